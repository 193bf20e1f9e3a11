"""Texts of a row beside the contents of its messages, texts that a template leaves out, and plain texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from alignment.data.rows.row import Message, Row

MISSING = re.compile(r"\s*(nan|none|null|#?n/a|<na>)\s*", re.IGNORECASE)
"""How tables write that there is nothing, after pandas' `astype(str)` for example."""


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a value of a message or a variable, at any depth: thoughts, arguments of calls, tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


def unwritten_thought(answer: Message, whole: str) -> str | None:
    """The thought in an answer's text that is not in the whole text; None where all of it is."""
    thought = answer["content"].rpartition("</think>")[0].rpartition("<think>")[2].strip()
    return thought if thought and thought not in whole else None


def missing_text(row: Row) -> str | None:
    """A question or an answer of the row that is only a word for nothing; None where there is none."""
    for text in (row.prompt, *row.completions):
        said = text if isinstance(text, str) else text[-1]["content"]
        if MISSING.fullmatch(said):
            return f"'{said.strip()}'"
    return None


def repeats(answer: str, question: str) -> bool:
    """Whether an answer begins with its question and goes on."""
    return len(question) >= 8 and answer.startswith(question) and len(answer) > len(question)


def plain_findings(row: Row, eos: str | None) -> Iterator[tuple[str, str]]:
    """Kinds and details of what is wrong with a row of plain texts, which hold their own special tokens rightly.

    Args:
        eos: the token that ends an answer. Inside of one, the policy would learn to go on behind it.
    """
    question = str(row.prompt).strip()
    for answer in map(str, row.completions):
        text = answer.strip()
        if repeats(text, question):
            yield "repeated_prompts", ""
        if eos and eos in text.removesuffix(eos):
            yield "special_tokens", f"{eos} inside an answer"
