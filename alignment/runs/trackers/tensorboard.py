"""TensorBoard: event files in the folder of the run, which `tensorboard --logdir outputs` shows side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from alignment.config.schema import TrackingConfig
from alignment.runs.alerts import Alert
from alignment.runs.record import STAGES
from alignment.runs.text import markdown_table
from alignment.runs.trackers.base import MARGINS, Cell, Key, Row, Service, Told, flat_values, prefix

FOLDER = "tensorboard"
_MOST_ROWS = 100
"""Of a table, which TensorBoard shows as text."""
_COMPARED = ("rewards/accuracies", "nats/accuracies", "nats/margins", "loss")
"""Held-out metrics that its page of hyper-parameters shows beside the settings."""


class EventFiles(Service):
    """Writes event files; each start of the run writes one more, and TensorBoard reads them as one run."""

    title = "TensorBoard"

    def __init__(self, told: Told) -> None:
        self.run_id = FOLDER
        self._folder = told.folder / FOLDER
        self._step = 0
        self.sent = rows_there(self._folder)
        self._writer = SummaryWriter(str(self._folder))
        settings = {name: _setting(value) for name, value in flat_values(told.config).items()}
        for part in hparams(settings, {f"eval/{name}": 0.0 for name in _COMPARED})[:2]:
            self._writer._get_file_writer().add_summary(part)
        self._text("settings", markdown_table(["setting", "value"], [[k, str(v)] for k, v in settings.items()]), 0)

    def row(self, row: Row) -> None:
        """Write it, its loss last: a row with a loss is whole."""
        self._step = row.step
        for name, value in sorted(row.named.items(), key=lambda item: item[0].endswith("/loss")):
            self._writer.add_scalar(name, value, row.step, walltime=row.seconds)
        if row.margins is not None and any(row.margins.counts):
            edges, counts = np.array(row.margins.edges), np.array(row.margins.counts)
            middles = (edges[1:] + edges[:-1]) / 2
            self._writer.add_histogram_raw(
                f"{row.split}/{MARGINS}",
                min=edges[0],
                max=edges[-1],
                num=int(counts.sum()),
                sum=float(middles @ counts),
                sum_squares=float(middles**2 @ counts),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=row.step,
                walltime=row.seconds,
            )
        self._writer.flush()

    def alert(self, alert: Alert) -> None:
        """Write it as a text."""
        self._text(f"alerts/{alert.stage}", f"**{alert.kind}** {'(over)' * alert.is_over}\n\n{alert.text}", alert.step)

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Write its first rows as a text."""
        shown = [["" if cell is None else str(cell) for cell in row] for row in rows[:_MOST_ROWS]]
        left = f"\n\n{len(rows) - _MOST_ROWS} more rows are left out." if len(rows) > _MOST_ROWS else ""
        self._text(name, markdown_table(list(header), shown) + left, self._step)

    def files(self, kind: str, paths: Sequence[Path]) -> None:
        """Write pictures as pictures and Markdown as text."""
        for path in paths:
            if path.suffix == ".png":
                picture = (imread(path)[..., :3] * 255).astype(np.uint8)
                self._writer.add_image(f"plots/{path.stem}", picture, self._step, dataformats="HWC")
            elif path.suffix == ".md":
                self._text(f"{kind}/{path.stem}", path.read_text("utf-8"), self._step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the final values as a text; its page of hyper-parameters takes the last value of each metric."""
        shown = [[name, str(value)] for name, value in flat_values(values).items()]
        self._text("summary", markdown_table(["name", "value"], shown), self._step)

    def finish(self, exit_code: int) -> None:
        """Say that it ended well, if it did, and close the file."""
        if exit_code == 0:  # the first end that it reads counts, and one with an error may go on
            self._writer._get_file_writer().add_summary(_session_end())
        self._writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)
        self._writer.flush()


def _setting(value: Any) -> bool | float | int | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _session_end() -> Any:
    """What its page of hyper-parameters takes as the good end of a run."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.metadata import PLUGIN_NAME, SESSION_END_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    content = HParamsPluginData(version=0, session_end_info=SessionEndInfo(status=Status.Value("STATUS_SUCCESS")))
    data = SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=content.SerializeToString())
    return Summary(value=[Summary.Value(tag=SESSION_END_INFO_TAG, metadata=SummaryMetadata(plugin_data=data))])


def rows_there(folder: Path) -> set[Key]:
    """The rows that event files hold whole."""
    if not folder.is_dir():
        return set()
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    known = found.Tags()["scalars"]
    return {
        (stage, event.step, split)
        for stage in STAGES
        for split in ("train", "eval")
        if (name := f"{prefix(stage)}{split}/loss") in known
        for event in found.Scalars(name)
    }


def open_service(config: TrackingConfig, told: Told, rows: Sequence[Row], team: Any) -> EventFiles:
    """Go on in the event files of the run's folder."""
    del config, rows, team
    return EventFiles(told)
