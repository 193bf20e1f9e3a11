"""What a run writes: metrics, summary, samples and the facts of its environment. No kill leaves half a file."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

import alignment
from alignment.errors import UserError
from alignment.evaluation.judges.base import Judgement
from alignment.files import (
    atomic_write_bytes,
    atomic_write_text,
    damaged,
    file_digest,
    to_json,
    to_json_lines,
    write_sealed,
)
from alignment.runs.text import escape_markdown

STAGES = ("sft", "preference")
"""The stages of a run, in their order."""

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "hydra-core",
    "wandb",
)

LINE_KEYS = ("stage", "split", "step", "time", "wall_s")
"""The keys of a row of metrics.jsonl that are no metrics. Its last key, the checksum, is left out when it is read."""
_CHECKSUM = "crc32"

MARGINS = "margins.jsonl"
"""In the folder of a run: how the margins of single held-out pairs were spread in each evaluation."""

SEAL = "checksums.json"
"""In the folder of a finished run: the digests of its files."""
SEALED = ("config.yaml", "summary.json", "metrics.jsonl", "samples.jsonl", "held_out.jsonl")
"""The files that it has digests of, as far as a run has them."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_lines(path: Path, parse: Callable[[bytes], dict[str, Any] | None]) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a JSON Lines file, and whether its last line lacks its end, as a kill leaves it.

    Args:
        parse: makes a row of a line, or None if the line is no row. Such a last line is left out.

    Raises:
        UserError: the file cannot be read, or a line before the last is no row.
    """
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        row = parse(line)
        if row is None:
            raise UserError(f"Line {number} of {path} cannot be read.")
        rows.append(row)
    if tail and (last := parse(tail)) is not None:
        rows.append(last)
    return rows, bool(tail)


def json_row(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None if the line holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def metrics_row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics.jsonl, with non-finite numbers as floats; None if the line is no such row, or has changed."""
    row = json_row(line)
    if row is None or not {"stage", "split", "step"} <= row.keys():
        return None
    checksum = row.pop(_CHECKSUM, None)  # earlier versions wrote none
    row = {key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
    known = all(isinstance(value, int | float) for key, value in row.items() if key not in LINE_KEYS)
    return row if known and checksum in (None, _checksum(row)) else None


def _checksum(row: Mapping[str, Any]) -> str:
    return f"{crc32(to_json(row)):08x}"  # no number, as metrics are: a damaged name cannot make one of it


def _metrics_line(row: Mapping[str, Any]) -> bytes:
    return to_json({**row, _CHECKSUM: _checksum(row)}) + b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that a kill cut off.

    Raises:
        UserError: the file cannot be read, or a line before the last is no row.
    """
    rows, _ = read_lines(path, metrics_row)
    return rows


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values lie between an edge and the next one."""

    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: Sequence[float], bins: int = 32) -> Histogram:
        """Of the values that are finite, in bins of equal width."""
        counts, edges = np.histogram([value for value in values if math.isfinite(value)], bins=bins)
        return cls(edges.tolist(), counts.tolist())


def read_margins(run_dir: Path) -> dict[int, Histogram]:
    """The histograms of the margins of single held-out pairs, by step of the preference stage.

    Raises:
        UserError: the file cannot be read, or a line before the last is no histogram.
    """
    path = run_dir / MARGINS
    rows = read_lines(path, _margins_row)[0] if path.exists() else []
    return {row["step"]: Histogram(row["edges"], row["counts"]) for row in rows}


def _margins_line(step: int, margins: Histogram) -> bytes:
    return to_json_lines([{"step": step, "edges": margins.edges, "counts": margins.counts}])


def _margins_row(line: bytes) -> dict[str, Any] | None:
    row = json_row(line)
    return row if row is not None and {"step", "edges", "counts"} <= row.keys() else None


