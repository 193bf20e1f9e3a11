"""Training rows that an evaluation set holds too, by the words that they share with it.

The rule is that of GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C): texts are in lower case and without
punctuation, and 13 words in a row that both have are a collision. The paper cuts colliding passages out of its web
text; here the whole row is left out, because an answer without its prompt trains nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from alignment.config.data import DataConfig
from alignment.data.conversations.messages import TURN, dialogue_of, messages_of
from alignment.data.rows.row import BadRow, Rejected, Row, Text
from alignment.data.sources.opening import open_records
from alignment.errors import UserError

WORDS = 13
"""Words in a row that make a collision. A prompt with fewer collides with a prompt that has the same words."""

PROMPT_COLUMNS = (
    "prompt",
    "question",
    "instruction",
    "problem",
    "query",
    "input",
    "messages",
    "conversations",
    "turns",
)
"""Columns of an evaluation set that hold its prompts; the first that a row has counts."""

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|(?:(?![{_IDEOGRAPHS}])[^\W_])+")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without signs; a Chinese or Japanese character is a word."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


class Contamination:
    """The words of the named evaluation sets.

    Args:
        config: of the data; `decontaminate` has names as `source` takes them, of a hub set the split `test`.

    Raises:
        UserError: a set cannot be read, or holds no prompts.
    """

    def __init__(self, config: DataConfig) -> None:
        self._answers = config.decontaminate_answers
        self._names = list(config.decontaminate)
        own = replace(config, name=None, revision=None, sources={}, source=self._names)
        self._sets: dict[int, int] = {}  # hash of words -> the set that has them
        for number, name in enumerate(self._names):
            columns: set[str] = set()
            prompts = 0
            for record in _records(name, own):
                if not isinstance(record, dict):
                    continue
                columns |= record.keys()
                for text in _prompts(record):
                    prompts += 1
                    self._add(_runs(words_of(text)), number)
                for text in _all_texts(list(record.values())) if self._answers else ():
                    self._add(_runs(words_of(text), WORDS), number)
            if not prompts:
                raise UserError(
                    f"data.decontaminate: {name} has no prompts: its columns are "
                    f"{', '.join(sorted(columns)) or 'none'}, and prompts are looked for in "
                    f"{', '.join(PROMPT_COLUMNS)} and chosen."
                )

    def _add(self, runs: Iterator[tuple[str, ...]], number: int) -> None:
        for run in runs:
            self._sets.setdefault(hash(run), number)

    def problem(self, row: Row) -> BadRow | None:
        """The row as one to leave out, with the words that it shares; None where it shares none."""
        parts = [("prompt", 1, row.prompt)]
        parts += [("answer", WORDS, answer) for answer in row.completions if self._answers]
        for part, least, text in parts:
            for content in contents_of(text):
                for run in _runs(words_of(content), least):
                    if (number := self._sets.get(hash(run))) is not None:
                        message = f"its {part} has the words '{' '.join(run)}' of {self._names[number]}"
                        return BadRow.of(row, "contaminated", message)
        return None


def _records(name: str, config: DataConfig) -> Iterator[Any]:
    """The records of an evaluation set; what is wrong with it names the setting."""
    try:
        yield from (record for _, _, record in open_records([name], "test", "eval", config).records)
    except UserError as error:
        raise UserError(f"data.decontaminate: {error}") from error


def _runs(words: list[str], least: int = 1) -> Iterator[tuple[str, ...]]:
    """All runs of `WORDS` words; of a text with fewer, but at least `least`, all its words."""
    for start in range(max(1, len(words) - WORDS + 1)) if len(words) >= least else ():
        yield tuple(words[start : start + WORDS])


def contents_of(text: Text) -> Iterator[str]:
    """The texts of a prompt or an answer: a system text, which many rows share, is none of them."""
    if isinstance(text, str):
        yield text
    else:
        yield from (message["content"] for message in text if message["role"] not in ("system", "developer"))


def _prompts(record: dict[str, Any]) -> Iterator[str]:
    """The prompts of a record of an evaluation set."""
    column = next((name for name in PROMPT_COLUMNS if record.get(name)), "chosen")
    value = record.get(column)
    if isinstance(value, str) and column != "chosen" and not TURN.match(value):
        yield value
    elif value:
        yield from _asked(value, column)


def _asked(value: Any, column: str) -> Iterator[str]:
    """What the user says in messages, in texts that are turns, or in a dialogue in one text."""
    if isinstance(value, list) and all(isinstance(turn, str) for turn in value):
        yield from value
        return
    try:
        messages = dialogue_of(value, column) if isinstance(value, str) else messages_of(value, column)
    except Rejected:
        return
    yield from (message["content"] for message in messages if message["role"] == "user")


def _all_texts(values: Sequence[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _all_texts(list(value.values()))
        elif isinstance(value, list):
            yield from _all_texts(value)
