"""Answers to the same prompt are not independent: how many independent ones they are worth."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from alignment.evaluation.statistics.resampling import numbered


def effective_count(values: Sequence[float], prompts: Sequence[Hashable]) -> float:
    """Of how many independent items the mean of these would have the same variance.

    n / d with the design effect d of Rao and Scott (1992, Biometrics 48, 577-585): the variance of the mean from the
    sums of the G prompts, G / (G - 1) sum_g (sum_i in g (y_i - m))^2 / n^2, over that of n independent values. It is at
    most n, and exactly n where each prompt has one item. Values that are all alike tell nothing of d, so that each
    prompt counts once.

    Args:
        values: of each item, such as 1 for a win, 0.5 for a tie and 0 for a loss.
        prompts: of each item.

    Raises:
        ValueError: no item, or another number of prompts.
    """
    n = len(values)
    if not n or len(prompts) != n:
        raise ValueError("An effective number needs at least one item, and the prompt of each.")
    places, groups = numbered(prompts)
    off = np.asarray(values, dtype=float) - np.mean(values)
    alone = float(off @ off)
    if groups == n or groups == 1 or alone < 1e-12:
        return float(groups)
    together = float((np.bincount(places, off) ** 2).sum())
    effect = together * groups / (groups - 1) / (alone * n / (n - 1))
    return n / max(effect, 1.0)
