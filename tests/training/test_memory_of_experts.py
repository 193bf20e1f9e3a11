"""The plan of a mixture of experts: against the loaded one, and of the large ones by hand, part by part."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.config.schema import Calibration, Dtype, QuantizationConfig
from alignment.policy.adapter import attach_adapter
from alignment.policy.stored import nf4_bytes_per_weight
from alignment.training.budget import Room, make_plan, relative_time, step_needs
from alignment.training.memory import CONTEXT, GIB, USABLE_SHARE, count_weights, plan_policy, sizes_of
from tests.helpers.kept import saved_bytes
from tests.helpers.mixtures import mixture_config, write_mixture
from tests.helpers.policies import NF4, adapter, load

AUTO = QuantizationConfig(double=True, compute_dtype=Dtype.auto, calibration=Calibration.none)
TARGETS = {
    "all": ["all-linear"],
    "attention": ["q_proj", "v_proj"],
    "experts": ["gate_proj", "up_proj", "down_proj"],
    "stacks": ["gate_up_proj", "down_proj"],
}
EIGHTY = Room("cuda", round(USABLE_SHARE["cuda"] * 80 * 10**9), CONTEXT["cuda"])


def meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for kind in ("qwen3_moe", "gpt_oss"):
        for layers in (1, 2):
            types = {"layer_types": ["full_attention"] * layers} if kind == "gpt_oss" else {}
            found[kind, layers] = tmp_path_factory.mktemp(f"{kind}{layers}")
            write_mixture(found[kind, layers], kind, num_hidden_layers=layers, **types)
    return found


def policy(folders, kind, layers, targets, quantization=NF4):
    base = load(folders[kind, layers], quantization, attention="eager" if kind == "gpt_oss" else "sdpa")
    return attach_adapter(base, adapter(target_modules=targets), 0)


CASES = [
    ("qwen3_moe", "all"), ("qwen3_moe", "attention"), ("qwen3_moe", "experts"), ("qwen3_moe", "stacks"),
    ("gpt_oss", "all"), ("gpt_oss", "stacks"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_planned_weights_are_those_of_the_loaded_mixture(kind, targets, folders):
    """Base and adapter, in NF4; the router's adapter, which all-linear makes, is not foreseen."""
    loaded = count_weights(policy(folders, kind, 2, TARGETS[targets]))
    config = AutoConfig.from_pretrained(folders[kind, 2])
    planned = plan_policy(meta(config), 4, adapter(target_modules=TARGETS[targets]), NF4)[1]
    assert planned.base == pytest.approx(loaded.base, rel=0.03)
    assert planned.adapter == pytest.approx(loaded.adapter, rel=0.1 if targets == "all" else 0)
    assert planned.quantised and loaded.quantised


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "targets"), [("qwen3_moe", "attention"), ("qwen3_moe", "experts")])
@pytest.mark.parametrize("quantization", [NF4, None])
def test_saved_bytes_of_a_layer_of_experts_are_counted(kind, targets, quantization, folders):
    """A second layer more saves what the count says."""
    totals = {}
    for layers in (1, 2):
        model = policy(folders, kind, layers, TARGETS[targets], quantization)
        totals[layers], positions = saved_bytes(model)
    sizes = sizes_of(model, count_weights(model), value=4, optimizer="adamw_torch", device="cpu")
    assert not sizes.estimate
    expected = sizes.layers[1].saved * positions + sizes.layers[1].copies
    assert totals[2] - totals[1] == pytest.approx(expected, rel=0.15)


def qwen3_30b():
    return AutoConfig.for_model(
        "qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        vocab_size=151936, tie_word_embeddings=False, decoder_sparse_step=1,
    )  # fmt: skip


def gpt_oss_20b():
    return AutoConfig.for_model(
        "gpt_oss", hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4, vocab_size=201088,
        tie_word_embeddings=False, layer_types=["sliding_attention", "full_attention"] * 12,
    )  # fmt: skip


