"""`adapter.target_modules=auto`: what it adapts, by structure and by a run."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn
from transformers import AutoModelForCausalLM

from alignment.errors import UserError
from alignment.policy import targets
from alignment.policy.adapter import attach_adapter
from alignment.policy.targets import auto_targets, linear_targets, own_name
from alignment.scoring.logps import enable_scoring
from tests.conftest import each, tiny_config
from tests.helpers.families import FAMILIES, write_model
from tests.helpers.policies import NF4, adapter, load

PLAIN = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "olmo2", "granite", "smollm3", "cohere2")


def model_of(model_type):
    [family] = [f for f in FAMILIES if f.model_type == model_type]
    return bare(family.config())


def bare(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    enable_scoring(model)
    return model


def all_linear(model):
    return _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model).target_modules


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PLAIN)
def test_on_a_plain_architecture_auto_is_all_linear(model_type):
    """The same layers with and without a run, and the same random adapter."""
    model = model_of(model_type)
    assert set(auto_targets(model)) == set(linear_targets(model)) == all_linear(model)


def test_the_same_layers_are_the_same_adapter():
    """To the last bit: runs of before go on as they were."""
    found, expected = (
        attach_adapter(model_of("qwen3"), adapter(target_modules=[t]), 3) for t in ("auto", "all-linear")
    )
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in expected.named_parameters()]
    assert all(map(torch.equal, found.parameters(), expected.parameters()))
    assert found.peft_config["default"].target_modules == expected.peft_config["default"].target_modules


def test_gpt2_stores_its_layers_in_another_way():
    """Its layers are transposed linear ones, which all-linear has too."""
    model = bare(tiny_config(model_type="gpt2"))
    assert set(auto_targets(model)) == all_linear(model)


class Routed(nn.Module):
    """A mixture of two experts in a list, the second of which eight tokens may never reach."""

    def __init__(self, inner):
        super().__init__()
        self.chooser = nn.Linear(32, 2)
        self.weigher = nn.Linear(32, 1)
        self.experts = nn.ModuleList([inner, copy.deepcopy(inner)])

    def forward(self, x):
        return self.experts[0](x) * self.chooser(x).softmax(-1)[..., :1] * self.weigher(x).sigmoid()


class Raw(nn.Module):
    """A block that reads a weight where it could call the layer, and one that it calls without a gradient."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.read, self.fixed, self.unused = inner, nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.asked = nn.Linear(32, 32)

    def forward(self, x, **kwargs):
        with torch.no_grad():
            x = x + self.fixed(x)
        x = self.asked(x.to(self.asked.weight.dtype))
        return self.inner(x @ self.read.weight, **kwargs)


def test_what_cannot_learn_or_should_not_is_left_out(caplog):
    """Routers, gates, layers that are read, run without gradient or not run, in whatever they are called."""
    model = model_of("llama")
    plain = set(auto_targets(model))
    model.model.layers[0].mlp = Routed(model.model.layers[0].mlp)
    model.model.layers[1].mlp = Raw(model.model.layers[1].mlp)
    model.model.tower = nn.Linear(32, 32)
    with caplog.at_level(logging.INFO, logger="alignment.policy.targets"):
        found = set(auto_targets(model))
    moved = {name.replace("1.mlp.", "1.mlp.inner.") for name in plain if "0.mlp." not in name}
    moved |= {name.replace("mlp.", f"mlp.experts.{i}.") for name in plain if "0.mlp." in name for i in (0, 1)}
    assert found == moved | {"model.layers.1.mlp.asked"}
    assert "chooser, fixed, read, tower, unused, weigher" in caplog.text
    assert all(p.grad is None for p in model.parameters()) and not model.model.layers[0].mlp._forward_hooks


def test_a_forward_that_fails_leaves_the_structure(monkeypatch, caplog):
    """The run only narrows down what the structure says."""

    def broken(*args):
        raise KeyError("tokens")

    model = model_of("qwen3")
    monkeypatch.setattr(targets, "_with_gradient", broken)
    with caplog.at_level(logging.INFO, logger="alignment.policy.targets"):
        assert set(auto_targets(model)) == all_linear(model)
    assert "KeyError: 'tokens'" in caplog.text


def test_a_state_space_block_keeps_what_its_kernel_reads():
    """No machine's fused kernel passes an adapter by: out_proj is called here, and read on a GPU."""
    leaves = {
        name: {n.rpartition(".")[2] for n in auto_targets(model_of(name))} for name in ("mamba", "falcon_h1", "jamba")
    }
    assert leaves["mamba"] == {"in_proj"}
    assert "out_proj" not in leaves["falcon_h1"] and {"in_proj", "q_proj", "o_proj"} <= leaves["falcon_h1"]
    assert "dt_proj" not in leaves["jamba"] and {"in_proj", "x_proj", "out_proj"} <= leaves["jamba"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_no_router_and_no_expert(model_type):
    """Attention alone, and what else is a layer under a name of its own: peft adapts experts when told to."""
    model = model_of(model_type)
    adapted = attach_adapter(model, adapter(target_modules=["auto"]), 0)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and not any(part in name for name in trained for part in ("experts.", "router", "mlp.gate."))


def test_oft_leaves_out_what_is_given_heads():
    """With transformers that expand latent keys and values head by head; older ones give rows of token vectors."""
    rotations = adapter(kind="oft", r=None, alpha=None, block_size=4, target_modules=["auto"])
    model = model_of("deepseek_v3")
    if any(hasattr(module, "expand_kv") for module in model.modules()):
        with pytest.raises(
            UserError, match=r"^adapter=oft .*layers\.0\.self_attn\.kv_b_proj .*exclude_modules=\[kv_b_proj\]"
        ):
            attach_adapter(model_of("deepseek_v3"), rotations, 0)
        rotations = replace(rotations, exclude_modules=["kv_b_proj"])
    attach_adapter(model, rotations, 0)(input_ids=torch.arange(6)[None])


CORE = ("qwen3_next", "jamba")
MIXTURES = [family for family in FAMILIES if "experts" in family.special]
CASES = [(family.model_type, False) for family in FAMILIES] + [(family.model_type, True) for family in MIXTURES]


@pytest.mark.parametrize(("model_type", "packed"), each(CASES, [(name, True) for name in CORE]))
def test_no_adapter_on_what_chooses_experts(model_type, packed, tmp_path):
    """In no family, whatever it is called: no target in a mixture has one output, or one for each expert."""
    [family] = [family for family in FAMILIES if family.model_type == model_type]
    model = load(write_model(family, tmp_path), NF4, attention="auto") if packed else model_of(model_type)
    targets = auto_targets(model)
    assert targets
    experts = {name.rpartition(".experts.")[0] for name, _ in model.named_parameters() if ".experts." in name}
    assert bool(experts) == ("experts" in family.special)
    for name in targets:
        leaf = own_name(name)
        assert "router" not in name and leaf not in ("gate", "shared_expert_gate"), name
        assert not any(part in name for part in ("vision", "audio", "tower")), name
        if any(name.startswith(f"{block}.") for block in experts):
            assert model.get_submodule(name).out_features not in (1, 4), name
    choosing = [p for name, p in model.named_parameters() if "router" in name or name.endswith("gate.weight")]
    assert all(p.is_floating_point() for p in choosing), "it stays plain in 4 bits"
