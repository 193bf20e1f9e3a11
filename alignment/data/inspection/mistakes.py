"""Likely mistakes of preference data, each by a rule that is told with its numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from alignment.data.inspection.words import answer_text, text_of, words
from alignment.data.rows.row import Row

ENOUGH = 20
"""Fewer pairs than this say nothing about the labels as a whole."""
MOSTLY, MUCH_LONGER = 0.75, 1.5
"""Longer rejected answers in more than this share of pairs, and so many times longer on average, are rare where the
labels are right."""
REFUSING = 0.2
"""Share of chosen answers that may refuse, if the rejected ones refuse less often."""
SHORT, LONG = 2, 20
"""An answer of at most 2 words, where the other has at least 20, looks like a missing one."""
SHORT_SHARE = 0.1
LEAST_PROMPT = 5
"""Words of a prompt that are no accident where an answer holds them."""
REFUSAL = re.compile(
    r"\s*((i['’]m |i am )?(very |so )?sorry\b|i apologi[sz]e|(unfortunately,? )?i (can['’]?t|cannot|am unable|won['’]t)"
    r"|as an ai\b|i['’]m unable)",
    re.IGNORECASE,
)
"""How an answer begins that refuses."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """Rows that look wrong.

    Attributes:
        count, of: how many of how many rows, pairs or answers.
        text: follows "12 of 300 ", and tells the rule.
        first: the place of the first one; empty where the mistake is of all together.
    """

    count: int
    of: int
    text: str
    first: str = ""

    @property
    def sentence(self) -> str:
        """The mistake in one sentence."""
        return f"{self.count} of {self.of} {self.text}{f'; the first is {self.first}' if self.first else ''}."


def likely_mistakes(rows: Sequence[Row]) -> list[Mistake]:
    """What the texts, labels and scores of the rows show; `data.rows.findings` has what the template shows."""
    pairs = [row for row in rows if len(row.completions) > 1]
    found = [
        _counted(rows, _holds_prompt, f"rows have an answer that holds its prompt ({LEAST_PROMPT} words or more)"),
        _counted(pairs, _differ_in_space, "pairs have answers that are equal but for white space"),
        _counted(
            [pair for pair in pairs if pair.scores is not None],
            lambda row: row.scores is not None and row.scores[0] < row.scores[-1],
            "pairs have a lower score for the chosen answer than for the rejected one",
        ),
    ]
    return [mistake for mistake in found if mistake is not None] + _inverted(rows, pairs)


def _counted(rows: Sequence[Row], rule: Callable[[Row], bool], text: str) -> Mistake | None:
    guilty = [row for row in rows if rule(row)]
    return Mistake(len(guilty), len(rows), text, guilty[0].source) if guilty else None


def _holds_prompt(row: Row) -> bool:
    """Whether an answer repeats the last turn before it, at its beginning or later."""
    asked = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
    asked = " ".join(asked.split())
    if len(words(asked)) < LEAST_PROMPT:
        return False
    return any(asked in " ".join(answer_text(answer).split()) for answer in row.completions)


def _differ_in_space(row: Row) -> bool:
    chosen, rejected = ("".join(text_of(answer).split()) for answer in (row.completions[0], row.completions[-1]))
    calls = any("tool_calls" in turn for answer in row.completions if not isinstance(answer, str) for turn in answer)
    return chosen == rejected and not calls


def _inverted(rows: Sequence[Row], pairs: Sequence[Row]) -> list[Mistake]:
    """What a label column looks like that means the opposite, from texts alone."""
    labelled = [row for row in rows if row.labels is not None]
    good = [answer_text(row.completions[0]) for row in labelled if row.labels == (True,)]
    bad = [answer_text(row.completions[0]) for row in labelled if row.labels == (False,)]
    names = ("desirable", "undesirable")
    found = []
    if len(labelled) >= ENOUGH and not (good and bad):
        text = f"rows are labelled {names[not good]}: losses of labels learn from the difference of both kinds"
        found.append(Mistake(len(labelled), len(labelled), text))
    if not labelled:
        good, bad = ([answer_text(pair.completions[k]) for pair in pairs] for k in (0, -1))
        names = ("chosen", "rejected")
        found = _of_pairs(pairs, good, bad)
    if min(len(good), len(bad)) >= ENOUGH:
        refusing, others = _refusing(good), _refusing(bad)
        if refusing > REFUSING * len(good) and refusing * len(bad) > 2 * others * len(good):
            text = f"{names[0]} answers begin with a refusal, and {others} of {len(bad)} {names[1]} ones"
            found.append(Mistake(refusing, len(good), f"{text}: the labels may be inverted"))
    return found


def _of_pairs(pairs: Sequence[Row], chosen: Sequence[str], rejected: Sequence[str]) -> list[Mistake]:
    found = []
    gaps = [(len(words(a)), len(words(b))) for a, b in zip(chosen, rejected, strict=True)]
    longer = sum(b > a for a, b in gaps)
    words_chosen, words_rejected = (sum(side) for side in zip(*gaps, strict=True)) if gaps else (0, 0)
    if len(gaps) >= ENOUGH and longer > MOSTLY * len(gaps) and words_rejected >= MUCH_LONGER * words_chosen:
        text = (
            f"pairs have the longer answer as rejected, with {words_rejected / len(gaps):.0f} words on average against "
            f"{words_chosen / len(gaps):.0f}: right for data that reward brevity, else the labels are inverted"
        )
        found.append(Mistake(longer, len(gaps), text))
    missing = [pair for pair, (a, b) in zip(pairs, gaps, strict=True) if a <= SHORT and b >= LONG]
    others = sum(b <= SHORT and a >= LONG for a, b in gaps)
    if len(pairs) >= ENOUGH and len(missing) > SHORT_SHARE * len(pairs) and len(missing) > 2 * others:
        text = (
            f"pairs have a chosen answer of at most {SHORT} words beside a rejected one of at least {LONG} (the other "
            f"way round: {others})"
        )
        found.append(Mistake(len(missing), len(pairs), text, missing[0].source))
    return found


def _refusing(answers: Iterable[str]) -> int:
    return sum(REFUSAL.match(answer) is not None for answer in answers)
