"""Which plan fits into the memory that there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from alignment.scoring.layout import PASS_COST
from alignment.training.memory import _ROUNDING, RECOMPUTED, USEFUL_TOKENS, Layer, Sizes


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of a step at its peak, by what they are for."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    buffers: int
    context: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class Room:
    """Where a step has to fit.

    Attributes:
        device: "cpu" or "cuda".
        limit: bytes that all of `Needs` may come to.
        context: bytes that are taken by other things than the model and its step.
    """

    device: str
    limit: int
    context: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How a stage runs its steps, and what it will need.

    Attributes:
        tokens_per_batch: positions of one pass, at most.
        reference_tokens: the same for the reference pass, which keeps nothing for gradients.
        checkpoint_every: 0: no layer is checkpointed; k: the first of every k layers is.
        needs: of the largest pass of a step.
        limit: bytes that were planned with.
        fits: whether the largest group of the data fits.
        estimate: see `Sizes`.
    """

    tokens_per_batch: int
    reference_tokens: int
    checkpoint_every: int
    needs: Needs
    limit: int
    fits: bool
    estimate: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The plan that `to_dict` wrote."""
        return cls(**{**values, "needs": Needs(**values["needs"])})


def describe_checkpointing(every: int) -> str:
    """`checkpoint_every` in words."""
    if every == 0:
        return "no checkpointing"
    if every == 1:
        return "every layer checkpointed"
    return f"one layer in {every} checkpointed"


# What a step needs, and the choice


def activation_bytes(layers: Sequence[Layer], every: int, tokens: int) -> int:
    """The most that the layers hold at one time in the forward and backward pass of so many positions.

    The backward pass goes through the layers from the last one. At each, all before it hold what they saved; a layer
    that is checkpointed is there run again, and holds all that it would have saved.
    """
    held = peak = 0
    for index, layer in enumerate(layers):
        peak = max(peak, held + (layer.saved + layer.working) * tokens + layer.copies)
        checkpointed = every and index % every == 0
        held += layer.entering * tokens if checkpointed else layer.saved * tokens + layer.copies
    return peak


def step_needs(sizes: Sizes, every: int, tokens: int, context: int) -> Needs:
    """Memory of a step whose largest pass has so many positions."""
    return Needs(
        weights=sizes.weights,
        adapter=sizes.adapter,
        gradients=sizes.gradients,
        optimizer=sizes.optimizer,
        activations=activation_bytes(sizes.layers, every, tokens) + sizes.ends * tokens,
        head=min(sizes.head * tokens, sizes.head_limit),
        buffers=sizes.buffers,
        context=context,
    )


def relative_time(layers: int, every: int, tokens: int, device: str) -> float:
    """Time per position, where 1 is that of an endless pass without checkpointing."""
    recomputed = math.ceil(layers / every) / layers if every else 0.0
    return (1 + RECOMPUTED * recomputed) * (1 + PASS_COST[device] / tokens)


def fitting_tokens(sizes: Sizes, every: int, room: Room, most: int) -> int:
    """The largest budget up to `most` that fits, a multiple of 64 if it is below `most`; 0 if none does."""
    if step_needs(sizes, every, most, room.context).total <= room.limit:
        return most
    low, high = 0, most // _ROUNDING + 1  # in units; `low` fits or is 0, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = step_needs(sizes, every, middle * _ROUNDING, room.context).total <= room.limit
        low, high = (middle, high) if fits else (low, middle)
    return low * _ROUNDING


def make_plan(
    sizes: Sizes,
    room: Room,
    *,
    longest: int,
    step_tokens: int,
    tokens_per_batch: int | None,
    checkpoint_every: int | None,
    members: int = 1,
) -> Plan:
    """The fastest way to run a step in the room that there is.

    Args:
        sizes: of the policy.
        room: where it has to fit.
        longest: positions of the largest group, which has to fit a pass whatever the budget is.
        step_tokens: positions of a whole step, beyond which a larger budget changes nothing.
        tokens_per_batch: given, or None to choose it.
        checkpoint_every: given, or None to choose it.
        members: of a cohort that share a pass. On a CPU the narrow products with the adapter of each want as many rows
            as in a pass of its own.
    """
    count = len(sizes.layers)
    options = [checkpoint_every] if checkpoint_every is not None else [0, *range(count, 0, -1)]
    useful = max(USEFUL_TOKENS[room.device] * (members if room.device == "cpu" else 1), longest)
    best: tuple[float, int, int] | None = None
    for every in options:
        tokens = tokens_per_batch or fitting_tokens(sizes, every, room, useful)
        largest = max(longest, min(tokens, step_tokens))
        if tokens_per_batch is None and tokens < longest:
            continue
        if step_needs(sizes, every, largest, room.context).total > room.limit:
            continue
        time = relative_time(max(1, count), every, largest, room.device)
        if best is None or time < best[0]:
            best = (time, every, tokens)
    fits = best is not None
    if best is None:
        best = (0.0, options[-1], tokens_per_batch or longest)
    _, every, tokens = best
    largest = max(longest, min(tokens, step_tokens))
    # Without gradients one layer's values at a time are held, and there is nothing of the optimizer yet.
    passing = replace(sizes, gradients=0, optimizer=0, layers=sizes.layers[:1])
    scoring = tokens_per_batch or max(tokens, fitting_tokens(passing, 0, room, useful))
    needs = step_needs(sizes, every, largest, room.context)
    return Plan(tokens, scoring, every, needs, room.limit, fits, sizes.estimate)
