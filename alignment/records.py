"""What a run leaves behind: metrics, summary, samples and the facts of its environment, each written safely."""

from __future__ import annotations

import html
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import alignment
from alignment.errors import UserError

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
"""What a row of metrics.jsonl holds beside its metrics."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_SECRET_WORDS = frozenset({"token", "key", "apikey", "password", "passwd", "secret", "credential", "credentials"})


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode())


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Strict JSON as UTF-8: non-finite floats become the strings NaN, Infinity, -Infinity; paths and enums, text."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)
    # A lone surrogate (half an emoji from a cut model answer) is no UTF-8; written as \udxxx it is valid JSON.
    return text.encode("utf-8", "backslashreplace")


def to_json_lines(rows: Iterable[Any]) -> bytes:
    """`to_json` of each, a line for each."""
    return b"".join(to_json(row) + b"\n" for row in rows)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Path):
        return str(value)
    return value.name if isinstance(value, Enum) else value


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose values under keys such as api_key, hf_token, password are '***', at any depth.

    A key is split into words at case changes and at everything but letters and digits; `tokens_per_batch` has no
    secret word in it. Null stays null: that nothing was set is no secret.
    """
    return {key: _redacted(str(key), value) for key, value in mapping.items()}


def _redacted(key: str, value: Any) -> Any:
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key).lower()
    if value is not None and not _SECRET_WORDS.isdisjoint(re.split(r"[^a-z0-9]+", words)):
        return "***"
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, (list, tuple)):
        return [_redacted("", item) for item in value]
    return value


def escape_markdown(text: str) -> str:
    """Text of a model or a user as one inert piece of a Markdown line or table cell: no markup, HTML or line break."""
    text = text.encode("utf-8", "replace").decode()
    text = re.sub("\r\n|[\r\u2028\u2029]", "\n", html.escape(text.strip(), quote=False))
    # Control characters and those that turn the direction of the text around them.
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)
    # Character references, unlike backslashes, are never read as structure, whatever stands around them.
    # An underscore between letters or digits is plain text already, and names are easier to read with it.
    text = re.sub(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])", lambda match: f"&#{ord(match[0])};", text)
    return text.replace("\n", "<br>")


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """All whole rows of a metrics file, and whether the file must be rewritten before appending."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"The metrics file {path} cannot be read: {error.strerror}.") from None
    rows: list[dict[str, Any]] = []
    lines = data.split(b"\n")
    tail = lines.pop()
    for number, line in enumerate(lines, 1):
        row = metrics_row(line)
        if row is None:
            raise UserError(
                f"Line {number} of {path} is no metrics row: expected one JSON object with "
                '"stage", "split", "step" and numbers.'
            )
        rows.append(row)
    if tail and (last := metrics_row(tail)) is not None:
        rows.append(last)
    return rows, bool(tail)


def metrics_row(line: bytes) -> dict[str, Any] | None:
    """A row of a metrics.jsonl, non-finite numbers as floats; None for a line that is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    known = row.get("stage") in STAGES and row.get("split") in ("train", "eval") and isinstance(row.get("step"), int)
    numbers = all(
        isinstance(value, (int, float)) or (isinstance(value, str) and value in _NON_FINITE)
        for key, value in row.items()
        if key not in ("stage", "split", "time")
    )
    if not (known and numbers):
        return None
    return {key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, non-finite numbers as floats; a last line cut off by a kill is left out."""
    rows, _ = _read_lines(path)
    return rows


class RunRecord:
    """The files of one run folder that grow or are rewritten while it runs."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.metrics_path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic()
        if self.metrics_path.exists():
            rows, torn = _read_lines(self.metrics_path)
            self._keep(rows, rewrite=torn)

    def _keep(self, rows: Sequence[Mapping[str, Any]], rewrite: bool) -> None:
        if rewrite:
            atomic_write_bytes(self.metrics_path, to_json_lines(rows))
        self._start = time.monotonic() - (rows[-1]["wall_s"] if rows else 0.0)

    @property
    def wall_seconds(self) -> float:
        """Seconds of running time up to now: those of the rows kept from before a resume, plus those since."""
        return time.monotonic() - self._start

    def log(self, stage: str, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Append one row to metrics.jsonl; it is with the operating system when this returns."""
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
            file.write(to_json(row) + b"\n")

    def rewind(self, stage: str, step: int) -> None:
        """Forget what a resume from `step` of `stage` will do again: later steps of it, and all later stages."""
        assert stage in STAGES, stage
        if not self.metrics_path.exists():
            return
        rows, _ = _read_lines(self.metrics_path)
        order = STAGES.index(stage)
        kept = [row for row in rows if (STAGES.index(row["stage"]), row["step"]) <= (order, step)]
        self._keep(kept, rewrite=True)

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Write summary.json whole."""
        path = self.run_dir / "summary.json"
        atomic_write_bytes(path, to_json(summary, indent=2) + b"\n")
        return path

    def write_samples(self, samples: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Write samples.jsonl, and samples.md for reading: per prompt the answer of each model."""
        paths = [self.run_dir / "samples.jsonl", self.run_dir / "samples.md"]
        atomic_write_bytes(paths[0], to_json_lines(samples))
        parts = ["# Samples\n"]
        for number, sample in enumerate(samples, 1):
            parts.append(f"## {number}\n\n**Prompt:** {escape_markdown(str(sample['prompt']))}\n")
            for key, title in (("start", "Before training"), ("sft", "After SFT"), ("final", "Final")):
                if sample.get(key) is not None:
                    parts.append(f"**{title}:** {escape_markdown(str(sample[key]))}\n")
            if sample.get("verdicts"):
                verdicts = json.dumps(sample["verdicts"], ensure_ascii=False)
                parts.append(f"**Verdicts:** {escape_markdown(verdicts)}\n")
        atomic_write_text(paths[1], "\n".join(parts))
        return paths


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of those that decide results; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "alignment": alignment.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit(cwd: Path) -> str | None:
    """Commit hash of the work tree around `cwd`, with -dirty if files differ from it; None outside of git."""
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
    """CPU model, usable cores, GPU name (None without one) and system."""
    import torch

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (model := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        cpu = model[1].strip()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": platform.platform(),
    }
