"""What a loss is: hyper-parameters in a dataclass, mathematics in `__call__`, nothing of models or training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from alignment.config import require
from alignment.ragged import RaggedLogps


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Log-probs of one step (or of a part of it) as a loss sees them.

    S sequences in group order. For a pairwise loss S = 2 * items and sequences 2i, 2i + 1 are the chosen and the
    rejected completion of pair i; for a row-wise loss S = items.

    Attributes:
        policy: log-probs under the policy, differentiable.
        reference: log-probs of the same tokens under the reference, no gradient; None where there is none.
        labels: (S,) bool, True for desirable completions; None for pairs.
    """

    policy: RaggedLogps
    reference: RaggedLogps | None = None
    labels: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Unreduced result of a loss; the trainer averages over the items of the whole optimizer step.

    Attributes:
        losses: (items,) differentiable.
        rewards: (S,) detached; the reward that this objective itself optimises, per sequence, in its own units.
        parts: further detached quantities per item, named, e.g. {"nll": (items,)}.
    """

    losses: Tensor
    rewards: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class Loss(ABC):
    """Base of all losses. A subclass is a dataclass whose fields are its hyper-parameters and its Hydra schema.

    Fields have no defaults: the one home of a default is `conf/loss/<name>.yaml`. `__post_init__` refuses values out
    of range with a `UserError` that names the key as the user wrote it (`loss.beta`).
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    """"pair" (two sequences an item) or "row" (one labelled sequence an item)."""
    needs_reference: ClassVar[bool]
    min_items: ClassVar[int] = 1
    """Fewest items of one optimizer step for which the loss is defined (KTO: 2)."""

    @abstractmethod
    def __call__(self, inputs: LossInputs, statistics: Tensor | None = None) -> LossOutput:
        """Per-item losses. `statistics` is what `statistics()` returned, summed over the whole optimizer step."""

    @abstractmethod
    def at_reference(self, reference: RaggedLogps, labels: Tensor | None) -> Tensor:
        """(items,) float64: the closed form of this loss where the policy equals the reference.

        Written out by hand (DPO: log 2), not by calling the loss: every run compares the two before its first update.
        """

    def companions(self, num_items: int) -> list[tuple[int, int]]:
        """Extra (prompt of item i, completion of item j) sequences that the step needs scored, without gradient."""
        del num_items
        return []

    def statistics(self, companions: LossInputs) -> Tensor | None:
        """(k,) sums over the companion sequences; additive over micro-batches and ranks. None: the loss needs none."""
        del companions
        return None


@dataclass(kw_only=True)
class BetaPairLoss(Loss):
    """A loss of pairs whose strength is `beta`."""

    unit: ClassVar[str] = "pair"

    beta: float

    def __post_init__(self) -> None:
        require(0 < self.beta < math.inf, f"loss.beta must be a finite number above 0, not {self.beta}.")


def per_pair(reference: RaggedLogps, value: float) -> Tensor:
    """(pairs,) float64: the same number for every pair of these sequences."""
    return torch.full((len(reference) // 2,), value, dtype=torch.float64, device=reference.values.device)
