"""What a verdict on two answers says: the first, the second, a tie, or both bad, in the spellings of the field."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from alignment.data.layouts.columns import Record, plain, real, whole
from alignment.data.rows.row import Rejected
from alignment.errors import UserError

Winner = Mapping[str, Sequence[Any]]
"""`data.winner`: the values that stand for `first`, `second`, `tie` and `both_bad`.

`negative` and `positive` stand for all numbers below and above 0.
"""

SIGNED = ("overallpreference", "preferencestrength")
"""HelpSteer's columns: numbers below 0 are for the first answer, above 0 for the second."""
_NAME = re.compile(
    r"(the)?(model|assistant|response|answer|output|completion|option|candidate|system|text|conversation|reply)?"
    r"(?P<which>a|b|0|1|2|first|second|left|right)(wins?|won|(is)?(better|preferred))?"
)
_SIDES = {"a": 0, "first": 0, "left": 0, "b": 1, "second": 1, "right": 1}
_ARROW = re.compile(r"\[*([ab]?)\s*(>>|>|=|<<|<)\s*[ab]?\]*", re.IGNORECASE)
"""Arena-Hard's verdicts, A>>B to B>>A."""
_SIGNS = {"negative": -1, "positive": 1}
_TIES = frozenset(
    ("c", "tie", "ties", "tied", "draw", "equal", "same", "both", "neither", "nopreference", "similar", "nodifference")
)


class Outcome(Enum):
    """What a verdict says."""

    first = "first"
    second = "second"
    tie = "tie"
    both_bad = "both_bad"


_WON = (Outcome.first, Outcome.second)


@dataclass(frozen=True, slots=True)
class Answers:
    """The columns of the two answers, and what tells their names apart, such as a and b."""

    columns: tuple[str, str]
    suffixes: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Codes:
    """What the values of a verdict mean.

    Attributes:
        winner: the setting; empty if it says nothing.
        numbers: outcome of each number; None where the sign decides.
        said: how the log says it.
    """

    winner: Winner
    numbers: Mapping[int, Outcome] | None
    said: str = ""


def values_of(record: Record, columns: Sequence[str]) -> list[Any]:
    """The votes of a record, without those that are missing; a list in a cell has several."""
    cells = [record.get(column) for column in columns]
    return [vote for cell in cells for vote in (cell if isinstance(cell, list) else [cell]) if vote is not None]


def is_verdict(value: Any, column: str, record: Record, answers: Answers, winner: Winner) -> bool:
    """Whether a value of a column may be a verdict, whatever it means."""
    if isinstance(value, dict):
        return False
    listed = any(_same(value, one) for values in winner.values() for one in values)
    number = real(value) if plain(column) in SIGNED else whole(value)
    return listed or number is not None or _read(value, record, answers) is not None


def decide(
    records: Sequence[Record], columns: Sequence[str], answers: Answers, winner: Winner, source: str, rated: bool
) -> Codes | None:
    """What the values in these columns mean, by all of them; None where ratings of the answers must say it instead.

    Args:
        rated: whether both answers have ratings.

    Raises:
        UserError: they may mean several things.
    """
    values = [value for record in records for value in values_of(record, columns)]
    if (
        not winner
        and plain(columns[0]) in SIGNED
        and 2 * sum(real(value) is not None for value in values) >= len(values)
    ):
        return Codes({}, None, ": below 0 the first, above 0 the second, 0 a tie")
    counts = Counter(number for value in values if (number := whole(value)) is not None)
    if winner or 2 * counts.total() < len(values):
        return Codes(winner, {})
    usual = {number for number, count in counts.items() if 20 * count >= counts.total()}
    for seen in (set(counts), usual):  # a few odd values are bad rows
        if (codes := _one_meaning(seen, answers.suffixes)) is not None:
            return codes
    if rated:
        return None
    raise UserError(
        f"{source}: the column {columns[0]} has the values {', '.join(map(str, sorted(counts)))}, which may mean "
        f"several things: say which of them stand for {answers.columns[0]} and which for {answers.columns[1]} with "
        "data.winner={first: [...], second: [...], tie: [...]}."
    )


