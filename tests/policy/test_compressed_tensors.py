"""Checkpoints as compressed-tensors itself writes them: unpacked as they load, and trained."""

import importlib.util
import logging
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment.policy.adapter import attach_adapter, check_adapter_gradients
from alignment.policy.identity import policy_identity
from alignment.policy.stored import stored_weights
from alignment.scoring.layout import FlatLayout
from alignment.scoring.logps import score
from tests.conftest import random_groups, tiny_config
from tests.helpers.policies import NF4, adapter, load
from tests.helpers.references import cached
from tests.helpers.steps import make_loss, make_trainer

GROUPS = random_groups(4, seed=3)


@pytest.fixture(autouse=True)
def _needs_the_library():
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("LIBRARY ABSENT: compressed-tensors is not installed, so this test did not run")


def write(folder, preset):
    """A tiny model, quantised by the library; returns the weights that its files stand for, by layer."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(0)
    shape = tiny_config(hidden_size=128, intermediate_size=128, head_dim=32)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    apply_quantization_config(model, QuantizationConfig(config_groups={preset: ["Linear"]}, ignore=["lm_head"]))
    expected = {}
    for name, layer in model.named_modules():
        if (scheme := getattr(layer, "quantization_scheme", None)) is None:
            continue
        weight, args = layer.weight.detach(), scheme.weights
        groups = weight.reshape(len(weight), -1, args.group_size or weight.shape[1])
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        layer.weight_scale.data.copy_(scale)
        expected[name] = fake_quantize(weight, scale, zero, args).float()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return expected


@pytest.mark.parametrize("preset", ["W4A16", "W8A16", "FP8_DYNAMIC"])
def test_it_loads_as_what_its_files_stand_for_and_trains(preset, tmp_path, caplog):
    """Plain weights or NF4 of them, an SFT step that lowers the loss, a DPO step from log 2."""
    expected = write(tmp_path / "model", preset)
    with caplog.at_level(logging.INFO, logger="alignment.policy.stored"):
        plain = load(tmp_path / "model")
    assert "is stored in compressed-tensors, which cannot be trained on: its weights are unpacked." in caplog.text
    assert set(stored_weights(plain)) == {"32 bit"} and len(expected) == 14
    for name, weight in expected.items():
        torch.testing.assert_close(plain.get_submodule(name).weight, weight, rtol=1e-2, atol=1e-6)
    packed = load(tmp_path / "model", NF4)
    assert "NF4" in stored_weights(packed)
    assert policy_identity(packed)[0] != policy_identity(plain)[0]

    for base in (plain, packed):
        model = attach_adapter(base, adapter(target_modules=["auto"]), 0).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        [batch] = FlatLayout().batches(GROUPS, 10_000)
        loss = -score(model, batch).values.mean()
        loss.backward()
        check_adapter_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        assert -score(model, batch).values.mean() < loss
        folder = tmp_path / policy_identity(model)[0][:8]
        reference = cached(model, folder)
        reference.prepare(GROUPS)
        trainer = make_trainer(model, GROUPS, make_loss("dpo"), folder, reference=reference)
        first = trainer.training_step(model, {"groups": GROUPS}).item()
        optimizer.step()
        assert math.isclose(first, math.log(2), abs_tol=1e-4)
        assert trainer.training_step(model, {"groups": GROUPS}).item() < first
