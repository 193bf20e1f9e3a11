"""The policy: what it is made of, what identifies it, and the frozen copy of its start."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.config.schema import Calibration, Device, Dtype, QuantizationConfig
from alignment.errors import UserError
from alignment.policy import identity as identities
from alignment.policy.adapter import attach_adapter, check_adapter_gradients, load_adapter, starts_at_base
from alignment.policy.identity import policy_identity
from alignment.policy.layers import disable_dropout
from alignment.policy.load import resolve_device, save_policy
from alignment.reference.frozen import FrozenPolicy
from alignment.scoring.layout import FlatLayout
from alignment.scoring.logps import enable_scoring, score
from alignment.training.cohort import share
from tests.conftest import each, random_groups, tiny_config, tiny_policy
from tests.helpers.policies import NF4, adapter, load, scores, start_of, train_adapter

GROUPS = random_groups(4, seed=1)


def identity(model):
    return policy_identity(model)[0]


# Loading


def test_a_machine_without_a_gpu_or_bitsandbytes_is_one_sentence(tiny_model_folder, monkeypatch):
    """Also for who loads a model from Python, without the checks of the command."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^This run lacks a CUDA GPU \([^)]+\): provide that, or try \S+,"):
        resolve_device(Device.cuda)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^This run lacks the package bitsandbytes \(.*quantization=none\): provide"):
        load(tiny_model_folder, NF4)


# Identity


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, NF4], ids=["full", "nf4"])
def test_a_fresh_adapter_leaves_no_trace(tiny_model_folder, quantization):
    expected = identity(load(tiny_model_folder, quantization))
    for settings in ({"r": 2}, {"r": 8}, {"alpha": 64}, {"init": "gaussian"}, {"target_modules": ["q_proj"]}):
        for seed in (0, 1):
            model = attach_adapter(load(tiny_model_folder, quantization), adapter(**settings), seed)
            assert identity(model) == expected, settings


def test_identity_does_not_depend_on_how_the_model_is_run(tiny_model_folder):
    sdpa, eager = load(tiny_model_folder), load(tiny_model_folder, attention="eager")
    assert identity(sdpa) == identity(eager)
    # What trainers write into a configuration.
    sdpa.config.use_cache, sdpa.config.output_router_logits = False, True
    sdpa.config.bos_token_id, sdpa.config.eos_token_id, sdpa.config.pad_token_id = 1, 2, 3
    sdpa.train()
    assert identity(sdpa) == identity(eager)


def test_everything_that_changes_the_policy_changes_its_identity(tiny_model_folder):
    """Each variant against every other: no two may share stored log-probs."""
    found = {"base": load(tiny_model_folder), "nf4": load(tiny_model_folder, NF4)}
    found["nf4 single"] = load(
        tiny_model_folder, QuantizationConfig(double=False, compute_dtype=Dtype.float32, calibration=Calibration.none)
    )
    found["nf4 bf16 compute"] = load(
        tiny_model_folder, QuantizationConfig(double=True, compute_dtype=Dtype.bfloat16, calibration=Calibration.none)
    )
    found["bf16"] = load(tiny_model_folder, dtype=Dtype.bfloat16)
    found["fp16"] = load(tiny_model_folder, dtype=Dtype.float16)
    found["one weight"] = load(tiny_model_folder)
    with torch.no_grad():
        found["one weight"].model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    found["a saved buffer"] = load(tiny_model_folder)
    found["a saved buffer"].model.layers[0].register_buffer("correction_bias", torch.ones(3))
    found["rope"] = load(tiny_model_folder)
    found["rope"].config.rope_parameters = {**found["rope"].config.rope_parameters, "rope_theta": 5e5}
    for seed in (1, 2):
        found[f"adapter {seed}"] = train_adapter(attach_adapter(load(tiny_model_folder), adapter(), 0), seed)
    found["adapter 1 scaled"] = train_adapter(attach_adapter(load(tiny_model_folder), adapter(alpha=4), 0), 1)
    found["adapter 1 rslora"] = train_adapter(attach_adapter(load(tiny_model_folder), adapter(rslora=True), 0), 1)
    found["adapter 1 on nf4"] = train_adapter(attach_adapter(load(tiny_model_folder, NF4), adapter(), 0), 1)
    targets = adapter(target_modules=["embed_tokens", "q_proj"])
    found["embedding adapter"] = train_adapter(attach_adapter(load(tiny_model_folder), targets, 0), 1)
    found["q_proj adapter"] = train_adapter(
        attach_adapter(load(tiny_model_folder), adapter(target_modules=["q_proj"]), 0), 1
    )
    identities = {name: identity(model) for name, model in found.items()}
    assert len(set(identities.values())) == len(identities), identities


