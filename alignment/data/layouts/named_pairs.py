"""Pairs whose better and worse answer have other names than chosen and rejected; recast to these."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from alignment.data.layouts.columns import ANSWERS, Question, Reading, Record, named, pop_answer

SIDES = (
    *(("preferred", "nonpreferred"), ("preferred", "dispreferred"), ("accepted", "rejected"), ("better", "worse")),
    *(("winning", "losing"), ("win", "lose"), ("chosen", "rejected")),
)
"""Plain names of the better and the worse side, alone or before the name of an answer."""
_NAMES = [(a + of, b + of) for a, b in SIDES for of in ("", *ANSWERS) if (a + of, b + of) != ("chosen", "rejected")]


def named_pairs(records: Sequence[Record], usual: AbstractSet[str]) -> Reading | None:
    """The reading of pairs under such names, as in the files of OpenAI's preference tuning; None where there are none.

    Args:
        usual: the columns that most records have.
    """
    found = [(named((good,), usual), named((bad,), usual)) for good, bad in _NAMES]
    chosen, rejected = next(((a, b) for a, b in found if a is not None and b is not None), (None, None))
    if chosen is None or rejected is None:
        return None
    question = Question.among(usual - {chosen, rejected})
    if question is None or not any(isinstance(record.get(chosen), str | list | dict) for record in records):
        return None

    def recast(record: Record) -> list[Record]:
        answers = {"chosen": pop_answer(record, chosen), "rejected": pop_answer(record, rejected)}
        return [record | {"prompt": question.take(record)} | answers]

    return Reading("", f"{chosen} has the better answers, {rejected} the worse ones", recast)
