"""What a check of the rendered rows finds: counted, and refused where it would spoil the training."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from alignment.data.rows.row import Row
from alignment.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

FEW = 0.05
"""Up to this share of rows a finding is only counted: large sets have a few odd rows."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of finding.

    Attributes:
        what: what the rows do, for "12 of 300 rows <what>".
        remedy: what you can do about it.
        share: of all rows, above which the data are refused; None: never.
    """

    what: str
    remedy: str
    share: float | None = FEW


FINDINGS = {
    "formatted": Finding(
        "hold text that was formatted with a chat template before, and would be formatted twice",
        "give the plain texts or the messages",
    ),
    "special_tokens": Finding(
        "hold special tokens of the tokenizer in their text, which would train as control tokens",
        "take them out of the text",
    ),
    "message_lists": Finding(
        "hold text that looks like a list of messages and cannot be read as one", "write valid JSON or plain text"
    ),
    "role_names": Finding(
        "have an answer that begins with the name of a role, which the chat template writes already",
        "take it out of the answers",
    ),
    "missing_texts": Finding(
        "have a question or an answer that is only nan, None, null or N/A, as tables write that there is nothing",
        "leave these rows out",
    ),
    "repeated_prompts": Finding(
        "have an answer that begins with its prompt", "leave the prompt out of the answers", share=0.5
    ),
    "unwritten": Finding(
        "hold text that the chat template does not write",
        "set model.chat_template to one that does, or leave these messages out (data.system=null for a system text)",
    ),
    "generation_prompt": Finding(
        "get a header before their answer that the chat template leaves out of the prompt: it ignores "
        "add_generation_prompt, so that the header would be scored and generated",
        "set model.chat_template to one with a generation prompt",
        share=0.0,
    ),
    "double_bos": Finding("begin with two BOS tokens", "take the BOS out of the text or of the chat template"),
    "empty_turns": Finding("have an earlier answer that is empty; SFT does not learn it", "", share=None),
}


@dataclass(frozen=True, slots=True)
class Found:
    """What one pass has found of one kind: in how many of the rows, and what to say of it.

    Attributes:
        text: follows "12 of 300 rows".
        quiet: it changes nothing that a row says.
    """

    kind: str
    rows: int
    of: int
    text: str
    quiet: bool = False


def report(parts: Iterable[Found]) -> tuple[dict[str, int], list[str]]:
    """Log what was found, each kind once for all parts of the data.

    Returns:
        The number of rows by kind, and the sentences that are worth a second look.
    """
    merged: dict[str, Found] = {}
    for found in parts:
        before = merged.get(found.kind)
        merged[found.kind] = (
            found if before is None else replace(before, rows=before.rows + found.rows, of=before.of + found.of)
        )
    sentences = []
    for found in merged.values():
        sentence = f"{found.rows} of {found.of} rows {found.text}."
        log.log(logging.INFO if found.quiet else logging.WARNING, "  %s", sentence)
        sentences += [] if found.quiet else [sentence]
    return {kind: found.rows for kind, found in merged.items()}, sentences


class Findings:
    """The findings of one pass over a data set.

    Args:
        setting: the name of the setting that allows findings, for messages.
        allow: the kinds that are only counted.

    Raises:
        UserError: `allow` has a name that is no kind of finding.
    """

    def __init__(self, setting: str, allow: Sequence[str]) -> None:
        for name in allow:
            if name not in FINDINGS:
                hint = did_you_mean(name, FINDINGS)
                raise UserError(f"{setting} has no kind '{name}'{hint}; accepted are {', '.join(FINDINGS)}.")
        self._setting = setting
        self._allow = allow
        self._counts: Counter[str] = Counter()
        self._first: dict[str, tuple[str, str]] = {}
        self._last: dict[str, Row] = {}

    def note(self, kind: str, row: Row, detail: str = "") -> None:
        """Count a row once for a kind; `detail` says what was found in the first one."""
        assert kind in FINDINGS
        if self._last.get(kind) is row:
            return
        self._last[kind] = row
        self._counts[kind] += 1
        self._first.setdefault(kind, (row.source, detail))

    def take(self) -> tuple[Counter[str], dict[str, tuple[str, str]]]:
        """What was found since the last time, for `add`."""
        taken = self._counts, self._first
        self._counts, self._first = Counter(), {}
        return taken

    def found(self) -> tuple[Counter[str], dict[str, tuple[str, str]]]:
        """What was found up to now, for `add`."""
        return self._counts, self._first

    def add(self, counts: Mapping[str, int], first: dict[str, tuple[str, str]]) -> None:
        """Add what another process has found in the next rows."""
        self._counts.update(counts)
        self._first = first | self._first

    def settle(self, rows: int) -> list[Found]:
        """What was found.

        Raises:
            UserError: something that would spoil the training was found in more than a few rows.
        """
        found = []
        for kind, count in self._counts.items():
            finding, (first, detail) = FINDINGS[kind], self._first[kind]
            text = f"{finding.what} (the first is {first}{f', {detail}' if detail else ''})"
            if finding.share is not None and count > finding.share * rows and kind not in self._allow:
                raise UserError(
                    f"{count} of {rows} rows {text}: {finding.remedy}, or set {self._setting}=[{kind}] to train on "
                    f"them as they are."
                )
            found.append(Found(kind, count, rows, text))
        return found
