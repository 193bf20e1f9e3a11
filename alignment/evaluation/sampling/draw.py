"""Answers to prompts, by an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from alignment.evaluation.sampling.answer import Answer, Sampling, Wanted


class Engine(Protocol):
    """What draws answers."""

    def identity(self) -> tuple[str, dict[str, Any]]:
        """64 hex digits of the policy and of what draws, and a description for people."""

    def decisive(self, how: Sampling) -> dict[str, Any]:
        """What of the settings, and of the model's own, decides an answer; JSON values."""

    def draw(self, wanted: Sequence[Wanted], how: Sampling) -> list[list[Answer]]:
        """The answers that are wanted of each prompt, in order; no prompt comes twice."""


def draw(engine: Engine, prompts: Sequence[np.ndarray], count: int, how: Sampling) -> list[list[Answer]]:
    """`count` answers to each prompt, in order.

    An answer depends on the prompt's tokens, its index and the settings, so a prompt that comes twice has the same
    answers twice, and the first of many answers are those of few.

    Args:
        prompts: (tokens,) int32 each.
    """
    numbers: dict[bytes, int] = {}
    for prompt in prompts:
        numbers.setdefault(prompt.tobytes(), len(numbers))
    different = {prompt.tobytes(): prompt for prompt in prompts}
    greedy = how.temperature == 0  # where all answers to a prompt are the same
    found = engine.draw([(prompt, range(1 if greedy else count)) for prompt in different.values()], how)
    return [found[numbers[prompt.tobytes()]] * (count if greedy else 1) for prompt in prompts]
