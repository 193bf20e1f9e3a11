"""A model that is an adapter: the policy and its reference are the base with it; and which modules adapters get."""

import functools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from alignment.config.compose import load as compose
from alignment.errors import UserError
from alignment.policy.adapter import attach_adapter, continue_adapter
from alignment.policy.identity import policy_identity
from alignment.policy.load import load_tokenizer, save_policy
from alignment.policy.merge import merge_adapter
from alignment.policy.saved_adapter import require_same_form
from alignment.policy.source import model_source, other_base
from alignment.reference.frozen import FrozenPolicy
from tests.conftest import random_groups
from tests.helpers.policies import adapter, load, scores, train_adapter

pytestmark = pytest.mark.slow

GROUPS = random_groups(3, seed=4)


@pytest.fixture(scope="module")
def saved(tiny_model_folder, tmp_path_factory):
    """A run folder with the adapter that it has trained."""
    run = tmp_path_factory.mktemp("run")
    model = train_adapter(attach_adapter(load(tiny_model_folder), adapter(), 0))
    save_policy(model, load_tokenizer(quickstart(), str(tiny_model_folder)), run / "adapter")
    (run / "config.yaml").write_text("seed: 0\n")
    return run


@functools.cache
def quickstart():
    return compose("recipe=quickstart").model


def source_of(path, cache):
    return model_source(replace(quickstart(), name=str(path)), cache)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What it was trained on


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ({}, []),
        ({"quantization": "nf4"}, ["quantization nf4 then, none now"]),
        ({"dtype": "bfloat16", "base": "ff"}, ["dtype bfloat16 then, float32 now"]),
        ({"base": "ff"}, ["other weights or another configuration"]),
    ],
)
def test_another_base_than_the_adapters_is_said(then, said, saved, tiny_model_folder, tmp_path):
    """By the summary of its run, wherever in the run the adapter lies; without one nothing is known."""
    run = shutil.copytree(saved, tmp_path / "run")
    now = policy_identity(continue_adapter(load(tiny_model_folder), run / "adapter", adapter(), 0))[1]
    assert other_base(run / "adapter", now) == []
    (run / "summary.json").write_text(json.dumps({"model": now | then}))
    for folder in (run / "adapter", run / "stages" / "sft" / "adapter"):
        assert other_base(folder, now) == said
    (run / "summary.json").write_text("{")
    assert other_base(run / "adapter", now) == []


# Where it is


def test_an_adapter_stands_for_its_base_with_it(saved, tiny_model_folder, tmp_path):
    """As its folder, with a config.json beside it, or as the folder of its run."""
    for path in (saved, saved / "adapter"):
        found = source_of(path, tmp_path)
        assert (found.base, found.adapter) == (str(tiny_model_folder), saved / "adapter")
        assert found.tokenizer == str(saved / "adapter")
    beside = shutil.copytree(saved / "adapter", tmp_path / "beside")
    shutil.copy(tiny_model_folder / "config.json", beside)
    assert source_of(beside, tmp_path).base == str(tiny_model_folder)
    (beside / "tokenizer_config.json").unlink()
    assert source_of(beside, tmp_path).tokenizer == str(tiny_model_folder)


def test_what_is_no_adapter_of_a_known_base_is_refused(saved, tiny_model_folder, tmp_path):
    """In one sentence that names the adapter and its base."""
    folder = shutil.copytree(saved / "adapter", tmp_path / "copy")
    edit(folder, base_model_name_or_path="/nowhere/model")
    with pytest.raises(UserError, match=r"copy is an adapter for the base /nowhere/model, and there is no such folder"):
        source_of(folder, tmp_path)
    edit(folder, base_model_name_or_path="someone/model")
    with pytest.raises(UserError, match="adapter for the base someone/model, and not in the local cache"):
        source_of(folder, tmp_path)
    edit(folder, base_model_name_or_path=str(saved / "adapter"))
    with pytest.raises(UserError, match="that folder holds no whole model"):
        source_of(folder, tmp_path)
    edit(folder, base_model_name_or_path=None)
    with pytest.raises(UserError, match="does not name its base"):
        source_of(folder, tmp_path)
    edit(folder, base_model_name_or_path=str(tiny_model_folder), revision="v2")
    with pytest.raises(UserError, match=r"set model\.revision=v2"):
        source_of(folder, tmp_path)
    shutil.copy(tiny_model_folder / "model.safetensors", folder)
    with pytest.raises(UserError, match=r"holds a whole model .* and an adapter"):
        source_of(folder, tmp_path)


