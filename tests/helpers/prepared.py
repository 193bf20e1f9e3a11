"""Rows that are prepared as many rows are, and all that a run gets of them."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.config.data import DataConfig
from alignment.data.conversations import writer
from alignment.data.preparation import prepared
from alignment.data.preparation.prepare import fit_preferences, load_conversations, read_preferences
from alignment.data.rows import sequences
from alignment.data.tokens import batches
from alignment.files import CacheKind
from alignment.types import Group
from tests.conftest import recommended_loss
from tests.helpers.chat_templates import CHATML

TOOLS = "{% for t in tools or [] %}{{ t.name }}{% endfor %}"


def records(count: int = 120) -> list[dict[str, Any]]:
    """Pairs of messages; every few of them have something else that is worth a word, or are bad."""
    made = []
    for i in range(count):
        record: dict[str, Any] = {
            "prompt": [{"role": "user", "content": f"{'long ' * (i % 7)}question {i // 2}"}],
            "chosen": [{"role": "assistant", "content": f"yes {i}"}],
            "rejected": [{"role": "assistant", "content": f"no {'x' * (i % 5)}"}],
            "kind": "abc"[i % 3],
            "weight": 1 + i % 4,
        }
        if i > 60:
            record |= {"score_chosen": 2 + i % 3, "score_rejected": 1.25}
        if i % 40 == 39:
            record["tools"] = [{"name": "search"}]
        if i % 9 == 8:
            record["prompt"][0]["name"] = "somebody"
        if i == 77:
            record["chosen"][0]["content"] = "yes <|im_end|>"
        if i % 33 == 32:
            record["rejected"] = record["chosen"]
        made.append(record)
    return made


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows count as many, and three processes share them."""
    monkeypatch.setattr(batches, "ROWS_PER_BATCH", 8)
    monkeypatch.setattr(sequences, "KEPT_ROWS", 20)
    monkeypatch.setattr(prepared, "KEPT_ROWS", 20)
    monkeypatch.setattr(prepared, "_SMALL", 0)
    monkeypatch.setattr(writer, "TRIES", 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})


@pytest.fixture
def chat(tiny: Any) -> Any:
    """The tiny tokenizer with a template that writes tools."""
    tiny.chat_template = TOOLS + CHATML
    return tiny


def plain(value: Any) -> Any:
    """A value to compare, arrays with their types."""
    if isinstance(value, Group):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.tolist())
    return tuple(plain(item) for item in value) if isinstance(value, tuple) else value


def preferences(config: DataConfig, tokenizer: Any, cache: Path | None, loss: str = "dpo") -> tuple[Any, ...]:
    """All that a run gets of its preference data."""
    data, bad = fit_preferences(read_preferences(config, tokenizer, cache=cache), config, recommended_loss(loss))
    return [plain(g) for g in data.train], [plain(g) for g in data.eval], list(data.eval_rows), data.info, bad


def conversations(config: DataConfig, tokenizer: Any, cache: Path | None) -> tuple[Any, ...]:
    """All that a run gets of its SFT data."""
    data, bad = load_conversations(config, tokenizer, cache=cache)
    return list(data.train), list(data.eval), list(data.sources), data.info, bad


def entries(cache: Path) -> list[Path]:
    return [path for path in CacheKind.tokens.under(cache).glob("[!.]*") if path.is_dir()]


def unread(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the rows were read again")