class RunRecord:
    """Writes the files of one run folder while the run goes on."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.metrics_path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        for path in run_dir.rglob(".*.tmp"):  # a kill leaves what was being written
            path.unlink()
        self._start = time.monotonic()
        if self.metrics_path.exists():
            try:
                rows, torn = read_lines(self.metrics_path, metrics_row)
            except UserError as error:
                raise UserError(f"{str(error).rstrip('.')}: start the run anew in another folder.") from error
            self._keep(rows, rewrite=torn)

    def _keep(self, rows: Sequence[Mapping[str, Any]], rewrite: bool) -> None:
        if rewrite:
            atomic_write_bytes(self.metrics_path, b"".join(map(_metrics_line, rows)))
        self._start = time.monotonic() - (rows[-1]["wall_s"] if rows else 0.0)

    @property
    def wall_seconds(self) -> float:
        """Seconds of running time so far, with those before a resume."""
        return time.monotonic() - self._start

    def log(self, stage: str, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Append one row to metrics.jsonl. When this returns, the operating system has the row."""
        assert stage in STAGES, stage
        assert split in ("train", "eval"), split
        assert not set(LINE_KEYS) & set(metrics), f"{LINE_KEYS} are no metric names"
        row = {
            "stage": stage,
            "split": split,
            "step": int(step),
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "wall_s": round(self.wall_seconds, 3),
            **{name: float(value) for name, value in metrics.items()},
        }
        with self.metrics_path.open("ab") as file:
            file.write(_metrics_line(row))

    def log_margins(self, step: int, margins: Histogram) -> None:
        """Append how the margins of single held-out pairs are spread after this step of the preference stage."""
        with (self.run_dir / MARGINS).open("ab") as file:
            file.write(_margins_line(step, margins))

    def rewind(self, stage: str, step: int) -> None:
        """Delete the rows that a resume from `step` of `stage` will write again: later steps and later stages."""
        assert stage in STAGES, stage
        last = step if stage == "preference" else -1
        lines = [_margins_line(at, margins) for at, margins in read_margins(self.run_dir).items() if at <= last]
        if (self.run_dir / MARGINS).exists():
            atomic_write_bytes(self.run_dir / MARGINS, b"".join(lines))
        if not self.metrics_path.exists():
            return
        rows = read_metrics(self.metrics_path)
        order = STAGES.index(stage)
        kept = [row for row in rows if (STAGES.index(row["stage"]), row["step"]) <= (order, step)]
        self._keep(kept, rewrite=True)

    def require(self, stage: str, step: int, split: str) -> None:
        """Refuse metrics that end before this row: rows are only ever appended, so the others are there too.

        Raises:
            UserError: the row is missing.
        """
        rows = read_metrics(self.metrics_path)
        if not any((row["stage"], row["step"], row["split"]) == (stage, step, split) for row in rows):
            raise damaged(self.metrics_path)

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Write summary.json."""
        path = self.run_dir / "summary.json"
        atomic_write_bytes(path, to_json(summary, indent=2) + b"\n")
        return path

    def seal(self) -> None:
        """Keep the digests of the files that reports are made from, now that the run is finished."""
        found = {name: file_digest(self.run_dir / name) for name in SEALED if (self.run_dir / name).exists()}
        write_sealed(self.run_dir / SEAL, found)

    def write_samples(self, samples: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Write samples.jsonl, and samples.md for reading: every prompt with the answer of each model."""
        paths = [self.run_dir / "samples.jsonl", self.run_dir / "samples.md"]
        atomic_write_bytes(paths[0], to_json_lines(samples))
        parts = ["# Samples\n"]
        for number, sample in enumerate(samples, 1):
            parts.append(f"## {number}\n\n**Prompt:** {escape_markdown(str(sample['prompt']))}\n")
            for key, title in (("start", "Before training"), ("sft", "After SFT"), ("final", "Final")):
                if sample.get(key) is not None:
                    parts.append(f"**{title}:** {escape_markdown(str(sample[key]))}\n")
                if found := sample.get("verdicts", {}).get(key):
                    parts.append(f"**Judged:** {escape_markdown(str(Judgement.from_json(found)))}\n")
                if found := sample.get("preferences", {}).get(key):
                    said = "; ".join([_OUTCOMES[found["outcome"]], *found["reasons"]])
                    parts.append(f"**Judged:** {escape_markdown(said)}\n")
        atomic_write_text(paths[1], "\n".join(parts))
        return paths


_OUTCOMES = {1: "the final answer is better", 0: "a tie with the final answer", -1: "better than the final answer"}


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of the packages that decide results; None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "alignment": alignment.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit(cwd: Path) -> str | None:
    """Commit hash of the work tree around `cwd`, with -dirty if it has changes; None outside of git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def machine() -> dict[str, Any]:
    """CPU model with its numbers and vectors, usable cores, GPU name (None without a GPU) and system."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    return {
        **processor(cpuinfo.read_text() if cpuinfo.exists() else ""),
        "cores": len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": platform.platform(),
    }


def processor(info: str) -> dict[str, Any]:
    """The processor: "cpu", its name; "family", "model" and "stepping", None where unknown; "vectors".

    Several processors may have one name, and what they gain from faster products differs. The vectors say what they
    can do, and how many bits of it at a time.

    Args:
        info: text of Linux's /proc/cpuinfo; empty on other systems.
    """
    name, *numbers = (
        found[1].strip() if (found := re.search(rf"^{key}\s*:\s*(.+)$", info, re.MULTILINE)) else None
        for key in ("model name", "cpu family", "model", "stepping")
    )
    known = {key: int(n) if n else None for key, n in zip(("family", "model", "stepping"), numbers, strict=True)}
    vectors = _vectors(info, known["family"])
    return {"cpu": name or platform.processor() or platform.machine(), **known, "vectors": vectors}


def _vectors(info: str, family: int | None) -> str:
    """Of AMD's family 25, Zen 4 alone has AVX-512, and computes it in halves; Zen 5 in laptops is not told apart."""
    import torch

    flags = set(info.split())
    if "avx512f" not in flags:
        return "AVX2, 256 bits" if "avx2" in flags else f"{torch.backends.cpu.get_cpu_capability()} as torch says"
    bits = "256 bits at a time" if "AuthenticAMD" in flags and family == 25 else "512 bits"
    return f"AVX-512{' with bfloat16' if 'avx512_bf16' in flags else ''}, {bits}"


def named(facts: Mapping[str, Any]) -> str:
    """The processor among the facts of a machine in words; records of earlier versions have its name alone."""
    numbers = [f"{key} {facts[key]}" for key in ("family", "model", "stepping") if facts.get(key) is not None]
    return ", ".join([facts["cpu"], *numbers])
