"""Experts in one tensor: packed or not, with adapters or not, they compute what the plain ones do with peft's own."""

import copy

import pytest
import torch

from alignment.kernels import experts, grouped
from alignment.kernels.base import is_patched
from alignment.kernels.experts import expert_layers, packed_weights, patch_experts, unpacked
from alignment.policy.quantize import stacks
from tests.helpers.mixtures import TARGETS, mixture

KINDS = ["qwen3_moe", "mixtral", "gpt_oss"]


def compute(model, positions=(2, 9)):
    """Logits and all gradients, of a random linear function of the logits."""
    generator = torch.Generator().manual_seed(5)
    width = model.get_input_embeddings().weight
    x = torch.randn(*positions, width.shape[1], generator=generator).to(width.dtype).requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    model.zero_grad()
    logits.backward(torch.randn(logits.shape, generator=generator).to(logits))
    return {"logits": logits.detach(), "x": x.grad} | {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad
    }


def plainly(model):
    """The same with every packed weight as a plain tensor, and every layer's own forward."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, parameter in packed_weights(module).items():
            weight = experts.unpack(parameter, parameter.quant_state)
            module._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
        if is_patched(module):
            module.__class__ = type(module)._original_class
    return plain


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert error <= tolerance, f"{name}: {error:.2g}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["experts", "attention", "none"])
@pytest.mark.parametrize("packed", [True, False])
def test_values_and_gradients_are_those_of_the_plain_experts(kind, targets, packed):
    """With an adapter on the experts, on the attention, or without one; in fp64 where nothing is packed."""
    chosen = {"experts": TARGETS[kind], "attention": ["q_proj", "v_proj"], "none": None}[targets]
    model = mixture(kind, torch.float32 if packed else torch.float64, packed, chosen)
    own = plainly(model)
    patch_experts(model)
    patched = [m for m in model.modules() if is_patched(m)]
    assert len(patched) == 2 + (2 if targets == "experts" else 0)
    assert_close(compute(model), compute(own), 1e-5 if packed else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_half_of_the_experts_may_have_an_adapter(kind):
    """The weight that has none trains nothing, and the other's gradients are peft's."""
    model = mixture(kind, torch.float32, True, ["down_proj"] if kind != "mixtral" else ["w2"])
    own = plainly(model)
    patch_experts(model)
    assert_close(compute(model), compute(own), 1e-5)


def test_an_expert_without_rows_and_a_single_position():
    """Two choices of four experts leave the others idle."""
    model = mixture("qwen3_moe", torch.float32, True, TARGETS["qwen3_moe"])
    own = plainly(model)
    patch_experts(model)
    found, expected = compute(model, (1, 1)), compute(own, (1, 1))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_adapters_that_are_off_have_no_part():
    """The reference of a fresh adapter is the base."""
    model = mixture("qwen3_moe", torch.float32, True, TARGETS["qwen3_moe"])
    patch_experts(model)
    ids = torch.arange(12)[None]
    base = plainly(mixture("qwen3_moe", torch.float32, True))
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, base(ids).logits)
    assert (model(ids).logits - base(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("targets", [None, TARGETS["qwen3_moe"]])
def test_where_the_faster_way_disagrees_experts_are_unpacked_for_their_own_forward(targets, monkeypatch, caplog):
    """With one log line for both layers, and the same numbers."""
    monkeypatch.setattr(experts, "all_close", lambda found, expected: False)
    with caplog.at_level("INFO"):
        model = mixture("qwen3_moe", torch.float32, True, targets)
        patch_experts(model)
    assert caplog.text.count("gives other values here") == (1 if targets is None else 2)
    layer = next(m for m in model.modules() if packed_weights(m))
    names = list(layer._parameters)
    assert_close(compute(model), compute(plainly(model)), 1e-5)
    assert list(layer._parameters) == names and len(packed_weights(layer)) == 2


def test_experts_of_an_unknown_form_compute_too():
    """A module that says nothing of its form: a stack with an odd name and a forward of its own."""

    class OddExperts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = torch.nn.Parameter(torch.randn(3, 64, 64), requires_grad=False)

        def forward(self, x):
            return torch.einsum("td,edf->tf", x, self.stack)

    from alignment.policy.quantize import _packed

    model = torch.nn.Sequential(OddExperts())
    (found,) = stacks(model)
    assert found[2] == "stack"
    x = torch.randn(5, 64)
    model[0]._parameters["stack"] = _packed(model[0].stack, True, torch.float32, torch.device("cpu"))
    patch_experts(model)
    with unpacked(model[0]):
        expected = torch.einsum("td,edf->tf", x, model[0].stack)
    torch.testing.assert_close(model(x), expected)


def test_nothing_of_the_weights_is_kept_for_the_backward_pass():
    """Only x, what enters the gate, and small things: a tenth of an unpacked stack."""
    from torch.autograd.graph import saved_tensors_hooks

    model = mixture("qwen3_moe", torch.float32, True, TARGETS["qwen3_moe"])
    patch_experts(model)
    layer = next(m for m in model.modules() if is_patched(m) and expert_layers(m)[1])
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x, index = torch.randn(6, 64, requires_grad=True), torch.arange(12).view(6, 2) % 4
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, index, torch.full((6, 2), 0.5))
    rank, small = 4, 12 * (8 + 8 + 4) + 4 * 4
    expected = 4 * (6 * 64 + 12 * 2 * 64 + 12 * (2 * rank + rank)) + small
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.1)


def test_products_of_groups_are_those_of_each_expert():
    """By the definition, with an expert that has no rows."""
    torch.manual_seed(0)
    routing = grouped.Routing.of(torch.tensor([[0, 3], [3, 1], [0, 1]]), 4)
    rows, stack = torch.randn(6, 5).double(), torch.randn(4, 5, 7).double()
    found = grouped.product(rows, stack, routing)
    for row, expert in enumerate(routing.experts.tolist()):
        torch.testing.assert_close(found[row], rows[row] @ stack[expert])
    sums = grouped.outer(rows, found, routing)
    assert sums[2].abs().max() == 0
    torch.testing.assert_close(sums[3], rows[4:].t() @ found[4:])
    x = torch.randn(3, 2).double()
    torch.testing.assert_close(routing.gather(routing.spread(x)), 2 * x)
