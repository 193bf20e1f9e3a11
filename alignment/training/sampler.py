"""Which groups make up each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, count, islice

import numpy as np
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """Batch sampler whose batches are whole optimizer steps, shuffled anew in every epoch from (seed, epoch).

    A last step with fewer than `min_groups` groups joins the one before it, for losses that a single row does not
    define.

    Several `parts` of the data are trained on one after the other, each as if it were all the data: no step mixes
    them, and the order within a part is that of a training on this part alone. Every part gets its share of the
    training, all of its epochs in a row, so that an epoch of this sampler is only a count of steps.

    Attributes:
        num_steps: length of the training, `max_steps` or as many as make `epochs`.
        starts: steps that are done when each part but the first begins.
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
        """`parts` holds the numbers of the groups of every part; None: all groups are one part."""
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
        """Choose the epoch whose steps are next iterated."""
        self.epoch = epoch

    def steps(self, epoch: int) -> list[list[int]]:
        """The steps of one epoch, without side effect."""
        return list(islice(self._all_steps(), epoch * self._length, (epoch + 1) * self._length))

    def first_steps(self, num_steps: int) -> list[list[int]]:
        """The first `num_steps` steps of the whole training, over as many epochs as they take."""
        return list(islice(self._all_steps(), num_steps))

    def _all_steps(self) -> Iterator[list[int]]:
        """Every part's steps up to the start of the next one; the last part has no end."""
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
