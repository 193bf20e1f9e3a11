"""A judge's mean, mended by the labels that people gave to a part of what it judged (PPI++)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from alignment.evaluation.intervals import Z


@dataclass(frozen=True, slots=True)
class Mended:
    """A mean with its 95% interval.

    Attributes:
        mean: of what people would say of all items.
        power: how much the judge counts, from 0 on; 0 leaves the labels alone, and 1 is PPI.
        labelled: items with a label.
        items: all items.
    """

    mean: float
    low: float
    high: float
    power: float
    labelled: int
    items: int


def mended_mean(labels: Sequence[float], judged: Sequence[float], others: Sequence[float]) -> Mended:
    """The mean label over all items, of which people have labelled a random part.

    mean(Y) + l (mean(f') - mean(f)), with the power l = cov(Y, f) / ((1 + n / N) var(f)) that has the least variance,
    clipped to [0, 1] (PPI++, Angelopoulos et al. 2023, arXiv:2311.01453, Eq. 2 and section 6), and the variance
    var(Y - l f) / n + l^2 var(f) / N. Where a judge is biased, its own mean stays off however many items it judges;
    this one is not, if the labelled items are a random part of all.

    Args:
        labels: Y, of the n labelled items, in [0, 1].
        judged: f, what the judge says of these.
        others: f', what it says of the N items without label.

    Raises:
        ValueError: fewer than two labelled items or than two others, or another number of verdicts than labels.
    """
    y, f, rest = (np.asarray(values, dtype=float) for values in (labels, judged, others))
    n, many = len(y), len(rest)
    if len(f) != n or n < 2 or many < 2:
        raise ValueError("Labels mend a mean from two labelled items and two others on, each with a verdict.")
    spread = float(np.var(np.append(f, rest), ddof=1))
    covariance = float(np.cov(y, f, ddof=1)[0, 1])
    power = min(max(covariance / ((1 + n / many) * spread), 0.0), 1.0) if spread > 0 else 0.0
    mean = float(y.mean() + power * (rest.mean() - f.mean()))
    variance = float(np.var(y - power * f, ddof=1)) / n + power**2 * float(np.var(rest, ddof=1)) / many
    half = Z * sqrt(variance)
    return Mended(mean, max(0.0, mean - half), min(1.0, mean + half), power, n, n + many)
