"""What losses of ranked lists share: ragged lists as tables, which completions of a list are better than which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignment.errors import positive
from alignment.losses.base import Loss, LossInputs
from alignment.losses.dpo import log_ratios


def table(values: Tensor, sizes: Tensor) -> Tensor:
    """(lists, longest list): the (S,) values of one list per line, with zeros behind those of a shorter one."""
    return pad_sequence(values.split(sizes.tolist()), batch_first=True)


def members(sizes: Tensor) -> Tensor:
    """(lists, longest list) bool: where such a table has a completion."""
    return torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]


def better_pairs(sizes: Tensor, scores: Tensor | None = None) -> Tensor:
    """(lists, longest list, longest list) bool: whether the first completion is better than the second.

    It stands before it in the list and, where there are (S,) scores, its own is not as low as the other's: completions
    with equal scores are no pair. NaN stands for no score.
    """
    places = torch.arange(int(sizes.max()), device=sizes.device)
    ordered = (places[:, None] < places) & members(sizes)[:, None]
    if scores is None:
        return ordered
    by_list = table(scores, sizes)
    return ordered & ~(by_list[:, :, None] <= by_list[:, None])


def sizes_of(inputs: LossInputs) -> Tensor:
    """(lists,) completions of each list."""
    assert inputs.sizes is not None, "a loss of lists reads how long each list is"
    return inputs.sizes


def scores_of(inputs: LossInputs) -> Tensor:
    """(lists, longest list) float64: the scores, with zeros behind those of a shorter list."""
    assert inputs.scores is not None, "this loss reads scores"
    return table(inputs.scores, sizes_of(inputs))


def lowest(dtype: torch.dtype) -> float:
    """What stands for minus infinity under a softmax: an infinity would give NaN gradients where nothing else is."""
    return torch.finfo(dtype).min


@dataclass(kw_only=True)
class BetaListLoss(Loss):
    """A loss of ranked lists whose rewards are beta times the summed log-ratios to the reference."""

    unit: ClassVar[str] = "list"
    needs_reference: ClassVar[bool] = True

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.beta", self.beta)

    def rewards(self, inputs: LossInputs) -> Tensor:
        """(S,) beta times the log-ratios, differentiable."""
        return self.beta * log_ratios(inputs).sums()
