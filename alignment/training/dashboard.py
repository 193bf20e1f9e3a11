"""A live view of the stage that trains, for a terminal: how far it is, how fast, and what its numbers do."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

_LEAST_SECONDS = 0.5
"""Between two drawings."""
_MOST_SHARE = 0.005
"""Of the time, that drawing takes from the training: after a slow drawing the next one is later."""
_ZERO_MARGIN = 1e-4
"""A margin below this is rounding, and then so is the accuracy."""
_LEAST_SIZE = 60, 16
"""Columns and lines of a terminal in which it has room."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVES = {"logps/chosen": "chosen, nats", "logps/rejected": "rejected, nats", "loss": "loss"}
_NUMBERS = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "mean_token_accuracy": "token accuracy",
    "kl/offline": "KL, offline",
    "kl/teacher": "KL to teacher",
    "grad_norm": "gradient",
    "learning_rate": "rate",
}
"""What is shown of a row, and under which name."""


def has_room() -> bool:
    """Whether this process has a terminal of its own that can show it: no log, no CI, no job of a launcher."""
    columns, lines = shutil.get_terminal_size()
    return (
        sys.stdout.isatty()
        and sys.stderr.isatty()
        and os.environ.get("TERM", "dumb") != "dumb"
        and not os.environ.get("CI")
        and multiprocessing.parent_process() is None
        and columns >= _LEAST_SIZE[0]
        and lines >= _LEAST_SIZE[1]
    )


class Dashboard(TrainerCallback):
    """Shows one stage; lines of the log appear above it.

    Attributes:
        tokens: how many tokens were trained on so far, where the stage's log does not say it.
    """

    tokens: Callable[[], int] | None = None

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._title = title
        self._console = console
        self._live: Live | None = None
        self._handlers: list[tuple[logging.StreamHandler, Any]] = []
        self._warning = _LastWarning()
        self._step = self._of_steps = 0
        self._train: dict[str, float] = {}
        self._held_out: dict[str, float] = {}
        self._held_out_step = 0
        self._curves: dict[str, list[float]] = {name: [] for name in _CURVES}
        self._times: deque[tuple[float, int]] = deque(maxlen=50)
        self._counts: deque[tuple[float, int]] = deque(maxlen=20)
        self._next_drawing = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open it at the step from which the stage starts or resumes."""
        if not state.is_world_process_zero:
            return
        self._step, self._of_steps = state.global_step, state.max_steps
        self._begun = time.monotonic()
        self._times.append((self._begun, self._step))
        outputs = sys.stdout, sys.stderr
        console = self._console or Console()
        self._live = Live(self._view(), console=console, auto_refresh=False)
        self._live.start(refresh=True)
        # Handlers hold the stream that was there before; what they write there would run through the view.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in outputs:
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stdout)
        logging.getLogger("alignment").addHandler(self._warning)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance, and draw if that is due."""
        self._step = state.global_step
        self._times.append((time.monotonic(), self._step))
        if self.tokens is not None:
            self._counts.append((time.monotonic(), self.tokens()))
        self._draw_if_due()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Take the newest numbers."""
        if not logs or "train_runtime" in logs:
            return
        if any(name.startswith("eval_") for name in logs):
            self._held_out = {name.removeprefix("eval_"): value for name, value in logs.items()}
            self._held_out_step = state.global_step
            if abs(self._held_out.get("rewards/margins", 1.0)) < _ZERO_MARGIN:
                self._held_out.pop("rewards/accuracies", None)
        else:
            self._train = dict(logs)
            for name, values in self._curves.items():
                if name in logs:
                    values.append(float(logs[name]))
            if "num_tokens" in logs:
                self._counts.append((time.monotonic(), int(logs["num_tokens"])))
        self._draw_if_due()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the last view on the screen."""
        self.close()

    def close(self) -> None:
        """Give the terminal back as it was, also where the training ends early."""
        if self._live is None:
            return
        live, self._live = self._live, None
        live.update(self._view())
        live.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers = []
        logging.getLogger("alignment").removeHandler(self._warning)

    def _draw_if_due(self) -> None:
        begun = time.monotonic()
        if self._live is not None and begun >= self._next_drawing:
            self._live.update(self._view(), refresh=True)
            drawn = time.monotonic()
            self._next_drawing = drawn + max(_LEAST_SECONDS, (drawn - begun) / _MOST_SHARE)

    def _view(self) -> Panel:
        parts: list[Any] = [self._progress()]
        if cells := [*_shown(self._train), *self._of_machine()]:
            parts.append(_grid(cells))
        if self._held_out:
            place = Text(f"held out, step {self._held_out_step}", style="dim")
            parts += [place, _grid(_shown(self._held_out))]
        curves = Table.grid(padding=(0, 1))
        for name, title in _CURVES.items():
            if len(values := self._curves[name]) > 1:
                curves.add_row(Text(title, style="dim"), sparkline(values), f"{values[0]:.4g} to {values[-1]:.4g}")
        if curves.row_count:
            parts.append(curves)
        if self._warning.text:
            parts.append(Text(self._warning.text, style="yellow"))
        return Panel(Group(*parts), title=self._title, title_align="left")

    def _progress(self) -> Table:
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column()
        line.add_column(ratio=1)
        line.add_column(justify="right")
        bar = Bar(total=max(1, self._of_steps), completed=self._step)
        spent = time.monotonic() - self._begun
        line.add_row(
            f"step {self._step} of {self._of_steps}", bar, f"{_clock(spent)} gone, {_clock(self._seconds_left())} left"
        )
        return line

    def _seconds_left(self) -> float | None:
        (first, step), (last, now) = self._times[0], self._times[-1]
        return (last - first) / (now - step) * (self._of_steps - now) if now > step else None

    def _of_machine(self) -> list[tuple[str, str]]:
        """Tokens per second, and memory."""
        found = []
        if len(self._counts) > 1:
            (first, few), (last, many) = self._counts[0], self._counts[-1]
            found.append(("tokens/s", f"{(many - few) / max(last - first, 1e-9):,.0f}"))
        return [*found, ("memory", _memory())]


class _LastWarning(logging.Handler):
    """Keeps the last warning of this package: alerts are warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def sparkline(values: list[float], width: int = 24) -> str:
    """A curve of at most `width` characters, each the mean of its part of the values, from lowest to highest."""
    known = [value for value in values if abs(value) < float("inf")]  # NaN is no number either
    if not known:
        return ""
    width = min(width, len(known))
    parts = [known[len(known) * i // width : len(known) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(_BLOCKS[round((value - low) / (high - low) * 7) if high > low else 0] for value in means)


def _shown(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(title, f"{float(row[name]):.4g}") for name, title in _NUMBERS.items() if name in row]


def _grid(cells: list[tuple[str, str]], columns: int = 3) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in range(columns):
        table.add_column(ratio=1)
    texts = [Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in cells]
    for start in range(0, len(texts), columns):
        table.add_row(*texts[start : start + columns])
    return table


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _memory() -> str:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{(total - free) / 2**30:.1f} of {total / 2**30:.0f} GiB"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{most / 2**30:.1f} GiB at most"
