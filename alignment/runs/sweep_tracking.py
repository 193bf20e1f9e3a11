"""Weights & Biases: one run for a whole sweep, beside the runs of its members."""

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
    """The result of a sweep.

    Attributes:
        facts: settings and data, sent as the configuration of the run.
        notes: the result in Markdown.
        values: single numbers that compare sweeps.
        header, rows: a table; each cell of the rows is a number, a text or None.
        figures: Plotly figures by name.
        files: sent together as one artifact.
    """

    facts: Mapping[str, str]
    notes: str
    values: Mapping[str, Any]
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    figures: Mapping[str, Any]
    files: Sequence[Path]


def send_summary(config: Mapping[str, Any], folder: Path, summary: SweepSummary) -> None:
    """Send it as a run in the group of the sweep's members. A resumed sweep continues its run.

    An error is logged and has no further effect.

    Args:
        config: the tracking settings of the members.
        folder: folder of the sweep, after which the group and the run are named.
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
