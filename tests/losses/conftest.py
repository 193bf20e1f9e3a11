"""Builders for float64 log-probs, shared by the tests of all losses."""

import pytest
import torch

from alignment.losses import LossInputs
from alignment.types import RaggedLogps


def make_ragged(sequences, dtype=torch.float64, requires_grad=False):
    lengths = [0, *(len(s) for s in sequences)]
    values = torch.tensor([x for s in sequences for x in s], dtype=dtype, requires_grad=requires_grad)
    return RaggedLogps(values, torch.tensor(lengths).cumsum(0))


def make_inputs(policy, reference=None, labels=None, dtype=torch.float64, **more):
    return LossInputs(
        make_ragged(policy, dtype, requires_grad=True),
        None if reference is None else make_ragged(reference, dtype),
        None if labels is None else torch.tensor(labels),
        **more,
    )


def token_gradients(losses, inputs):
    """The gradient of the summed losses as one list of floats per sequence."""
    (gradient,) = torch.autograd.grad(losses.sum(), inputs.policy.values, retain_graph=True)
    ragged = RaggedLogps(gradient, inputs.policy.offsets)
    return [ragged.sequence(i).tolist() for i in range(len(ragged))]


@pytest.fixture
def ragged():
    return make_ragged


@pytest.fixture
def inputs():
    return make_inputs


@pytest.fixture
def gradients():
    return token_gradients
