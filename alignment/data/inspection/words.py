"""Prompts and answers of rows as plain text, their words, and how much of these two answers share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from alignment.data.rows.row import Row, Text
from alignment.errors import UserError

_WORD = re.compile(r"\w+")


def text_of(text: Text) -> str:
    """The text itself, or the contents of all messages but the system's."""
    if isinstance(text, str):
        return text
    return "\n".join(message["content"] for message in text if message["role"] != "system")


def prompts(rows: Sequence[Row]) -> list[str]:
    """The prompts as plain texts."""
    return [text_of(row.prompt) for row in rows]


def answers(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The chosen and the rejected answer of every row.

    Raises:
        UserError: a row has only one completion.
    """
    for row in rows:
        if len(row.completions) < 2:
            raise UserError(f"Row {row.source} has one completion, but two are needed: use pairs or ranked lists.")
    return [(answer_text(row.completions[0]), answer_text(row.completions[-1])) for row in rows]


def answer_text(completion: Text) -> str:
    """What the assistant says in it."""
    if isinstance(completion, str):
        return completion
    return text_of([message for message in completion if message["role"] == "assistant"])


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation."""
    return _WORD.findall(text.casefold())


def overlaps(rows: Sequence[Row]) -> list[float]:
    """For each pair, the words that both answers share over the words of either, repetitions counted."""
    found = []
    for chosen, rejected in answers(rows):
        a, b = Counter(words(chosen)), Counter(words(rejected))
        found.append((a & b).total() / max(1, (a | b).total()))
    return found
