"""A mixture with a large source: kept in the cache, found by a second start, and the same as in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.data import DataConfig
from alignment.data.preparation import prepared
from alignment.data.tokens.token_store import StoreWriter
from tests.helpers.prepared import chat, conversations, entries, preferences, records, small_limits, unread

__all__ = ["chat", "small_limits"]


@pytest.fixture
def large_mixture(mixture: Any, jsonl: Any, small_limits: None) -> DataConfig:
    """A source in files beside one in memory, each with held-out rows."""
    sources = {
        "large": {"source": jsonl(records(), "large.jsonl"), "eval_size": 9, "weight": 5, "max_bad_rows": 9},
        "small": {"source": jsonl(records(12), "small.jsonl"), "eval_size": 2, "weight": 1},
    }
    return mixture(sources)


@pytest.mark.parametrize("prepare", [preferences, pytest.param(conversations, marks=pytest.mark.slow)])
def test_a_second_start_finds_a_mixture(
    prepare: Callable[..., Any], large_mixture: DataConfig, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the mixture that memory gives, and reads no text."""
    in_memory = prepare(large_mixture, chat, None)
    assert prepare(large_mixture, chat, tmp_path) == in_memory
    (entry,) = entries(tmp_path)
    assert {path.name for path in entry.iterdir()} == {"train", "eval", "texts", "entry.json"}
    assert not list(entry.parent.glob(".*"))
    monkeypatch.setattr("alignment.data.preparation.making.mixed", unread)
    assert prepare(large_mixture, chat, tmp_path) == in_memory


def test_every_change_of_a_mixture_makes_new_tokens(large_mixture: DataConfig, chat: Any) -> None:
    """The content of any source, and any share."""

    def key() -> str | None:
        return prepared._key(large_mixture, "preference", chat, None, "")

    keys = [key()]
    small = Path(large_mixture.sources["small"].source)
    small.write_text(small.read_text().replace("question 1", "question one"))
    keys.append(key())
    large_mixture.sources["small"].weight = 2
    keys.append(key())
    large_mixture.sources["bundled"] = replace(large_mixture.sources["small"], source="bundled:quickstart")
    keys.append(key())
    assert None not in keys and len(set(keys)) == len(keys)


def test_a_killed_preparation_of_a_mixture_goes_on(
    large_mixture: DataConfig, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The sources that were tokenised are not tokenised again, and what was written of the mixture is written anew."""
    in_memory = preferences(large_mixture, chat, None, "kto")
    write = StoreWriter.close

    def end(writer: StoreWriter) -> Any:
        if writer._folder.parent.name.startswith(".") and writer._folder.name == "eval":
            raise KeyboardInterrupt
        return write(writer)

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "close", end)
        with pytest.raises(KeyboardInterrupt):
            preferences(large_mixture, chat, tmp_path, "kto")
    assert not entries(tmp_path)
    with caplog.at_level("INFO"):
        assert preferences(large_mixture, chat, tmp_path, "kto") == in_memory
    done = [record.args for record in caplog.records if "were tokenised before" in record.message]
    assert done and done[0][0] == done[0][1]
    assert len(entries(tmp_path)) == 1


@pytest.mark.slow
def test_a_mixture_with_a_source_that_may_change_is_for_one_start(
    large_mixture: DataConfig, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The log says so, and nothing of it stays."""
    monkeypatch.setattr(prepared, "origins", lambda config: None)
    with caplog.at_level("INFO"):
        there = preferences(large_mixture, chat, tmp_path / "cache")
    assert "for this start alone: nothing tells before the reading whether a source of the mixture has" in caplog.text
    assert there == preferences(large_mixture, chat, None)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
