"""Statistics of preference data before training: lengths, overlap, agreement with other judges, near-duplicates.

They count words and need no tokenizer. The pair of a ranked list is its best and its worst completion.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from alignment.data.inspection.words import answers, prompts, words
from alignment.data.inspection.words import overlaps as overlaps  # one of these statistics
from alignment.data.rows.row import Row
from alignment.errors import UserError
from alignment.evaluation.judges.base import compare
from alignment.evaluation.judges.rules import accepted_answers, judge


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often another judge agrees with the labels.

    Attributes:
        judge: `scores` of the data, `rules` of `alignment.evaluation.judges.rules`, `repeats` of the same comparison
            elsewhere in the data, or `longer`, which prefers the longer answer.
        n: number of comparisons that the judge decides.
        ties: number of comparisons that it leaves open.
        share: share of the n comparisons in which it agrees; NaN if n is 0.
    """

    judge: str
    n: int
    ties: int
    share: float


@dataclass(frozen=True, slots=True)
class LengthGroup:
    """The n pairs whose answers differ by `low` to `high` words, and the share in which the longer one is chosen."""

    low: int
    high: int
    n: int
    chosen_longer: float


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Two texts by their indices, and the share of their phrases that they have in common."""

    first: int
    second: int
    similarity: float


def lengths(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Number of words of every prompt, chosen and rejected answer."""
    sides = {
        "prompt": prompts(rows),
        "chosen": [chosen for chosen, _ in answers(rows)],
        "rejected": [rejected for _, rejected in answers(rows)],
    }
    return {side: [len(words(text)) for text in texts] for side, texts in sides.items()}


def length_groups(rows: Sequence[Row], groups: int) -> list[LengthGroup]:
    """Pairs in groups of about equal size, by how much their answers differ in length.

    If the labels have no length bias, `chosen_longer` is about 0.5 in every group. Pairs of equally long answers are in
    no group. Pairs with the same difference share a group, so there may be fewer groups than you ask for.
    """
    sides = lengths(rows)
    gaps = sorted((c - r for c, r in zip(sides["chosen"], sides["rejected"], strict=True) if c != r), key=abs)
    parts: defaultdict[int, list[int]] = defaultdict(list)
    first = {abs(gap): number for number, gap in reversed(list(enumerate(gaps)))}
    for gap in gaps:
        parts[first[abs(gap)] * groups // len(gaps)].append(gap)
    return [
        LengthGroup(abs(part[0]), abs(part[-1]), len(part), sum(gap > 0 for gap in part) / len(part))
        for part in parts.values()
    ]


def agreements(rows: Sequence[Row]) -> list[Agreement]:
    """How far scores, rules, repeated comparisons and length agree with the labels, as far as the data have them."""
    sides = lengths(rows)
    gaps = [c - r for c, r in zip(sides["chosen"], sides["rejected"], strict=True)]
    found = [
        _agreement("scores", (_sign(row.scores[0] - row.scores[-1]) for row in rows if row.scores is not None)),
        _agreement("rules", (_by_rules(row) for row in rows if row.meta.get("answer"))),
        _agreement("repeats", _repeats(rows)),
        _agreement("longer", (_sign(gap) for gap in gaps)),
    ]
    return [agreement for agreement in found if agreement.n + agreement.ties]


def _agreement(name: str, signs: Iterable[int]) -> Agreement:
    """Count signs: +1 agrees with the label, -1 disagrees, 0 is undecided."""
    counts = Counter(signs)
    n = counts[1] + counts[-1]
    return Agreement(name, n, counts[0], counts[1] / n if n else math.nan)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _by_rules(row: Row) -> int:
    accepted = accepted_answers(row.meta)
    [(chosen, rejected)] = answers([row])
    return compare(judge(chosen, accepted), judge(rejected, accepted))


def _repeats(rows: Sequence[Row]) -> list[int]:
    """+1 or -1 for every two judgements of the same two answers to the same prompt."""
    seen: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for prompt, (chosen, rejected) in zip(prompts(rows), answers(rows), strict=True):
        seen[prompt, *sorted((chosen, rejected))].append(chosen)
    return [1 if a == b else -1 for winners in seen.values() for a, b in combinations(winners, 2)]


def near_duplicates(
    texts: Sequence[str], others: Sequence[str] | None = None, *, threshold: float, phrase: int
) -> list[NearDuplicate]:
    """All pairs of texts that share at least `threshold` of their phrases, the most similar first.

    Args:
        texts: compared with each other, or with `others` if given.
        threshold: least Jaccard similarity, in (0, 1]: common phrases over all phrases of the two.
        phrase: number of words in a phrase; a shorter text is one phrase.

    Raises:
        UserError: `threshold` is out of range.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"The threshold of near-duplicates must be above 0 and at most 1, not {threshold}.")
    left = [_phrases(text, phrase) for text in texts]
    right = left if others is None else [_phrases(text, phrase) for text in others]
    frequency = Counter(p for phrases in (left if others is None else left + right) for p in phrases)
    # Sets that share this much also share one of their rarest phrases, so it is enough to look these up.
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for number, phrases in enumerate(left):
        for p in _rarest(phrases, frequency, threshold):
            holders[p].append(number)
    found = []
    for second, phrases in enumerate(right):
        candidates = {i for p in _rarest(phrases, frequency, threshold) for i in holders[p]}
        for first in sorted(candidates):
            similarity = len(left[first] & phrases) / len(left[first] | phrases)
            if similarity >= threshold and (others is not None or first < second):
                found.append(NearDuplicate(first, second, similarity))
    return sorted(found, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def _phrases(text: str, size: int) -> frozenset[str]:
    found = words(text)
    return frozenset(" ".join(found[i : i + size]) for i in range(max(1, len(found) - size + 1)))


def _rarest(phrases: frozenset[str], frequency: Counter[str], threshold: float) -> list[str]:
    """The rarest phrases, enough that a set with `threshold` in common must have one of them."""
    shared = math.ceil(threshold * len(phrases) - 1e-9)
    return sorted(phrases, key=lambda p: (frequency[p], p))[: len(phrases) - shared + 1]
