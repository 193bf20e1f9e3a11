"""The percentile bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 1000
"""Resamples of an interval: its ends are then within about a twentieth of its width."""


def numbered(prompts: Sequence[Hashable]) -> tuple[np.ndarray, int]:
    """(items,) a number from 0 on for the prompt of each item, in the order in which prompts come, and how many."""
    numbers: dict[Hashable, int] = {}
    found = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=np.int64)
    return found, len(numbers)


def drawn_weights(count: int, resamples: int = RESAMPLES) -> np.ndarray:
    """(resamples, count) how often each of `count` prompts is drawn; the same whenever it is asked for.

    All items of a prompt are drawn together, because they are not independent (Davison and Hinkley 1997, section 3.8).
    """
    rng = np.random.default_rng(0)
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples)


def bounds(values: np.ndarray) -> tuple[float, float]:
    """The 95% interval of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
