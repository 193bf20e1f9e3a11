"""Several policies on one scale, from the pairs that a judge has compared."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from alignment.evaluation.statistics.resampling import bounds, drawn_weights, numbered

_LARGEST = 15.0
"""Difference to the mean of a policy that never lost, which has no largest one."""


@dataclass(frozen=True, slots=True)
class Strength:
    """How strong a policy is.

    Attributes:
        logit: b, of which the differences count; the mean over the policies is 0.
        rate: the win rate that this gives against the first policy, in [0, 1].
        low, high: 95% interval of `logit`.
        rate_low, rate_high: 95% interval of `rate`.
    """

    logit: float
    low: float
    high: float
    rate: float
    rate_low: float
    rate_high: float


def strengths(
    pairs: Sequence[tuple[int, int]], shares: Sequence[float], prompts: Sequence[Hashable], policies: int
) -> list[Strength]:
    """The strengths b of the Bradley-Terry model, P(i beats j) = S(b_i - b_j), with the greatest likelihood.

    Bradley and Terry 1952 (Biometrika 39, 324-345); a tie is half a win. Intervals are the percentile bootstrap over
    prompts, all pairs of which are drawn together, and for each two policies that met two prompts more, of which each
    wins one. A normal error from the likelihood would count answers to one
    prompt as independent (Chiang et al. 2024, arXiv:2403.04132, section 5).

    Args:
        pairs: the numbers of the two policies of each comparison.
        shares: the first one's share of its win, in [0, 1].
        prompts: of each comparison.
        policies: how many there are.

    Raises:
        ValueError: no pair, another number of shares or prompts, or policies that no chain of pairs joins.
    """
    if not pairs or len(shares) != len(pairs) or len(prompts) != len(pairs):
        raise ValueError("Strengths need at least one pair, and the share and prompt of each.")
    places, groups = numbered(prompts)
    first, second = np.array(pairs, dtype=np.int64).T
    wins = np.zeros((groups, policies, policies))
    np.add.at(wins, (places, first, second), shares)
    np.add.at(wins, (places, second, first), 1 - np.asarray(shares, dtype=float))
    met = (wins.sum(0) + wins.sum(0).T) > 0
    if not (np.linalg.matrix_power(met + np.eye(policies, dtype=np.int64), policies) > 0).all():
        raise ValueError("Policies that were compared in no way, not even by way of others, have no common scale.")
    found = _fit(wins.sum(0)[None])[0]

    more = np.argwhere(met)
    wins = np.concatenate([wins, np.zeros((len(more), policies, policies))])
    wins[groups + np.arange(len(more)), more[:, 0], more[:, 1]] = 1
    drawn = _fit(np.einsum("rp,pij->rij", drawn_weights(len(wins)), wins, optimize=True))
    rates = _sigmoid(drawn - drawn[:, :1])
    return [
        Strength(float(found[i]), *bounds(drawn[:, i]), float(_sigmoid(found[i] - found[0])), *bounds(rates[:, i]))
        for i in range(policies)
    ]


def _fit(wins: np.ndarray) -> np.ndarray:
    """(tables, policies) the strengths of each table (policies, policies) of wins of the one over the other.

    Newton's method, on all tables at once; steps are bounded, since far from the maximum the likelihood is flat.
    """
    tables, policies, _ = wins.shape
    met, eye = wins + wins.transpose(0, 2, 1), np.eye(policies)
    found = np.zeros((tables, policies))
    for _ in range(60):
        p = _sigmoid(found[:, :, None] - found[:, None, :])
        slope = wins.sum(2) - (met * p).sum(2)
        curve = met * p * (1 - p)
        hessian = curve.sum(2)[:, :, None] * eye - curve
        # The mean is 0: constant shifts, of which the likelihood knows nothing, get a curvature of their own
        step = np.linalg.solve(hessian + 1 / policies + 1e-9 * eye, slope[:, :, None])[:, :, 0]
        step = np.clip(step, -1, 1)
        found = np.clip(found + step, -_LARGEST, _LARGEST)
        if np.abs(step).max() < 1e-9:
            break
    return found - found.mean(1, keepdims=True)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))
