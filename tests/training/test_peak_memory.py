"""The peak of training steps against the plan, for every kind and family of policies; what layers keep in 16 bits."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from alignment.config.compose import load as compose
from alignment.config.schema import Calibration
from alignment.policy.adapter import attach_adapter
from alignment.policy.architecture import show_decoder
from alignment.policy.layers import decoder_layers, disable_dropout
from alignment.scoring.logps import enable_scoring
from alignment.training.budget import step_needs
from alignment.training.elastic import elastic
from alignment.training.layer_probe import is_usual, measured_layers
from alignment.training.master_weights import MasterWeights
from alignment.training.memory import attention_estimate, count_weights, plan_policy, sizes_of
from alignment.training.optimizers import muon
from tests.conftest import each, tiny_config
from tests.helpers.adapter_options import OPTIONS
from tests.helpers.families import FAMILIES
from tests.helpers.kept import saved_bytes
from tests.helpers.mixtures import mixture_config
from tests.helpers.peak import step_peak
from tests.helpers.policies import NF4, adapter, load

LAYERS = 4
WIDE = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_hidden_layers": LAYERS}
ICQ = replace(NF4, calibration=Calibration.mse)
CHOSEN = [f"model.layers.{i}.{name}" for i in (1, 2, 3) for name in ("self_attn.v_proj", "mlp.down_proj")]
"""As Spectrum may choose: nothing trains in the lowest layer."""


def random_model(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)
    show_decoder(model)
    enable_scoring(model)
    return model


def dense(vocab=97, dtype=torch.float32, **settings):
    return random_model(tiny_config(vocab, **WIDE | settings), dtype)


def packed(config, folder, quantization=NF4):
    random_model(config).save_pretrained(folder)
    return load(folder, quantization, attention="auto")


def stored_in_8_bits(folder):
    random_model(tiny_config(**WIDE)).save_pretrained(folder / "plain")
    bits = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=bits, device_map="cpu").save_pretrained(
        folder / "int8"
    )
    return load(folder / "int8")


def family(name):
    """Twice as many layers as the families' table has: of each kind some."""
    found = next(f for f in FAMILIES if f.model_type == name)
    own = {"num_hidden_layers": 4} | found.settings
    types = {key: own[key] for key in ("layer_types", "layers_block_type", "no_rope_layers") if key in own}
    twice = {key: value * 2 for key, value in types.items() if len(value) < own["num_hidden_layers"]}
    model = random_model(replace(found, settings=own | twice).config())
    disable_dropout(model)
    return model


def mixture(kind, folder, *targets):
    base = packed(mixture_config(kind, num_hidden_layers=LAYERS), folder)
    return attach_adapter(base, adapter(target_modules=[*targets]), 0)


def option(name, base):
    return attach_adapter(base, adapter(**OPTIONS[name]), 0)


KINDS = ("lora", "dora", "vera", "oft", "boft")
POLICIES = {
    **{name: lambda _, name=name: option(name, dense()) for name in (*KINDS, "patterns", "pissa")},
    "dora on NF4": lambda folder: option("dora", packed(tiny_config(**WIDE), folder)),
    "whole head": lambda _: option("whole head", dense(2000)),
    "tokens": lambda _: option("tokens", dense(2000)),
    "tokens of tied ends": lambda _: option("tokens", dense(2000, tie_word_embeddings=True)),
    "dropout": lambda _: attach_adapter(dense(), adapter(dropout=0.1), 0),
    "iec": lambda _: attach_adapter(dense(), adapter(iec=True), 0),
    "nf4": lambda folder: option("lora", packed(tiny_config(**WIDE), folder)),
    "icq": lambda folder: option("lora", packed(tiny_config(**WIDE), folder, ICQ)),
    "int8": lambda folder: option("lora", stored_in_8_bits(folder)),
    "spectrum": lambda _: attach_adapter(dense(), adapter(target_modules=CHOSEN), 0),
    "spectrum of a whole model": lambda _: attach_adapter(dense(), None, 0, modules=CHOSEN),
    "whole model": lambda _: attach_adapter(dense(), None, 0),
    "one pass of a whole model": lambda _: attach_adapter(dense(), None, 0),
    "muon": lambda _: attach_adapter(dense(), None, 0),
    "masters of 16 bits": lambda _: attach_adapter(dense(dtype=torch.bfloat16), None, 0),
    "experts": lambda folder: mixture("qwen3_moe", folder, "gate_proj", "up_proj", "down_proj"),
    "attention beside experts": lambda folder: mixture("qwen3_moe", folder, "q_proj", "v_proj"),
    "experts of mixtral": lambda folder: mixture("mixtral", folder, "all-linear"),
    **{
        f.model_type: lambda _, name=f.model_type: attach_adapter(family(name), adapter(target_modules=["auto"]), 0)
        for f in FAMILIES
    },
}
CORE = (
    "dora", "boft", "tokens of tied ends", "spectrum", "one pass of a whole model", "experts", "mamba2", "mistral",
    "deepseek_v3",
)  # fmt: skip


