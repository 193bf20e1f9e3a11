"""Columns under the names that data sets of the field give them, and records recast to the names of the layouts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.data.conversations.messages import found
from alignment.data.rows.row import BadRow, Rejected

Record = dict[str, Any]
Numbered = tuple[str, int, Any]
"""(file, row number from 1, record); a `BadRow` in place of a record that cannot be read."""

PROMPTS = (
    *("prompt", "instruction", "question", "query", "userinput", "context", "messages", "conversations"),
    *("conversation", "history", "input", "trajectory"),
)
ANSWERS = ("completion", "response", "answer", "output", "reply", "generation", "modeloutput")


def plain(name: Any) -> str:
    """A name or a word without case, spaces and punctuation, so that `Response_A` and `response a` are one."""
    return re.sub(r"[\W_]+", "", str(name)).lower()


def named(names: Iterable[str], columns: Collection[str]) -> str | None:
    """The column with the first of these plain names that there is."""
    by_name = {plain(column): column for column in columns}
    return next((by_name[name] for name in names if name in by_name), None)


@dataclass(frozen=True, slots=True)
class Question:
    """The column with the prompt, and the second one that an Alpaca instruction may have."""

    column: str
    more: str | None

    @classmethod
    def among(cls, usual: Collection[str]) -> Question | None:
        """The question of records with these columns; None where there is none."""
        column = named(PROMPTS, usual)
        if column is None:
            return None
        more = named(("input",), usual) if plain(column) == "instruction" else None
        return cls(column, more)

    def take(self, record: Record) -> Any:
        """The prompt, taken out of the record; the input stands on a new line below the instruction."""
        prompt = pop(record, self.column)
        if isinstance(prompt, dict) and isinstance(prompt.get("full_text"), str):  # WebGPT
            prompt = prompt["full_text"]
        elif isinstance(prompt, dict) and "messages" in prompt:  # OpenAI, with its tools
            record.update((key, value) for key, value in prompt.items() if key != "messages" and key not in record)
            prompt = prompt["messages"]
        more = None if self.more is None else record.pop(self.more, None)
        if more is None or more == "" or not isinstance(prompt, str):
            return prompt
        if not isinstance(more, str):
            raise Rejected("wrong_type", f"column '{self.more}' holds {found(more)}, not text")
        return f"{prompt}\n{more}" if more.strip() else prompt


def pop(record: Record, column: str) -> Any:
    """The value of a column, taken out of the record.

    Raises:
        Rejected: it is absent or null.
    """
    value = record.pop(column, None)
    if value is None:
        raise Rejected("missing_field", f"column '{column}' is absent or null")
    return value


def pop_answer(record: Record, column: str) -> Any:
    """The answer in a column, taken out of the record: text or messages.

    Raises:
        Rejected: it is absent, empty or something else.
    """
    answer = pop(record, column)
    if not isinstance(answer, str | list | dict):
        raise Rejected("wrong_type", f"column '{column}' holds {found(answer)}, not text or messages")
    if not answer or (isinstance(answer, str) and not answer.strip()):
        raise Rejected("empty_answer", f"column '{column}' is empty")
    return answer


def real(value: Any) -> float | None:
    """The finite number that a value is or writes, None if it is none; true is 1."""
    try:
        found = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def whole(value: Any) -> int | None:
    """The whole number that a value is or writes, None if it is none; true is 1."""
    found = real(value)
    return int(found) if found is not None and found == int(found) else None


def number(value: Any, column: str) -> float:
    """The number that a cell holds or writes.

    Raises:
        Rejected: it is none, or not finite.
    """
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise Rejected("bad_score", f"column '{column}' has {value!r}, which is no finite number")
    return found


@dataclass(frozen=True, slots=True)
class Reading:
    """How records under other names become records of a layout.

    Attributes:
        name: what they are, for the log; empty if that of the layout says it.
        note: what was decided of their columns, for the log; empty if nothing was.
        recast: the records of the layout that a record becomes; it may change the one that it is given.
    """

    name: str
    note: str
    recast: Callable[[Record], list[Record]]

    def ready(self, records: Iterable[Numbered], folder: Path | None) -> Iterator[Numbered]:
        """All records recast to those of the layout; those that cannot be are bad rows.

        Args:
            folder: for what is too much for memory; None: it stays there.
        """
        return self.each(records)

    def each(self, records: Iterable[Numbered]) -> Iterator[Numbered]:
        """The records recast one by one, in order."""
        for file, number, record in records:
            if not isinstance(record, dict):
                yield file, number, record
                continue
            try:
                recast = self.recast(dict(record))
            except Rejected as rejected:
                yield file, number, BadRow(rejected.reason, str(rejected), file, number)
                continue
            for each in recast:
                yield file, number, each


def cased(usual: Collection[str], names: Collection[str]) -> Reading | None:
    """The reading of columns that have these names but for case, spaces and signs; None where there are none."""
    theirs = {name: column for name in names if name not in usual and (column := named((plain(name),), usual))}
    theirs = {name: column for name, column in theirs.items() if column not in names}
    if not theirs:
        return None

    def recast(record: Record) -> list[Record]:
        found = {name: record.pop(column) for name, column in theirs.items() if column in record}
        return [record | found]

    return Reading("", f"read are the columns {', '.join(map(repr, theirs.values()))}", recast)
