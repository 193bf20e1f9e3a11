"""Scores less what length costs, so that a judge that likes long answers does not make them longer and longer.

An answer of n tokens with score s counts as s - penalty n (DICE, Chen et al. 2024, arXiv 2406.09760, who count
characters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from alignment.evaluation.sampling.answer import Finish
from alignment.onpolicy.pairs import Drawn


def shaped(drawn: Sequence[Drawn], penalty: float) -> list[Drawn]:
    """The same with the scores of their answers less `penalty` for each token."""
    return [
        replace(
            one,
            scores=[
                None if score is None else score - penalty * len(answer.tokens)
                for answer, score in zip(one.answers, one.scores or (), strict=True)
            ],
        )
        for one in drawn
    ]


def balanced_penalty(drawn: Sequence[Drawn]) -> float:
    """The penalty, at least 0, for which the best and the worst answer to a prompt are equally long in the mean.

    Answers that are cut, empty or without a score do not count, nor do prompts with fewer than two others. As the
    penalty grows, the best answer of a prompt gets no longer and the worst no shorter. So the mean difference of their
    lengths falls in steps, where two answers change places; of the two steps on either side of 0 it is the nearer one,
    and the penalty stands in its middle.
    """
    prompts = [found for one in drawn if len(found := _whole(one)) > 1]
    changes = {0.0}
    for found in prompts:
        better, worse = np.triu_indices(len(found), 1)
        gap, longer = (found[better] - found[worse]).T
        changes.update((gap[longer != 0] / longer[longer != 0]).tolist())
    steps = sorted(change for change in changes if change >= 0)
    if len(steps) == 1:
        return 0.0
    penalties = [0.0, *((a + b) / 2 for a, b in pairwise(steps[1:])), 2 * steps[-1]]

    # The first step at or below 0, by halving
    low, high = 0, len(penalties) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _gap(prompts, penalties[middle]) <= 0 else (middle + 1, high)
    nearest = min(range(max(0, low - 1), low + 1), key=lambda step: abs(_gap(prompts, penalties[step])))
    return penalties[nearest]


def _whole(drawn: Drawn) -> np.ndarray:
    """(answers, 2) float64, score and length of the answers that count."""
    rows = [
        (score, len(answer.tokens))
        for answer, text, score in zip(drawn.answers, drawn.texts, drawn.scores or (), strict=True)
        if score is not None and text.strip() and answer.finish is Finish.stop
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def _gap(prompts: Sequence[np.ndarray], penalty: float) -> float:
    """Length of the best less that of the worst answer, mean over prompts."""
    gaps = []
    for found in prompts:
        scores = found[:, 0] - penalty * found[:, 1]
        gaps.append(found[scores.argmax(), 1] - found[scores.argmin(), 1])
    return float(np.mean(gaps))
