"""What a step needs: the arithmetic against the things themselves, the choice, and what happens without room."""

import logging
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from alignment.config.schema import (
    Calibration,
    Dtype,
    ModelConfig,
    Planning,
    QuantizationConfig,
    ReferenceMode,
    Shard,
    TrainerConfig,
)
from alignment.errors import UserError
from alignment.policy.adapter import attach_adapter
from alignment.policy.layers import checkpoint_layers, decoder_layers
from alignment.policy.load import load_base
from alignment.policy.stored import nf4_bytes_per_weight
from alignment.reference.frozen import FrozenPolicy
from alignment.scoring.layout import SharedLayout
from alignment.scoring.logps import enable_scoring, score
from alignment.scoring.prompt_sharing import choose_layout
from alignment.training import planning
from alignment.training.budget import activation_bytes, step_needs
from alignment.training.layer_memory import Layer
from alignment.training.memory import count_weights, plan_policy, sizes_of
from alignment.training.optimizers import optimizer_bytes
from tests.conftest import random_groups, tiny_config
from tests.helpers.adapters import adapter
from tests.helpers.kept import saved_bytes

CPU = torch.device("cpu")
LORA = adapter(r=4, alpha=8)


def bare(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.requires_grad_(False)
    enable_scoring(model)
    return model


def meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


# Weights, gradients, optimizer


@pytest.mark.slow
def test_qwen3_8b_by_hand():
    """36 layers of hidden 4096, 32 and 8 heads of 128, MLP 12288; embeddings and head of 151936 words apart."""
    config = AutoConfig.for_model(
        "qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False,
    )  # fmt: skip
    linear = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    adapter = 36 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))
    nf4 = QuantizationConfig(double=True, compute_dtype=Dtype.auto, calibration=Calibration.none)
    weights = plan_policy(meta(config), 2, replace(LORA, r=16), nf4)[1]
    packed = linear // 2 + linear // 64 + 4 * linear // (64 * 256)
    assert weights.base == packed + 2 * (2 * 151936 * 4096 + norms)
    assert (weights.count, weights.adapter) == (adapter, 4 * adapter)
    sizes = sizes_of(meta(config), weights, value=2, optimizer="paged_adamw_8bit", device="cuda")
    assert sizes.gradients == 4 * adapter
    assert sizes.optimizer == pytest.approx(2 * adapter, rel=0.02)
    needs = step_needs(sizes, 1, 8192, 0)
    assert needs.total == sum(
        (needs.weights, needs.adapter, needs.gradients, needs.optimizer, needs.activations, needs.head, needs.buffers)
    )


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["auto"], ["all-linear"], ["q_proj", "down_proj"]])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt_neox", "qwen3_moe"])
def test_planned_weights_are_those_of_the_loaded_policy(kind, targets):
    config = tiny_of(kind)
    if kind == "gpt_neox" and targets == ["q_proj", "down_proj"]:
        targets = ["query_key_value"]
    lora = replace(LORA, target_modules=targets)
    loaded = count_weights(attach_adapter(bare(config), lora, 0))
    assert plan_policy(meta(config), 4, lora, None)[1] == loaded


def test_nf4_bytes_are_those_of_bitsandbytes(tiny_model_folder):
    """Packed weights and their scales, storage by storage."""
    config = ModelConfig(
        name=str(tiny_model_folder), revision=None, dtype=Dtype.float32, attention="sdpa", chat_template=None,
        eos_token=None, trust_remote_code=False,
    )  # fmt: skip
    for double in (True, False):
        quantization = QuantizationConfig(double=double, compute_dtype=Dtype.float32, calibration=Calibration.none)
        model = load_base(config, quantization, str(tiny_model_folder), CPU)
        layer = model.model.layers[0].mlp.up_proj
        state = layer.weight.quant_state
        tensors = [layer.weight.data, state.absmax]
        nested = 0
        if double:
            # The 8-bit scales have fp32 scales of their own, one for 256 of them; here that is one.
            nested = state.state2.absmax.numel() * 4
            assert nested == 4
        size = sum(t.numel() * t.element_size() for t in tensors)
        weights = state.shape[0] * state.shape[1]
        expected = nf4_bytes_per_weight(double) * weights
        assert size + (4 * weights / (64 * 256) if double else 0) == expected


