"""Bases that are quantised: as they were stored, or made so while they load, experts included."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from alignment.config.compose import load as compose
from alignment.config.schema import Calibration, Dtype, QuantizationConfig
from alignment.errors import UserError
from alignment.kernels.eight_bit import row_scales
from alignment.kernels.experts import packed_weights
from alignment.policy import stored
from alignment.policy.adapter import attach_adapter, continue_adapter, load_adapter
from alignment.policy.identity import policy_identity
from alignment.policy.merge import export_merged
from alignment.policy.saved_adapter import require_same_form
from alignment.policy.stored import Checkpoint, in_shares, require_usable, stored_facts, stored_weights
from alignment.reference.frozen import FrozenPolicy
from tests.conftest import each, random_groups, tiny_config
from tests.helpers.mixtures import write_mixture
from tests.helpers.policies import CPU, NF4, adapter, load, scores, train_adapter

GROUPS = random_groups(3, seed=2)
PROMPTS = [np.arange(3, 12, dtype=np.int32)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model_folder):
    """A plain model, the same in 4 and in 8 bits as bitsandbytes saves it, and mixtures of experts."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("plain", "nf4", "int8", "qwen3_moe", "gpt_oss")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(300, hidden_size=64, intermediate_size=128, head_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(found["plain"])
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    for name, settings in (("nf4", four), ("int8", BitsAndBytesConfig(load_in_8bit=True))):
        packed = AutoModelForCausalLM.from_pretrained(found["plain"], quantization_config=settings, device_map="cpu")
        packed.save_pretrained(found[name])
    for kind in ("qwen3_moe", "gpt_oss"):
        write_mixture(found[kind], kind)
    for folder in found.values():
        AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return found


def eager(folder, quantization=None):
    return load(folder, quantization, attention="eager")


# Checkpoints that are quantised already


@pytest.mark.parametrize("asked", [None, NF4], ids=["null", "nf4"])
def test_a_checkpoint_in_nf4_stays_as_it_is(asked, folders, caplog):
    """Whether or not the settings ask for NF4; it is what NF4 makes of the plain model, and the log says what holds."""
    with caplog.at_level(logging.INFO):
        model = load(folders["nf4"], asked)
    assert "is quantised already, and stays as it is: bitsandbytes NF4" in caplog.text
    assert "Weights of the base: NF4" in caplog.text
    made = load(folders["plain"], NF4)
    torch.testing.assert_close(scores(model, GROUPS), scores(made, GROUPS), rtol=0, atol=1e-4)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.compute_dtype is layer.weight.quant_state.dtype is torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_checkpoint_trains_saves_and_merges(kind, folders, tmp_path):
    """Its adapter learns, is found again with the same identity, and becomes one plain model with the unpacked base."""
    model = attach_adapter(load(folders[kind]), adapter(), 0)
    scores(model, GROUPS)
    train_adapter(model)
    values = scores(model, GROUPS)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = load_adapter(load(folders[kind]), tmp_path / "adapter")
    assert torch.equal(scores(again, GROUPS), values)
    assert policy_identity(again)[0] == policy_identity(model)[0]
    assert policy_identity(model)[1]["quantization"] == kind
    config = compose("recipe=quickstart", "tracking=none", "export.merge=true", "export.dtype=float32")
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    export_merged(model, tokenizer, tmp_path / "merged", config, str(folders[kind]), CPU, PROMPTS)
    written = load(tmp_path / "merged")
    assert stored_weights(written) == {"32 bit": sum(p.numel() for p in written.parameters())}
    assert (scores(written, GROUPS) - values).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_identity_knows_packed_weights_and_their_scales(kind, folders):
    """A changed code and a changed scale are other policies; a forward pass, which moves scales, is not."""
    model = load(folders[kind])
    first = policy_identity(model)[0]
    scores(model, GROUPS)
    assert policy_identity(model)[0] == first == policy_identity(load(folders[kind]))[0]
    other, scaled = load(folders[kind]), load(folders[kind])
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] ^= 1
    layer = scaled.model.layers[1].mlp.up_proj
    (row_scales(layer) if kind == "int8" else layer.weight.quant_state.state2.absmax)[0] *= 1.5
    assert len({first, policy_identity(other)[0], policy_identity(scaled)[0]}) == 3


def quantised(folder, target, settings):
    """A copy of a checkpoint that says it is quantised."""
    for path in folder.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return target


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ.*gptqmodel and optimum"),
        ({"quant_method": "awq", "bits": 4}, "AWQ.*gptqmodel"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors.*compressed-tensors"),
    ],
)
def test_a_missing_library_is_one_sentence(settings, needs, folders, tmp_path, monkeypatch):
    """It names the packages, whether or not they happen to be installed here."""
    monkeypatch.setattr(stored.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"is quantised already \({needs}: install that"):
        load(quantised(folders["plain"], tmp_path, settings))


