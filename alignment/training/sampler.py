"""Which groups make up each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, count, islice

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
        parts: Sequence[Sequence[int]] | None = None,
        epochs: float = 1.0,
        max_steps: int | None = None,
    ) -> None:
        """`parts` holds the indices of the groups of every part; None makes all groups one part."""
        self.groups_per_step = groups_per_step
        self.seed = seed
        self.min_groups = min_groups
        self.epoch = 0
        self._parts = [range(num_groups)] if parts is None else parts
        lengths = [len(self._part_steps(part, 0)) for part in self._parts]
        self._length = sum(lengths)
        self.num_steps = max_steps or math.ceil(epochs * self._length)
        shares = (self.num_steps * done / self._length for done in accumulate(lengths[:-1]))
        self.starts = tuple(math.floor(share + 0.5) for share in shares)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate over next."""
        self.epoch = epoch

    def steps(self, epoch: int) -> list[list[int]]:
        """The steps of one epoch; does not change the current epoch."""
        return list(islice(self._all_steps(), epoch * self._length, (epoch + 1) * self._length))

    def first_steps(self, num_steps: int) -> list[list[int]]:
        """The first `num_steps` steps of the whole training, over as many epochs as needed."""
        return list(islice(self._all_steps(), num_steps))

    def _all_steps(self) -> Iterator[list[int]]:
        """Each part's steps until the next part starts; the last part never ends."""
        for part, start, end in zip(self._parts, [0, *self.starts], [*self.starts, None], strict=True):
            epochs = chain.from_iterable(self._part_steps(part, epoch) for epoch in count())
            yield from islice(epochs, None if end is None else end - start)

    def _part_steps(self, part: Sequence[int], epoch: int) -> list[list[int]]:
        order = [part[i] for i in np.random.default_rng((self.seed, epoch)).permutation(len(part)).tolist()]
        steps = [order[i : i + self.groups_per_step] for i in range(0, len(order), self.groups_per_step)]
        if len(steps) > 1 and len(steps[-1]) < self.min_groups:
            last = steps.pop()
            steps[-1].extend(last)
        return steps

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.steps(self.epoch))

    def __len__(self) -> int:
        return self._length
