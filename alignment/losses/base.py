"""What a loss is: hyper-parameters in a dataclass, mathematics in `__call__`, nothing of models or training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import EnumType
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from torch import Tensor

from alignment.errors import positive, require
from alignment.types import Quantity, RaggedLogps


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Counts over a whole optimizer step, whatever part of it is at hand: what a mean over its tokens divides by.

    Attributes:
        items: pairs, rows or lists.
        tokens: of the preferred completions: chosen in a pair, desirable in a row, first of a list.
        prompt_tokens: of their prompts, without the first token, which nothing predicts.
    """

    items: int
    tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What a loss sees of one step (or of a part of it).

    S sequences in group order. For a loss of pairs S = 2 * items and sequences 2i, 2i + 1 are the chosen and the
    rejected completion of pair i; for a loss of rows S = items; for a loss of lists `sizes` says how many sequences
    each item has, best first.

    Attributes:
        policy: log-probs under the policy, differentiable.
        reference: log-probs of the same tokens under the reference, no gradient; None where there is none.
        labels: (S,) bool, True for desirable completions; None for pairs and lists.
        sizes: (items,) int64, completions of each list; None for pairs and rows.
        scores: (S,) float64, what a judge or a reward model gave the completions, not a number for items without; None
            where none has any.
        prompts: the policy's log-probs of every item's prompt tokens but the first, for losses that ask for them.
        quantities: what the loss asks for by `Requirements.quantities`, per completion token like `policy`.
        state: what `LossOutput.state` was after the step before, or `Loss.initial_state()`.
        totals: counts over the whole step; None where these inputs are the whole step.
        seeds: (items,) int64, drawn anew for every step from the item's content: the source of all randomness, so that
            neither the order of the items nor their split into parts changes a draw. None outside training.
    """

    policy: RaggedLogps
    reference: RaggedLogps | None = None
    labels: Tensor | None = None
    sizes: Tensor | None = None
    scores: Tensor | None = None
    prompts: RaggedLogps | None = None
    quantities: Mapping[Quantity, RaggedLogps] = field(default_factory=dict)
    state: Mapping[str, float] = field(default_factory=dict)
    totals: StepTotals | None = None
    seeds: Tensor | None = None

    def preferred(self) -> Tensor:
        """(S,) bool: chosen in a pair, desirable in a row, first of a list."""
        if self.labels is not None:
            return self.labels
        preferred = torch.zeros(len(self.policy), dtype=torch.bool, device=self.policy.values.device)
        if self.sizes is None:
            preferred[0::2] = True
        else:
            preferred[self.sizes.cumsum(0) - self.sizes] = True
        return preferred

    def step_totals(self) -> StepTotals:
        """Counts over the whole step, taken from these inputs where they are all of it."""
        if self.totals is not None:
            return self.totals
        preferred = self.preferred()
        return StepTotals(
            items=len(self._counts(preferred)),
            tokens=int(self.policy.lengths[preferred].sum()),
            prompt_tokens=0 if self.prompts is None else int(self.prompts.lengths[self._counts(preferred)].sum()),
        )

    def _counts(self, preferred: Tensor) -> Tensor:
        """(items,) bool: whose prompts count; every pair and list has a preferred completion."""
        return preferred if self.labels is not None else torch.ones_like(preferred[preferred])


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Unreduced result of a loss; the trainer averages over the items of the whole optimizer step.

    Attributes:
        losses: (items,) differentiable.
        rewards: (S,) detached; the reward that this objective itself optimises, per sequence, in its own units.
        parts: further detached quantities per item, named, e.g. {"nll": (items,)}.
        state: the running state after this step; only of losses that have one, which see whole steps.
    """

    losses: Tensor
    rewards: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a loss with these settings needs from the trainer.

    Attributes:
        unit: "pair" (two sequences an item), "row" (one labelled sequence an item) or "list" (two or more).
        reference: whether `LossInputs.reference` must be there.
        min_items: fewest items of one optimizer step for which the loss is defined (KTO: 2).
        whole_step: whether an item's loss depends on other items of the step, so that it is given all of them at once.
        scores, prompts: whether it reads these inputs.
        quantities: which of these it reads.
        density_weights: whether rows are to be weighted by how their prompts are spread, before training (BCO).
    """

    unit: str
    reference: bool
    min_items: int
    whole_step: bool
    scores: bool
    prompts: bool
    quantities: frozenset[Quantity]
    density_weights: bool = False


@dataclass(kw_only=True)
class Loss(ABC):
    """Base of all losses. A subclass is a dataclass whose fields are its hyper-parameters and its Hydra schema.

    Fields have no defaults: the one home of a default is `conf/loss/<name>.yaml`. `__post_init__` refuses values out
    of range, and values that would have no effect, with a `UserError` that names the key as the user wrote it
    (`loss.beta`).
    """

    name: ClassVar[str]
    """The key that chooses it: `loss=<name>`."""
    title: ClassVar[str]
    """Its name as its paper writes it, for tables and pages; only losses of this package need one."""
    purpose: ClassVar[str] = ""
    """What it is for, in one short line of the table of losses."""
    uncertain: ClassVar[str] = ""
    """What of it could not be checked against its paper; empty where everything was."""
    unit: ClassVar[str]
    needs_reference: ClassVar[bool]
    min_items: ClassVar[int] = 1
    whole_step: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False
    discontinuous_at_reference: ClassVar[bool] = False
    """Whether rounding may change its value at the reference by more than rounding: it depends on an order of rewards,
    and there all are equal."""
    quantities: ClassVar[frozenset[Quantity]] = frozenset()

    def __post_init__(self) -> None:
        """Give every field its declared type: call this first where you override it.

        Raises:
            UserError: a value of another type, or a string that names no member of the field's enum.
        """
        types = get_type_hints(type(self))
        for item in fields(self):
            setattr(self, item.name, as_typed(f"loss.{item.name}", types[item.name], getattr(self, item.name)))

    def requirements(self) -> Requirements:
        """What the trainer has to provide; by default the same for all settings of a class."""
        return Requirements(
            unit=self.unit,
            reference=self.needs_reference,
            min_items=self.min_items,
            whole_step=self.whole_step,
            scores=self.needs_scores,
            prompts=False,
            quantities=self.quantities,
        )

    @abstractmethod
    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Per-item losses. `step_statistics` is what the method of that name returned, summed over the step."""

    @abstractmethod
    def at_reference(self, inputs: LossInputs) -> Tensor:
        """(items,) float64: the closed form of this loss where the policy equals the reference.

        Written out by hand (DPO: log 2), not by calling the loss: every run compares the two before its first update.

        Args:
            inputs: in float64, those of a policy that is its own reference; nothing is drawn.
        """

    def problem(self, completions: int, scores: tuple[float, ...] | None) -> str | None:
        """Why items of so many completions with these scores are none for this loss; None: they are.

        Written to be read after the row that has it: "has two completions, and ...".
        """
        del completions, scores
        return None

    def initial_state(self) -> dict[str, float]:
        """The running state before the first step; it is kept in checkpoints."""
        return {}

    def mismatched(self, num_items: int) -> list[tuple[int, int]]:
        """Extra (prompt of sequence i, completion of sequence j) that the step needs scored, without gradient."""
        del num_items
        return []

    def step_statistics(self, mismatched: LossInputs) -> Tensor | None:
        """(k,) sums over the mismatched sequences, additive over micro-batches and ranks. None: the loss needs none."""
        del mismatched
        return None


