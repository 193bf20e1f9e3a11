"""The merged model is the policy, for every kind of layer; where it is not, nothing is left of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alignment.config.compose import load as compose
from alignment.config.schema import Dtype
from alignment.errors import UserError
from alignment.policy import merge
from alignment.policy.adapter import attach_adapter
from alignment.policy.merge import export_merged, merge_adapter
from alignment.policy.requantise import drift, next_logps
from tests.conftest import random_groups, tiny_config
from tests.helpers.policies import CPU, NF4, adapter, load, scores, train_adapter

pytestmark = pytest.mark.slow

GROUPS = random_groups(3, seed=2)
PROMPTS = [np.arange(3, 12, dtype=np.int32), np.arange(40, 55, dtype=np.int32)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model_folder):
    """Models of each kind, with weights that are large enough for differences to show. Vocabularies are padded."""
    found = {}
    for name in ("untied", "tied", "gpt2", "experts"):
        found[name] = tmp_path_factory.mktemp(name)
        config = tiny_config(300, tie_word_embeddings=name == "tied")
        if name == "experts":
            config = tiny_config(300, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        if name == "gpt2":
            config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)
        model.save_pretrained(found[name])
        AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def config():
    """A run that exports in float32."""
    return compose("recipe=quickstart", "tracking=none", "export.merge=true", "export.dtype=float32")


def export(model, source, folder, config):
    tokenizer = AutoTokenizer.from_pretrained(source)
    return export_merged(model, tokenizer, folder, config, str(source), CPU, PROMPTS)


QWEN = (["all-linear"], ["q_proj", "down_proj"], ["lm_head", "q_proj"], ["embed_tokens"], ["embed_tokens", "lm_head"])
GPT2 = (["all-linear"], ["c_attn", "c_proj"], ["lm_head"], ["wte"], ["wte", "lm_head", "c_fc"])
SPACE = [(k, q, t) for k in ("untied", "tied", "gpt2") for q in (None, NF4) for t in (GPT2 if k == "gpt2" else QWEN)]
SPACE += [("experts", None, ["all-linear"]), ("experts", None, ["gate_proj", "up_proj", "down_proj"])]


@pytest.mark.parametrize(
    ("kind", "quantization", "targets"), SPACE, ids=lambda v: "-".join(v) if isinstance(v, list) else str(v)[:6]
)
def test_what_is_written_is_the_policy(kind, quantization, targets, folders, config, tmp_path):
    """Loaded as anybody would load it, and far from the base."""
    base = load(folders[kind], quantization)
    before = scores(base, GROUPS)
    model = train_adapter(attach_adapter(base, adapter(target_modules=targets, rslora=True), 0))
    found = export(model, folders[kind], tmp_path / "merged", config)
    assert found["max_logp_difference"] < 1e-4 and found["generation_agrees"]
    after = scores(model, GROUPS)
    assert (after - before).abs().max() > 0.05
    written = load(tmp_path / "merged")
    assert (scores(written, GROUPS) - after).abs().max() < 1e-3
    is_tied = kind in ("tied", "gpt2")
    one_end = is_tied and bool({"lm_head", "embed_tokens", "wte"} & set(targets))
    assert written.config.tie_word_embeddings == (is_tied and not one_end)


@pytest.mark.parametrize("kind", ["untied", "tied", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["plain", "dora", "rslora"])
def test_an_adapter_that_is_added_to_the_weights_changes_nothing(kind, settings, folders, tmp_path):
    """Also one that rescales what it adds to, and one of the head of a tied model."""
    targets = ["lm_head", *(["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"])]
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = train_adapter(get_peft_model(load(folders[kind]), lora))
    if settings.get("use_dora"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1.3)
    expected = scores(model.eval(), GROUPS)
    model.save_pretrained(str(tmp_path))
    base = load(folders[kind])
    assert (scores(base, GROUPS) - expected).abs().max() > 0.05
    assert (scores(merge_adapter(base, tmp_path), GROUPS) - expected).abs().max() < 1e-3


def test_16_bits_are_rounding(folders, config, tmp_path):
    """The same model in bfloat16 is kept, with what rounding has changed."""
    model = train_adapter(attach_adapter(load(folders["tied"]), adapter(), 0))
    half = replace(config, export=replace(config.export, dtype=Dtype.bfloat16))
    found = export(model, folders["tied"], tmp_path / "merged", half)
    assert found["dtype"] == "bfloat16" and 1e-4 < found["max_logp_difference"] < 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["another weight", "not a number"])
def test_a_merged_model_that_is_not_the_policy_is_removed(dtype, fault, folders, config, tmp_path, monkeypatch):
    """In one sentence with the true cause; one of an earlier try, which was checked then, stays."""
    put = merge._put_weights

    def spoilt(model, weights):
        put(model, weights)
        layer = model.model.layers[0].mlp.down_proj.weight.data
        layer.mul_(3) if fault == "another weight" else layer.fill_(torch.nan)

    earlier = tmp_path / "merged" / "config.json"
    earlier.parent.mkdir()
    earlier.touch()
    model = train_adapter(attach_adapter(load(folders["tied"]), adapter(), 0))
    monkeypatch.setattr(merge, "_put_weights", spoilt)
    config = replace(config, export=replace(config.export, dtype=Dtype[dtype]))
    with pytest.raises(
        UserError, match=r"^export\.merge: the merged model is not the policy, .* nats .*removed"
    ) as said:
        export(model, folders["tied"], tmp_path / "merged", config)
    assert ("16 bits" in str(said.value)) == ("export.dtype=float32" in str(said.value)) == (dtype == "bfloat16")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [earlier]


def test_greedy_answers_may_part_only_where_two_tokens_are_close():
    """A wider gap than rounding can close is a fault, whatever the next-token distributions say."""
    close = merge._Comparison(difference=0.3, mean=0.02, agrees=False, gap=0.4)
    assert merge._problem(close, precise=False) is None
    assert "0.9 nats apart" in merge._problem(replace(close, gap=0.9), precise=False)


def test_drift_is_measured_at_each_step_to_nf4_again(folders, config, tmp_path):
    """A merge in fp32 moves nothing; rounding the sum to NF4 moves as much as a load of it in NF4 shows."""
    quantised = replace(config, quantization=NF4, model=replace(config.model, dtype=Dtype.float32))
    model = train_adapter(attach_adapter(load(folders["untied"], NF4), adapter(), 0))
    found = export(model, folders["untied"], tmp_path / "merged", quantised)["drift"]
    again = load(tmp_path / "merged", NF4)
    sequences = [(torch.from_numpy(prompt.astype(np.int64))[None], 0) for prompt in PROMPTS]
    expected = drift(next_logps(model, sequences), next_logps(again, sequences))
    assert found["merged"] < 1e-4
    assert 0.3 * expected < found["requantised"] < 3 * expected  # along other tokens: the policy's answers
    assert found["together"] == pytest.approx(found["requantised"], rel=0.05)
    assert expected > 0.01
    assert drift(next_logps(model, sequences), next_logps(model, sequences)) == 0
