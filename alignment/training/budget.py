"""Chooses the fastest plan that fits into the available memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from alignment.training.layer_memory import Layer
from alignment.training.memory import FIXED_COST, RECOMPUTED, ROUNDING, USEFUL_TOKENS, Sizes


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of a step at its peak, by purpose."""

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
        """The sum."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that a step has to fit into.

    Attributes:
        device: "cpu" or "cuda".
        limit: bytes that all of `Needs` may add up to.
        context: bytes taken by anything but the model and its step.
    """

    device: str
    limit: int
    context: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How a stage runs its steps, and the memory that it will need.

    Attributes:
        tokens_per_batch: at most this many positions in one pass.
        reference_tokens: the same for reference passes, which keep nothing for gradients.
        checkpoint_every: 0: no layer is checkpointed; k: the first of every k layers is.
        needs: memory of the step's largest pass.
        limit: bytes that the plan may use.
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


# What a step needs, and the choice of a plan


def activation_bytes(layers: Sequence[Layer], every: int, tokens: int) -> tuple[int, int]:
    """Bytes of the layers for a pass of this many positions: held when its forward pass ends, and the most after that.

    The backward pass starts at the last layer. At each layer all earlier ones still hold what they saved. A
    checkpointed layer runs again at that point and then holds all that it would have saved.
    """
    held = peak = 0
    for index, layer in enumerate(layers):
        peak = max(peak, held + (layer.saved + layer.working) * tokens + layer.copies)
        checkpointed = every and index % every == 0
        held += layer.entering * tokens if checkpointed else layer.saved * tokens + layer.copies
    return held, peak


def step_needs(sizes: Sizes, every: int, tokens: int, context: int, alone: bool = False) -> Needs:
    """Memory of a step whose largest pass has this many positions.

    The head has its logits while all layers hold what they saved. They are gone when the backward pass reaches the
    layers, and all is gone when the weights are updated. The largest of these moments counts. Where a pass of a whole
    model is `alone` in its step, its gradients come only as the activations go, so both are never there at once.
    """
    held, peak = activation_bytes(sizes.layers, every, tokens)
    held += sizes.ends * tokens
    head = min(sizes.head * tokens, sizes.head_limit)
    if max(peak, sizes.update) > held + head:
        held, head = max(peak, sizes.update), 0
    if alone and sizes.layers and not sizes.adapter:
        last = max(sizes.layers[0].saved * tokens, sizes.update)
        if (spared := min(sizes.gradients, held + head - last)) > 0:
            held, head = held + head - spared, 0
    return Needs(
        weights=sizes.weights,
        adapter=sizes.adapter,
        gradients=sizes.gradients,
        optimizer=sizes.optimizer,
        activations=held,
        head=head,
        buffers=sizes.buffers,
        context=context,
    )


def relative_time(sizes: Sizes, every: int, tokens: int, device: str) -> float:
    """Time per position, relative to an infinitely long pass without checkpointing.

    A GPU works while the host launches, so only the longer of the two counts.
    """
    layers = max(1, len(sizes.layers))
    recomputed = math.ceil(layers / every) / layers if every else 0.0
    return (1 + RECOMPUTED * recomputed) * max(
        1 + sizes.fixed_share * FIXED_COST[device] / tokens, sizes.launched / tokens
    )


def useful_tokens(sizes: Sizes, device: str) -> int:
    """Positions of a pass above which larger passes gain no time: a GPU works longer than the host, by far."""
    least, most = USEFUL_TOKENS[device]
    return min(max(4 * sizes.launched // ROUNDING * ROUNDING, least), most)


def fitting_tokens(sizes: Sizes, every: int, room: Room, most: int) -> int:
    """The largest budget up to `most` that fits, a multiple of `ROUNDING` if below `most`; 0 if none fits."""
    if step_needs(sizes, every, most, room.context).total <= room.limit:
        return most
    low, high = 0, most // ROUNDING + 1  # in units; `low` fits or is 0, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = step_needs(sizes, every, middle * ROUNDING, room.context).total <= room.limit
        low, high = (middle, high) if fits else (low, middle)
    return low * ROUNDING


def make_plan(
    sizes: Sizes,
    room: Room,
    *,
    longest: int,
    step_tokens: int,
    tokens_per_batch: int | None,
    checkpoint_every: int | None,
) -> Plan:
    """The fastest way to run a step in this room.

    Args:
        sizes: of the policy.
        room: the memory that it has to fit into.
        longest: positions of the largest group, which must fit into one pass with any budget.
        step_tokens: positions of a whole step; a larger budget changes nothing.
        tokens_per_batch: fixed, or None to choose it.
        checkpoint_every: fixed, or None to choose it.
    """
    count = len(sizes.layers)
    options = [checkpoint_every] if checkpoint_every is not None else [0, *range(count, 0, -1)]
    useful = max(useful_tokens(sizes, room.device), longest)
    best: tuple[float, int, int] | None = None
    for every in options:
        tokens = tokens_per_batch or fitting_tokens(sizes, every, room, useful)
        largest = max(longest, min(tokens, step_tokens))
        if tokens_per_batch is None and tokens < longest:
            continue
        if step_needs(sizes, every, largest, room.context, largest >= step_tokens).total > room.limit:
            continue
        time = relative_time(sizes, every, largest, room.device)
        if best is None or time < best[0]:
            best = (time, every, tokens)
    fits = best is not None
    if best is None:
        best = (0.0, options[-1], tokens_per_batch or longest)
    _, every, tokens = best
    largest = max(longest, min(tokens, step_tokens))
    # Reference passes hold one layer's values at a time, and the optimizer does not exist yet.
    one = sorted(sizes.layers, key=lambda layer: layer.saved)[-1:]  # below the lowest that trains they keep nothing
    passing = replace(sizes, gradients=0, optimizer=0, update=0, layers=tuple(one))
    scoring = tokens_per_batch or max(tokens, fitting_tokens(passing, 0, room, useful))
    needs = step_needs(sizes, every, largest, room.context, largest >= step_tokens)
    return Plan(tokens, scoring, every, needs, room.limit, fits, sizes.estimate)
