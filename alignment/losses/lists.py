"""Shared by losses of ranked lists: ragged lists as padded tables, and which completion beats which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignment.errors import positive
from alignment.losses.base import Loss, LossInputs, given
from alignment.losses.dpo import log_ratios


def table(values: Tensor, sizes: Tensor) -> Tensor:
    """(lists, longest list): the (S,) values, one list per line, padded with zeros."""
    return pad_sequence(values.split(sizes.tolist()), batch_first=True)


def members(sizes: Tensor) -> Tensor:
    """(lists, longest list) bool: True where `table` holds a completion, False where it holds padding."""
    return torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]


def better_pairs(sizes: Tensor, scores: Tensor | None = None) -> Tensor:
    """(lists, longest list, longest list) bool: whether the first completion is better than the second.

    The better one stands earlier in the list. With (S,) scores it must also have the higher score, so completions with
    equal scores form no pair; NaN stands for no score and decides nothing.
    """
    places = torch.arange(int(sizes.max()), device=sizes.device)
    ordered = (places[:, None] < places) & members(sizes)[:, None]
    if scores is None:
        return ordered
    by_list = table(scores, sizes)
    return ordered & ~(by_list[:, :, None] <= by_list[:, None])


def sizes_of(inputs: LossInputs) -> Tensor:
    """(lists,) completions of each list."""
    return given(inputs.sizes, "LossInputs.sizes")


def scores_of(inputs: LossInputs) -> Tensor:
    """(lists, longest list) float64: the scores, padded with zeros."""
    return table(given(inputs.scores, "LossInputs.scores"), sizes_of(inputs))


def lowest(dtype: torch.dtype) -> float:
    """A stand-in for minus infinity under a softmax, where a line of true infinities has NaN gradients."""
    return torch.finfo(dtype).min


@dataclass(kw_only=True)
class BetaListLoss(Loss):
    """A loss of ranked lists with rewards of beta times the summed log-ratios to the reference."""

    unit: ClassVar[str] = "list"
    needs_reference: ClassVar[bool] = True

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.beta", self.beta)

    def rewards(self, inputs: LossInputs) -> Tensor:
        """(S,) beta times the log-ratios, differentiable."""
        return self.beta * log_ratios(inputs).sums()