def test_what_contradicts_a_packed_checkpoint_is_one_sentence(folders):
    """NF4 of 8 bits, training its weights, and merging into a form that cannot be unpacked."""
    with pytest.raises(UserError, match=r"quantization=nf4: .* already \(bitsandbytes 8 bit\): set quantization=none"):
        load(folders["int8"], NF4)
    run = compose("recipe=quickstart", "tracking=none")
    eight = Checkpoint("bitsandbytes", {"load_in_8bit": True})
    with pytest.raises(UserError, match=r"its weights cannot be trained: choose an adapter"):
        require_usable(replace(run, adapter=None), eight)
    require_usable(run, eight)
    gptq, merging = Checkpoint("hqq", {"bits": 4}), replace(run, export=replace(run.export, merge=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "_LIBRARIES", {})
        require_usable(run, gptq)
        with pytest.raises(UserError, match=r"export.merge=true: nothing can be added to weights .* in hqq"):
            require_usable(merging, gptq)
    require_usable(merging, eight)


def test_a_start_from_weights_in_8_bits_is_one_sentence(folders):
    """Their codes are no weights."""
    for init in ("pissa", "olora"):
        with pytest.raises(UserError, match=rf"^adapter\.init={init} .*q_proj, which the checkpoint has packed into a"):
            attach_adapter(load(folders["int8"]), adapter(init=init), 0)


@pytest.mark.parametrize("kind", each(["nf4", "int8"], ["nf4"]))
def test_plain_weights_that_count_as_packed_are_one_sentence(kind, folders, tmp_path):
    """As when a checkpoint was merged, and its config.json kept."""
    settings = json.loads((folders[kind] / "config.json").read_text())["quantization_config"]
    with pytest.raises(UserError, match=r"says that it is quantised \(bitsandbytes .*\), and its files have plain w"):
        load(quantised(folders["plain"], tmp_path, settings))


def test_a_format_that_nobody_knows_is_one_sentence(folders, tmp_path):
    """transformers takes its weights for plain ones, and passes over it with a warning."""
    with pytest.raises(UserError, match=r"is quantised already \(modelopt\), which this transformers cannot read"):
        load(quantised(folders["plain"], tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4"}))


@pytest.mark.parametrize("damage", ["half a file", "a weight", "a state"])
def test_damaged_files_are_one_sentence(damage, folders, tmp_path):
    """Whatever transformers raises."""
    settings = json.loads((folders["nf4"] / "config.json").read_text())["quantization_config"]
    path = quantised(folders["nf4"], tmp_path, settings)
    file = path / "model.safetensors"
    if damage == "half a file":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        lost = "layers.0.self_attn.q_proj.weight" + (".absmax" if damage == "a state" else "")
        save_file({k: v for k, v in load_file(file).items() if lost not in k}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^model\.name=\S+ cannot be loaded: its files may be damaged or incomplete"):
        load(path)


def mxfp4_checkpoint(folder, target):
    """gpt-oss as it is published: blocks of 32 values in 4 bits, with a shared exponent, stored (experts, out, in)."""
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    quantised(folder, target, settings)
    tensors, made = load_file(target / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            made[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            made[f"{name}_scales"] = torch.randint(121, 124, shape, generator=generator, dtype=torch.uint8)
        else:
            made[name] = tensor
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_mxfp4_is_unpacked_and_packed_again_if_asked(folders, tmp_path, caplog):
    """Plain weights are those that the blocks stand for; NF4 holds the experts then, and is close to them."""
    folder = mxfp4_checkpoint(folders["gpt_oss"], tmp_path)
    with caplog.at_level(logging.INFO):
        plain = eager(folder)
    assert "is stored in MXFP4, which cannot be trained on" in caplog.text
    blocks = load_file(folder / "model.safetensors")["model.layers.0.mlp.experts.down_proj_blocks"]
    scales = load_file(folder / "model.safetensors")["model.layers.0.mlp.experts.down_proj_scales"]
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([table, -table])
    values = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1).flatten(-2)
    expected = (values * (scales.float() - 127).exp2()[..., None]).flatten(-2).transpose(1, 2)
    torch.testing.assert_close(plain.model.layers[0].mlp.experts.down_proj.data, expected)

    plain.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(
        eager(tmp_path / "plain").model.layers[0].mlp.experts.down_proj.data, expected.to(plain.dtype)
    )

    four = eager(folder, NF4)
    assert stored_weights(four)["NF4"] > 0.5 * sum(stored_weights(four).values())
    before, after = scores(plain, GROUPS), scores(four, GROUPS)
    assert 0 < (after - before).abs().mean() < 0.5
    model = attach_adapter(four, adapter(target_modules=["q_proj", "down_proj"]), 0)
    scores(model, GROUPS)
    assert policy_identity(model)[1]["quantization"] == "nf4"


def test_fp8_is_unpacked(folders, tmp_path):
    """Each weight is its code times the scale of its block."""
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": ["lm_head"]}
    quantised(folders["plain"], tmp_path, settings)
    tensors, made = load_file(tmp_path / "model.safetensors"), {}
    for name, tensor in tensors.items():
        made[name] = tensor
        if name.endswith("proj.weight"):
            rows, columns = tensor.shape
            made[name] = tensor.to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = torch.full((rows // 32, columns // 32), 2.0)
    save_file(made, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(model.get_parameter(name).data, 2 * made[name].float())
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(load(tmp_path / "plain").get_parameter(name), model.get_parameter(name))
    assert stored_weights(load(tmp_path, NF4))["NF4"] > 0


# Experts in 4 bits


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_nf4_holds_the_experts(kind, folders, caplog):
    """Measured on the loaded model, said in the log; the router stays plain."""
    with caplog.at_level(logging.INFO):
        model = eager(folders[kind], NF4)
    layers = [module for module in model.modules() if packed_weights(module)]
    assert len(layers) == 2 and all(len(packed_weights(layer)) == 2 for layer in layers)
    found = stored_weights(model)
    assert found["NF4"] > 0.6 * sum(found.values())
    assert f"Weights of the base: {in_shares(found)}." in caplog.text and "NF4 " in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    router = next(m for n, m in model.named_modules() if type(m).__name__.endswith("Router"))
    assert router.weight.dtype is torch.float32


def test_nf4_that_leaves_most_weights_plain_is_a_warning(folders, caplog, monkeypatch):
    """As a mixture whose experts have a form that is not known."""
    monkeypatch.setattr("alignment.policy.quantize.is_stack", lambda *_: False)
    with caplog.at_level(logging.WARNING):
        model = eager(folders["qwen3_moe"], NF4)
    assert "counts as quantised, but most of its weights are not (32 bit" in caplog.text
    assert stored_facts(model)["notes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("qwen3_moe", ["all-linear"]),
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"]),
        ("gpt_oss", ["q_proj", "gate_up_proj", "down_proj"]),
    ],
)
def test_an_adapter_of_packed_experts_is_saved_found_again_and_merged(kind, targets, folders, tmp_path):
    """Reloaded or continued bit by bit, with the identity that it had; merged into plain experts that give the same."""
    base = eager(folders[kind], NF4)
    config = adapter(target_modules=targets, rank_pattern={"down_proj": 2})
    before, start = scores(base, GROUPS), policy_identity(base)
    model = attach_adapter(base, config, 0)
    assert policy_identity(model)[0] == start[0]
    train_adapter(model)
    values, identity = scores(model, GROUPS), policy_identity(model)
    assert (values - before).abs().max() > 0.05 and identity[1]["base"] == start[1]["base"]
    model.save_pretrained(str(tmp_path / "adapter"))
    again = load_adapter(eager(folders[kind], NF4), tmp_path / "adapter")
    assert torch.equal(scores(again, GROUPS), values) and policy_identity(again)[0] == identity[0]
    require_same_form(tmp_path / "adapter", config)
    continued = continue_adapter(eager(folders[kind], NF4), tmp_path / "adapter", config, 3)
    assert torch.equal(scores(continued, GROUPS), values) and policy_identity(continued)[0] == identity[0]
    trained, found = ({n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (model, continued))
    assert trained == found
    with pytest.raises(UserError, match=r"has adapted other layers than .*, or spectrum where it is"):
        continue_adapter(eager(folders[kind], NF4), tmp_path / "adapter", adapter(target_modules=["q_proj"]), 3)
    attention = "model.attention=eager"
    config = compose("recipe=quickstart", "tracking=none", "export.merge=true", "export.dtype=float32", attention)
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    export_merged(model, tokenizer, tmp_path / "merged", config, str(folders[kind]), CPU, PROMPTS)
    assert (scores(eager(tmp_path / "merged"), GROUPS) - values).abs().max() < 1e-3


def test_a_mixed_reference_of_experts_is_exact_in_weight_space(folders):
    """Half of one adapter and half of another: the sum of half of both updates, expert by expert."""
    model = attach_adapter(
        eager(folders["qwen3_moe"]), adapter(target_modules=["gate_proj", "up_proj", "down_proj"]), 0
    )
    train_adapter(model, seed=1, std=0.05)
    frozen = FrozenPolicy(model)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.experts")

    def update():
        return layer.get_delta_weight("default").detach().clone()

    first = update()
    train_adapter(model, seed=2, std=0.05)
    second = update()
    frozen.mix(0.25)
    with frozen.active():
        torch.testing.assert_close(update(), 0.75 * first + 0.25 * second)


def test_dropout_of_an_adapter_of_experts_is_one_sentence(folders):
    """peft has none there."""
    with pytest.raises(UserError, match=r"^adapter.dropout=0.1: an adapter of a mixture's experts has no dropout"):
        attach_adapter(eager(folders["qwen3_moe"]), adapter(dropout=0.1), 0)


def test_without_double_quantisation(folders):
    """The scales stay in fp32, for layers and experts."""
    config = QuantizationConfig(double=False, compute_dtype=Dtype.float32, calibration=Calibration.none)
    model = eager(folders["qwen3_moe"], config)
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    assert states and not any(state.nested for state in states)
