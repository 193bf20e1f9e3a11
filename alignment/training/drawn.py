"""Answers to the held-out prompts by the policy as it is now, for losses whose policy is compared with a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.evaluation.sampling.answer import Sampling
from alignment.evaluation.sampling.draw import Engine, draw
from alignment.evaluation.sampling.store import AnswerStore
from alignment.types import Group


@dataclass(frozen=True, slots=True)
class HeldOutDraws:
    """Draws one answer to each held-out prompt, always with the same random numbers.

    Attributes:
        groups: of which the prompts are read, one for each.
        engine: draws with the policy.
        cache: folder that all runs share.
        how: answers are drawn.
        prepare: has the teacher score them.
    """

    groups: Sequence[Group]
    engine: Engine
    cache: Path
    how: Sampling
    prepare: Callable[[Sequence[Group]], None]

    def draw(self) -> list[Group]:
        """The answers, each a row of its own, whose tokens the teacher has scored."""
        with AnswerStore(self.cache, self.engine) as store:
            answers = draw(store, [group.prompt for group in self.groups], 1, self.how)
        found = [
            replace(group, completions=(one.tokens,), drawn=(one.logps,), scored=None)
            for group, (one,) in zip(self.groups, answers, strict=True)
        ]
        self.prepare(found)
        return found
