"""What an offline W&B run holds beside numbers: histograms, tables, alerts, pictures and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.files import to_json_lines
from alignment.runs.alerts import COLLAPSE, Alert
from alignment.runs.record import Histogram, RunRecord
from alignment.runs.tracked_tables import held_out_table, samples_table, send_results
from alignment.runs.tracking import open_tracker
from tests.helpers.tracked import nobody_logged_in, tracking_config
from tests.helpers.wandb_files import history, of_kind, read_wandb

__all__ = ["nobody_logged_in"]

PAIRS = [
    {"moment": "start", "source": "a:1", "key": "k", "rewards/margins": 0.0, "logps/chosen": -9.0},
    {"moment": "start", "source": "a:2", "key": "k", "rewards/margins": 0.0, "logps/chosen": -8.0},
    {"moment": "final", "source": "a:1", "key": "k", "rewards/margins": 1.5, "logps/chosen": -9.5},
    {"moment": "final", "source": "a:2", "key": "k", "rewards/margins": -0.5, "logps/chosen": -7.0},
]
SAMPLES = [
    {"prompt": "Who?", "start": "I.", "final": "You.", "verdicts": {"start": {"score": 0}, "final": {"score": 1}}},
    {"prompt": "When?", "start": "Now", "final": "Then", "verdicts": {"start": {"score": 1}, "final": {"score": None}}},
]


def test_held_out_pairs_stand_beside_what_they_were(tmp_path: Path) -> None:
    """Also two pairs of the same tokens, which have one key."""
    assert held_out_table(tmp_path) is None
    (tmp_path / "held_out.jsonl").write_bytes(to_json_lines(PAIRS))
    header, rows = held_out_table(tmp_path) or ([], [])
    assert header[:4] == ["source", "key", "rewards/margins before", "rewards/margins after"]
    assert [row[:4] for row in rows] == [["a:1", "k", 0.0, 1.5], ["a:2", "k", 0.0, -0.5]]
    assert [row[4:] for row in rows] == [[-9.0, -9.5], [-8.0, -7.0]]


def test_samples_have_what_the_judge_says() -> None:
    header, rows = samples_table(SAMPLES)
    assert header == ["prompt", "before training", "final", "score, before training", "score, final"]
    assert rows == [["Who?", "I.", "You.", 0, 1], ["When?", "Now", "Then", 1, None]]
    compared = [{"prompt": "p", "start": "a", "final": "b", "preferences": {"start": {"outcome": -1, "reasons": []}}}]
    assert samples_table(compared)[1] == [["p", "a", "b", "worse"]]


@pytest.mark.slow
def test_wandb_gets_them_and_still_counts_rows(tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    record, run_dir = RunRecord(tmp_path), tmp_path
    tracked = {"run_dir": run_dir, "recipe": "r", "run_config": {}, "stages": ["preference"]}
    margins = Histogram.of([0.0, 0.5, 2.0, 2.0], bins=2)
    with open_tracker(tracking_config(), **tracked) as tracker:  # type: ignore[arg-type]
        tracker.table("samples", ["prompt", "start"], [["Who?", "I."]])
        for step in (0, 1):
            record.log("preference", step, "eval", {"loss": 1.0})
            record.log_margins(step, margins)
            tracker.log("preference", step, "eval", {"loss": 1.0}, margins)
        tracker.alert(Alert(COLLAPSE, "it fell", "preference", 1, "eval"))
    with open_tracker(tracking_config(), **tracked) as tracker:  # type: ignore[arg-type]
        for name, rows in (("held_out", PAIRS), ("samples", SAMPLES)):
            (run_dir / f"{name}.jsonl").write_bytes(to_json_lines(rows))
        (run_dir / "report.md").write_text("# Report\n")
        (run_dir / "plots").mkdir()
        Figure().savefig(run_dir / "plots" / "loss.png")
        send_results(tracker, run_dir, {"status": "finished"})
    first, second = sorted(run_dir.glob("wandb/offline-run-*"))

    early, late = history(read_wandb(first))
    assert early["samples/_type"] == "table-file" and "samples/_type" not in late, "it came with the next row"
    assert (early["eval/rewards/margins/histogram/values"], late["preference/step"]) == ([2, 2], 1)
    assert [(alert.title, alert.text) for alert in of_kind(read_wandb(first), "alert")] == [(COLLAPSE, "it fell")]

    *again, results = history(read_wandb(second))
    assert [row["eval/rewards/margins/histogram/values"] for row in again] == [[2, 2], [2, 2]], "the record has them"
    assert results["plots/loss/_type"] == "image-file"
    table = json.loads((second / "files" / results["held_out/path"]).read_text())
    assert [row[3] for row in table["data"]] == [1.5, -0.5]
    kept = {artifact.type: artifact for artifact in of_kind(read_wandb(second), "artifact")}["report"]
    assert {entry.path for entry in kept.manifest.contents} == {"report.md", "loss.png"}
