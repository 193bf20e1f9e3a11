"""The tables: on the screen, in results.md, in the README."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Table = tuple[str, list[list[str]]]
"""Title, and header and rows as text."""

COLUMNS = {
    "s / pair": ("seconds_per_pair", ".3f"),
    "of it reference": ("reference_seconds_per_pair", ".3f"),
    "tokens / s": ("tokens_per_second", ",.0f"),
    "of torch's rate": ("of_peak", ".0%"),
    "of our rate": ("of_our_peak", ".0%"),
    "peak GiB": ("peak_gib", ".2f"),
    "user s / pair": ("user_seconds_per_pair", ".3f"),
    "kernel s / pair": ("kernel_seconds_per_pair", ".3f"),
    "kernel": ("kernel_share", ".1%"),
    "setup s": ("setup_seconds", ".1f"),
    "loss, step 0": ("loss_at_start", ".4f"),
}
RATIO_COLUMNS = {
    "faster": ("times_faster", ".2f", "x"),
    "less CPU time": ("times_less_cpu", ".2f", "x"),
    "memory": ("memory", ".2f", "x"),
}
QUANTITIES = {
    "times_faster": ("times faster", ".2f"),
    "memory": ("of its memory", ".2f"),
    "of_peak": ("of the rate of torch's products", ".0%"),
}
README_ROWS = ("TRL, default", "TRL, precomputed", "ours, cold", "ours, warm")
README_RATIOS = {
    "ours, cold : TRL, default": "cold, against TRL's default",
    "ours, warm : TRL, default": "warm, against TRL's default",
    "ours, two epochs : TRL, precomputed, two epochs": "two epochs, against TRL precomputed",
}
README_MARKERS = ("<!-- benchmark: python -m tests.bench.against_trl --readme -->", "<!-- end of the benchmark -->")


def _title(name: str, case: Mapping[str, Any]) -> str:
    prompt, chosen, rejected = case["mean_lengths"]
    return (
        f"{name}: {case['source']}; {case['steps']} counted steps of {case['pairs_per_step']} pairs; mean tokens "
        f"{prompt:.0f} prompt, {chosen:.0f} chosen, {rejected:.0f} rejected; at least "
        f"{case['floor_per_pair'] / 1e9:,.0f} GFLOP a pair; large products run at "
        f"{case['torch_rate'] / 1e9:,.0f} GFLOP/s by torch, {case['our_rate'] / 1e9:,.0f} by ours; largest difference "
        f"between losses {case['max_loss_difference']:.1e}"
    )


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Every table of a run."""
    found = []
    for name, case in summary["cases"].items():
        cells = [
            [row, *(format(values[key], spec) for key, spec in COLUMNS.values())]
            for row, values in case["rows"].items()
        ]
        found.append((_title(name, case), [["", *COLUMNS], *cells]))
        cells = [
            [
                pair.replace(" : ", " against "),
                *(f"{values[k]:{spec}}{unit}" for k, spec, unit in RATIO_COLUMNS.values()),
            ]
            for pair, values in case["ratios"].items()
        ]
        found.append((f"{name}: ours against TRL", [["", *RATIO_COLUMNS], *cells]))
    if summary["goals"]:
        found.append(("Goals", goal_table(summary["goals"])))
    return found


