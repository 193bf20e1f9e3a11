"""Votes in a file of compared pairs, which a run trains on as it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.errors import UserError, require
from alignment.files import to_json_lines


def check_votes(path: Path) -> None:
    """Refuse a file that a run would not read, or that holds other data than votes.

    Raises:
        UserError: it is one.
    """
    require(path.suffix == ".jsonl", f"votes={path}: votes are JSON Lines, so the file's name must end in .jsonl.")
    try:
        with path.open("rb") as file:
            first = file.readline()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"votes={path} cannot be read: {error.strerror}.") from None
    require(
        not first.strip() or b'"conversation_a"' in first,
        f"votes={path} holds other data than votes: name a new file, or one with votes of a chat.",
    )


def keep_vote(path: Path, row: Mapping[str, Any]) -> None:
    """Append a vote: one write of a whole line, so that several chats may share the file, and none leaves half a row.

    Raises:
        UserError: the file cannot be written.
    """
    line = to_json_lines([row])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":  # somebody's editor left its last line open
                line = b"\n" + line
            written = os.write(file, line)
            if written < len(line):
                os.ftruncate(file, size)
                raise UserError(f"{path} cannot be written: no space is left.")
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
