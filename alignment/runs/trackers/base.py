"""What a service is told of a run, and what each of them does with it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from alignment.files import redact, to_json
from alignment.runs.alerts import Alert
from alignment.runs.record import Histogram

Key = tuple[str, int, str]
"""Stage, step and split of a row, of which a run has one."""

Cell = str | int | float | bool | None
"""Of a table."""

MARGINS = "rewards/margins/histogram"
"""Name of the histogram of the margins of single held-out pairs, after the split."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of metrics.jsonl.

    Attributes:
        seconds: when it was written, in seconds since 1970.
        margins: of the single pairs, for an evaluation that has them.
    """

    stage: str
    step: int
    split: str
    metrics: Mapping[str, float]
    seconds: float
    margins: Histogram | None = None

    @property
    def key(self) -> Key:
        """What tells it from all other rows of the run."""
        return self.stage, self.step, self.split

    @property
    def named(self) -> dict[str, float]:
        """The metrics under the names that users of TRL know: `train/rewards/margins`, in SFT `sft/train/loss`."""
        return {f"{prefix(self.stage)}{self.split}/{name}": value for name, value in self.metrics.items()}


def prefix(stage: str) -> str:
    """What stands before the split in the name of a metric."""
    return "sft/" if stage == "sft" else ""


@dataclass(frozen=True, slots=True)
class Told:
    """The run as a service is told of it when it begins or goes on.

    Attributes:
        folder: of the run.
        name, group: for people, to tell runs apart and to find those that belong together.
        job_type: its stages, "sweep member", or "sweep summary".
        config: its settings, with secrets masked.
        notes: Markdown.
        tags: free words.
    """

    folder: Path
    name: str
    group: str
    job_type: str
    config: Mapping[str, Any]
    notes: str | None = None
    tags: Sequence[str] = ()


class Service(ABC):
    """A service that has opened a run. Whatever it raises ends the tracking by it, never the training.

    Attributes:
        title: its name in sentences.
        run_id: under which a later process continues the run.
        sent: the rows that it has from earlier processes.
    """

    title: ClassVar[str]
    run_id: str
    sent: set[Key]

    @abstractmethod
    def row(self, row: Row) -> None:
        """Take one row."""

    @abstractmethod
    def alert(self, alert: Alert) -> None:
        """Tell people of it."""

    @abstractmethod
    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Take a table; a later one of this name is a newer version of it."""

    @abstractmethod
    def files(self, kind: str, paths: Sequence[Path]) -> None:
        """Take files that belong together, at the end of the run."""

    @abstractmethod
    def summary(self, values: Mapping[str, Any]) -> None:
        """Take the final values, with secrets masked."""

    @abstractmethod
    def finish(self, exit_code: int) -> None:
        """Close the run; 0 says that it went well."""

    def figure(self, name: str, figure: Any) -> None:  # noqa: B027 - most services draw none
        """Take a Plotly figure, if the service shows such."""


def sendable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with secrets masked, in types that JSON has."""
    return json.loads(to_json(redact(values)))


def flat_values(values: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping, its names joined by dots."""
    if isinstance(values, Mapping):
        parts = [flat_values(value, f"{name}.{key}" if name else str(key)) for key, value in values.items()]
        return {key: value for part in parts for key, value in part.items()}
    return {name: ", ".join(map(str, values)) if isinstance(values, list) else values}
