"""Adapters folded into their weights while answers are drawn: the same policy, and no trace of it afterwards."""

import copy

import pytest
import torch

from alignment.evaluation.sampling import folded as folding
from alignment.evaluation.sampling.folded import folded
from alignment.kernels.linear import is_lora_layer
from tests.conftest import tiny_policy

IDS = torch.arange(12).view(2, 6)


def layers(model):
    return [layer for layer in model.modules() if is_lora_layer(layer)]


def shortcuts(model):
    return sum("forward" in vars(layer) for layer in layers(model))


@torch.no_grad()
def test_logits_are_those_of_the_policy_and_no_bit_of_it_changes():
    """Every adapted layer multiplies once, by weight and update."""
    model = tiny_policy(torch.float32, trained=True).eval()
    before = copy.deepcopy(model.state_dict())
    expected = model(input_ids=IDS).logits
    with folded(model, 1):
        assert shortcuts(model) == len(layers(model)) > 0
        found = model(input_ids=IDS).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(found, expected)
        for layer in layers(model):
            layer.lora_A["default"].weight.zero_()
        assert torch.equal(model(input_ids=IDS).logits, found), "the adapter itself has no part in it"
        model.load_state_dict(before)
    assert shortcuts(model) == 0
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_an_error_leaves_no_shortcut():
    """The policy trains on afterwards."""
    model = tiny_policy(torch.float32, trained=True).eval()

    def fail():
        with folded(model, 1):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert shortcuts(model) == 0


def test_where_the_sum_would_be_another_policy_or_memory_is_short_nothing_is_folded(monkeypatch):
    """16 bits round the update away; a switched-off adapter has none; copies need memory, for each of the processes."""
    model = tiny_policy(torch.float32, trained=True).eval()
    for other in (tiny_policy(torch.bfloat16, trained=True), tiny_policy(torch.float32, trained=True)):
        if other.dtype is torch.float32:
            other.base_model.disable_adapter_layers()
        with folded(other, 1):
            assert shortcuts(other) == 0
    size = sum(layer.base_layer.weight.nbytes for layer in layers(model))
    monkeypatch.setattr(folding, "available_memory", lambda: 4 * size)
    for processes, expected in ((2, len(layers(model))), (3, 0)):
        with folded(model, processes):
            assert shortcuts(model) == expected
