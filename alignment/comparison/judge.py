"""The judges of a comparison: their cards, and how the answers of variants do against each other."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignment.comparison.head_to_head import MAX_ENTRANTS
from alignment.comparison.measures import verdicts
from alignment.comparison.members import ComparedRun, rows_by_key
from alignment.comparison.ranking import Comparison
from alignment.comparison.tables import Table, head_to_head
from alignment.evaluation.judges.base import Item, Preference, by_scores
from alignment.evaluation.judges.card import measures
from alignment.runs.folder import MODEL_TITLES, dig, submapping
from alignment.runs.judge_table import ABOUT_JUDGE, judge_rows
from alignment.runs.text import DASH, is_number

_FROM_FILES = (
    " The verdicts are those that python -m alignment.evaluate has left in this folder; evaluation.html has win rates "
    "at equal length."
)


def answers_against_answers(found: Comparison) -> list[Table]:
    """Win rates between variants: by the scores of the runs' judge, and by a judge that has compared their answers."""
    kinds = {dig(member.run.summary, "evaluation", "judge", "kind") for member in found.members}
    tables = [head_to_head(found, whose=_judged_by(*kinds))]
    if found.between is not None:
        second = head_to_head(found, found.between.meet, _judged_by(found.between.card.get("kind")), _FROM_FILES)
        if second is not None and tables[0] is not None:
            second = replace(second, note=f"To be read like the table above.{_FROM_FILES}")
        tables.append(second)
    return [table for table in tables if table is not None]


def _judged_by(*kinds: Any) -> str:
    return f", judged by {kinds[0]}" if len(kinds) == 1 and kinds[0] else ""


def judge_table(found: Comparison) -> Table | None:
    """A column for each judge; None if nobody judged. Runs with the same judge share a column, over all their pairs."""
    by_judge: dict[Any, list[ComparedRun]] = {}
    for member in found.members:
        if (card := submapping(member.run.summary, "evaluation", "judge")) and member.run.samples:
            by_judge.setdefault(card.get("identity"), []).append(member)
    cards = [_pooled(members) for members in by_judge.values()]
    titles = ["of the runs"] if len(cards) == 1 else [f"of {', '.join(m.name for m in ms)}" for ms in by_judge.values()]
    if found.between is not None and found.between.card and found.between.shares:
        cards.append(found.between.card)
        titles.append("between the runs")
    if not cards:
        return None
    columns = [dict(judge_rows(card)) for card in cards]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, DASH) for column in columns)] for name in names]
    return Table("The judge" if len(cards) == 1 else "The judges", ["", *titles], rows, ABOUT_JUDGE + _not_met(found))


def _not_met(found: Comparison) -> str:
    """Where a judge that compares has not compared the variants: the command that has it do so."""
    firsts = [variant.members[0] for variant in found.best[:MAX_ENTRANTS]]
    compares = any(dig(member.run.summary, "evaluation", "judge", "consistent") is not None for member in found.members)
    if not compares or len(firsts) < 2 or (found.between is not None and found.between.shares):
        return ""
    names = " ".join(shlex.quote(member.name) for member in firsts)
    return (
        f" It has compared each run's answers with those of an earlier model, but not the runs with each other: "
        f"`python -m alignment.evaluate {names} against=all` does that, in the folder of this page, asking the judge "
        f"for what it has not said yet, and `python -m alignment.report` then shows it."
    )


def _pooled(members: Sequence[ComparedRun]) -> dict[str, Any]:
    """One card of a judge for all runs that it has judged: measured anew over their pairs, the costs in sum."""
    cards = [submapping(member.run.summary, "evaluation", "judge") for member in members]
    scores = [judged for member in members for model in MODEL_TITLES for judged in verdicts(member, model).values()]
    pairs = [pair for member in members for pair in _pairs(member)]
    card = {**cards[0], **measures(pairs, scores, pointwise=bool(scores))}
    used = [submapping(one, "usage") for one in cards]
    return card | ({"usage": _sum(used)} if any(used) else {})


def _pairs(member: ComparedRun) -> Iterator[tuple[Item, Preference]]:
    """The final answers with those of earlier models, and what the judge says of them."""
    scored = {model: verdicts(member, model) for model in MODEL_TITLES}
    for prompt, sample in rows_by_key(member.run.samples, "prompt").items():
        for model in MODEL_TITLES:
            kept = submapping(sample, "preferences", model)
            if kept:
                said = Preference.from_json(kept)
            elif model != "final" and prompt in scored[model] and prompt in scored["final"]:
                said = by_scores(scored["final"][prompt], scored[model][prompt])
            else:
                continue
            yield Item(str(sample.get("prompt")), (str(sample.get("final")), str(sample.get(model)))), said


def _sum(used: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and costs in sum, with the mappings in them."""
    total: dict[str, Any] = {}
    for one in used:
        for key, value in one.items():
            if isinstance(value, Mapping):
                total[key] = _sum([total.get(key, {}), value])
            elif is_number(value):
                total[key] = total.get(key, 0) + value
    return total
