"""A run on tokens in files trains what it trains on tokens in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.data.preparation import prepared
from alignment.data.rows import sequences
from tests.helpers.commands import Ended
from tests.helpers.rounds import Project, write_pairs
from tests.helpers.runs import assert_same
from tests.helpers.tiny_runs import project, tiny

__all__ = ["project", "tiny"]


def few_are_many() -> None:
    """As many rows as the tiny recipe has are many."""
    from alignment.data.preparation import prepared
    from alignment.data.rows import sequences
    from alignment.data.tokens import batches

    batches.ROWS_PER_BATCH = 2
    sequences.KEPT_ROWS = prepared.KEPT_ROWS = 2
    prepared._SMALL = 0
    os.sched_getaffinity = lambda pid: {0, 1}


def left_by(folder: Path) -> dict[str, Any]:
    """What the run has found out: metrics without times, the digests of its tokens, its answers."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "per_second", "wall_s", "time", "crc32")
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "metrics": [{k: v for k, v in row.items() if not any(word in k for word in timed)} for row in metrics],
        "data": summary["data"],
        "held_out": (folder / "held_out.jsonl").read_text(),
        "samples": (folder / "samples.jsonl").read_text(),
    }


@pytest.mark.matrix
def test_a_run_on_mapped_files_is_the_same_run(tiny: Callable[..., Ended], tmp_path: Path) -> None:
    """Both stages, their evaluation and the answers, to the last digit; only where the tokens are differs."""
    for name, patch in (("memory", None), ("files", few_are_many)):
        ended = tiny(f"hydra.run.dir={name}", f"reference.path=cache_of_{name}", patch=patch)
        assert ended.code == 0, ended.err
    assert len([path for path in (tmp_path / "cache_of_files" / "tokens").glob("[!.]*") if path.is_dir()]) == 2
    assert left_by(tmp_path / "files") == left_by(tmp_path / "memory")


@pytest.mark.slow
def test_rounds_on_mapped_files_are_the_same_rounds(tiny_model_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """To the bit, with the texts of the prompts beside the tokens; also at a second start, which reads both again."""
    project = Project(tmp_path, tiny_model_folder, write_pairs(tmp_path), monkeypatch)
    short = ("trainer.max_steps=4",)
    project.run("memory", *short, cache="of few")
    monkeypatch.setattr(sequences, "KEPT_ROWS", 2)
    monkeypatch.setattr(prepared, "KEPT_ROWS", 2)
    monkeypatch.setattr(prepared, "_SMALL", 0)
    for name in ("files", "again"):
        chain = project.chain(name, *short, cache="of many")
        assert chain.data.preferences is not None and chain.data.preferences.train_rows[-1].completions == ()
        chain.run()
        assert_same(tmp_path / name, tmp_path / "memory")
        own, other = (
            sorted((tmp_path / run).glob("stages/preference/rounds/*/answers.jsonl")) for run in (name, "memory")
        )
        assert [path.read_text() for path in own] == [path.read_text() for path in other] and len(own) == 2
    assert len([path for path in (tmp_path / "of many" / "tokens").glob("[!.]*") if path.is_dir()]) == 1
