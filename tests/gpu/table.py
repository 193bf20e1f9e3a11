"""The check's results as tables for docs/gpu.md: `python -m tests.gpu.table RESULTS.jsonl`."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

Line = dict[str, Any]

TITLES = {
    "ours_warm": "ours, reference in the store",
    "ours_cold": "ours, reference pass counted in",
    "ours_checkpointed": "ours, every layer checkpointed, reference in the store",
    "ours_checkpointed, cold": "ours, every layer checkpointed, reference pass counted in",
    "ours_wide": "ours, four times as many pairs a step, reference in the store",
    "ours_wide, cold": "ours, four times as many pairs a step, reference pass counted in",
    "trl_precomputed": "TRL, reference precomputed",
    "trl_default": "TRL, reference in every step",
    "trl_checkpointed": "TRL, reference in every step, checkpointed (its default)",
}


def read(path: Path) -> list[Line]:
    """All lines of the results."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def of_part(lines: list[Line], part: str, **wanted: Any) -> list[Line]:
    """The lines of a part that have these values."""
    return [line for line in lines if line["part"] == part and all(line.get(k) == v for k, v in wanted.items())]


def tokens_per_second(line: Line, *, with_reference: bool) -> float:
    """By the median step: the first steps of a run still ask the driver for memory.

    The reference pass, which covers the warm-up step too, is shared among all steps.
    """
    seconds = statistics.median(line["seconds"])
    tokens = line["tokens_per_second"] * sum(line["seconds"]) / len(line["seconds"])
    share = line["reference"] / (len(line["seconds"]) + 1) if with_reference else 0.0
    return tokens / (seconds + share)


def speed(lines: list[Line]) -> list[str]:
    """One row a run; a run of ours that made its reference gives the warm row as well."""
    rows = ["| model | run | step | tokens/s | peak |", "| --- | --- | ---: | ---: | ---: |"]
    for line in of_part(lines, "measure"):
        if "out_of_memory" in line:
            rows.append(f"| {line['size']} | {TITLES[line['run']]} | out of memory | | |")
            continue
        for run, counted in {
            "ours_cold": (("ours_warm", False), ("ours_cold", True)),
            "ours_checkpointed": (("ours_checkpointed", False), ("ours_checkpointed, cold", True)),
            "ours_wide": (("ours_wide", False), ("ours_wide, cold", True)),
            "trl_precomputed": (("trl_precomputed", True),),
        }.get(line["run"], ((line["run"], False),)):
            step = statistics.median(line["seconds"])
            rows.append(
                f"| {line['size']} | {TITLES[run]} | {step:.3f} s "
                f"| {tokens_per_second(line, with_reference=counted):,.0f} | {line['peak_gib']:.1f} GiB |"
            )
    return rows


def correctness(lines: list[Line]) -> list[str]:
    """Differences of log-probs in nats per token, of the gradient as a share of its norm."""
    rows = ["| model | compared | log-probs, mean | largest | gradient |", "| --- | --- | ---: | ---: | ---: |"]
    for line in of_part(lines, "correct"):
        rows.append(
            f"| {line['size']} | {line['what']} | {line['mean']:.4f} | {line['max']:.3f} | {line['gradient']:.4f} |"
        )
    return rows


def memory(lines: list[Line]) -> list[str]:
    """Planned and measured peaks of a step."""
    rows = ["| model | positions | checkpointed | planned | measured |", "| --- | ---: | --- | ---: | ---: |"]
    for line in of_part(lines, "memory"):
        rows.append(
            f"| {line['size']} | {line['fullest']:,} | {'every layer' if line['every'] else 'none'} "
            f"| {line['predicted_gib']:.2f} GiB | {line['measured_gib']:.2f} GiB |"
        )
    return rows


def main() -> None:
    """Print all tables."""
    lines = read(Path(sys.argv[1]))
    for title, rows in (("Speed", speed(lines)), ("Correctness", correctness(lines)), ("Memory", memory(lines))):
        print(f"## {title}\n", *rows, "", sep="\n")


if __name__ == "__main__":
    main()
