"""Prompts from a file, in place of the held-out ones: those of AlpacaEval, of IFEval, or your own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.data.rows.row import Row
from alignment.errors import UserError

COLUMNS = ("prompt", "instruction", "question")


def read_questions(path: Path) -> list[Row]:
    """The rows of a file of JSON Lines, or of one JSON list: a prompt in each, and what a judge wants of it.

    Raises:
        UserError: the file cannot be read, or a row has no prompt.
    """
    try:
        text = path.read_text("utf-8")
        is_list = text.lstrip()[:1] == "["
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise UserError(f"questions={path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"questions={path} holds no JSON Lines, and no JSON list.") from None
    if not rows:
        raise UserError(f"questions={path} holds no row.")
    return [_row(row, f"{path}:{number}") for number, row in enumerate(rows, 1)]


def _row(row: Any, source: str) -> Row:
    """A row whose answer is none yet: a placeholder stands for it where a prompt is tokenised with its answer."""
    name = next((name for name in COLUMNS if isinstance(row, Mapping) and row.get(name)), None)
    if name is None or not isinstance(row[name], str):
        raise UserError(f"{source} has no prompt: a row of questions=FILE needs a text in {' or '.join(COLUMNS)}.")
    prompt = [{"role": "user", "content": row[name]}]
    answer = [{"role": "assistant", "content": "."}]
    meta = {key: value for key, value in row.items() if key != name}
    return Row(prompt, (answer,), labels=(True,), meta=meta, source=source)