@pytest.mark.slow
def test_qwen3_30b_a3b_by_hand():
    """48 layers of 128 experts of 768, hidden 2048; a LoRA of rank 16 on the attention and on every expert."""
    experts = 48 * 128 * 3 * 768 * 2048
    attention = 48 * (2 * 2048 * 4096 + 2 * 2048 * 512)
    plain = 2 * 151936 * 2048 + 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = 48 * 16 * (2 * (2048 + 4096) + 2 * (2048 + 512) + 128 * (2 * (2048 + 1536) + 768 + 2048))
    model = meta(qwen3_30b())
    weights = plan_policy(model, 2, adapter(r=16, target_modules=targets), AUTO)[1]
    assert weights.base == pytest.approx((experts + attention) * nf4_bytes_per_weight(True) + 2 * plain, rel=1e-6)
    assert (weights.count, weights.adapter) == (lora, 4 * lora)
    sizes = sizes_of(model, weights, value=2, optimizer="paged_adamw_8bit", device="cuda")
    assert sizes.buffers == 2 * 128 * 1536 * 2048  # the larger stack, unpacked
    kept = 2 * (2 * 2048 + 2 * 128) + 2 * (2 * 4096 + 2 * 512) + 2 * (4096 + 512) + 2 * (2048 + 8 * 2 * 768)
    assert sizes.layers[0].saved == pytest.approx(kept, rel=0.1)

    # A position computes with 8 experts of 128; all of them are unpacked for a pass
    active = attention / 48 + 8 * 3 * 768 * 2048
    share = (experts + attention) / 48 / active
    assert sizes.fixed_share == pytest.approx(share) and share == pytest.approx(11)
    assert sizes.launched == pytest.approx(2.25e11 / active, rel=1e-3)
    for tokens, time in ((512, sizes.launched / 512), (2048, 1 + share * 256 / 2048)):
        assert relative_time(sizes, 0, tokens, "cuda") == pytest.approx(time)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "least", "most"), [(qwen3_30b, 15, 40), (gpt_oss_20b, 11, 30)])
@pytest.mark.parametrize("targets", ["all", "attention"])
def test_large_mixtures_fit_one_gpu_of_80_gb(config, least, most, targets):
    """With pairs of 4096 positions; its weights alone are most of what it needs where attention is adapted."""
    model = meta(config())
    weights = plan_policy(model, 2, adapter(r=16, target_modules=TARGETS[targets]), AUTO)[1]
    sizes = sizes_of(model, weights, value=2, optimizer="adamw_torch", device="cuda")
    plan = make_plan(sizes, EIGHTY, longest=4096, step_tokens=64 * 4096, tokens_per_batch=None, checkpoint_every=None)
    assert plan.fits
    assert least < plan.needs.weights / GIB < least + 3
    assert step_needs(sizes, 1, 4096, EIGHTY.context).total / GIB < most


@pytest.mark.slow
def test_a_checkpoint_that_is_packed_is_planned_as_it_is_stored():
    """4 and 8 bits of bitsandbytes, and GPTQ's groups of 128; unpacked kinds count as plain weights, or as NF4."""
    config = mixture_config("qwen3_moe", mlp_only_layers=[0, 1])
    bare = plan_policy(meta(config), 2, adapter(), None)[1].base
    found = {}
    for name, settings in {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "int8": {"load_in_8bit": True},
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
        "fp8": {"quant_method": "fp8"},
    }.items():
        config.quantization_config = settings
        found[name] = plan_policy(meta(config), 2, adapter(), None)[1].base
    config.quantization_config = None
    assert found["nf4"] == plan_policy(meta(config), 2, adapter(), AUTO)[1].base < found["gptq"] * 1.02
    assert found["nf4"] < found["int8"] < found["fp8"] == bare


def test_the_first_layers_may_be_dense():
    """As in DeepSeek-V3: the widest layer decides what the host needs, and no layer counts as both kinds."""
    settings = {
        "hidden_size": 64, "intermediate_size": 256, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    model = meta(mixture_config("qwen3_moe", mlp_only_layers=[0], **settings))
    weights = plan_policy(model, 2, adapter(), None)[1]
    sizes = sizes_of(model, weights, value=2, optimizer="adamw_torch", device="cuda")
    attention, dense, expert = 4 * 64 * 64, 3 * 64 * 256, 3 * 64 * 32
    assert sizes.launched == int(2.25e11) // (attention + dense)
    total, active = (2 * attention + dense + count * expert for count in (8, 2))
    assert sizes.fixed_share == pytest.approx(total / active)
