"""Model and tokenizer together, before weights are loaded; and weights that are not all there."""

import json
import logging
import re
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from alignment.config.compose import load as compose
from alignment.errors import UserError
from alignment.policy.load import load_tokenizer
from alignment.policy.model_check import check_model, damaged_weight
from alignment.policy.source import ModelSource
from tests.conftest import random_groups, tiny_config
from tests.helpers.chat_templates import published
from tests.helpers.policies import NF4, load, scores


@pytest.fixture(scope="module")
def config():
    """A preference run without an SFT stage."""
    return compose("recipe=quickstart", "sft=none", "tracking=none", "data.max_length=512")


@pytest.fixture
def copied(tiny_model_folder, tmp_path):
    """A model folder to break."""
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def rewrite(path, **changes):
    """Change keys of a JSON file; None takes a key out."""
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def checked(config, folder, **settings):
    """The tokenizer of a run with the model of this folder, after the check."""
    config = replace(config, model=replace(config.model, name=str(folder), **settings))
    tokenizer = load_tokenizer(config.model, str(folder))
    check_model(config, ModelSource(str(folder), None, str(folder)), tokenizer)
    return tokenizer


def without_eos(folder):
    """The end of turn is a special token like any other."""
    extra = "extra_special_tokens"
    tokens = json.loads((folder / "tokenizer_config.json").read_text()).get(extra, [])
    rewrite(folder / "tokenizer_config.json", eos_token=None, pad_token=None, **{extra: [*tokens, "<|im_end|>"]})


# Vocabulary and positions


@given(missing=st.integers(-3, 3))
def test_embeddings_must_reach_the_largest_id(config, tiny_model_folder, tmp_path_factory, missing):
    """Fewer rows than ids are refused with both numbers; more are padding."""
    folder = shutil.copytree(tiny_model_folder, tmp_path_factory.mktemp("vocabulary") / "model")
    size = len(load_tokenizer(config.model, str(folder)))
    rewrite(folder / "config.json", vocab_size=size - missing)
    if missing <= 0:
        checked(config, folder)
        return
    with pytest.raises(UserError, match=rf"largest id is {size - 1} \(.*\), and the model has {size - missing} embed"):
        checked(config, folder)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen3"])
def test_learned_positions_end_and_rotary_ones_are_said(config, copied, caplog, kind):
    """Of a prompt with its answer, and of a prompt with what is sampled."""
    shape = tiny_config(300, kind, max_position_embeddings=500)
    shape.save_pretrained(copied)
    with caplog.at_level(logging.INFO):
        if kind == "qwen3":
            checked(config, copied)
            assert "data.max_length=512 is beyond the 500 positions" in caplog.text
        else:
            with pytest.raises(UserError, match=r"the model has 500 positions, and data.max_length=512 asks for more"):
                checked(config, copied)
    short = replace(config, data=replace(config.data, max_length=500, max_prompt_length=450))
    checked(replace(short, evaluation=replace(config.evaluation, max_new_tokens=50)), copied)
    if kind != "qwen3":
        with pytest.raises(UserError, match=r"max_prompt_length=450 with evaluation.max_new_tokens=51"):
            checked(replace(short, evaluation=replace(config.evaluation, max_new_tokens=51)), copied)


# How an answer ends


def test_without_eos_the_template_says_how_an_answer_ends(config, copied):
    """The end of turn becomes EOS, and padding with it."""
    without_eos(copied)
    tokenizer = checked(config, copied)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"


def test_without_eos_and_template_the_setting_is_named(config, copied):
    """And it must name a token that exists."""
    without_eos(copied)
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no EOS token, .*: set model.eos_token to the token that ends one\.$"):
        checked(config, copied)
    with pytest.raises(UserError, match=r"no token <\|im_edn\|> \(did you mean <\|im_end\|>\?\)"):
        checked(config, copied, eos_token="<|im_edn|>")
    tokenizer = checked(config, copied, eos_token="<|im_start|>")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_start|>"


# The tokenizer


def test_the_sft_stage_needs_a_fast_tokenizer(config, tmp_path):
    """Offsets come from fast tokenizers alone; pairs need none."""
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    slow.save_pretrained(tmp_path)
    tiny_config(len(slow) + 1).save_pretrained(tmp_path)
    checked(config, tmp_path)
    both = compose("recipe=quickstart", "tracking=none")
    with pytest.raises(UserError, match=r"a ByT5Tokenizer, does not say where .* or set sft=none"):
        checked(both, tmp_path)


