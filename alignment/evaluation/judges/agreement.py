"""How far two judges agree: the share of equal verdicts, and Cohen's kappa, which takes away what chance would give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from alignment.evaluation.intervals import Z, wilson_interval


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of two judges over `n` verdicts, with 95% intervals.

    Attributes:
        share: of the verdicts that are equal, with [low, high].
        kappa: 1 for full agreement, 0 for that of chance; None if both judges only ever say the same one thing.
    """

    n: int
    share: float
    low: float
    high: float
    kappa: float | None
    kappa_low: float | None
    kappa_high: float | None


def agreement(first: Sequence[int], second: Sequence[int], rows: int | None = None) -> Agreement:
    """The agreement of two judges' verdicts on the same cases.

    kappa = (p_o - p_e) / (1 - p_e) (Cohen 1960), with the large-sample error of Fleiss, Cohen and Everitt (1969,
    Psychological Bulletin 72, 323-327).

    Args:
        rows: of how many independent cases the verdicts are, for the intervals; None: each is one.

    Raises:
        ValueError: no verdict, or another number of them.
    """
    n, cases = len(first), len(first) if rows is None else rows
    if not n or n != len(second):
        raise ValueError("Agreement needs as many verdicts of the one judge as of the other, and at least one.")
    cells = {pair: count / n for pair, count in Counter(zip(first, second, strict=True)).items()}
    kinds = sorted({*first, *second})
    of_first = {kind: first.count(kind) / n for kind in kinds}
    of_second = {kind: second.count(kind) / n for kind in kinds}
    observed = sum(cells.get((kind, kind), 0.0) for kind in kinds)
    chance = sum(of_first[kind] * of_second[kind] for kind in kinds)
    share = (n, observed, *wilson_interval(observed, cases))
    if len(kinds) == 1:
        return Agreement(*share, None, None, None)

    kappa = (observed - chance) / (1 - chance)
    on = sum(
        cells.get((kind, kind), 0.0) * (1 - (of_first[kind] + of_second[kind]) * (1 - kappa)) ** 2 for kind in kinds
    )
    off = sum(part * (of_second[a] + of_first[b]) ** 2 for (a, b), part in cells.items() if a != b)
    variance = on + (1 - kappa) ** 2 * off - (kappa - chance * (1 - kappa)) ** 2
    half = Z * sqrt(max(variance, 0.0) / cases) / (1 - chance)
    return Agreement(*share, kappa, max(-1.0, kappa - half), min(1.0, kappa + half))