def as_typed(key: str, kind: Any, value: Any) -> Any:
    """The value of a setting; a string becomes the member of an enum that it names.

    Losses compare enums by `is`: a string that slipped through would silently choose another formula.

    Raises:
        UserError: the value is not of that type.
    """
    if isinstance(kind, UnionType):
        if value is None and NoneType in get_args(kind):
            return None
        kind = next(option for option in get_args(kind) if option is not NoneType)
    if isinstance(kind, EnumType):
        if isinstance(value, str) and value in kind.__members__:
            return kind[value]
        require(isinstance(value, kind), f"{key} must be one of {', '.join(kind.__members__)}, not {value!r}.")
    elif kind in _ACCEPTED:
        accepted, words = _ACCEPTED[kind]
        right = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
        require(right, f"{key} must be {words}, not {value!r}.")
    return value


_ACCEPTED: dict[Any, tuple[type, str]] = {
    float: (Real, "a number"),
    int: (Integral, "a whole number"),
    bool: (bool, "true or false"),
}


@dataclass(kw_only=True)
class BetaPairLoss(Loss):
    """A loss of pairs whose strength is `beta`."""

    unit: ClassVar[str] = "pair"

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.beta", self.beta)


def per_pair(reference: RaggedLogps, value: float) -> Tensor:
    """(pairs,) float64: the same number for every pair of these sequences."""
    return torch.full((len(reference) // 2,), value, dtype=torch.float64, device=reference.values.device)
