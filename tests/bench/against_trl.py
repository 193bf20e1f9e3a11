"""Ours against TRL's DPOTrainer, side by side on this machine.

`python -m tests.bench.against_trl [--quick] [--steps N] [--out DIR]`; README.md beside this file says how to read it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.job import PAIRS_PER_STEP, RUNS, Job, Preparation

HERE = Path(__file__).parent
REAL_DATA = HERE.parents[2] / "shared" / "data"
SOURCES = {"short": "pandalm_human/pairs.jsonl", "long": "llamafactory_demo/pairs_en.jsonl"}
FALLBACK = "quickstart"

LEARNING_RATE = 1e-4
START_TOLERANCE = 1e-3
LOSS_TOLERANCE = 2e-2

ROWS = {
    "ours, cold": ("ours_cold", True),
    "ours, warm": ("ours_warm", False),
    "TRL, default": ("trl_default", False),
    "TRL, precomputed, cold": ("trl_precomputed", True),
    "TRL, precomputed, warm": ("trl_precomputed", False),
}
"""Row of the table -> (run, whether its reference pass is counted in)."""

COMPARISONS = (
    ("ours, cold", "TRL, default"),
    ("ours, cold", "TRL, precomputed, cold"),
    ("ours, warm", "TRL, default"),
    ("ours, warm", "TRL, precomputed, warm"),
)


COLUMNS = {
    "s / pair": ("seconds_per_pair", ".3f"),
    "of it reference": ("reference_seconds_per_pair", ".3f"),
    "tokens / s": ("tokens_per_second", ",.0f"),
    "user s / pair": ("user_seconds_per_pair", ".3f"),
    "kernel s / pair": ("kernel_seconds_per_pair", ".3f"),
    "setup s": ("setup_seconds", ".1f"),
    "peak MiB": ("peak_mib", ",.0f"),
    "loss, step 0": ("loss_at_start", ".4f"),
}
RATIO_COLUMNS = {
    "s / pair": ("seconds_per_pair", ".2f"),
    "user s / pair": ("user_seconds_per_pair", ".2f"),
    "peak memory": ("peak_mib", ".2f"),
}


def choose_sources(quick: bool) -> dict[str, str]:
    """Name -> preference data; the bundled set in place of real data that is not beside the checkout."""
    names = ["short"] if quick else list(SOURCES)
    found = {name: str(REAL_DATA / SOURCES[name]) for name in names if (REAL_DATA / SOURCES[name]).is_file()}
    return found if len(found) == len(names) else {**found, FALLBACK: "bundled:quickstart"}


def in_own_process(task: Preparation | Job, folder: Path) -> dict[str, Any]:
    """Carry out a task in a fresh process, and return its result."""
    given, result, output = folder / "task.json", folder / "result.json", folder / "output.log"
    given.write_text(json.dumps(asdict(task)))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-m", "tests.bench.one_run", str(given), str(result)]
    with output.open("w") as log:
        done = subprocess.run(command, cwd=HERE.parents[1], env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        sys.exit(f"{task}\nended with status {done.returncode}:\n{output.read_text()[-4000:]}")
    return json.loads(result.read_text())


def check_losses(losses: Mapping[str, list[float]]) -> float:
    """Every run starts at log 2 and all follow one trajectory; returns their largest difference.

    Raises:
        AssertionError: they compute different things, so their times must not be compared.
    """
    for run, values in losses.items():
        if not abs(values[0] - math.log(2)) <= START_TOLERANCE:
            raise AssertionError(f"{run} starts at a loss of {values[0]:.6f} and not at log 2")
    worst = max(max(step) - min(step) for step in zip(*losses.values(), strict=True))
    if not worst < LOSS_TOLERANCE:
        raise AssertionError(f"the losses of the runs differ by up to {worst:.4f}: {dict(losses)}")
    return worst


def summarise(results: Mapping[str, Mapping[str, Any]], lengths: list[list[int]]) -> dict[str, Any]:
    """Numbers per pair of every row and their ratios, from the runs on one data set.

    Args:
        results: by run, as `one_run.run` returns them; the first step of each is the warm-up and is not counted.
        lengths: (prompt, chosen, rejected) tokens of every pair, in the order of training.
    """
    counted = lengths[PAIRS_PER_STEP:]
    tokens_per_pair = sum(2 * p + c + r for p, c, r in counted) / len(counted)
    rows = {}
    for name, (run, count_reference) in ROWS.items():
        result = results[run]
        share = 1 / len(lengths) if count_reference else 0.0
        reference = {kind: share * seconds for kind, seconds in result["reference_seconds"].items()}
        steps = {kind: [s / PAIRS_PER_STEP for s in values[1:]] for kind, values in result["seconds"].items()}
        rows[name] = {
            "seconds_per_pair": median(steps["wall"]) + reference["wall"],
            "reference_seconds_per_pair": reference["wall"],
            "tokens_per_second": tokens_per_pair / (mean(steps["wall"]) + reference["wall"]),
            "user_seconds_per_pair": median(steps["user"]) + reference["user"],
            "kernel_seconds_per_pair": median(steps["system"]) + reference["system"],
            "setup_seconds": result["setup_seconds"],
            "peak_mib": result["peak_bytes"] / 2**20,
            "loss_at_start": result["losses"][0],
        }
    ratios = {
        f"{ours} / {trl}": {key: rows[ours][key] / rows[trl][key] for key, _ in RATIO_COLUMNS.values()}
        for ours, trl in COMPARISONS
    }
    return {
        "pairs": len(lengths),
        "mean_lengths": [sum(column) / len(lengths) for column in zip(*lengths, strict=True)],
        "tokens_per_pair": tokens_per_pair,
        "max_loss_difference": check_losses({run: result["losses"] for run, result in results.items()}),
        "rows": rows,
        "ratios": ratios,
    }


def tables(summary: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(title, header and rows) of every table, as text."""
    found = []
    for name, data in summary["data"].items():
        prompt, chosen, rejected = data["mean_lengths"]
        title = (
            f"{name}: {data['pairs']} pairs, mean tokens {prompt:.0f} prompt, {chosen:.0f} chosen, "
            f"{rejected:.0f} rejected; largest difference between losses {data['max_loss_difference']:.1e}"
        )
        for heading, columns, rows in (
            (title, COLUMNS, data["rows"]),
            (f"{name}: ours / TRL (below 1: ours is faster, smaller)", RATIO_COLUMNS, data["ratios"]),
        ):
            cells = [[row, *(format(v[key], spec) for key, spec in columns.values())] for row, v in rows.items()]
            found.append((heading, [["", *columns], *cells]))
    return found