def test_a_base_from_a_wheel_is_found_in_any_cache(saved, tmp_path, monkeypatch):
    """Adapters name its folder in the cache of their time; another release of it is another base."""
    made = tmp_path / "cache" / "models" / "llm-small-0123456789abcdef"
    monkeypatch.setattr("alignment.policy.source.wheel_model_folder", lambda name, cache: made)
    folder = shutil.copytree(saved / "adapter", tmp_path / "copy")
    for base in (f"/elsewhere/models/{made.name}", "wheel:llm-small"):
        edit(folder, base_model_name_or_path=base)
        assert source_of(folder, tmp_path / "cache").base == str(made)
    edit(folder, base_model_name_or_path="/elsewhere/models/llm-small-aaaaaaaaaaaaaaaa")
    with pytest.raises(UserError, match="the installed llm-small is another release"):
        source_of(folder, tmp_path / "cache")


# What it is


def test_policy_and_reference_start_at_base_and_adapter(saved, tiny_model_folder):
    """And the reference stays there while the policy moves."""
    trained = train_adapter(attach_adapter(load(tiny_model_folder), adapter(), 0))
    expected = scores(trained, GROUPS)
    model = continue_adapter(load(tiny_model_folder), saved / "adapter", adapter(dropout=0.1), 3).eval()
    assert torch.equal(scores(model, GROUPS), expected)
    assert policy_identity(model)[0] == policy_identity(trained)[0]
    assert all(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)
    start = FrozenPolicy(model)
    train_adapter(model, seed=9)
    with start.active() as frozen:
        assert torch.equal(scores(frozen, GROUPS), expected)
    assert not torch.equal(scores(model, GROUPS), expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 8}, r"set adapter\.r=4, as it has"),
        ({"r": 8, "alpha": 16}, r"set adapter\.r=4 adapter\.alpha=8, as it has"),
        ({"rslora": True}, r"set adapter\.rslora=false"),
        ({"init": "pissa"}, r"set adapter\.init=default"),
        ({"target_modules": ["q_proj"]}, r"other layers than adapter\.target_modules, .*\(down_proj, "),
    ],
)
def test_settings_that_contradict_the_adapter_are_refused(saved, tiny_model_folder, settings, said):
    """The report would show others than those that train."""

    def start():
        require_same_form(saved / "adapter", adapter(**settings))
        continue_adapter(load(tiny_model_folder), saved / "adapter", adapter(**settings), 0)

    with pytest.raises(UserError, match=said):
        start()


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"use_dora": True}, r"set adapter\.kind=dora, as it has"),
        ({"modules_to_save": ["lm_head"]}, r"set adapter\.modules_to_save=\[lm_head\], as it has"),
        ({"bias": "lora_only"}, r"has bias=lora_only.*merge it into its base first"),
    ],
)
def test_an_adapter_of_another_form_is_refused(tiny_model_folder, tmp_path, lora, said):
    """One that can be added to the weights may be, for full fine-tuning."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **lora)
    get_peft_model(load(tiny_model_folder), config).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=said):
        require_same_form(tmp_path, adapter())
    if "use_dora" in lora:
        require_same_form(tmp_path, None)


def test_weights_beside_the_updates_are_refused(tiny_model_folder, tmp_path):
    """peft saves embeddings that were adapted; others than the base's would be lost in the next adapter."""
    targets = {"target_modules": ["embed_tokens"]}
    model = attach_adapter(load(tiny_model_folder), adapter(**targets), 0)
    model.save_pretrained(str(tmp_path))
    continue_adapter(load(tiny_model_folder), tmp_path, adapter(**targets), 0)
    model.get_input_embeddings().base_layer.weight.data.add_(1)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"weights beside its updates \(.*embed_tokens"):
        continue_adapter(load(tiny_model_folder), tmp_path, adapter(**targets), 0)


