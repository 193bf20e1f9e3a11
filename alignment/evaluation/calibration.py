"""Whether a reward model is as often right as its margins say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of which a reward model is about equally sure.

    Attributes:
        pairs: how many.
        confidence: mean probability, by the Bradley-Terry model, that the answer with the higher reward is the chosen
            one: S(|r_w - r_l|), from 0.5 to 1.
        accuracy: share of the pairs where it is; equal rewards count one half.
    """

    pairs: int
    confidence: float
    accuracy: float


def reliability(margins: Sequence[float], num_bins: int = NUM_BINS) -> list[Bin]:
    """The pairs in bins of about equal size, the least sure ones first; at most one bin for every ten pairs.

    Args:
        margins: r_w - r_l of each pair.
        num_bins: at most.
    """
    ordered = sorted(margins, key=abs)
    count = max(1, min(num_bins, len(ordered) // 10))
    cuts = [len(ordered) * i // count for i in range(count + 1)]
    found = [ordered[a:b] for a, b in pairwise(cuts) if b > a]
    return [
        Bin(
            pairs=len(part),
            confidence=sum(1 / (1 + math.exp(-abs(margin))) for margin in part) / len(part),
            accuracy=sum((margin > 0) + (margin == 0) / 2 for margin in part) / len(part),
        )
        for part in found
    ]


def calibration_error(margins: Sequence[float]) -> float:
    """The expected calibration error: the mean over pairs of |accuracy - confidence| of their bin.

    Guo et al. 2017, arXiv:1706.04599, Eq. 3, with bins of equal size (Nixon et al. 2019, arXiv:1904.01685). A bin's
    accuracy is off by chance, so a perfectly calibrated model has an error above 0: about 0.8 / sqrt(pairs in a bin)
    times its standard deviation, which is at most one half.
    """
    bins = reliability(margins)
    return sum(part.pairs * abs(part.accuracy - part.confidence) for part in bins) / max(1, len(margins))