def goal_table(goals: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows: every goal, what was found, whether it is met."""
    rows = [["data", "what", "goal", "found", "met"]]
    for goal in goals:
        words, spec = QUANTITIES[goal["quantity"]]
        bound = "at most" if goal["quantity"] == "memory" else "at least"
        against = f", against {goal['trl']}" if goal["trl"] else ""
        rows.append(
            [
                goal["case"],
                f"{goal['ours']}{against}: {words}",
                f"{bound} {goal['goal']:{spec}}",
                f"{goal['found']:{spec}}",
                "yes" if goal["met"] else "no",
            ]
        )
    return rows


def describe(summary: Mapping[str, Any]) -> str:
    """Where and with what it ran."""
    machine, versions = summary["machine"], summary["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl"))
    where = machine["gpu"] if machine["device"] == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    dtype = "bfloat16" if machine["device"] == "cuda" else "float32"
    return (
        f"{summary['date']}, {where}, {machine['system']}; {named}; {summary['model']}, {dtype}, LoRA r 16 on all "
        f"linear layers, one warm-up step before the counted ones, no gradient checkpointing in either. "
        f"{summary['minutes']:.0f} minutes."
    )


def markdown_table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table whose first row is the header; columns after the first `left` are right-aligned."""
    header, *body = rows
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return ["| " + " | ".join(line) + " |" for line in (header, rule, *body)]


def results_markdown(summary: Mapping[str, Any]) -> str:
    """All of results.md."""
    lines = ["# Ours against TRL", "", describe(summary)]
    for title, rows in tables(summary):
        lines += ["", f"**{title}**", "", *markdown_table(rows, left=2 if title == "Goals" else 1)]
    return "\n".join(lines) + "\n"


def profile_markdown(profiles: Mapping[str, Mapping[str, Any]]) -> str:
    """All of profile.md: one warm step of ours for every case."""
    lines = ["# Where one step of ours spends its time", ""]
    lines += ["Self time of torch's operators; the head counts by itself, with its own matrix products."]
    for name, profile in profiles.items():
        shares = [[kind, f"{share:.1%}"] for kind, share in profile["shares"].items()]
        operators = [[f"`{operator}`", str(calls), f"{share:.1%}"] for operator, calls, share in profile["operators"]]
        lines += ["", f"## {name}: {profile['seconds']:.2f} s", ""]
        lines += markdown_table([["work", "share"], *shares])
        lines += ["", *markdown_table([["operator", "calls", "share"], *operators])]
    return "\n".join(lines) + "\n"


# README


def newest_results(results: Path) -> list[Path]:
    """The newest folder of whole runs for every machine, newest machine first: `<date>-<machine>/results.json`."""
    newest: dict[str, Path] = {}
    for path in sorted(results.glob("*/results.json")):
        if not json.loads(path.read_text())["quick"]:
            newest[path.parent.name[len("2026-11-23-") :]] = path.parent
    return sorted(newest.values(), key=lambda folder: folder.name, reverse=True)


def readme_block(results: Path, root: Path) -> str:
    """What stands between the README's markers: for every machine its newest numbers.

    Args:
        results: folder of the results.
        root: folder of the README, for links.
    """
    lines = []
    for folder in newest_results(results):
        summary = json.loads((folder / "results.json").read_text())
        cells = [["seconds a pair, peak memory", *README_ROWS]]
        for name, case in summary["cases"].items():
            numbers = [case["rows"][row] for row in README_ROWS]
            cells.append([name, *(f"{n['seconds_per_pair']:.2f} s, {n['peak_gib']:.1f} GiB" for n in numbers)])
        ratios = [["times faster", *README_RATIOS.values()]]
        for name, case in summary["cases"].items():
            found = [case["ratios"][pair] for pair in README_RATIOS]
            ratios.append([name, *(f"{r['times_faster']:.1f}, {r['memory']:.2f} of its memory" for r in found)])
        lines += ["", *markdown_table(ratios), "", *markdown_table(cells), "", describe(summary)]
        lines += [f"[All numbers.]({folder.relative_to(root)}/results.md)"]
    return "\n".join([*lines, "", ""])


def with_block(readme: str, block: str) -> str:
    """The README with the block between its markers.

    Raises:
        ValueError: it does not hold the two markers once each.
    """
    begin, end = map(re.escape, README_MARKERS)
    changed, count = re.subn(f"({begin}\n).*({end})", lambda m: m[1] + block + m[2], readme, flags=re.DOTALL)
    if count != 1 or any(readme.count(marker) != 1 for marker in README_MARKERS):
        raise ValueError(f"the README must hold these two lines once each: {README_MARKERS}")
    return changed