def with_masters(parameters):
    optimizer = torch.optim.AdamW(parameters)
    optimizer.masters = MasterWeights(optimizer)
    return optimizer


def optimizer_of(name, model):
    """(name, how it is made) of the optimizer that this policy trains with."""
    if name == "masters of 16 bits":
        return "adamw_torch", with_masters
    if name != "muon":
        return "adamw_torch", torch.optim.AdamW
    optim = compose("recipe=quickstart", "adapter=none", "model.dtype=float32").optim
    return "muon", lambda _: muon(model, optim, ())


def as_planned(name, model, optimizer, batch):
    """The sizes of a loaded policy, as a stage plans with them for this pass."""
    sizes = sizes_of(
        model, count_weights(model), value=model.dtype.itemsize, optimizer=optimizer, device="cpu",
        dropout=name == "dropout",
    )  # fmt: skip
    modules = decoder_layers(model)
    if not sizes.estimate and is_usual(model, modules, batch):
        return sizes
    return replace(sizes, layers=measured_layers(model, sizes.layers, modules, batch))


@pytest.mark.slow
@pytest.mark.parametrize("name", each(POLICIES, CORE))
def test_the_peak_of_a_step_is_planned(name, tmp_path):
    """To 15 per cent of what a step takes beside the weights, which the plan counts to the byte; two passes a step."""
    model = POLICIES[name](tmp_path)
    optimizer, make = optimizer_of(name, model)
    passes = 1 if name.startswith("one pass") else 2
    with elastic(model, adapter(iec=True)) if name == "iec" else nullcontext():
        peak, batch = step_peak(model, make, passes)
    needs = step_needs(as_planned(name, model, optimizer, batch), 0, batch.positions, 0, alone=passes == 1)
    assert needs.total - needs.weights - needs.adapter == pytest.approx(peak, rel=0.15)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["mamba2", "falcon_h1", "bamba"])
def test_the_peak_of_a_step_of_forks_is_planned(name):
    """Twice as many tokens in the prompt as in an answer, so that the prompt runs once; again to 15 per cent."""
    model = POLICIES[name](None)
    peak, batch = step_peak(model, torch.optim.AdamW, passes=1, prompt=256)
    assert batch.positions == 256 + 2 * 127
    needs = step_needs(as_planned(name, model, "adamw_torch", batch), 0, batch.positions, 0)
    assert needs.total - needs.weights - needs.adapter == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("kind", each([*KINDS, "whole model"], ["dora"]))
def test_what_a_layer_keeps_in_16_bits_is_counted(kind):
    """Casts of fp32 adapters, and norms that train, keep copies that 32 bits do not."""
    totals = {}
    for layers in (1, 2):
        base = dense(dtype=torch.bfloat16, num_hidden_layers=layers)
        model = attach_adapter(base, None, 0) if kind == "whole model" else option(kind, base)
        totals[layers], positions = saved_bytes(model)
    layer = sizes_of(model, count_weights(model), value=2, optimizer="adamw_torch", device="cpu").layers[1]
    assert totals[2] - totals[1] == pytest.approx(layer.saved * positions + layer.copies, rel=0.05)


@pytest.mark.parametrize("name", each([*KINDS, "whole head", "patterns"], ["boft", "patterns"]))
def test_a_plan_without_weights_is_that_of_the_loaded_policy(name):
    """`alignment.plan` lays the adapter out on the meta device, and counts the same layers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(**WIDE))
    settings = {"value": 4, "optimizer": "adamw_torch", "device": "cuda"}
    policy, weights = plan_policy(model, 4, adapter(**OPTIONS[name]), None)
    loaded = option(name, dense())
    assert sizes_of(policy, weights, **settings) == sizes_of(loaded, count_weights(loaded), **settings)


def test_what_is_not_counted_is_said():
    """Attention that keeps a value for each pair of positions; Spectrum before a model is loaded is another test's."""
    model = attach_adapter(dense(), adapter(), 0)
    model.config._attn_implementation = "eager"
    sizes = sizes_of(model, count_weights(model), value=4, optimizer="adamw_torch", device="cpu")
    assert sizes.estimate == attention_estimate("eager") != attention_estimate("sdpa") == ""
