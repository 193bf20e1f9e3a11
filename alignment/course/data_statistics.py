"""What preference data are like before anything is trained on them: lengths, overlap, agreement, near-duplicates.

All of it looks at words and needs no tokenizer. Of a ranked list the best and the worst completion are the pair.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from alignment.data.rows import Row, Text
from alignment.errors import UserError
from alignment.evaluation.judge import compare, judge

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often something else than the labels says the same as they do.

    Attributes:
        judge: what it is: `scores` of the data, the `rules` of `alignment.evaluation.judge`, `repeats` of the same
            comparison elsewhere in the data, or that the `longer` answer is the better one.
        n: comparisons that it decides.
        ties: comparisons that it leaves open.
        share: of the n in which it agrees; not a number where n is 0.
    """

    judge: str
    n: int
    ties: int
    share: float


@dataclass(frozen=True, slots=True)
class LengthGroup:
    """Pairs whose answers differ by `low` to `high` words: how often the longer one is the chosen one."""

    low: int
    high: int
    n: int
    chosen_longer: float


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Two texts by their numbers, and the share of their phrases that both have."""

    first: int
    second: int
    similarity: float


def text_of(text: Text) -> str:
    """The contents of the messages but for the system's, or the text itself."""
    if isinstance(text, str):
        return text
    return "\n".join(message["content"] for message in text if message["role"] != "system")


def prompts(rows: Sequence[Row]) -> list[str]:
    """The prompts as texts."""
    return [text_of(row.prompt) for row in rows]


def answers(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The chosen and the rejected answer of every row.

    Raises:
        UserError: a row has one completion only.
    """
    for row in rows:
        if len(row.completions) < 2:
            raise UserError(f"Row {row.source} has one completion, and two are compared: use pairs or ranked lists.")
    return [(text_of(row.completions[0]), text_of(row.completions[-1])) for row in rows]


def words(text: str) -> list[str]:
    """The words of a text, without regard to case and punctuation."""
    return _WORD.findall(text.casefold())


def lengths(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Words of every prompt, chosen and rejected answer."""
    sides = {
        "prompt": prompts(rows),
        "chosen": [chosen for chosen, _ in answers(rows)],
        "rejected": [rejected for _, rejected in answers(rows)],
    }
    return {side: [len(words(text)) for text in texts] for side, texts in sides.items()}


def overlaps(rows: Sequence[Row]) -> list[float]:
    """Per pair the words that both answers have over the words that any of them has, repetitions counted."""
    found = []
    for chosen, rejected in answers(rows):
        a, b = Counter(words(chosen)), Counter(words(rejected))
        found.append((a & b).total() / max(1, (a | b).total()))
    return found


def length_groups(rows: Sequence[Row], groups: int) -> list[LengthGroup]:
    """Pairs in so many groups of about equal size by how much their answers differ in length.

    Without a bias of the labels for length `chosen_longer` is a half in every group. Pairs of equally long answers are
    in none, and equal differences are in one, so that there may be fewer groups.
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
    """How far scores, rules, repeated comparisons and bare length agree with the labels; what the data allow."""
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
    """Of +1 (says the same as the label), -1 (the opposite) and 0 (undecided)."""
    counts = Counter(signs)
    n = counts[1] + counts[-1]
    return Agreement(name, n, counts[0], counts[1] / n if n else math.nan)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _by_rules(row: Row) -> int:
    answer = row.meta["answer"]
    accepted = [str(a) for a in answer] if isinstance(answer, list) else [str(answer)]
    [(chosen, rejected)] = answers([row])
    return compare(judge(chosen, accepted), judge(rejected, accepted))


def _repeats(rows: Sequence[Row]) -> list[int]:
    """+1 or -1 for each two judgements of the same two answers to the same prompt."""
    seen: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for prompt, (chosen, rejected) in zip(prompts(rows), answers(rows), strict=True):
        seen[prompt, *sorted((chosen, rejected))].append(chosen)
    return [1 if a == b else -1 for winners in seen.values() for a, b in combinations(winners, 2)]


def near_duplicates(
    texts: Sequence[str], others: Sequence[str] | None = None, *, threshold: float, phrase: int
) -> list[NearDuplicate]:
    """All pairs of texts that share at least `threshold` of their phrases, the most alike first.

    Args:
        texts: compared with each other, or with `others` where these are given.
        threshold: least share, above 0: phrases of both over phrases of any (Jaccard).
        phrase: words in a phrase; a shorter text is one phrase.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"The threshold of near-duplicates is above 0 and at most 1, not {threshold}.")
    left = [_phrases(text, phrase) for text in texts]
    right = left if others is None else [_phrases(text, phrase) for text in others]
    frequency = Counter(p for phrases in (left if others is None else left + right) for p in phrases)
    # Two sets that share so much share one of their rarest phrases: only those are looked up, and nothing is missed.
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
    """As many as a set with `threshold` in common cannot all lack."""
    shared = math.ceil(threshold * len(phrases) - 1e-9)
    return sorted(phrases, key=lambda p: (frequency[p], p))[: len(phrases) - shared + 1]
