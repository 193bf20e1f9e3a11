"""Cohorts: several preference trainings in one process that share one frozen base.

Each member keeps its own policy (its own modules and adapter on the shared base tensors), trainer, optimizer and
files. It trains in its own greenlet, and one greenlet runs at a time: the members take turns, one step each, so each
ends with the bits that it has by itself.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet
from torch import nn

from alignment.scoring.logps import enable_scoring
from alignment.training.objective import PassRunner

T = TypeVar("T")


def share(base: nn.Module) -> nn.Module:
    """A second model with its own modules on the tensors of a base model, after `enable_scoring` on both."""
    kept: list[Any] = [*base.parameters(), *base.buffers()]
    kept += [state for p in base.parameters() if (state := getattr(p, "quant_state", None)) is not None]
    other: Any = copy.deepcopy(base, {id(tensor): tensor for tensor in kept})
    del other.forward  # bound to the first model: the second needs its own
    enable_scoring(other)
    return other


class CohortSlot(PassRunner):
    """One of the cohort's concurrent trainings, as that training sees it."""

    def __init__(self, cohort: Cohort) -> None:
        self._cohort = cohort

    @property
    def width(self) -> int:
        """How many members train at once, at most."""
        return self._cohort.width

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Something that all members share; the first to ask makes it."""
        return self._cohort.once(name, make)

    def base(self, load: Callable[[], nn.Module]) -> nn.Module:
        """A model for this member on the cohort's base tensors; the first member to ask loads them."""
        return self._cohort.base(load)

    def finish(self) -> None:
        """Let the others take a step each."""
        getcurrent().parent.switch()


class Cohort:
    """Trains several policies on one base, `width` at a time.

    Attributes:
        width: how many train at once; when one ends, the next takes its place.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._made: dict[str, Any] = {}
        self._base: nn.Module | None = None

    def run(self, trainings: Sequence[Callable[[CohortSlot], T]]) -> list[T | Exception]:
        """Run all trainings; a failing one does not stop the others.

        Returns:
            What each training returned, or the error that ended it.
        """
        results: list[Any] = [None] * len(trainings)
        waiting = deque(range(len(trainings)))

        def work() -> None:
            while waiting:
                index = waiting.popleft()
                try:
                    results[index] = trainings[index](CohortSlot(self))
                except Exception as error:
                    results[index] = error

        # Greenlets, not threads: each thread would start its own OpenMP team, and these fight for the cores.
        running = [greenlet(work) for _ in range(min(self.width, len(trainings)))]
        turns = deque(running)
        try:
            while turns:
                one = turns.popleft()
                one.switch()
                if not one.dead:
                    turns.append(one)
        finally:
            for unfinished in filter(None, running):  # after an interrupt
                unfinished.throw()
        return results

    def once(self, name: str, make: Callable[[], T]) -> T:
        """See `CohortSlot.once`."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def base(self, load: Callable[[], nn.Module]) -> nn.Module:
        """See `CohortSlot.base`."""
        if self._base is None:
            self._base = load()
        return share(self._base)
