"""`model.attention`: what a model's class has is taken, what it lacks is refused in one sentence."""

import json

import pytest

from alignment.config.compose import load as compose
from alignment.errors import UserError
from alignment.policy.architecture import attentions, build_model
from alignment.policy.layers import decoder_layers
from alignment.scoring.logps import keeps_logits
from alignment.training.forecast import read_config
from tests.conftest import each
from tests.helpers.families import FAMILIES, write_model
from tests.helpers.policies import load

KINDS = ("sdpa", "flash_attention_2", "flex_attention", "fastest")
CASES = [(f.model_type, kind) for f in FAMILIES for kind in KINDS if kind not in attentions(f.config())]
CORE = [("gemma2", "sdpa"), ("mamba", "sdpa"), ("falcon_h1", "flex_attention"), ("qwen3", "fastest")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a tiny model, by its `model_type`: written once."""
    root = tmp_path_factory.mktemp("models")

    def folder(model_type):
        if not (root / model_type).exists():
            write_model(next(family for family in FAMILIES if family.model_type == model_type), root / model_type)
        return root / model_type

    return folder


@pytest.mark.parametrize(("model_type", "kind"), each(CASES, CORE))
def test_what_the_class_lacks_is_refused(model_type, kind, folders):
    """The sentence names the setting, what the model has, and auto."""
    with pytest.raises(UserError) as caught:
        load(folders(model_type), attention=kind)
    has = attentions(next(family for family in FAMILIES if family.model_type == model_type).config())
    expected = f"model.attention={kind}: a {model_type} has {', '.join(has)}: choose one, or auto."
    assert str(caught.value) == expected


def test_what_only_a_library_lacks_is_said(folders, monkeypatch):
    """Flash attention is the class's, and not installed."""

    def missing(*args, **kwargs):
        raise ImportError("the package for FlashAttention2\n doesn't seem to be installed.")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", missing)
    with pytest.raises(UserError) as caught:
        load(folders("qwen3"), attention="flash_attention_2")
    assert str(caught.value) == (
        "model.attention=flash_attention_2: the package for FlashAttention2 doesn't seem to be installed; install it, "
        "or set model.attention=auto."
    )


@pytest.mark.parametrize("model_type", each([f.model_type for f in FAMILIES], ["llama4_text"]))
def test_every_family_is_scored_by_its_decoder(model_type, folders):
    """Not by whole logits, and its plan knows its layers."""
    model = load(folders(model_type), attention="auto")
    assert not keeps_logits(model)
    assert model.get_decoder() is not model and build_model(model.config).get_decoder().config is not None
    assert len(decoder_layers(build_model(model.config))) == len(decoder_layers(model)) > 0


def test_an_architecture_that_nobody_knows_is_one_sentence(folders, tmp_path):
    """A model that is newer than the library, for a run and for a plan."""
    config = json.loads((folders("qwen3") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen9"}))
    said = r"transformers \S+ knows no architecture qwen9: install a version that does, or set model\.trust_remote_code"
    with pytest.raises(UserError, match=rf"^model\.name=\S+ cannot be loaded: {said}"):
        load(tmp_path)
    with pytest.raises(UserError, match=rf"^--config: \S+: {said}"):
        read_config(compose("recipe=quickstart"), tmp_path / "config.json")