@pytest.mark.parametrize(
    "name",
    ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop", "paged_adamw_8bit",
     "adamw_bnb_8bit", "paged_adamw_32bit", "lion_8bit", "lion_32bit", "ademamix", "ademamix_8bit"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_states_are_those_of_the_optimizer(name, dtype, tmp_path):
    weight = nn.Parameter(torch.randn(256, 256, dtype=dtype))
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind([weight], **settings)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight].values()
    size = sum(t.numel() * t.element_size() for t in state if isinstance(t, torch.Tensor) and t.numel() > 256)
    planned = optimizer_bytes(name, weight.element_size()) * weight.numel()
    assert planned == pytest.approx(size, rel=0.05, abs=0.01 * weight.numel())


# Activations


def tiny_of(kind, layers=1, **settings):
    experts = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2} if kind == "qwen3_moe" else {}
    shape = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": layers, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0,
    }  # fmt: skip
    return AutoConfig.for_model(kind, **(shape | experts | settings))


def policy_of(config, dtype, kind):
    model = bare(config, dtype)
    if kind == "full":
        return model.requires_grad_(True)
    return attach_adapter(model, replace(LORA, r=2, dropout=0.1 if kind == "dropout" else 0.0), 0)


def policy_sizes(model, dtype, kind="lora"):
    return sizes_of(
        model, count_weights(model), value=dtype.itemsize, optimizer="adamw_torch", device="cpu",
        dropout=kind == "dropout",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "trained", "dtype"),
    [
        ("llama", "lora", torch.float32),
        ("qwen3", "lora", torch.float32),
        ("qwen3", "lora", torch.bfloat16),
        ("gemma3_text", "lora", torch.float32),
        ("llama", "dropout", torch.float32),
        ("llama", "full", torch.float32),
        ("qwen3", "full", torch.float32),
    ],
)
def test_saved_bytes_of_a_layer_are_counted(kind, trained, dtype):
    """A second layer more saves what the count says, of a layer that is wide enough for statistics to be small."""
    totals = {}
    for layers in (1, 2):
        model = policy_of(tiny_of(kind, layers, hidden_size=64, intermediate_size=160, head_dim=16), dtype, trained)
        totals[layers], positions = saved_bytes(model)
    sizes = policy_sizes(model, dtype, trained)
    assert not sizes.estimate
    expected = sizes.layers[1].saved * positions + sizes.layers[1].copies
    assert totals[2] - totals[1] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("kind", ["gpt_neox"])
