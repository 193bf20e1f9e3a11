"""Checkpoints that also see: their language model trains on text, and anybody can load what is saved."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig

from alignment.policy.adapter import attach_adapter, check_adapter_gradients
from alignment.policy.adapter_start import StartSources
from alignment.policy.architecture import auto_class
from alignment.policy.float_weights import FloatWeights
from alignment.policy.layers import decoder_layers
from alignment.scoring.logps import score
from alignment.scoring.prompt_sharing import choose_layout
from tests.conftest import each, random_groups
from tests.helpers.families import policy
from tests.helpers.policies import CPU, NF4, adapter, load, scores, train_adapter
from tests.helpers.seeing_models import KINDS, write_seeing_model

GROUPS = random_groups(3, seed=3)


@pytest.fixture(params=each(sorted(KINDS), ["gemma3"]))
def folder(request, tmp_path):
    return write_seeing_model(request.param, tmp_path / "model")


def test_the_language_model_trains_on_text(folder, tmp_path):
    """Adapters on the language model alone; a plain `PeftModel` on the class of the checkpoint gives the same."""
    model = policy(folder, quantization=NF4).train()
    assert len(decoder_layers(model)) == 2
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not any("vision" in name or "visual" in name or "projector" in name for name in trained)
    layout = choose_layout(model, CPU)
    for batch in layout.batches(GROUPS, 10_000):
        score(model, batch).sums().sum().backward()
    check_adapter_gradients(model)


def test_anybody_loads_what_is_saved(folder, tmp_path):
    """The names in the saved adapter are those of the class that transformers loads the checkpoint with."""
    model = train_adapter(policy(folder, quantization=None)).eval()
    model.save_pretrained(tmp_path / "adapter")
    theirs = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    plain = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert scores(model, GROUPS).isfinite().all()


@pytest.mark.parametrize("kind", each(["lora", "vera"], ["lora"]))
def test_names_are_those_of_the_language_model(kind, folder):
    """The tower's layers have the same names, and do not run on text."""
    other = {"kind": "vera", "alpha": None} if kind == "vera" else {}
    settings = adapter(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], **other)
    model = attach_adapter(load(folder), settings, 0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".layers.1." in name and "vision" not in name for name in trained)
    for batch in choose_layout(model, CPU).batches(GROUPS, 10_000):
        score(model, batch).sums().sum().backward()
    check_adapter_gradients(model)


def test_pissa_on_nf4_finds_the_weights_of_the_language_model(folder):
    """The files have other prefixes than the model."""
    sources = StartSources(FloatWeights(str(folder), None))
    model = attach_adapter(load(folder, NF4), adapter(init="pissa", target_modules=["auto"]), 0, sources)
    expected = scores(load(folder), GROUPS)
    torch.testing.assert_close(scores(model, GROUPS), expected, rtol=0, atol=0.2)


def test_a_whole_model_trains_what_runs_on_text(folder, caplog):
    """The tower stays as it is, with one log line."""
    model = attach_adapter(load(folder), None, 0)
    for batch in choose_layout(model, CPU).batches(GROUPS, 10_000):
        score(model, batch).sums().sum().backward()
    with caplog.at_level("INFO"):
        check_adapter_gradients(model)
    has_tower = any("vision" in name or "visual" in name for name, _ in model.named_parameters())
    assert ("play no part in text and stay as they are" in caplog.text) == has_tower