def test_of_several_templates_the_default_one_or_the_named_one_is_used(config, copied):
    """Without either, the names are listed; a name that is none is no file either."""
    (copied / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "{{ 1 }}<|im_end|>"}, {"name": "tool_use", "template": "2"}]
    rewrite(copied / "tokenizer_config.json", chat_template=named)
    assert checked(config, copied).chat_template == "{{ 1 }}<|im_end|>"
    assert checked(config, copied, chat_template="tool_use").chat_template == "2"
    with pytest.raises(UserError, match=r"the file tool_uze does not exist \(did you mean tool_use\?\).*default, tool"):
        checked(config, copied, chat_template="tool_uze")
    rewrite(copied / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "3"}, named[1]])
    with pytest.raises(UserError, match=r"several chat templates .*: set model\.chat_template to one of rag, tool_use"):
        checked(config, copied)


def test_the_template_that_trl_trains_with(config, copied):
    """It writes every answer as the last one; a template that TRL does not know ends in one sentence."""
    (copied / "chat_template.jinja").write_text(published("qwen3"))
    assert checked(config, copied, chat_template="training").chat_template == published("qwen3_training")
    (copied / "chat_template.jinja").write_text(published("qwen3_training"))
    assert checked(config, copied, chat_template="training").chat_template == published("qwen3_training")
    for change in (lambda path: path.write_text("{{ messages[0].content }}"), lambda path: path.unlink()):
        change(copied / "chat_template.jinja")
        with pytest.raises(UserError, match=r"^model\.chat_template=training: .*data\.score=last\.$"):
            checked(config, copied, chat_template="training")


# What is loaded


def test_weights_that_are_not_in_the_files_are_refused(copied):
    """They would be random numbers."""
    weights = load_file(copied / "model.safetensors")
    name = next(key for key in weights if "q_proj" in key)
    save_file({k: v for k, v in weights.items() if k != name}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"lack 1 weights of a Qwen3ForCausalLM, .* \(the first: {re.escape(name)}"):
        load(copied)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["full", "nf4"])
def test_weights_of_another_size_than_the_configuration_says_are_refused(copied, quantization):
    """They would be left out; those of a quantised model change their size and are right."""
    load(copied, quantization)
    rewrite(copied / "config.json", vocab_size=300)
    with pytest.raises(UserError, match=r"lack 2 weights of a Qwen3ForCausalLM, or .* \(the first: lm_head"):
        load(copied, quantization)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["embed_tokens", "down_proj", "norm"])
def test_a_single_damaged_weight_is_found(copied, kind, value):
    """No prompt of the data need reach it, and it would be saved, merged and met by whoever uses the model."""
    model = load(copied)
    assert damaged_weight(model) is None
    name, parameter = next((n, p) for n, p in reversed(list(model.named_parameters())) if kind in n)
    parameter.data.view(-1)[-1] = value
    rules_out = parameter.ndim == 1 and value < 0
    assert damaged_weight(model) == (None if rules_out else name)


def test_a_folder_without_a_tokenizer_is_said_to_have_none(config, copied):
    """transformers makes an empty one, whose every text has no token."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    with pytest.raises(UserError, match=r"^model\.name=.*: no tokenizer is there, only special tokens: put"):
        checked(config, copied)


def test_the_dropout_of_the_model_itself_is_off(copied):
    """From the start, in every stage: in training mode the same batch gives the same numbers."""
    rewrite(copied / "config.json", attention_dropout=0.5)
    model, groups = load(copied).train(), random_groups(3)
    assert torch.equal(scores(model, groups), scores(model, groups))


def test_the_models_generation_settings_are_said_once(copied):
    """Those that act on sampled answers, and those that ours replace."""
    from alignment.evaluation.sampling.presets import presets_in_words

    assert presets_in_words(load(copied), 0.0) is None
    rewrite(copied / "generation_config.json", repetition_penalty=1.3, temperature=0.7, do_sample=True)
    said = presets_in_words(load(copied), 0.0)
    assert "repetition_penalty=1.3 acts on sampled answers; " in said
    idle = said.split("; ")[1]
    assert "temperature=0.7" in idle and "do_sample=True" in idle and "evaluation.temperature=0 counts" in idle
