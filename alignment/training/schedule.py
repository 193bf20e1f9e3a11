"""The steps of a preference stage, and after which of them its reference is refreshed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from alignment.config.rounds import RoundReference
from alignment.config.schema import RunConfig
from alignment.errors import UserError
from alignment.reference.base import Reference
from alignment.training.optimizers import as_policy
from alignment.training.sampler import StepSampler
from alignment.types import Group


def consecutive_parts(groups: Sequence[Group], num_parts: int) -> list[np.ndarray]:
    """Indices of the groups of `num_parts` consecutive parts of the data; groups made from one row stay together."""
    sources = np.fromiter((_short_hash(group.source) for group in groups), np.uint64, len(groups))
    _, first, which = np.unique(sources, return_index=True, return_inverse=True)
    rows = first.argsort().argsort()[which]  # of each group, in the order in which the rows come first
    part_of = rows * num_parts // len(first)
    return [np.flatnonzero(part_of == part) for part in range(num_parts)]


def _short_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Schedule:
    """All steps of a training, and when its reference is refreshed.

    With `reference.sync_every=n` the reference moves towards the policy, or becomes it, every n steps. This is TR-DPO
    (Gorbatovski et al. 2024, arXiv:2404.09656), for any loss with a reference. TRL 1.16 refreshes before it evaluates
    the step; here the evaluation comes first, since right after a hard refresh the policy would equal its reference.

    With `reference.parts=n` training takes n consecutive parts of the data one after the other, and the reference
    becomes the policy between them. This is sDPO (Kim et al. 2024, arXiv:2403.19270). The paper starts a new training
    for every part; here it is one training, with one optimizer state and one learning rate schedule over all steps.

    With `onpolicy` there are as many steps as the data would have, and the groups of each are drawn in rounds: step i
    takes the i-th `groups_per_step` of them. Every round may begin with a refresh.

    Attributes:
        sampler: gives the steps to the Trainer.
        steps: the groups of every step.
        refreshes: how many steps come before each refresh, ascending; there is none after the last step.
        rounds: the same of each round whose groups the policy draws; the first one begins the training.
    """

    sampler: StepSampler
    steps: Sequence[list[int]]
    refreshes: tuple[int, ...]
    rounds: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: RunConfig, groups: Sequence[Group]) -> Schedule:
        """The schedule of a run on these groups, in the order of the data.

        Raises:
            UserError: there are too few rows or steps for it.
        """
        trainer, every, num_parts = config.trainer, config.reference.sync_every, config.reference.parts
        least = config.loss.requirements().min_items
        parts = consecutive_parts(groups, num_parts) if num_parts > 1 else None
        if parts is not None and min(map(len, parts)) < least:
            raise UserError(f"reference.parts={num_parts}: there are too few training rows for so many parts.")
        sampler = StepSampler(
            len(groups),
            trainer.groups_per_step,
            config.seed,
            least,
            parts=parts,
            epochs=trainer.epochs,
            max_steps=trainer.max_steps,
        )
        num_steps = sampler.num_steps
        if every is not None and every >= num_steps:
            raise UserError(f"reference.sync_every={every} is never reached: this training has {num_steps} steps.")
        if len({0, *sampler.starts, num_steps}) < num_parts + 1:
            raise UserError(f"reference.parts={num_parts}: too many parts for a training of {num_steps} steps.")
        if config.onpolicy is not None:
            return cls._in_rounds(config, num_steps)
        refreshes = sampler.starts if every is None else tuple(range(every, num_steps, every))
        return cls(sampler, sampler.first_steps(num_steps), refreshes)

    @classmethod
    def _in_rounds(cls, config: RunConfig, num_steps: int) -> Schedule:
        assert config.onpolicy is not None
        size = config.trainer.groups_per_step
        sampler = StepSampler(num_steps * size, size, config.seed, max_steps=num_steps, shuffled=False)
        rounds = tuple(range(0, num_steps, config.onpolicy.every or num_steps))
        refreshes = rounds[1:] if config.onpolicy.reference is RoundReference.round else ()
        return cls(sampler, sampler.first_steps(num_steps), refreshes, rounds)

    def on_file(self, config: RunConfig, num_groups: int) -> Schedule:
        """As many steps on so many groups that are all there before the first one, in the order of data from a file."""
        least, num_steps = config.loss.requirements().min_items, len(self.steps)
        sampler = StepSampler(num_groups, config.trainer.groups_per_step, config.seed, least, max_steps=num_steps)
        return replace(self, sampler=sampler, steps=sampler.first_steps(num_steps))

    def until_refresh(self, step: int) -> Sequence[list[int]]:
        """The steps from number `step`, counted from 0, to the next refresh or round."""
        return self.steps[step : min((end for end in (*self.refreshes, *self.rounds) if end > step), default=None)]


class FollowPolicy(TrainerCallback):
    """Refreshes the reference before the first step that uses it, and saves it in checkpoints.

    So all that is logged, evaluated and saved after a step belongs to the reference that the step trained with.
    """

    def __init__(
        self,
        reference: Reference,
        schedule: Schedule,
        asked: Callable[[Sequence[Sequence[int]]], Sequence[Group]],
    ) -> None:
        """`asked` gives all groups whose reference some steps, and the evaluations between them, need."""
        self._reference = reference
        self._schedule = schedule
        self._asked = asked

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refresh the reference where one is due."""
        step = state.global_step
        if step in self._schedule.refreshes:
            as_policy(kwargs.get("optimizer"))
            self._reference.refresh(step, self._asked(self._schedule.until_refresh(step)))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the reference to the checkpoint."""
        if state.is_world_process_zero:
            self._reference.save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}")
