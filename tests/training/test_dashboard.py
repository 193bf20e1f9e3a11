"""The live view of a stage: what it shows, where it is shown, and that it gives the terminal back."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from alignment.config.schema import View
from alignment.training import dashboard
from alignment.training.callbacks import ProgressBar, stage_callbacks
from alignment.training.dashboard import Dashboard, has_room, sparkline


def shown(output: io.StringIO) -> str:
    return output.getvalue()


def begun(width: int = 80) -> tuple[Dashboard, Any, io.StringIO]:
    output = io.StringIO()
    view = Dashboard("DPO", Console(file=output, force_terminal=True, width=width, color_system=None))
    state = SimpleNamespace(is_world_process_zero=True, global_step=2, max_steps=10)
    view.on_train_begin(None, state, None)
    return view, state, output


@pytest.mark.parametrize("width", [80, 120])
def test_the_last_view_has_all_numbers_and_no_line_is_too_wide(width):
    view, state, output = begun(width)
    counted = iter(range(0, 10**6, 500))
    view.tokens = lambda: next(counted)
    for step in (3, 4, 5):
        state.global_step = step
        view.on_log(None, state, None, {"eval_loss": 0.7, "eval_rewards/margins": 0.5})
        view.on_log(None, state, None, {"loss": 0.5, "rewards/margins": 1.25, "logps/chosen": -40.0 - step})
        view.on_step_end(None, state, None)
    logging.getLogger("alignment.any").warning("Something to know")
    view.on_train_end(None, state, None)
    last = shown(output)[shown(output).rindex("DPO") :]
    for text in ("step 5 of 10", "loss 0.5", "margin 1.25", "held out, step 5", "tokens/s", "memory", "left"):
        assert text in last, text
    assert "chosen, nats █▅▁ -43 to -45" in last
    assert "Something to know" in last
    assert max(map(len, last.splitlines())) <= width


def test_an_accuracy_that_is_rounding_is_not_shown():
    view, state, output = begun()
    view.on_log(None, state, None, {"eval_loss": 0.7, "eval_rewards/margins": 1e-9, "eval_rewards/accuracies": 0.0})
    view.close()
    last = shown(output)[shown(output).rindex("DPO") :]
    assert "margin 1e-09" in last and "accuracy" not in last


def test_the_terminal_and_the_log_are_as_they_were_afterwards(monkeypatch):
    """Also where the training is interrupted: the cursor is there again, and a second end does nothing."""
    handler, other = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    logging.getLogger().addHandler(other)
    before, handlers = (sys.stdout, sys.stderr), list(logging.getLogger("alignment").handlers)
    try:
        view, _, output = begun()
        assert handler.stream is sys.stdout is not before[0], "the log goes through the view"
        view.close()
        view.close()
        assert (sys.stdout, sys.stderr) == before and (handler.stream, other.stream) == before
        assert logging.getLogger("alignment").handlers == handlers
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().removeHandler(other)
    assert shown(output).rindex("\x1b[?25h") > shown(output).rindex("\x1b[?25l")


def test_drawing_takes_a_small_share_of_the_time(monkeypatch):
    """After a drawing of 20 ms the next one comes 4 s later, however many steps there are."""
    view, state, _ = begun()
    now, drawings = 0.0, []

    def draw(*_: Any, **__: Any) -> None:
        nonlocal now
        drawings.append(now)
        now += 0.02

    monkeypatch.setattr(dashboard.time, "monotonic", lambda: now)
    monkeypatch.setattr(view._live, "update", draw)
    for _ in range(1000):
        now += 0.01
        view.on_step_end(None, state, None)
    monkeypatch.undo()
    view.close()
    assert [round(moment) for moment in drawings] == [0, 4, 8]


def test_it_is_for_a_terminal_of_ones_own(monkeypatch):
    trainer: Any = SimpleNamespace(eval_every=0, keep_checkpoints=1)

    def kinds(alone: bool = True, view: View = View.auto) -> set[type]:
        return {type(c) for c in stage_callbacks("t", print, trainer, True, alone, view)} & {Dashboard, ProgressBar}

    assert not has_room() and kinds() == {ProgressBar}, "tests write to no terminal"
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    assert kinds() == {Dashboard}
    assert kinds(alone=False) == kinds(view=View.off) == {ProgressBar}
    for name, value in (("TERM", "dumb"), ("CI", "true"), ("COLUMNS", "50"), ("LINES", "10")):
        with monkeypatch.context() as once:
            once.setenv(name, value)
            assert kinds() == {ProgressBar}, name


def test_a_curve_is_as_wide_as_it_may_be():
    assert sparkline([0.0, 1.0, 2.0]) == "▁▅█"
    assert sparkline([1.0, 1.0]) == "▁▁" and sparkline([float("nan")]) == ""
    assert sparkline([float(i) for i in range(1000)], 4) == "▁▃▆█"
