"""Which groups make up each optimizer step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import overload

import numpy as np
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """Batch sampler whose batches are whole optimizer steps, shuffled in every epoch from (seed, epoch).

    If the last step has fewer than `min_groups` groups, it joins the one before: some losses need more than one row.

    With several `parts` of the data, training takes them one after the other. No step mixes parts, and the order within
    a part is the same as when you train on this part alone. Each part has all of its epochs in a row, so an epoch of
    this sampler is only a number of steps.

    Attributes:
        num_steps: length of the training: `max_steps`, or enough for `epochs`.
        starts: for each part but the first, how many steps come before it.
    """

    def __init__(
        self,
        num_groups: int,
        groups_per_step: int,
        seed: int,
        min_groups: int = 1,
        *,
        parts: Sequence[Sequence[int] | np.ndarray] | None = None,
        epochs: float = 1.0,
        max_steps: int | None = None,
        shuffled: bool = True,
    ) -> None:
        """`parts` holds the indices of the groups of every part; None makes all groups one part.

        Without `shuffled` the groups are taken as they come.
        """
        self.groups_per_step = groups_per_step
        self.seed = seed
        self.min_groups = min_groups
        self.epoch = 0
        self._shuffled = shuffled
        self._parts: Sequence[Sequence[int] | np.ndarray] = [range(num_groups)] if parts is None else parts
        self._lengths = [self._num_steps(len(part)) for part in self._parts]
        self._length = sum(self._lengths)
        self.num_steps = max_steps or math.ceil(epochs * self._length)
        shares = (self.num_steps * done / self._length for done in accumulate(self._lengths[:-1]))
        self.starts = tuple(math.floor(share + 0.5) for share in shares)
        self._order: tuple[tuple[int, int], np.ndarray] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate over next."""
        self.epoch = epoch

    def steps(self, epoch: int) -> Steps:
        """The steps of one epoch; does not change the current epoch."""
        return Steps(self, range(epoch * self._length, (epoch + 1) * self._length))

    def first_steps(self, num_steps: int) -> Steps:
        """The first `num_steps` steps of the whole training, over as many epochs as needed."""
        return Steps(self, range(num_steps))

    def step(self, number: int) -> list[int]:
        """The groups of a step, counted from 0; each part's steps go on until the next part starts, the last's on."""
        part = bisect_right(self.starts, number)
        epoch, index = divmod(number - (0, *self.starts)[part], self._lengths[part])
        order = self._part_order(part, epoch)
        start, is_last = index * self.groups_per_step, index == self._lengths[part] - 1
        found: list[int] = order[start : len(order) if is_last else start + self.groups_per_step].tolist()
        return found

    def _num_steps(self, num_groups: int) -> int:
        steps = math.ceil(num_groups / self.groups_per_step)
        last = num_groups - (steps - 1) * self.groups_per_step
        return steps - 1 if steps > 1 and last < self.min_groups else steps

    def _part_order(self, part: int, epoch: int) -> np.ndarray:
        """(groups,) of a part in the order of one of its epochs; that of the last call is kept."""
        if self._order is None or self._order[0] != (part, epoch):
            self._order = None  # so that never two of them are in memory
            groups = self._parts[part]
            number = len(groups)
            generator = np.random.default_rng((self.seed, epoch))
            order = generator.permutation(number) if self._shuffled else np.arange(number)
            if isinstance(groups, range):  # which is an array only where it must be
                order *= groups.step
                order += groups.start
            else:
                order = np.asarray(groups)[order]
            self._order = (part, epoch), order
        return self._order[1]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.steps(self.epoch))

    def __len__(self) -> int:
        return self._length


@dataclass(frozen=True, slots=True)
class Steps(Sequence[list[int]]):
    """Steps of a training, each made when it is asked for: however many there are, they take no memory."""

    sampler: StepSampler
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> Steps: ...
    def __getitem__(self, index: int | slice) -> list[int] | Steps:
        if isinstance(index, slice):
            return Steps(self.sampler, self.numbers[index])
        return self.sampler.step(self.numbers[index])