@pytest.mark.slow
@pytest.mark.parametrize("target", each(["all-linear", "embed_tokens"], ["embed_tokens"]))
def test_identity_survives_saving_and_another_process(tiny_model_folder, tmp_path, target):
    model = train_adapter(attach_adapter(load(tiny_model_folder), adapter(target_modules=[target]), 0))
    model.save_pretrained(str(tmp_path / "adapter"))
    assert identity(load_adapter(load(tiny_model_folder), tmp_path / "adapter")) == identity(model)
    other = train_adapter(attach_adapter(load(tiny_model_folder), adapter(target_modules=[target]), 1), seed=3)
    assert identity(load_adapter(other, tmp_path / "adapter")) == identity(model)
    if target == "all-linear":
        code = (
            "import sys; from pathlib import Path; from tests.policy.test_policy import *;"
            "print(identity(load_adapter(load(sys.argv[1]), Path(sys.argv[2]))))"
        )
        environment = os.environ | {"PYTHONHASHSEED": "77", "CUDA_VISIBLE_DEVICES": ""}
        output = subprocess.run(
            [sys.executable, "-c", code, str(tiny_model_folder), str(tmp_path / "adapter")],
            capture_output=True, text=True, env=environment, check=True,
        )  # fmt: skip
        assert output.stdout.strip() == identity(model)


def test_description_names_what_was_scored(tiny_model_folder):
    _, plain = policy_identity(load(tiny_model_folder))
    assert (plain["model"], plain["dtype"], plain["quantization"]) == (str(tiny_model_folder), "float32", "none")
    assert plain["adapter"] is None
    _, adapted = policy_identity(train_adapter(attach_adapter(load(tiny_model_folder, NF4), adapter(), 0)))
    assert adapted["quantization"] == "nf4" and adapted["adapter"] is not None


@pytest.mark.parametrize("quantization", [None, NF4], ids=["full", "nf4"])
def test_a_frozen_base_is_read_once_until_something_is_written_to_it(quantization, tiny_model_folder, monkeypatch):
    """Also by a model of other modules on the same tensors; what trains is read every time."""
    read: list[int] = []

    def updated(digest, tensor, update=identities.hash_tensor):
        read.append(id(tensor))
        update(digest, tensor)

    monkeypatch.setattr(identities, "hash_tensor", updated)

    def times(model):
        read.clear()
        return identity(model), read.count(id(embedding))

    base = load(tiny_model_folder, quantization)
    embedding = base.get_input_embeddings().weight
    other = share(base)
    model = attach_adapter(base, adapter(), 0)
    expected, count = times(model)
    assert count == 1
    train_adapter(model)
    trained, count = times(model)
    assert count == 0 and trained != expected
    assert times(other) == times(attach_adapter(share(other), adapter(r=2), 1)) == (expected, 0)
    with torch.no_grad():
        embedding[0, 0] += 1
    changed, count = times(other)
    assert count == 1 and changed != expected
    embedding.data = embedding.detach().clone()
    assert times(other) == (changed, 1)
    assert times(load(tiny_model_folder, quantization))[0] == expected
    assert times(other) == (changed, 1)
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 5e5}
    assert times(other)[0] not in (expected, changed)
    embedding.requires_grad_()
    assert times(other)[1] == times(other)[1] == 1


# The frozen start


