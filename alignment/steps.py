"""Which groups make up each optimizer step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """Batch sampler whose batches are whole optimizer steps, shuffled anew in every epoch from (seed, epoch).

    A last step with fewer than `min_groups` groups joins the one before it, for losses that a single row does not
    define.
    """

    def __init__(self, num_groups: int, groups_per_step: int, seed: int, min_groups: int = 1) -> None:
        self.num_groups = num_groups
        self.groups_per_step = groups_per_step
        self.seed = seed
        self.min_groups = min_groups
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose steps are next iterated."""
        self.epoch = epoch

    def steps(self, epoch: int) -> list[list[int]]:
        """The steps of one epoch, without side effect."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_groups).tolist()
        steps = [order[i : i + self.groups_per_step] for i in range(0, len(order), self.groups_per_step)]
        if len(steps) > 1 and len(steps[-1]) < self.min_groups:
            last = steps.pop()
            steps[-1].extend(last)
        return steps

    def first_steps(self, num_steps: int) -> list[list[int]]:
        """The first `num_steps` steps of the whole training, over as many epochs as they take."""
        steps: list[list[int]] = []
        epoch = 0
        while len(steps) < num_steps:
            steps.extend(self.steps(epoch))
            epoch += 1
        return steps[:num_steps]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.steps(self.epoch))

    def __len__(self) -> int:
        return len(self.steps(0))
