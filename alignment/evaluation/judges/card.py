"""The card of a judge: what it was, how far it can be trusted, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from alignment.evaluation.intervals import wilson_interval
from alignment.evaluation.judges.agreement import agreement
from alignment.evaluation.judges.base import Item, Judge, Judgement, Preference
from alignment.evaluation.judges.human_labels import HumanLabels


def judge_card(
    judge: Judge,
    pairs: Sequence[tuple[Item, Preference]],
    scores: Sequence[Judgement] = (),
    humans: HumanLabels | None = None,
) -> dict[str, Any]:
    """Measure a judge by what it has said.

    Args:
        pairs: the compared answers.
        scores: of single answers.
        humans: labelled pairs, which the judge judges here.

    Returns:
        "kind", "identity", "described"; what `measures` finds; "humans"; "usage". What cannot be measured is missing.
    """
    described = {k: v for k, v in judge.description().items() if isinstance(v, str | int | float)}
    card: dict[str, Any] = {"kind": judge.kind, "identity": judge.identity, "described": described}
    card |= measures(pairs, scores, judge.pointwise)
    if humans is not None:
        card["humans"] = against_humans(judge, humans)
    return card | ({"usage": used} if (used := judge.usage()) else {})


def measures(pairs: Sequence[tuple[Item, Preference]], scores: Sequence[Judgement], pointwise: bool) -> dict[str, Any]:
    """What verdicts say of the judge that gave them.

    Args:
        pointwise: whether it scores one answer at a time.

    Returns:
        "pairs", their number; "same", how many of these have two equal answers, which tell nothing of the judge;
        "unreadable", how many verdicts or scores could not be read, of "verdicts"; of judges that see both answers
        "consistent", the share of pairs with the same verdict in both orders, and "first", the share of decided
        verdicts for the answer shown first; "longer" and "length_correlation".
    """
    apart = [(item, preference) for item, preference in pairs if not item.is_same]
    preferences = [preference for _, preference in apart]
    card: dict[str, Any] = {"pairs": len(pairs), "same": len(pairs) - len(apart)}
    card["verdicts"] = len(scores) or 2 * len(apart)
    card["unreadable"] = (
        sum(one.score is None for one in scores) if scores else sum(one.unreadable for one in preferences)
    )
    if not pointwise:
        card |= _order(preferences)
    return card | _length(apart)


def _order(preferences: Sequence[Preference]) -> dict[str, Any]:
    """What the order of the answers does to the verdicts."""
    both = [one for one in preferences if not one.unreadable]
    shown_first = [share for one in both for share in (one.shares[0], 1 - (one.shares[1] or 0.0)) if share is not None]
    decided = [share for share in shown_first if share != 0.5]
    card: dict[str, Any] = {}
    if both:
        card["consistent"] = sum(one.is_consistent for one in both) / len(both)
    if decided:
        card["first"] = sum(share > 0.5 for share in decided) / len(decided)
    return card


def _length(pairs: Sequence[tuple[Item, Preference]]) -> dict[str, Any]:
    """How the verdicts go with the length of the answers, in characters.

    "longer" is the share of won pairs that the longer answer wins, with its interval. "length_correlation" is that of
    the outcome (1, 0, -1) with the difference of the lengths' logarithms, over all pairs in both orders, so that it
    does not matter which answer is called the first. A good answer may be longer: neither is a bias by itself.
    """
    gaps = [math.log1p(len(item.answers[0])) - math.log1p(len(item.answers[1])) for item, _ in pairs]
    outcomes = [preference.outcome for _, preference in pairs]
    won = [gap * outcome > 0 for gap, outcome in zip(gaps, outcomes, strict=True) if gap and outcome]
    card: dict[str, Any] = {}
    if won:
        share = sum(won) / len(won)
        low, high = wilson_interval(share, len(won))
        card["longer"] = {"n": len(won), "share": share, "low": low, "high": high}
    spread = math.sqrt(sum(gap * gap for gap in gaps) * sum(outcome * outcome for outcome in outcomes))
    if spread:
        card["length_correlation"] = sum(gap * outcome for gap, outcome in zip(gaps, outcomes, strict=True)) / spread
    return card


class LongerJudge(Judge):
    """Prefers the longer answer, in characters: what every judge must beat."""

    kind = "longer"

    def description(self) -> dict[str, Any]:
        """It has no settings."""
        return {"version": 1}

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        """The number of characters."""
        return [Judgement(float(len(item.answers[0]))) for item in items]


def against_humans(judge: Judge, humans: HumanLabels) -> dict[str, Any]:
    """How a judge's verdicts agree with people's.

    Returns:
        "judge" and "longer", of the judge and of the longer answer: the agreement over all pairs, ties and unreadable
        verdicts included, and "decisive", over the pairs on which both decide. "annotators": that among people.
    """
    card = {
        name: _with_decisive([preference.outcome for preference in one.compare(humans.items)], humans.outcomes)
        for name, one in (("judge", judge), ("longer", LongerJudge()))
    }
    among = humans.among_annotators()
    return card | ({"annotators": asdict(among)} if among is not None else {})


def _with_decisive(outcomes: Sequence[int], labels: Sequence[int]) -> dict[str, Any]:
    decided = [(ours, theirs) for ours, theirs in zip(outcomes, labels, strict=True) if ours and theirs]
    card = asdict(agreement(outcomes, labels))
    if decided:
        card["decisive"] = {"n": len(decided), "share": sum(a == b for a, b in decided) / len(decided)}
    return card
