"""What was found, as tables, and as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.assessment.entrants import Entrants
from alignment.comparison.answers import Answer, Question
from alignment.comparison.tables import Table
from alignment.evaluation.judges.base import Judgement, Preference
from alignment.pages import page_templates
from alignment.runs.judge_table import ABOUT_JUDGE, judge_rows
from alignment.runs.text import DASH, MAX_SAMPLES, clip, format_value, percent

_TEMPLATES = page_templates(Path(__file__).parent)

_RATES = {
    "win rate": "of the first policy; a tie is half a win. The interval is Tango's, at the number of independent pairs "
    "that all answers to a prompt are worth together",
    "at equal length": "the same without what the judge pays for length: AlpacaEval 2's regression. Intervals by "
    "bootstrap over prompts",
    "mended by people": "the win rate that people would give, from the labels of a random part of the pairs (PPI++)",
    "longer by": "characters, in mean",
}
_STRENGTH = (
    "by the Bradley-Terry model, in logits with mean 0, and the win rate that it gives against the first policy; 95% "
    "intervals by bootstrap over prompts"
)


def to_html(title: str, tables: Sequence[Table], cautions: Sequence[str], asked: Sequence[Question], note: str) -> str:
    """The page. All texts of models and users are escaped.

    Args:
        note: on the selection of questions.
    """
    return _TEMPLATES.get_template("page.html.j2").render(
        title=title, tables=tables, cautions=cautions, asked=asked, note=note
    )


def win_rate_tables(found: Mapping[str, Any]) -> list[Table]:
    """The tables of what `Judged.found` has returned."""
    return [_matches(found["matches"]), _policies(found["policies"]), _judge(found["judge"])]


def _interval(found: Mapping[str, Any] | None) -> str:
    if not found:
        return DASH
    rate = found.get("rate", found.get("mean"))
    return f"{percent(rate)} ({percent(found['low'])} to {percent(found['high'])})"


def _matches(matches: Sequence[Mapping[str, Any]]) -> Table:
    header = ["first", "against", "wins, ties, losses", "win rate", "at equal length", "longer by"]
    rows = [
        [
            match["first"],
            match["second"],
            f"{match['wins']}, {match['ties']}, {match['losses']}",
            _interval(match),
            _interval(match["length_controlled"]),
            format_value(match["longer_by"]),
        ]
        for match in matches
    ]
    columns = {name: what for name, what in _RATES.items() if name in header}
    if any("humans" in match for match in matches):
        header.append("mended by people")
        columns["mended by people"] = _RATES["mended by people"]
        for row, match in zip(rows, matches, strict=True):
            mended = match.get("humans")
            row.append(f"{_interval(mended)}, {mended['labelled']} labels" if mended else DASH)
    return Table("Win rates", header, rows, "With 95% intervals.", is_numbers=True, columns=columns)


def _policies(policies: Sequence[Mapping[str, Any]]) -> Table:
    header, columns = ["policy", "answers", "words", "characters"], {}
    rows = [[row["name"], *(format_value(row[key]) for key in ("answers", "words", "characters"))] for row in policies]
    for key, title, write in (("judge_score", "judge's score", format_value), ("correct", "correct", percent)):
        if any(key in row for row in policies):
            header.append(title)
            for cells, row in zip(rows, policies, strict=True):
                cells.append(write(row.get(key)))
    if all("strength" in row for row in policies):
        header += ["strength", "against the first"]
        columns["strength"] = _STRENGTH
        for cells, row in zip(rows, policies, strict=True):
            one = row["strength"]
            cells.append(f"{one['logit']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})")
            cells.append(f"{percent(one['rate'])} ({percent(one['rate_low'])} to {percent(one['rate_high'])})")
    return Table("Policies", header, rows, "Words and characters are means.", is_numbers=True, columns=columns)


def _judge(card: Mapping[str, Any]) -> Table:
    return Table("The judge", ["", ""], judge_rows(card), ABOUT_JUDGE)


def questions(
    field: Entrants, preferences: Mapping[tuple[int, int], Sequence[Preference]], scores: Sequence[Sequence[Judgement]]
) -> tuple[list[Question], str]:
    """Some prompts with the first answer of every policy, those on which policies differ first, and a note on these.

    Args:
        preferences: of two policies, those of each pair of answers, prompt by prompt.
        scores: of each policy, the verdicts on its answers, prompt by prompt; empty for a judge that compares.
    """
    texts = field.policies[0].questions.texts
    verdicts = {match: preferences[match][:: field.count] for match in field.matches}
    split = [n for n in range(len(texts)) if any(several[n].outcome for several in verdicts.values())]
    alike = [n for n in range(len(texts)) if n not in split]
    picked = _pick(split, MAX_SAMPLES)
    picked += _pick(alike, MAX_SAMPLES - len(picked))
    shown = []
    for n in picked:
        answers = []
        for number, name in enumerate(field.names):
            said = [f"{_in_words(several[n])} {field.names[j]}" for (i, j), several in verdicts.items() if i == number]
            if scores:
                said.insert(0, str(scores[number][n * field.count]))
            answers.append(Answer(name, clip(field.answers[number][n][0]), "\n".join(said) or DASH))
        shown.append(Question(clip(texts[n]), answers, []))
    note = f"{len(picked)} of {len(texts)} prompts; on {len(split)} of them the judge prefers an answer of a pair."
    return shown, note


def _in_words(preference: Preference) -> str:
    return {1: "better than", 0: "a tie with", -1: "worse than"}[preference.outcome]


def _pick(numbers: Sequence[int], most: int) -> list[int]:
    """At most so many, at equal distances."""
    count = min(most, len(numbers))
    return [numbers[i * len(numbers) // count] for i in range(count)]