KINDS = {
    "fresh": "adapter switched off",
    "trained": "frozen copy of the adapter",
    "embedding": "frozen copy of the adapter",
    "pissa": "frozen copy of the adapter",
    "olora": "frozen copy of the adapter",
    "full": "copy of the model",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_start_stays_while_the_policy_moves(kind, tmp_path):
    """Taking, running and dropping the copy changes nothing of the policy; moving the policy nothing of the copy."""
    model = start_of(kind)
    expected, before = scores(model, GROUPS), identity(model)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    start = FrozenPolicy(model)
    assert start.form == KINDS[kind]
    assert starts_at_base(model) == (kind == "fresh")
    assert torch.equal(scores(model, GROUPS), expected)
    assert identity(model) == before
    with start.active() as frozen:
        assert torch.equal(scores(frozen, GROUPS), expected)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trainable:
                parameter.add_(0.05 * torch.randn_like(parameter))
    moved = scores(model, GROUPS)
    assert (moved - expected).abs().max() > 1e-2
    with start.active() as frozen:
        assert torch.equal(scores(frozen, GROUPS), expected)
    assert torch.equal(scores(model, GROUPS), moved)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    start.close()
    assert torch.equal(scores(model, GROUPS), moved)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    if kind != "full":
        assert list(model.peft_config) == ["default"]
        model.save_pretrained(str(tmp_path))
        assert sorted(p.name for p in tmp_path.iterdir() if p.suffix in (".json", ".safetensors") or p.is_dir()) == [
            "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip


# Dropout


@pytest.mark.parametrize("source", ["attention", "adapter", "residual"])
def test_no_dropout_is_left(source):
    """In training mode, twice the same batch: the same numbers, whether dropout is a module or a number."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(attention_dropout=0.5 if source == "attention" else 0.0)
    if source == "residual":
        config = AutoConfig.for_model(
            "gpt2", vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.3, resid_pdrop=0.3
        )
    model = AutoModelForCausalLM.from_config(config)
    enable_scoring(model)
    if source == "adapter":
        model = train_adapter(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)))
    expected = scores(model.eval(), GROUPS)
    model.train()
    assert (scores(model, GROUPS) - scores(model, GROUPS)).abs().max() > 1e-3
    disable_dropout(model)
    # eval and train mode may take different attention kernels, whose sums are rounded differently
    torch.testing.assert_close(scores(model, GROUPS), expected, rtol=1e-5, atol=1e-5)


# Loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_stays_in_its_own_dtype_and_what_trains(tiny_model_folder, dtype):
    """Embeddings, norms and the head are not cast to fp32, and nothing but adapter tensors trains, in fp32."""
    import bitsandbytes as bnb

    name = Dtype.float32 if dtype is torch.float32 else Dtype.bfloat16
    model = attach_adapter(
        load(
            tiny_model_folder, QuantizationConfig(double=True, compute_dtype=name, calibration=Calibration.none), name
        ),
        adapter(),
        0,
    )
    quantized = {n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len({n for n in quantized if n.endswith("base_layer")}) == 2 * len(projections)
    for parameter_name, parameter in model.named_parameters():
        if ".lora_" in parameter_name:
            assert parameter.requires_grad and parameter.dtype is torch.float32, parameter_name
        else:
            assert not parameter.requires_grad, parameter_name
            packed = parameter_name.removesuffix(".weight") in quantized
            assert parameter.dtype is (torch.uint8 if packed else dtype), parameter_name
    assert not isinstance(model.get_output_embeddings(), bnb.nn.Linear4bit)
    for module_name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert module.support_avx512bf16_for_cpu is False, module_name
            assert module.quant_state.nested, module_name


def gradient_norms(model, batch):
    model.zero_grad()
    score(model, batch).sums().sum().backward()
    return {n: p.grad.norm().item() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("compute", [Dtype.float32, Dtype.bfloat16], ids=["fp32", "bf16"])
def test_evaluating_first_does_not_change_the_gradient(tiny_model_folder, compute):
    """A forward in eval mode may repack 4-bit weights into a form whose backward skips the base weights."""
    batch = next(FlatLayout().batches(GROUPS, 10_000))
    quantization = QuantizationConfig(double=True, compute_dtype=compute, calibration=Calibration.none)
    norms = []
    for evaluate_first in (False, True):
        model = train_adapter(attach_adapter(load(tiny_model_folder, quantization), adapter(), 0))
        if evaluate_first:
            model.eval()
            before = scores(model, GROUPS)
            assert torch.equal(scores(model, GROUPS), before)
        model.train()
        norms.append(gradient_norms(model, batch))
    assert norms[0] == norms[1]
    assert min(norms[0].values()) > 0


@pytest.mark.parametrize(("asked", "found"), [("float16", torch.float16), ("bfloat16", torch.float32)])
def test_packed_weights_compute_in_the_float16_of_their_model(tiny_model_folder, asked, found):
    """`auto` is the device's in any other case: here a CPU's."""
    auto = QuantizationConfig(double=True, compute_dtype=Dtype.auto, calibration=Calibration.none)
    model = load(tiny_model_folder, auto, Dtype(asked))
    assert model.config.quantization_config.bnb_4bit_compute_dtype is found


def test_models_whose_activations_float16_may_not_hold_are_named(tmp_path, caplog):
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
    }
    shape |= {"num_key_value_heads": 1, "vocab_size": 32}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **shape)).save_pretrained(tmp_path)
    for dtype in (Dtype.float32, Dtype.float16):
        load(tmp_path, dtype=dtype, attention="eager")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        "The activations of a gemma2 may exceed 65504, where float16 ends: if the loss is not finite, set "
        "model.dtype=float32."
    ]


def test_a_sweep_member_gets_the_same_adapter_whatever_was_drawn_before(tiny_model_folder):
    first = attach_adapter(load(tiny_model_folder), adapter(), 3)
    torch.rand(17)
    state = torch.get_rng_state()
    second = attach_adapter(load(tiny_model_folder), adapter(), 3)
    assert torch.equal(torch.get_rng_state(), state)
    other = attach_adapter(load(tiny_model_folder), adapter(), 4)
    for (name, a), (_, b), (_, c) in zip(
        first.named_parameters(), second.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        if "lora_A" in name:
            assert not torch.equal(a, c), name


def test_an_adapter_that_peft_refuses_is_one_sentence(tiny_model_folder):
    with pytest.raises(UserError, match=r"^adapter: .*Qwen3Attention.*") as caught:
        attach_adapter(load(tiny_model_folder), adapter(target_modules=["self_attn"]), 0)
    assert "\n" not in str(caught.value)


def test_a_saved_policy_carries_tokenizer_and_template(tiny_model_folder, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = train_adapter(attach_adapter(load(tiny_model_folder), adapter(), 0))
    save_policy(model, tokenizer, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".lora_" in name for name in saved)
    assert len(saved) == sum(p.requires_grad for p in model.parameters())
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


# Gradients


def tiny_mamba(targets):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba", vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4
    )
    model = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(False)
    enable_scoring(model)
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets))


def test_a_layer_that_bypasses_its_adapter_is_named():
    """The state-space forward reads the weight of `dt_proj` itself, so an adapter there would never learn."""
    batch = next(FlatLayout().batches(GROUPS, 10_000))
    model = tiny_mamba(["in_proj", "dt_proj"])
    score(model, batch).sums().sum().backward()
    with pytest.raises(UserError, match=r"^4 trainable tensors .*dt_proj\.lora_A.*adapter\.target_modules"):
        check_adapter_gradients(model)
    model = tiny_mamba(["in_proj"])
    score(model, batch).sums().sum().backward()
    check_adapter_gradients(model)


def test_a_gradient_of_zero_is_a_gradient():
    """In the first step A of a fresh LoRA gets zeros, since B is zero: that is no fault."""
    model = tiny_policy(torch.float32)
    score(model, next(FlatLayout().batches(GROUPS, 10_000))).sums().sum().backward()
    check_adapter_gradients(model)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(not g.any() for n, g in gradients.items() if "lora_A" in n)
    assert all(g.any() for n, g in gradients.items() if "lora_B" in n)
