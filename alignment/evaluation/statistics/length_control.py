"""A win rate without what the judge pays for length: AlpacaEval 2's, in its minimal form."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from alignment.evaluation.statistics.resampling import bounds, drawn_weights, numbered

_FOLDS = 5
_PENALTIES = np.logspace(-1, -5, 9)
"""Of the mean loss; AlpacaEval's C = 1 / (penalty times items)."""
_LARGEST = 15.0
"""Of a coefficient: data that can be told apart without error have no largest one."""
_RESAMPLES = 300
"""Each of them is a fit."""


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """A win rate at equal length.

    Attributes:
        rate: mean over prompts of S(theta + psi gamma_x), with [low, high], 95%.
        length: phi, what the judge pays for length; 0 if it pays nothing that other prompts bear out.
        difficulty: psi; 0 without difficulties.
    """

    rate: float
    low: float
    high: float
    length: float
    difficulty: float


def length_controlled(
    shares: Sequence[float],
    gaps: Sequence[float],
    prompts: Sequence[Hashable],
    difficulties: Sequence[float] | None = None,
) -> LengthControlled:
    """The win rate that the judge would give if both answers were equally long.

    logit P(first wins) = theta + phi tanh(gap / sd(gaps)) + psi gamma_x, evaluated at gap 0 (Dubois et al. 2024,
    arXiv:2404.04475, section 3), as a logistic regression without intercept, whose penalty on |phi| + |psi| is chosen
    by the loss on held-out prompts, in five folds. AlpacaEval takes gamma_x from its own fit of many models; here they
    are given, or left out. Nor is theta penalised, as it is there: so a judge that does not heed length gives the plain
    win rate, and not one that is shrunk to one half.

    The interval is the percentile bootstrap over prompts and two more pairs of equal length, one won and one lost; see
    `alignment.comparison.statistics`.

    Args:
        shares: (pairs,) the first answer's share of each win, in [0, 1].
        gaps: by how much the first answer is longer.
        prompts: of each pair.
        difficulties: gamma_x of each pair's prompt.

    Raises:
        ValueError: no pair, or another number of gaps, prompts or difficulties.
    """
    count = len(shares)
    given = [gaps, prompts] if difficulties is None else [gaps, prompts, difficulties]
    if not count or any(len(values) != count for values in given):
        raise ValueError("A length-controlled win rate needs at least one pair, and the gap and prompt of each.")
    y, gap = np.asarray(shares, dtype=float), np.asarray(gaps, dtype=float)
    spread = float(gap.std(ddof=1)) if count > 1 else 0.0
    columns = [np.ones(count), np.tanh(gap / spread) if spread > 0 else np.zeros(count)]
    if difficulties is not None:
        columns.append(np.asarray(difficulties, dtype=float))
    x, (places, groups) = np.stack(columns, axis=1), numbered(prompts)
    penalty = _chosen_penalty(x, y, places, groups)
    fitted = _fit(x, y, np.ones(count), penalty)

    # Resampled, with the two pairs more
    x, y = np.concatenate([x, np.eye(1, x.shape[1]).repeat(2, axis=0)]), np.append(y, [1.0, 0.0])
    places = np.append(places, [groups, groups + 1])
    rates = [
        _rate(x, weights, _fit(x, y, weights, penalty, fitted))
        for weights in (drawn[places].astype(float) for drawn in drawn_weights(groups + 2, _RESAMPLES))
    ]
    return LengthControlled(
        _rate(x[:count], np.ones(count), fitted), *bounds(np.array(rates)), float(fitted[1]), float(fitted[2:].sum())
    )


def _rate(x: np.ndarray, weights: np.ndarray, fitted: np.ndarray) -> float:
    """The mean probability at equal length."""
    level = x.copy()
    level[:, 1] = 0
    return float(np.average(_sigmoid(level @ fitted), weights=weights))


def _chosen_penalty(x: np.ndarray, y: np.ndarray, places: np.ndarray, groups: int) -> float:
    """The penalty with the least loss on prompts that the fit has not seen; the largest where there are too few."""
    folds = (np.random.default_rng(0).permutation(groups) % _FOLDS)[places]
    if groups < _FOLDS:
        return float(_PENALTIES[0])
    losses = np.zeros(len(_PENALTIES))
    for fold in range(_FOLDS):
        seen = folds != fold
        fitted = None
        for i, penalty in enumerate(_PENALTIES):
            fitted = _fit(x[seen], y[seen], np.ones(seen.sum()), penalty, fitted)
            z = x[~seen] @ fitted
            losses[i] += float((np.logaddexp(0, z) - y[~seen] * z).sum())
    return float(_PENALTIES[losses.argmin()])


def _fit(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, penalty: float, start: np.ndarray | None = None
) -> np.ndarray:
    """The coefficients with the least weighted mean of the cross-entropy + penalty * sum of |all but the first|.

    Newton's steps, each the solution of a quadratic problem with the same penalty, which is found coordinate by
    coordinate (Friedman, Hastie and Tibshirani 2010, J. Stat. Softw. 33, section 3), and halved until it helps.
    """
    weights, size = weights / weights.sum(), x.shape[1]
    penalties = np.array([0.0] + [penalty] * (size - 1))
    found = np.zeros(size) if start is None else start

    def objective(at: np.ndarray) -> float:
        z = x @ at
        return float(weights @ (np.logaddexp(0, z) - y * z) + penalties @ np.abs(at))

    best = objective(found)
    for _ in range(50):
        p = _sigmoid(x @ found)
        slope = x.T @ (weights * (p - y))
        curve = (x * (weights * np.maximum(p * (1 - p), 1e-6))[:, None]).T @ x + 1e-9 * np.eye(size)
        goal = _quadratic(slope, curve, penalties, found)
        step = np.clip(goal, -_LARGEST, _LARGEST) - found
        while (now := objective(found + step)) > best and np.abs(step).max() > 1e-7:
            step = step / 2
        if now >= best - 1e-12:
            break
        found, best = found + step, now
    return found


def _quadratic(slope: np.ndarray, curve: np.ndarray, penalties: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The b with the least slope (b - at) + (b - at) curve (b - at) / 2 + penalties |b|."""
    b = at.copy()
    for _ in range(100):
        before = b.copy()
        for j in range(len(b)):
            target = curve[j, j] * b[j] - slope[j] - curve[j] @ (b - at)
            b[j] = np.sign(target) * max(abs(target) - penalties[j], 0.0) / curve[j, j]
        if np.abs(b - before).max() < 1e-9:
            break
    return b


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))