def _one_meaning(seen: set[int], suffixes: tuple[str, str]) -> Codes | None:
    """What these numbers mean beside answers with these suffixes, if that is one thing."""
    if suffixes == ("0", "1"):
        return Codes({}, dict(enumerate(_WON)), ": 0 and 1 as in their names") if seen <= {0, 1} else None
    numbers = dict(enumerate(_WON, 1))
    if suffixes == ("1", "2") and seen <= {0, 1, 2} and (2 in seen or seen == {1}):
        if 2 in seen:  # then 0 is a tie, even if no record so far has it
            numbers[0] = Outcome.tie
        return Codes({}, numbers, f": 1 and 2 as in their names{', 0 a tie' * (0 in seen)}")
    return Codes({}, numbers, ": 1 the first, 2 the second") if seen == {1, 2} else None


def majority(record: Record, columns: Sequence[str], answers: Answers, codes: Codes) -> tuple[Outcome, float | None]:
    """The outcome that more than half of the votes have, a tie if none has, and the mean strength of these votes.

    Raises:
        Rejected: there is no vote, or one that means nothing.
    """
    values = values_of(record, columns)
    if not values:
        raise Rejected("missing_field", f"column '{columns[0]}' is absent or null")
    votes = [_outcome(value, record, columns[0], answers, codes) for value in values]
    outcome, count = Counter(outcome for outcome, _ in votes).most_common(1)[0]
    if 2 * count <= len(votes):
        return Outcome.tie, None
    strengths = [strength for won, strength in votes if won is outcome and strength is not None]
    return outcome, sum(strengths) / len(strengths) if strengths else None


def _outcome(value: Any, record: Record, column: str, answers: Answers, codes: Codes) -> tuple[Outcome, float | None]:
    """What one verdict says, and how strongly, where it says that."""
    number = real(value)
    if codes.winner:
        signed = any(_is_negative(one) for values in codes.winner.values() for one in values)
        for outcome, values in codes.winner.items():
            if any(_same(value, one) for one in values):
                return Outcome(outcome), abs(number) if signed and number is not None else None
        known = ", ".join(str(one) for values in codes.winner.values() for one in values)
        raise Rejected("bad_verdict", f"column '{column}' has {value!r}, and data.winner names {known}")
    if number is None:
        read = _read(value, record, answers)
        if read is not None:
            return read
    elif codes.numbers is None:
        return (Outcome.tie, Outcome.second, Outcome.first)[(number > 0) - (number < 0)], abs(number)
    elif (code := whole(value)) is not None and code in codes.numbers:
        return codes.numbers[code], None
    known = ", ".join(["A", "B", "tie", "both_bad", *map(str, codes.numbers or ())])
    raise Rejected(
        "bad_verdict", f"column '{column}' has {value!r}, and accepted are {known}, and what data.winner names"
    )


def _read(value: Any, record: Record, answers: Answers) -> tuple[Outcome, float | None] | None:
    """What a word says, and how strongly; None where it is no verdict."""
    if not isinstance(value, str):
        return None
    if (arrow := _ARROW.fullmatch(value.strip())) is not None:
        sign = arrow[2]
        if sign == "=":
            return Outcome.tie, 0.0
        return _WON[(sign[0] == "<") != (arrow[1].lower() == "b")], float(len(sign))

    word = plain(value)
    if "bad" in word and ("both" in word or "tie" in word or "neither" in word):
        return Outcome.both_bad, None
    if word in _TIES or word.startswith(("tie", "both", "equal")):
        return Outcome.tie, None
    if (said := _NAME.fullmatch(word)) is not None:
        numbers = ("0", "1") if answers.suffixes == ("0", "1") else ("1", "2")
        which = said["which"]
        place = _SIDES.get(which, numbers.index(which) if which in numbers else None)
        return None if place is None else (_WON[place], None)

    # The name of an answer's column or of its model, or its text
    for names in (answers.columns, ("model_a", "model_b")):
        texts = [record.get(name) for name in names]
        for both in (list(names), texts):
            if value in both and both[0] != both[1]:
                return _WON[both.index(value)], None
    return None


def _same(value: Any, listed: Any) -> bool:
    number, said = real(value), str(listed).strip()
    if number is None or said in _SIGNS:
        return str(value).strip() == said if number is None else number * _SIGNS[said] > 0
    return number == real(listed)


def _is_negative(listed: Any) -> bool:
    return str(listed).strip() == "negative" or (real(listed) or 0) < 0