def describe(summary: Mapping[str, Any]) -> str:
    """One sentence on where and with what it ran."""
    machine, versions = summary["machine"], summary["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl"))
    where = machine["gpu"] if machine["device"] == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    dtype = "bfloat16" if machine["device"] == "cuda" else "float32"
    return (
        f"{summary['date']}, {where}, {machine['system']}; {named}; {summary['model']}, {dtype}, LoRA r 16 on all "
        f"linear layers, {PAIRS_PER_STEP} pairs a step, {summary['steps']} counted steps after one warm-up step, "
        f"no gradient checkpointing in either. {summary['minutes']:.0f} minutes."
    )


def write(summary: Mapping[str, Any], out: Path) -> None:
    """Print the tables, and write them as Markdown with everything measured as JSON."""
    console = Console(width=140)
    markdown = ["# Ours against TRL", "", describe(summary)]
    for title, (header, *rows) in tables(summary):
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        markdown += ["", f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in lines)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text("\n".join(markdown) + "\n")
    (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print(describe(summary))
    console.print(f"Written to {out}.")


def measure(preparation: Preparation, steps: int, tokens_per_batch: int, work: Path, lr: float) -> dict[str, Any]:
    """Run everything, one process after the other."""
    started = time.monotonic()
    prepared = in_own_process(preparation, work)
    data, runs = {}, {}
    for name, pairs in prepared["pairs"].items():
        runs[name] = {}
        for run in RUNS:
            print(f"{name}: {run} ...", file=sys.stderr, flush=True)
            cache = work / name
            cache.mkdir(exist_ok=True)
            job = Job(
                run=run,
                model=prepared["model"],
                adapter=prepared["adapter"],
                pairs=pairs,
                cache=str(cache),
                lr=lr,
                tokens_per_batch=tokens_per_batch,
            )
            runs[name][run] = in_own_process(job, work)
        data[name] = summarise(runs[name], prepared["lengths"][name])
    return {
        "date": date.today().isoformat(),
        "machine": prepared["machine"],
        "versions": prepared["versions"],
        "model": Path(prepared["model"]).name,
        "steps": steps,
        "tokens_per_batch": tokens_per_batch,
        "minutes": (time.monotonic() - started) / 60,
        "data": data,
        "runs": {
            name: {
                run: {
                    key: result[key]
                    for key in ("losses", "seconds", "reference_seconds", "setup_seconds", "peak_bytes")
                }
                for run, result in results.items()
            }
            for name, results in runs.items()
        },
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.against_trl", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the short pairs only, three counted steps")
    parser.add_argument("--steps", type=int, help="counted optimizer steps of every run (6; 3 with --quick)")
    parser.add_argument("--tokens-per-batch", type=int, default=1024, help="positions of one of our forward passes")
    parser.add_argument("--out", type=Path, help="folder for the results (tests/bench/results/<date>-<machine>)")
    arguments = parser.parse_args()
    steps = arguments.steps or (3 if arguments.quick else 6)
    with tempfile.TemporaryDirectory(prefix="against-trl-") as folder:
        preparation = Preparation(
            folder=folder,
            model=None,
            sources=choose_sources(arguments.quick),
            num_pairs=PAIRS_PER_STEP * (1 + steps),
        )
        summary = measure(preparation, steps, arguments.tokens_per_batch, Path(folder), LEARNING_RATE)
    machine = summary["machine"]
    where = (machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores").lower()
    name = f"{summary['date']}-{re.sub('[^a-z0-9]+', '-', where).strip('-')}"
    write(summary, arguments.out or HERE / "results" / name)


if __name__ == "__main__":
    main()
