"""Weights & Biases: one run for a sweep as a whole, beside those of its members."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.config.schema import TrackingConfig
from alignment.runs.tracking import sendable, start_run

logger = logging.getLogger(__name__)

_SECTION = "comparison"


@dataclass(frozen=True, slots=True)
class SweepSummary:
    """What is sent of a sweep as a whole.

    Attributes:
        facts: what was run, as the configuration of the run.
        notes: what came out, in Markdown.
        values: single numbers, to compare sweeps by.
        header, rows: a table; of the rows each cell is a number, a text or None.
        figures: Plotly's, by name.
        files: kept together as one artifact.
    """

    facts: Mapping[str, str]
    notes: str
    values: Mapping[str, Any]
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    figures: Mapping[str, Any]
    files: Sequence[Path]


def send_summary(config: Mapping[str, Any], folder: Path, summary: SweepSummary) -> None:
    """Send it as a run in the group of the sweep's members; a sweep that goes on goes on in the same run.

    Whatever is wrong is logged and has no further effect.

    Args:
        config: where to, as the members have it.
        folder: of the sweep; its name is the group's and the run's.
    """
    try:
        name = folder.absolute().name
        run = start_run(
            replace(TrackingConfig(**config), name=None),
            folder,
            summary.facts,
            group=name,
            job_type="sweep summary",
            name=name,
            notes=summary.notes,
        )
        if run is None:
            return
        import wandb

        with run:
            rows = [list(row) for row in summary.rows]
            table = wandb.Table(columns=list(summary.header), data=rows, allow_mixed_types=True)
            figures = {f"{_SECTION}/{name}": wandb.Plotly(figure) for name, figure in summary.figures.items()}
            run.log({f"{_SECTION}/variants": table} | figures)
            artifact = wandb.Artifact(f"{_SECTION}-{run.id}", type=_SECTION)
            for path in summary.files:
                artifact.add_file(str(path))
            run.log_artifact(artifact)
            run.summary.update(sendable(summary.values))
    except Exception as error:
        logger.warning("W&B failed and gets no summary of the sweep: %s", error)
