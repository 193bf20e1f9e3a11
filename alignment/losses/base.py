"""What a loss is: a dataclass of hyper-parameters with its mathematics in `__call__`. It knows no model, no trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import EnumType
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from alignment.errors import positive, require
from alignment.types import Quantity, RaggedLogps

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Counts over a whole optimizer step: the denominators of its means, the same for every micro-batch.

    Attributes:
        items: pairs, rows or lists.
        tokens: the scored ones of the preferred completions: chosen in a pair, desirable in a row, first of a list.
        prompt_tokens: of their prompts, without the first token (nothing predicts it).
    """

    items: int
    tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The input of a loss: one step, or a part of one.

    It holds S sequences in group order. In pairs S = 2 * items: sequences 2i and 2i + 1 are the chosen and the rejected
    completion of pair i. In rows S = items. In lists `sizes` counts the sequences of each item, best first.

    A sequence holds the scored tokens of a completion and no others, so sums, means and lengths are over these. Where a
    completion has several turns, they are the assistant's; turns of users and tools are context.

    Attributes:
        policy: log-probs under the policy, differentiable.
        reference: log-probs of the same tokens under the reference, without gradient; None without a reference.
        labels: (S,) bool, True for desirable completions; None for pairs and lists.
        sizes: (items,) int64, completions of each list; None for pairs and rows.
        scores: (S,) float64 from a judge or a reward model, NaN for items without; None if no item has any.
        prompts: the policy's log-probs of every item's prompt tokens but the first, for losses that ask for them.
        quantities: the quantities of `Requirements.quantities`, per scored token like `policy`.
        state: `LossOutput.state` of the previous step, or `Loss.initial_state()`.
        totals: counts over the whole step; None if these inputs are the whole step.
        seeds: (items,) int64, new for every step and derived from the item's content. All randomness comes from them,
            so the order of the items and their split into parts change no draw. None outside training.
        lengths: (S,) int64, scored tokens of each completion, for a loss that reads rewards: `policy` then holds one
            number for each completion, the reward that the model's head gives it. None where it holds log-probs.
        drawn: log-probs of the same tokens under the policy that drew them, for a loss that draws; else None.

    Raises:
        ValueError: parts that do not fit together.
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
    lengths: Tensor | None = None
    drawn: RaggedLogps | None = None

    def __post_init__(self) -> None:
        # Shapes only: looking at values would make the training pass wait for its device.
        found = {f"quantities[{quantity.name}]": ragged for quantity, ragged in self.quantities.items()}
        for name, ragged in {"reference": self.reference, "drawn": self.drawn, **found}.items():
            if ragged is not None and (len(ragged), len(ragged.values)) != (len(self.policy), len(self.policy.values)):
                raise ValueError(
                    f"LossInputs.{name} must have the policy's {len(self.policy)} sequences and "
                    f"{len(self.policy.values)} tokens, not {len(ragged)} and {len(ragged.values)}."
                )
        if self.labels is not None and self.labels.dtype != torch.bool:
            raise ValueError(f"LossInputs.labels must be bool, not {self.labels.dtype}.")
        sequences, items = len(self.policy), self._items()
        if self.sizes is not None and self.sizes.device.type == "cpu" and (total := int(self.sizes.sum())) != sequences:
            raise ValueError(f"LossInputs.sizes must add up to the policy's {sequences} sequences, not {total}.")
        lengths = {"labels": sequences, "scores": sequences, "prompts": items, "seeds": items, "lengths": sequences}
        for name, length in lengths.items():
            part = getattr(self, name)
            if part is not None and len(part) != length:
                raise ValueError(f"LossInputs.{name} must have length {length}, not {len(part)}.")

    def _items(self) -> int:
        """Pairs, rows or lists."""
        if self.sizes is not None:
            return len(self.sizes)
        return len(self.policy) // (2 if self.labels is None else 1)

    def preferred(self) -> Tensor:
        """(S,) bool: chosen in a pair, desirable in a row, first of a list."""
        if self.labels is not None:
            return self.labels
        preferred = torch.zeros(len(self.policy), dtype=torch.bool, device=self.policy.values.device)
        return preferred.index_fill_(0, self.first_sequences(), True)

    def first_sequences(self) -> Tensor:
        """(items,) int64: the first sequence of each pair or list. As an index it makes no host wait; a mask does."""
        if self.sizes is not None:
            return self.sizes.cumsum(0) - self.sizes
        return torch.arange(0, len(self.policy), 2, device=self.policy.values.device)

    def step_totals(self) -> StepTotals:
        """Counts over the whole step: `totals`, or counted here if these inputs are the whole step."""
        if self.totals is not None:
            return self.totals
        preferred = self.preferred()
        return StepTotals(
            items=len(self._counts(preferred)),
            tokens=int(self.policy.lengths[preferred].sum()),
            prompt_tokens=0 if self.prompts is None else int(self.prompts.lengths[self._counts(preferred)].sum()),
        )

    def _counts(self, preferred: Tensor) -> Tensor:
        """(items,) bool: whether the item's prompt counts. Every pair and every list has a preferred completion."""
        return preferred if self.labels is not None else torch.ones_like(preferred[preferred])


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The unreduced result of a loss. The trainer averages over the items of the whole optimizer step.

    Attributes:
        losses: (items,) differentiable.
        rewards: (S,) detached: the reward of each sequence that this objective optimises, in its own units.
        parts: more detached numbers per item, by name, e.g. {"nll": (items,)}.
        state: the running state after this step, for losses that have one.
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
        reference: whether it reads `LossInputs.reference`.
        min_items: the fewest items of an optimizer step for which the loss is defined (KTO: 2).
        whole_step: whether an item's loss depends on other items. Such a loss gets the whole step at once.
        scores, prompts: whether it reads these inputs.
        quantities: the quantities that it reads.
        density_weights: whether to weight rows by the density of their prompts before training (BCO).
        orders_ties: whether it ranks answers with equal scores, in the order of the file.
        rewards: whether `LossInputs.policy` holds a reward of each completion in place of log-probs: a head on the
            model gives it, and what trains is a reward model.
        draws: whether its items are answers that the policy draws while it trains. All are desirable rows, and the
            reference is a teacher.
        likeliest: over how many of the teacher's likeliest tokens a forward KL goes.
        renormalise: whether the probabilities of these are scaled to add up to 1.
    """

    unit: str
    reference: bool
    min_items: int
    whole_step: bool
    scores: bool
    prompts: bool
    quantities: frozenset[Quantity]
    density_weights: bool = False
    orders_ties: bool = False
    rewards: bool = False
    draws: bool = False
    likeliest: int = 0
    renormalise: bool = False


@dataclass(kw_only=True)
class Loss(ABC):
    """The base of all losses. A subclass is a dataclass; its fields are its hyper-parameters and its Hydra schema.

    Fields have no defaults: defaults live in `conf/loss/<name>.yaml` and nowhere else. `__post_init__` refuses values
    that are out of range or would have no effect. Its `UserError` names the key as you write it (`loss.beta`).
    """

    name: ClassVar[str]
    """The key that chooses it: `loss=<name>`."""
    title: ClassVar[str]
    """Its name as its paper writes it, for tables and pages; only losses of this package need one."""
    purpose: ClassVar[str] = ""
    """What it is for, in one short line for the table of losses."""
    uncertain: ClassVar[str] = ""
    """What could not be checked against its paper; empty if everything was."""
    unit: ClassVar[str]
    needs_reference: ClassVar[bool]
    min_items: ClassVar[int] = 1
    whole_step: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False
    reads_rewards: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    orders_ties: ClassVar[bool] = False
    discontinuous_at_reference: ClassVar[bool] = False
    """Whether rounding can make the loss jump where the policy equals the reference: the loss depends on the order of
    the rewards, and there all rewards are equal."""
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
        """What the trainer has to provide. By default it is the same for all settings of a class."""
        return Requirements(
            unit=self.unit,
            reference=self.needs_reference,
            min_items=self.min_items,
            whole_step=self.whole_step,
            scores=self.needs_scores,
            prompts=False,
            quantities=self.quantities,
            orders_ties=self.orders_ties,
            rewards=self.reads_rewards,
            draws=self.draws,
        )

    @abstractmethod
    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Per-item losses. `step_statistics` is what the method of that name returned, summed over the step."""

    @abstractmethod
    def at_reference(self, inputs: LossInputs) -> Tensor:
        """(items,) float64: the closed form of this loss where the policy equals the reference.

        Write it out by hand (DPO: log 2) instead of calling the loss: every run compares the two before its first
        update.

        Args:
            inputs: float64, with the policy as its own reference and without seeds.
        """

    def problem(self, completions: int, scores: tuple[float, ...] | None) -> str | None:
        """Why this loss cannot read an item with that many completions and these scores; None if it can.

        The text continues a sentence about the row: "has 2 completions, where three are read".
        """
        del completions, scores
        return None

    def initial_state(self) -> dict[str, float]:
        """The running state before the first step. Checkpoints keep it."""
        return {}

    def mismatched(self, num_items: int) -> list[tuple[int, int]]:
        """Pairs (i, j): also score the completion of sequence j under the prompt of sequence i, without gradient."""
        del num_items
        return []

    def step_statistics(self, mismatched: LossInputs) -> Tensor | None:
        """(k,) sums over the mismatched sequences, additive over micro-batches and ranks; None if it needs none."""
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
    """A loss of pairs with a strength `beta`."""

    unit: ClassVar[str] = "pair"

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.beta", self.beta)


@dataclass(kw_only=True)
class WeightedRowLoss(Loss):
    """A loss of labelled rows with a strength `beta` and a weight for each of the two labels."""

    unit: ClassVar[str] = "row"

    beta: float
    desirable_weight: float
    undesirable_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("beta", "desirable_weight", "undesirable_weight"):
            positive(f"loss.{key}", getattr(self, key))

    def weights_of(self, like: Tensor, labels: Tensor) -> Tensor:
        """(rows,) in the dtype of `like`; built there, since `torch.where` on numbers would round them to float32."""
        return like.new_tensor([self.undesirable_weight, self.desirable_weight])[labels.long()]


def given(value: T | None, name: str) -> T:
    """The value of this name, which the loss needs.

    Raises:
        ValueError: there is none.
    """
    if value is None:
        raise ValueError(f"This loss needs {name}, and there is none.")
    return value


def per_pair(reference: RaggedLogps, value: float) -> Tensor:
    """(pairs,) float64: the same number for every pair of these sequences."""
    return torch.full((len(reference) // 2,), value, dtype=torch.float64, device=reference.values.device)
