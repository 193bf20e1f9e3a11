"""Alerts of simulated runs: a collapse is told once, and noise never is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.runs.alerts import COLLAPSE, UNSTABLE, alerts_in
from alignment.runs.cautions import cautions
from alignment.runs.folder import RunFiles
from alignment.runs.log import RunLog
from alignment.runs.record import RunRecord
from alignment.runs.tracking import Tracker

TOKENS = 50.0


def training(steps: int, chosen: Callable[[int], float], rejected: Callable[[int], float], noise: float, seed: int = 0):
    """Training rows whose log-ratios follow two curves in nats, each with noise of its own."""
    chance = random.Random(seed)
    for step in range(1, steps + 1):
        up, down = chosen(step) + chance.gauss(0, noise), rejected(step) + chance.gauss(0, noise)
        metrics = {"nats/chosen": up, "nats/rejected": down, "nats/margins": up - down, "lengths/chosen": TOKENS}
        yield {"stage": "preference", "split": "train", "step": step, "loss": 0.5, **metrics}


def held_out(step: int, chosen: float, rejected: float) -> dict[str, Any]:
    metrics = {"logps/chosen": chosen, "logps/rejected": rejected, "lengths/chosen": TOKENS}
    return {"stage": "preference", "split": "eval", "step": step, "loss": 0.5, **metrics}


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_a_collapse_is_told_once_at_the_step_where_it_is_beyond_doubt(noise):
    """Chosen fall by 0.2 nats a step, rejected by 0.5: ten rows have fallen by 5 nats (0.1 per token) at step 30."""
    [alert] = alerts_in(training(200, lambda s: -0.2 * s, lambda s: -0.5 * s, noise))
    assert (alert.kind, alert.stage, alert.split, alert.is_over) == (COLLAPSE, "preference", "train", False)
    assert 28 <= alert.step <= 60
    assert "under the reference, while the margin rises" in alert.text and "optim.lr" in alert.text


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (lambda s: 0.0, lambda s: 0.0),  # nothing moves
        (lambda s: 0.1 * s, lambda s: -0.1 * s),  # as it should be
        (lambda s: -0.02 * s, lambda s: -0.2 * s),  # a slight fall: 4 of 50 nats per 200 steps
        (lambda s: -0.5 * s, lambda s: -0.2 * s),  # chosen fall further than rejected: no margin rises
    ],
)
@pytest.mark.parametrize("noise", [0.1, 3.0, 30.0])
def test_nothing_else_is_an_alert_whatever_the_noise(chosen, rejected, noise):
    found = [a for seed in range(20) for a in alerts_in(training(200, chosen, rejected, noise, seed))]
    assert found == []


def test_held_out_rows_are_compared_with_the_first():
    """The same completions each time, so one row is enough; what follows says that it is over, once."""
    rows = [held_out(0, -40, -40), held_out(10, -44, -60), held_out(20, -46, -65), held_out(30, -47, -70)]
    rows += [held_out(40, -44, -70), held_out(50, -42, -70), held_out(60, -60, -99), held_out(70, -41, -90)]
    assert [(a.step, a.is_over) for a in alerts_in(rows)] == [(20, False), (50, True)]
    first = next(alerts_in(rows))
    assert "those of the held-out data are 0.12 nats per token less likely than before the first update" in first.text


def test_both_must_have_recovered():
    rows = [held_out(0, -40, -40), held_out(1, -46, -65), *training(12, lambda s: -9.0, lambda s: -20.0, 0.0)]
    rows += [held_out(13, -40, -65)]
    assert [a.is_over for a in alerts_in(rows)] == [False]
    rows += training(12, lambda s: -1.0, lambda s: -20.0, 0.0)
    assert [a.is_over for a in alerts_in(rows)] == [False, True]


def test_numbers_that_are_not_finite_are_told_once():
    rows = [{"stage": "sft", "split": "train", "step": s, "loss": 1.0, "grad_norm": math.nan} for s in (4, 5)]
    [alert] = alerts_in(rows)
    assert (alert.kind, alert.step) == (UNSTABLE, 4)
    assert alert.text == f"{UNSTABLE}: at step 4 grad_norm (train) is not finite."


def test_runs_without_log_probs_have_no_collapse():
    """A reward model, or answers of the policy."""
    rows = [
        {"stage": "preference", "split": split, "step": s, "rewards/margins": 0.1 * s, "kl/teacher": 1.0}
        for s in range(20)
        for split in ("train", "eval")
    ]
    assert list(alerts_in(rows)) == []


class Listening:
    title, run_id = "listening", "1"

    def __init__(self) -> None:
        self.sent: set[Any] = set()
        self.told: list[tuple[str, int]] = []

    def row(self, row: Any) -> None:
        pass

    def alert(self, alert: Any) -> None:
        self.told.append((alert.kind, alert.step))


def logged(told: RunLog, rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    for row in rows:
        metrics = {name: value for name, value in row.items() if name not in ("stage", "split", "step")}
        told.row(row["stage"], row["step"], row["split"], metrics)


def test_the_log_the_trackers_and_the_report_tell_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And a resume after it tells nothing again."""
    rows = [held_out(0, -40, -40), held_out(10, -46, -65), held_out(20, -47, -70)]
    service: Any = Listening()
    told = RunLog(RunRecord(tmp_path), Tracker([service]))
    logged(told, rows[:2])
    told.begin("preference", 10)
    logged(told, rows[2:])
    assert service.told == [(COLLAPSE, 10)]
    [line] = [record for record in caplog.records if record.levelname == "WARNING"]
    run = RunFiles(tmp_path, metrics=[{"time": "", "wall_s": 0.0, **row} for row in rows])
    [caution] = [found for found in cautions(run) if "chosen" in found.kind]
    assert (caution.kind, caution.text) == (COLLAPSE, line.getMessage())


def test_where_a_stage_stops_the_trackers_are_told(tmp_path: Path) -> None:
    service: Any = Listening()
    told = RunLog(RunRecord(tmp_path), Tracker([service]))
    told.row("sft", 7, "train", {"loss": 1.0})
    told.stopped("sft", "SFT stopped at step 8")
    assert service.told == [(UNSTABLE, 7)]
