"""Rows of text before tokenisation: one prompt with its completions; and the rows that were left out, with reasons."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignment.errors import UserError

Message = dict[str, Any]
"""{"role": system | developer | user | assistant | tool, "content": text}, and keys that a chat template may read."""

Text = str | list[Message]


class Rejected(Exception):
    """One record cannot be used. `reason` is a word to count by, the message is for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with K >= 1 completions, all strings or all message lists.

    Attributes:
        prompt: text, or messages that end with a user or tool turn.
        completions: K texts, or K lists of messages that begin and end with the assistant's; the chosen one first in a
            pair, the best first in a list.
        labels: K booleans (True: desirable), or None.
        scores: K finite floats from the data, or None.
        meta: the row's other columns as they were, e.g. answer keys for a judge.
        source: "file:row", rows counted from 1; the line number in JSON Lines.
        weight: factor of the row's loss.
        steps: the beginning of the answer, which each completion continues by one step; None for whole answers.
        variables: of the chat template, for this row alone, e.g. its tools.
    """

    prompt: Text
    completions: tuple[Text, ...]
    labels: tuple[bool, ...] | None = None
    scores: tuple[float, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    weight: float = 1.0
    steps: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out: the reason to count by, a message for people, and its place."""

    reason: str
    message: str
    file: str
    row: int

    @property
    def fault(self) -> bool:
        """Whether something is wrong with it: a comparison without a winner or a repeated row is right, and no use."""
        return self.reason not in ("tie", "both_bad", "single_answer", "no_vote", "duplicate", "contaminated")

    @classmethod
    def of(cls, row: Row, reason: str, message: str) -> BadRow:
        """For a row that was read but cannot be tokenised."""
        file, _, number = row.source.rpartition(":")
        return cls(reason, message, file, int(number))


def require_pairs(rows: Sequence[Row], loss: str) -> None:
    """Raise `UserError` unless every row has at least two completions to compare."""
    for row in rows:
        if len(row.completions) < 2:
            raise UserError(
                f"Loss {loss} compares completions of one prompt, but row {row.source} has one completion"
                f"{' with a label' if row.labels is not None else ''}: use pairs or ranked lists, or a loss on "
                f"labelled rows (kto)."
            )


def require_scores(rows: Sequence[Row], loss: str) -> None:
    """Raise `UserError` unless every row has a score for each completion."""
    for row in rows:
        if row.scores is None:
            raise UserError(
                f"Loss {loss} reads scores, and row {row.source} has none: pairs have them in the columns score_chosen "
                f"and score_rejected, ranked lists in the column scores."
            )


def fingerprint(*parts: Sequence[Row]) -> str:
    """SHA-256 (hex) of the content of all parts, in order; it does not depend on where the rows came from."""
    digest = hashlib.sha256()
    for rows in parts:
        for row in rows:
            content = [row.prompt, row.completions, row.labels, row.scores, row.weight, row.steps, row.meta]
            content += [row.variables] if row.variables else []
            digest.update(json.dumps(content, sort_keys=True, default=str).encode("ascii") + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def prompt_key(row: Row) -> bytes:
    """SHA-256 of a row's prompt."""
    return hashlib.sha256(json.dumps(row.prompt, sort_keys=True).encode("ascii")).digest()


def content_key(row: Row) -> int:
    """64-bit hash of what a row trains on: prompt, completions, labels and steps, wherever it came from."""
    content = [row.prompt, row.completions, row.labels, row.steps, row.variables]
    text = json.dumps(content, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=8).digest(), "big")


def count_reasons(bad: Iterable[BadRow]) -> dict[str, int]:
    """The number of bad rows by reason, most frequent first."""
    return dict(Counter(b.reason for b in bad).most_common())


def left_out(bad: Sequence[BadRow]) -> list[str]:
    """One sentence per reason: how many rows are left out, and what is wrong with the first of them."""
    first = {row.reason: row for row in reversed(bad)}
    return [
        f"{count} row{'s are' if count > 1 else ' is'} left out, the first {first[reason].file} row "
        f"{first[reason].row}: {first[reason].message}."
        for reason, count in count_reasons(bad).items()
    ]


def write_rejected(rows: Iterable[BadRow], path: Path) -> None:
    """Write one JSON line {file, row, reason, message} per bad row; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)
