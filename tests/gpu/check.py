"""The one call on a GPU: `python -m tests.gpu.check OUT`, or with `--dry` all of it on a CPU with a tiny model.

It says whether CUDA computes what the CPU does, and how fast and in how much memory against TRL. Each part is a process
with a time limit of its own and adds lines to OUT/results.jsonl as it goes, so a crash or a limit costs one part. Parts
that measure time run alone; the others run side by side. It ends with status 1 where a part did not end well, or noted
that something in it failed.

    python -m tests.gpu.check OUT --only correct micro --sizes 1.7B --seconds 300
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.gpu.lines import note

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 15
"""No part starts with less time than this left."""


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: what `--only` calls it.
        module: that it runs, with `arguments`.
        seconds: its limit.
        size: of the model, where it has one.
        environment: what is set for it.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    seconds: float = 60
    size: str | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Names its log: only files of letters, digits, dots, dashes and underscores come back from the machine."""
        return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join([self.name, *self.arguments, *self.environment]))


RUNS = (
    "ours_warm", "ours_cold", "ours_wide", "trl_precomputed", "trl_default", "ours_checkpointed", "trl_checkpointed",
)  # fmt: skip
"""Runs of a measurement. The first one fills the reference store, untimed: `ours_cold` clears it again."""

OWN_KERNELS = ("operations", "head", "products", "optimizers", "trl", "liger")
OTHER_KERNELS = ("attention", "flash3", "compiled")


def parts(sizes: Sequence[str]) -> list[list[Part]]:
    """Groups of parts, one after another; the parts of a group run side by side."""
    workers = str(max(4, (os.cpu_count() or 1) - 3))  # the model is prepared beside them
    first = [
        Part("environment", "tests.gpu.environment", seconds=60),
        Part("tests", "pytest", ("tests/gpu", "-q", "-p", "no:cacheprovider", "--maxfail=20", "-n", workers), 150),
        *(Part("prepare", "tests.gpu.speed", ("prepare", size), 120, size) for size in sizes),
    ]
    correct = [Part("correct", "tests.gpu.correct", (size,), 120, size) for size in sizes]
    alone = [
        *(Part("measure", "tests.gpu.speed", ("measure", sizes[0], run), 75, sizes[0]) for run in RUNS),
        Part("measure", "tests.gpu.speed", ("measure", sizes[0], "ours_warm"), 75, sizes[0], {"ALIGNMENT_FUSED": "0"}),
        Part("host", "tests.gpu.host", (sizes[0],), 60, sizes[0]),
        Part("micro", "tests.gpu.micro", ("--only", *OWN_KERNELS), 60),
        *(Part("measure", "tests.gpu.speed", ("measure", size, run), 75, size) for size in sizes[1:] for run in RUNS),
        Part("sampling", "tests.gpu.sampling", (sizes[0],), 60, sizes[0]),
        Part("micro", "tests.gpu.micro", ("--only", *OTHER_KERNELS, "--seconds", "75"), 90),
    ]
    return [first, correct, *([part] for part in alone)]


def main() -> int:
    """Run the parts that were asked for, within the time given; returns the exit status."""
    parser = argparse.ArgumentParser(description="Check and measure on a GPU.")
    parser.add_argument("out", type=Path, help="folder for results.jsonl and the logs")
    parser.add_argument("--dry", action="store_true", help="a tiny model on a CPU, to try the script itself")
    parser.add_argument("--only", nargs="+", help="names of parts")
    parser.add_argument("--skip", nargs="+", default=(), help="words; a part whose title holds one is left out")
    parser.add_argument("--sizes", nargs="+", default=["1.7B", "8B"])
    parser.add_argument("--seconds", type=float, default=525, help="for all parts together")
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + given.seconds
    results = out / "results.jsonl"
    earlier = len(results.read_text().splitlines()) if results.exists() else 0
    for group in parts(["tiny"] if given.dry else given.sizes):
        chosen = [part for part in group if given.only is None or part.name in given.only]
        chosen = [part for part in chosen if not any(word in part.title for word in given.skip)]
        run_together(chosen, out, end, dry=given.dry)
    lines = [json.loads(line) for line in results.read_text().splitlines()[earlier:]] if results.exists() else []
    failed = [line for line in lines if line["part"] == "failed" or (line["part"] == "ended" and line["code"] != 0)]
    for line in failed:
        print("FAILED:", line.get("what") or line["name"], line.get("error") or line.get("code"), file=sys.stderr)
    return 1 if failed else 0


def run_together(chosen: Sequence[Part], out: Path, end: float, *, dry: bool) -> None:
    """Start the parts, wait for each, say how each ended."""
    running: list[tuple[Part, subprocess.Popen[bytes], IO[bytes], float]] = []
    started = time.monotonic()
    for part in chosen:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            note(out, "ended", name=part.title, code="no time left")
            continue
        command = [sys.executable, "-m", part.module, *part.arguments]
        # Eight files come back from the machine: the log of the tests is one of them, the others are read here.
        folder = out if part.name == "tests" else work_folder(out)
        log = (folder / f"{part.title}.log").open("wb")
        environment = os.environ | {
            "CHECK_OUT": str(out),
            "CHECK_DRY": str(int(dry)),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # As our command sets it; TRL gains by it too, since every step has another width.
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            **part.environment,
        }
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        running.append((part, process, log, min(part.seconds, left)))
    for part, process, log, seconds in running:
        try:
            code: int | str = process.wait(max(0.1, started + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = "time limit"
        log.close()
        tail = Path(log.name).read_text(errors="replace")[-1800:] if code else ""
        note(out, "ended", name=part.title, code=code, seconds=round(time.monotonic() - started, 1), tail=tail)


def work_folder(out: Path) -> Path:
    """Where models and logs lie that stay on the machine."""
    folder = Path(os.environ.get("CHECK_WORK", out.parent / "check-work"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
