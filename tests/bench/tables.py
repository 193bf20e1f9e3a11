"""The tables: on the screen, in results.md, in README.md and docs/speed.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from os.path import relpath
from pathlib import Path
from typing import Any

from alignment.runs.record import named
from tests.bench.summary import AT_MOST

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
SWEEP_COLUMNS = {
    "seconds": ("seconds", ".1f"),
    "a member": ("seconds_per_member", ".1f"),
    "user s": ("user_seconds", ".1f"),
    "kernel s": ("kernel_seconds", ".1f"),
    "peak GiB": ("peak_gib", ".2f"),
}
SWEEP_RATIO_COLUMNS = RATIO_COLUMNS | {"largest difference between losses": ("loss_difference", ".1e", "")}
SWEEP_BASELINE = "TRL, a run each"
QUANTITIES = {
    "times_faster": ("times faster", ".2f"),
    "memory": ("of its memory", ".2f"),
    "loss_difference": ("largest difference between losses", ".1e"),
    "of_peak": ("of the rate of torch's products", ".0%"),
}
README_ROWS = ("TRL, default", "TRL, precomputed", "ours, cold", "ours, warm")
README_RATIOS = {
    "ours, cold : TRL, default": "cold, against TRL's default",
    "ours, warm : TRL, default": "warm, against TRL's default",
    "ours, two epochs : TRL, precomputed, two epochs": "two epochs, against TRL precomputed",
}
REPORTED = "reported.json"
"""In the folder of the results: what other machines found, of which there is no more than their numbers."""
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
        found.append((_title(name, case), _row_table(case["rows"], COLUMNS)))
        found.append((f"{name}: ours against TRL", _ratio_table(case["ratios"], RATIO_COLUMNS)))
    if summary["goals"]:
        found.append(("Goals", goal_table(summary["goals"])))
    return found


def sweep_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Every table of a sweep."""
    betas = ", ".join(map(str, summary["betas"]))
    title = (
        f"sweep: {summary['source']}; beta {betas}; {summary['steps']} steps of {summary['pairs_per_step']} pairs a "
        f"member; all that the commands do is counted"
    )
    checkpointed = {name: row for name, row in summary["rows"].items() if name.endswith("checkpointed")}
    timed = {name: row for name, row in summary["rows"].items() if name not in checkpointed}
    found = [(title, _row_table(timed, SWEEP_COLUMNS))]
    if checkpointed:
        title = "sweep: two steps with every layer checkpointed, as many positions in a pass of either"
        found.append((title, _row_table(checkpointed, SWEEP_COLUMNS)))
    found.append(("sweep: one against the other", _ratio_table(summary["ratios"], SWEEP_RATIO_COLUMNS)))
    return [*found, ("Goals", goal_table(summary["goals"]))]


def _row_table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> list[list[str]]:
    cells = [[row, *(format(values[key], spec) for key, spec in columns.values())] for row, values in rows.items()]
    return [["", *columns], *cells]


def _ratio_table(
    ratios: Mapping[str, Mapping[str, Any]], columns: Mapping[str, tuple[str, str, str]]
) -> list[list[str]]:
    cells = [
        [pair.replace(" : ", " against "), *(f"{values[k]:{spec}}{unit}" for k, spec, unit in columns.values())]
        for pair, values in ratios.items()
    ]
    return [["", *columns], *cells]


