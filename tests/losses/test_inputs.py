"""Inputs that do not fit together are refused where they are made, in one sentence."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from alignment.losses import DPO, KTO, LossInputs, PlackettLuce, Quantity
from alignment.types import Group, RaggedLogps
from tests.helpers.loss_steps import make_step
from tests.losses.conftest import make_ragged

FOUR = make_ragged([[-1.0]] * 4)
OTHERS = make_ragged([[-1.0]] * 3 + [[-1.0, -2.0]])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"reference": OTHERS}, "LossInputs.reference must have the policy's 4 sequences and 4 tokens, not 4 and 5."),
        (
            {"reference": make_ragged([[-1.0] * 4])},
            "LossInputs.reference must have the policy's 4 sequences and 4 tokens, not 1 and 4.",
        ),
        (
            {"quantities": {Quantity.entropy: OTHERS}},
            "LossInputs.quantities[entropy] must have the policy's 4 sequences and 4 tokens, not 4 and 5.",
        ),
        ({"labels": torch.tensor([True] * 3)}, "LossInputs.labels must have length 4, not 3."),
        ({"labels": torch.tensor([1, 0, 1, 0])}, "LossInputs.labels must be bool, not torch.int64."),
        ({"sizes": torch.tensor([2, 3])}, "LossInputs.sizes must add up to the policy's 4 sequences, not 5."),
        ({"scores": torch.zeros(2)}, "LossInputs.scores must have length 4, not 2."),
        ({"seeds": torch.zeros(4, dtype=torch.int64)}, "LossInputs.seeds must have length 2, not 4."),
        ({"prompts": FOUR}, "LossInputs.prompts must have length 2, not 4."),
        ({"prompts": FOUR, "sizes": torch.tensor([4])}, "LossInputs.prompts must have length 1, not 4."),
    ],
)
def test_parts_that_do_not_fit_together(parts, said):
    with pytest.raises(ValueError, match="LossInputs") as refused:
        LossInputs(FOUR, **parts)
    assert str(refused.value) == said


def test_what_fits():
    labels, ones = torch.tensor([True, False] * 2), torch.ones(4)
    assert LossInputs(FOUR, FOUR, labels, prompts=FOUR, scores=ones, seeds=ones.long()).reference is FOUR
    assert LossInputs(make_ragged([[-1.0]] * 3), make_ragged([[-1.0]] * 3)).labels is None  # mismatched rows of KTO


@pytest.mark.parametrize(
    ("loss", "missing", "said"),
    [
        (DPO(beta=0.1, label_smoothing=0.0), "reference", "LossInputs.reference"),
        (KTO(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0), "labels", "LossInputs.labels"),
        (PlackettLuce(beta=0.1), "sizes", "LossInputs.sizes"),
    ],
)
def test_a_loss_names_the_part_that_it_lacks(loss, missing, said):
    step = replace(make_step(loss), **{missing: None, "seeds": None})
    with pytest.raises(ValueError, match=rf"^This loss needs {said}, and there is none\.$"):
        loss(step, torch.tensor([0.0, 1.0]))


def group(**changed):
    tokens = np.arange(3, dtype=np.int32)
    return Group(**{"prompt": tokens, "completions": (tokens, tokens[:1])} | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompt": np.arange(3)}, "must be int32"),
        ({"completions": (np.arange(3),)}, "must be int32"),
        ({"prompt": np.zeros(0, np.int32)}, "needs a token"),
        ({"completions": ()}, "needs a completion"),
        ({"completions": (np.zeros(0, np.int32),)}, "every completion needs a token"),
        ({"labels": (True,)}, "2 completions cannot have 1 labels"),
        ({"scores": (1.0, 2.0, 3.0)}, "2 completions cannot have 3 scores"),
        ({"scored": (np.ones(3, bool),)}, "2 completions cannot have 1 masks"),
        ({"scored": (np.ones(3, bool), np.ones(2, bool))}, "as long as its completion"),
        ({"scored": (np.ones(3, bool), np.zeros(1, bool))}, "true for a token"),
        ({"scored": (np.ones(3, int), np.ones(1, bool))}, "is bool"),
    ],
)
def test_a_group_that_is_none(changed, said):
    assert len(group().keys()) == 2
    with pytest.raises(ValueError, match=said):
        group(**changed)


@pytest.mark.parametrize(
    ("values", "offsets", "said"),
    [
        (torch.zeros(2, 2), torch.tensor([0, 2]), "one-dimensional"),
        (torch.zeros(2), torch.tensor(2), "one-dimensional"),
        (torch.zeros(0), torch.zeros(0, dtype=torch.int64), "at least one offset"),
        (torch.zeros(2), torch.tensor([0, 2], dtype=torch.int32), "must be int64, not torch.int32"),
    ],
)
def test_ragged_log_probs_of_another_shape(values, offsets, said):
    with pytest.raises(ValueError, match=said):
        RaggedLogps(values, offsets)