# Which modules it has

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@given(st.lists(st.sampled_from([*PROJECTIONS, "self_attn.q_proj", "v_porj", "proj", "all-linear"]), min_size=1))
def test_every_name_of_the_target_modules_exists(tiny_model_folder, names):
    """All of them are adapted, or the one that is none is named."""
    wrong = {"v_porj", "proj"} & set(names) or ({"all-linear"} & set(names) if len(set(names)) > 1 else set())
    settings = adapter(target_modules=names)
    if wrong:
        with pytest.raises(
            UserError, match=r"^adapter\.target_modules: (the model has no module (v_porj|proj)|all-lin)"
        ):
            attach_adapter(load(tiny_model_folder), settings, 0)
        return
    model = attach_adapter(load(tiny_model_folder), settings, 0)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    wanted = PROJECTIONS[:-1] if names[0] == "all-linear" else names
    assert all(any(layer.endswith(f".{name}") for layer in adapted) for name in wanted)


@pytest.mark.parametrize(("written", "names"), [("all-linear", ["all-linear"]), ("[q_proj]", ["q_proj"]), ("a", ["a"])])
def test_one_name_needs_no_list(written, names):
    """For modules and for tags."""
    config = compose("recipe=quickstart", f"adapter.target_modules={written}", f"tracking.tags={written}")
    assert config.adapter.target_modules == config.tracking.tags == names


def test_what_is_no_name_is_refused():
    """In a sentence of ours; a number may be a name."""
    with pytest.raises(
        UserError, match=r"^adapter\.target_modules must be a name or a list of names like \[a,b\], not None"
    ):
        compose("recipe=quickstart", "adapter.target_modules=null")


# A whole second run


@pytest.mark.parametrize(
    "adapted", [True, pytest.param(False, marks=pytest.mark.matrix)], ids=["adapter", "whole model"]
)
def test_a_second_run_goes_on_from_the_first(adapted, saved, tiny_model_folder, tmp_path):
    """Its reference is the policy that the first has ended with; without an adapter, as one whole model."""
    from alignment.config.compose import as_plain, compose_node, to_run_config
    from alignment.stages.chain import Chain
    from tests.helpers.commands import pair, write_lines

    write_lines(tmp_path / "pairs.jsonl", [pair(number) for number in range(1, 9)])
    form = ["adapter.r=4", "adapter.alpha=8"] if adapted else ["adapter=none"]
    node = compose_node(
        [
            "recipe=quickstart", "sft=none", "tracking=none", "device=cpu", f"model.name={saved}", "data.system=null",
            f"data.source={tmp_path / 'pairs.jsonl'}", "data.eval_source=null", "data.eval_size=2", "data.limit=null",
            "data.eval_limit=null", "trainer.max_steps=1", "trainer.groups_per_step=2", "evaluation.prompts=0",
            "evaluation.kl_prompts=0", "evaluation.judge=none", f"reference.path={tmp_path / 'cache'}", *form,
        ]
    )  # fmt: skip
    summary = Chain(to_run_config(node), tmp_path / "run", "quickstart", as_plain(node)).run()
    assert summary["stages"]["preference"]["start"]["loss"] == pytest.approx(0.693147, abs=1e-4)
    base = load(tiny_model_folder)
    first = (
        continue_adapter(base, saved / "adapter", adapter(), 0) if adapted else merge_adapter(base, saved / "adapter")
    )
    assert policy_identity(first)[0] == summary["reference"]["identity"]
    (tmp_path / "run" / "config.yaml").touch()
    assert source_of(tmp_path / "run", tmp_path).base == str(
        tiny_model_folder if adapted else tmp_path / "run" / "model"
    )