def test_other_layers_are_estimated_and_said_to_be(kind):
    totals = {}
    for layers in (1, 2):
        model = policy_of(tiny_of(kind, layers), torch.float32, "lora")
        totals[layers], positions = saved_bytes(model)
    sizes = policy_sizes(model, torch.float32)
    assert type(model.get_base_model()).__name__ in sizes.estimate or "PeftModel" in sizes.estimate
    expected = sizes.layers[1].saved * positions + sizes.layers[1].copies
    assert totals[2] - totals[1] == pytest.approx(expected, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_saved_bytes_with_checkpointing(every):
    """What is held when the forward pass ends: inputs of the layers that are run again, all of the others."""
    config = tiny_of("qwen3", 5, hidden_size=64, intermediate_size=160, head_dim=16)
    model = policy_of(config, torch.float32, "lora")
    checkpoint_layers(model, every)
    total, positions = saved_bytes(model)
    sizes = policy_sizes(model, torch.float32)
    chosen = {0: [], 1: [0, 1, 2, 3, 4], 2: [0, 2, 4], 3: [0, 3]}[every]
    layers = sum(layer.entering if i in chosen else layer.saved for i, layer in enumerate(sizes.layers))
    checkpoint_layers(model, 1)
    smallest, _ = saved_bytes(model)
    difference = layers - sum(layer.entering for layer in sizes.layers)
    assert (total - smallest) / positions == pytest.approx(difference, rel=0.05, abs=1)


def test_activations_by_hand():
    """Layers of unlike size: the widest moment is when the last layer that is run again holds all of its own."""
    layers = (Layer(1, 10, 5), Layer(1, 20, 5), Layer(1, 40, 7, copies=300))
    assert activation_bytes(layers, 0, 100) == (100 * (10 + 20 + 40) + 300, 100 * (10 + 20 + 40 + 7) + 300)
    assert activation_bytes(layers, 1, 100) == (100 * 3, 100 * (1 + 1 + 40 + 7) + 300)
    assert activation_bytes(layers, 2, 100) == (100 * (1 + 20 + 1), 100 * (1 + 20 + 40 + 7) + 300)
    assert activation_bytes(layers[:2], 1, 100) == (100 * 2, 100 * (1 + 20 + 5))
    assert activation_bytes((), 1, 100) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("positions", "every", "measured"),
    [(4077, 0, 8.307), (8125, 0, 13.822), (10879, 0, 17.589), (10879, 1, 3.985)],
)
def test_what_an_h200_measured(positions, every, measured):
    """GiB at the peak of one step of Qwen3-1.7B in NF4, rank 32, torch 2.11 on an NVIDIA H200, before Adam's states.

    Beside the step, torch held 1.84 GiB: the policy, and other tensors of that program.
    """
    config = AutoConfig.for_model(
        "qwen3", hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    nf4 = QuantizationConfig(double=True, compute_dtype=Dtype.auto, calibration=Calibration.none)
    weights = plan_policy(meta(config), 2, replace(LORA, r=32), nf4)[1]
    sizes = sizes_of(meta(config), weights, value=2, optimizer="adamw_torch", device="cuda")
    context = round(1.840 * 2**30) - weights.base - weights.adapter
    needs = step_needs(sizes, every, positions, context)
    assert (needs.total - needs.optimizer) / 2**30 == pytest.approx(measured, rel=0.1)
    assert (needs.head > 0) == (every == 0)  # every layer checkpointed: the layers' backward pass is the peak


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_checkpointing_changes_no_gradient_and_runs_the_chosen_layers_again(trained):
    """Each k runs the first of every k layers twice; hooks on a part of the layer count the runs."""
    groups = random_groups(4)
    batch = next(SharedLayout().batches(groups, 10**6))
    gradients = []
    for every in (0, 1, 2, 3):
        model = policy_of(tiny_config(num_hidden_layers=5), torch.float64, trained)
        assert choose_layout(model, CPU)
        assert checkpoint_layers(model, every) == (every > 0)
        assert not checkpoint_layers(model, every)
        runs: Counter[int] = Counter()
        for index, layer in enumerate(decoder_layers(model)):  # on its first part: the second run stops when it can
            layer.input_layernorm.register_forward_hook(lambda *_, index=index, runs=runs: runs.update([index]))
        model.train()
        score(model, batch).values.square().sum().backward()
        again = {0: [], 1: [0, 1, 2, 3, 4], 2: [0, 2, 4], 3: [0, 3]}[every]
        assert runs == {index: 2 if index in again else 1 for index in range(5)}
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in gradients[1:]:
        for expected, found in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_model_that_cannot_be_checkpointed():
    model = nn.Linear(2, 2)
    assert not checkpoint_layers(model, 0)
    with pytest.raises(UserError, match=r"trainer.checkpoint_every=2: the layers of Linear cannot"):
        checkpoint_layers(model, 2)


# A stage

TRAINER = TrainerConfig(
    epochs=1, max_steps=None, groups_per_step=4, plan=Planning.auto, tokens_per_batch=None, checkpoint_every=None,
    log_every=1, eval_every=0, save_every=0, keep_checkpoints=1, cohort=1,
    router_aux_loss_coef=0, devices=1, shard=Shard.off,
)  # fmt: skip


def stage_plan(model, folder, adapter=LORA, mode=ReferenceMode.cache, slot=None, mix=1.0, refreshes=0):
    config = SimpleNamespace(
        trainer=TRAINER,
        optim=SimpleNamespace(name="adamw_torch", master_weights=True, target_modules=None),
        adapter=adapter,
        reference=SimpleNamespace(mode=mode, sync_mix=mix),
    )
    return planning.plan_stage(
        model, config, supervised=False, folder=folder, device=CPU, longest=64, slot=slot, refreshes=refreshes
    )


def test_a_mixed_reference_is_counted_with_the_ranks_that_it_grows_to(tmp_path, monkeypatch):
    """Each refresh adds the policy's rank, until the oldest share is lost; the count is that of a real one."""
    model = policy_of(tiny_of("qwen3", 4), torch.float32, "lora")
    own = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    monkeypatch.setattr(planning, "_taken", lambda device: 0)
    live, found = ReferenceMode.live, {}
    for mix, refreshes in ((1.0, 0), (1.0, 5), (0.6, 3), (0.6, 50)):
        folder = tmp_path / f"{mix}-{refreshes}"
        found[mix, refreshes] = stage_plan(model, folder, mode=live, mix=mix, refreshes=refreshes).needs.context
    assert stage_plan(model, tmp_path / "cached", refreshes=5).needs.context == 0
    assert found == {(1.0, 0): 0, (1.0, 5): own, (0.6, 3): 3 * own, (0.6, 50): 17 * own}
    reference = FrozenPolicy(model)
    for _ in range(20):
        reference.mix(0.6)
    assert sum(t.nbytes for key, t in reference.state().items() if key != "shares") == 17 * own


def test_members_and_a_second_copy_are_counted(tmp_path):
    """Each member has gradients and optimizer states; a live reference of a whole model holds its weights again."""
    model = policy_of(tiny_of("qwen3", 4), torch.float32, "lora")
    alone, found = (
        stage_plan(model, tmp_path / str(i), slot=slot) for i, slot in enumerate((None, SimpleNamespace(width=3)))
    )
    assert found.needs.gradients == 3 * alone.needs.gradients > 0
    assert found.needs.optimizer == 3 * alone.needs.optimizer > 0
    assert found.tokens_per_batch == alone.tokens_per_batch == 1024
    whole = policy_of(tiny_of("qwen3", 4), torch.float32, "full")
    cached, live = (
        stage_plan(whole, tmp_path / mode.value, adapter=None, mode=mode)
        for mode in (ReferenceMode.cache, ReferenceMode.live)
    )
    assert live.needs.context >= cached.needs.context + cached.needs.weights > cached.needs.context


def test_a_stage_keeps_the_plan_that_it_began_with(tmp_path, monkeypatch):
    model = policy_of(tiny_of("qwen3", 4), torch.float32, "lora")
    first = stage_plan(model, tmp_path)
    assert (first.checkpoint_every, first.tokens_per_batch, first.fits) == (0, 1024, True)
    monkeypatch.setattr(planning, "available_memory", lambda: 0)
    assert stage_plan(model, tmp_path) == first
    (tmp_path / "plan.json").unlink()
    assert stage_plan(model, tmp_path) != first


def test_a_stage_without_room_says_so(tmp_path, monkeypatch, caplog):
    model = policy_of(tiny_of("qwen3", 4), torch.float32, "lora")
    monkeypatch.setattr(planning, "available_memory", lambda: 0)
    with caplog.at_level(logging.WARNING):
        found = stage_plan(model, tmp_path)
    assert (found.fits, found.checkpoint_every, found.tokens_per_batch) == (False, 1, 64)
    assert "its largest group has 64 positions" in caplog.text


def test_a_plan_that_is_off_needs_numbers():
    with pytest.raises(UserError, match=r"trainer.plan=off needs a number for trainer.tokens_per_batch"):
        replace(TRAINER, plan=Planning.off)
    with pytest.raises(UserError, match=r"trainer.plan=off needs a number for trainer.checkpoint_every"):
        replace(TRAINER, plan=Planning.off, tokens_per_batch=5)
    assert replace(TRAINER, plan=Planning.off, tokens_per_batch=5, checkpoint_every=0)
    with pytest.raises(UserError, match=r"trainer.checkpoint_every must be null or at least 0, not -1"):
        replace(TRAINER, checkpoint_every=-1)