def goal_table(goals: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows: every goal, what was found, whether it is met."""
    rows = [["data", "what", "goal", "found", "met"]]
    for goal in goals:
        words, spec = QUANTITIES[goal["quantity"]]
        bound = "at most" if goal["quantity"] in AT_MOST else "at least"
        against = f", against {goal['against']}" if goal["against"] else ""
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
    return _described(summary, "one warm-up step before the counted ones, no gradient checkpointing in either")


def describe_sweep(summary: Mapping[str, Any]) -> str:
    """The same of a sweep."""
    return _described(summary, f"{summary['steps']} steps a member, no gradient checkpointing")


def _described(summary: Mapping[str, Any], how: str) -> str:
    machine, versions = summary["machine"], summary["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl"))
    dtype = "bfloat16" if machine["device"] == "cuda" else "float32"
    return (
        f"{when_and_where(summary)}, {machine['system']}; {named}; {summary['model']}, {dtype}, LoRA r 16 on all "
        f"linear layers, {how}. {summary['minutes']:.0f} minutes."
    )


def when_and_where(summary: Mapping[str, Any]) -> str:
    """The date and the machine."""
    machine = summary["machine"]
    return f"{summary['date']}, {machine['gpu'] if machine['device'] == 'cuda' else _on_cpu(machine)}"


def _on_cpu(machine: Mapping[str, Any]) -> str:
    vectors = f" ({machine['vectors']})" if "vectors" in machine else ""
    return f"{named(machine)}{vectors}, {machine['threads']} threads"


def markdown_table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table whose first row is the header; columns after the first `left` are right-aligned."""
    header, *body = rows
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return ["| " + " | ".join(line) + " |" for line in (header, rule, *body)]


def results_markdown(summary: Mapping[str, Any]) -> str:
    """All of results.md."""
    return _page("Ours against TRL", describe(summary), tables(summary))


def sweep_markdown(summary: Mapping[str, Any]) -> str:
    """All of sweep.md."""
    return _page("A sweep: ours against TRL", describe_sweep(summary), sweep_tables(summary))


def _page(heading: str, description: str, found: Sequence[Table]) -> str:
    lines = [f"# {heading}", "", description]
    for title, rows in found:
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


# README.md and docs/speed.md


def newest_results(results: Path, name: str) -> list[Path]:
    """The newest folder of whole runs for every machine, newest machine first: `<date>-<machine>/<name>`."""
    newest: dict[str, Path] = {}
    for path in sorted(results.glob(f"*/{name}")):
        if not json.loads(path.read_text())["quick"]:
            newest[path.parent.name[len("2026-11-23-") :]] = path.parent
    return sorted(newest.values(), key=lambda folder: folder.name, reverse=True)


def readme_block(results: Path) -> str:
    """What stands between the README's markers: the ratios of every GPU, their range over CPUs, those of sweeps."""
    lines = []
    summaries = [json.loads((f / "results.json").read_text()) for f in newest_results(results, "results.json")]
    for summary in summaries:
        if summary["machine"]["device"] == "cuda":
            lines += ["", *markdown_table(_ratios(summary)), "", describe(summary)]
    on_cpus = [summary for summary in summaries if summary["machine"]["device"] != "cuda"]
    if on_cpus := on_cpus + reported(results):
        lines += ["", *markdown_table(ranges(on_cpus)), "", *markdown_table(processors(on_cpus), left=2)]
    for folder in newest_results(results, "sweep.json"):
        summary = json.loads((folder / "sweep.json").read_text())
        ratios = [
            (name.removeprefix("ours, "), ratio["times_faster"])
            for name in summary["rows"]
            if (ratio := summary["ratios"].get(f"{name} : {SWEEP_BASELINE}")) is not None
        ]
        said = ", ".join(f"{faster:.1f} times faster as a {name}" for name, faster in ratios)
        lines += ["", f"A whole sweep over {len(summary['betas'])} beta: {said} ({when_and_where(summary)})."]
    return "\n".join([*lines, "", ""])


def reported(results: Path) -> list[dict[str, Any]]:
    """What `REPORTED` holds: summaries with the ratios of their cases alone, and how they were measured."""
    path = results / REPORTED
    return json.loads(path.read_text()) if path.exists() else []


def ranges(summaries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows: from the least to the most times faster on any of the machines; no machine stands for all."""
    rows = [["times faster, by processor", *README_RATIOS.values()]]
    for name in dict.fromkeys(name for summary in summaries for name in summary["cases"]):
        ratios = [summary["cases"][name]["ratios"] for summary in summaries if name in summary["cases"]]
        cells = []
        for pair in README_RATIOS:
            found = [ratio[pair] for ratio in ratios if pair in ratio]
            times = [r["times_faster"] for r in found]
            if not found:
                cells.append("")
                continue
            shown = f"{min(times):.1f} to {max(times):.1f}" if len(times) > 1 else f"{times[0]:.1f} on one"
            cells.append(f"{shown}, {max(r['memory'] for r in found):.2f} of its memory")
        rows.append([name, *cells])
    return rows


def processors(summaries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows: how fast each machine multiplies, by torch and by oneDNN, and what a row of pairs gained there.

    The row is the first that a machine measured.
    """
    cold, warm, _ = README_RATIOS
    rows = [["processor", "vectors", "measured", "GFLOP/s by torch, by oneDNN", "pairs", "cold", "warm"]]
    for summary in summaries:
        machine, (name, case) = summary["machine"], next(iter(summary["cases"].items()))
        rows.append(
            [
                f"{named(machine)}, {machine['threads']} threads",
                machine.get("vectors", "not recorded"),
                summary["date"],
                f"{case['torch_rate'] / 1e9:.0f}, {case['our_rate'] / 1e9:.0f}",
                name,
                *(f"{case['ratios'][pair]['times_faster']:.1f}" for pair in (cold, warm)),
            ]
        )
    return rows


def speed_block(results: Path, page: Path) -> str:
    """What stands between the markers of the page about speed: the README's ratios, and the seconds and bytes behind.

    Args:
        results: folder of the results.
        page: the page, for links.
    """
    lines = []
    for summary in reported(results):
        lines += ["", *markdown_table(_ratios(summary)), "", f"{when_and_where(summary)}; {summary['how']}"]
    for folder in newest_results(results, "results.json"):
        summary = json.loads((folder / "results.json").read_text())
        cells = [["seconds a pair, peak memory", *README_ROWS]]
        for name, case in summary["cases"].items():
            numbers = [case["rows"][row] for row in README_ROWS]
            cells.append([name, *(f"{n['seconds_per_pair']:.2f} s, {n['peak_gib']:.1f} GiB" for n in numbers)])
        lines += ["", *markdown_table(_ratios(summary)), "", *markdown_table(cells), "", describe(summary)]
        lines += [f"[All numbers.]({relpath(folder, page.parent)}/results.md)"]
    for folder in newest_results(results, "sweep.json"):
        lines += ["", *_sweep_lines(json.loads((folder / "sweep.json").read_text()))]
        lines += [f"[All numbers.]({relpath(folder, page.parent)}/sweep.md)"]
    return "\n".join([*lines, "", ""])


def _ratios(summary: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows: times faster than TRL, and the share of its memory."""
    rows = [["times faster", *README_RATIOS.values()]]
    for name, case in summary["cases"].items():
        found = [case["ratios"].get(pair) for pair in README_RATIOS]
        cells = (f"{r['times_faster']:.1f}, {r['memory']:.2f} of its memory" if r else "" for r in found)
        rows.append([name, *cells])
    return rows


def _sweep_lines(summary: Mapping[str, Any]) -> list[str]:
    """A sweep's lines on the page about speed."""
    cells = [["a whole sweep, from its start to its end", "seconds", "times faster", "peak memory"]]
    for name, row in summary["rows"].items():
        if not name.endswith("checkpointed"):
            ratio = summary["ratios"].get(f"{name} : {SWEEP_BASELINE}")
            faster = "" if ratio is None else f"{ratio['times_faster']:.1f}"
            cells.append([name, f"{row['seconds']:.0f}", faster, f"{row['peak_gib']:.1f} GiB"])
    betas = ", ".join(map(str, summary["betas"]))
    text = (
        f"The same for a sweep over beta {betas}, by `python -m alignment.run -m`, one member after the other and as a "
        f"cohort, and by as many runs of TRL's."
    )
    return [text, "", *markdown_table(cells), "", describe_sweep(summary)]


def with_block(page: str, block: str) -> str:
    """The page with the block between its markers.

    Raises:
        ValueError: it does not hold the two markers once each.
    """
    begin, end = map(re.escape, README_MARKERS)
    changed, count = re.subn(f"({begin}\n).*({end})", lambda m: m[1] + block + m[2], page, flags=re.DOTALL)
    if count != 1 or any(page.count(marker) != 1 for marker in README_MARKERS):
        raise ValueError(f"the page must hold these two lines once each: {README_MARKERS}")
    return changed
