"""Ours against TRL's DPOTrainer, side by side on this machine.

`python -m tests.bench.against_trl [--quick] [--out DIR] ...`; README.md beside this file says how to read it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from alignment.runs.record import named
from tests.bench import sweeps, tables
from tests.bench.floor import Shape
from tests.bench.job import PAIRS_OF_RUNS, QWEN3_SIZES, ROOT, Case, Job, PeakRate, Preparation, Task, environment
from tests.bench.summary import judge_goals, summarise
from tests.bench.turns import Command, take_turns

RESULTS = Path(__file__).parent / "results"
REAL_DATA = ROOT.parent / "shared" / "data"
BUNDLED = "bundled:quickstart"
_LONG, _SHORT = "llamafactory_demo/pairs_en.jsonl", "pandalm_human/pairs.jsonl"

CASES = (
    Case(name="long", source=_LONG, steps=4),
    Case(name="short", source=_SHORT, steps=6),
    # Two pairs: with four, TRL's step would need more memory than this machine has.
    Case(name="prompts", source=_LONG, steps=4, pairs_per_step=2, cut=(768, 128)),
    Case(name="nf4", source=_SHORT, steps=4, nf4=True),
)
SWEEP = Case(name="sweep", source=_SHORT, steps=5, warm_up=0)
QUICK = ["short", SWEEP.name]
QUICK_STEPS = 3

BETA = 0.1
LEARNING_RATE = 1e-4


def choose_cases(cases: Sequence[Case], data: Path) -> tuple[Case, ...]:
    """The cases on what is there: bundled text in place of real data that is not beside the checkout.

    Cases that are nothing but their data become one, named after the bundled data.
    """
    chosen: dict[str, Case] = {}
    for case in cases:
        here = on_real_data(case, data)
        if here.source == BUNDLED and case.cut is None and not case.nf4:
            here = replace(here, name="quickstart")
        chosen.setdefault(here.name, here)
    return tuple(chosen.values())


def on_real_data(case: Case, data: Path) -> Case:
    """The case on its real data, or on the bundled ones where they are absent."""
    source = data / case.source
    return replace(case, source=str(source) if source.is_file() else BUNDLED)


class Bench:
    """Runs tasks in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def __call__(self, *tasks: Task, at_once: bool = True) -> list[dict[str, Any]]:
        """Carry out tasks, taking turns or (`at_once=False`) one after the other; return their results."""
        commands, results = [], []
        for task in tasks:
            self._count += 1
            stem = self._folder / f"task-{self._count}"
            stem.with_suffix(".json").write_text(json.dumps(asdict(task)))
            results.append(stem.with_suffix(".result"))
            words = (sys.executable, "-m", "tests.bench.one_run", f"{stem}.json", f"{stem}.result")
            commands.append(Command(words, stem.with_suffix(".log"), ROOT, environment(task)))
        for together in [commands] if at_once else [[command] for command in commands]:
            take_turns(together)
        return [json.loads(result.read_text()) for result in results]


def measure(preparation: Preparation, tokens_per_batch: int | None, lr: float, profile: bool) -> dict[str, Any]:
    """Run all cases; everything measured, and the profiles under "profiles"."""
    started = time.monotonic()
    work = Path(preparation.folder)
    bench = Bench(work)
    (prepared,) = bench(preparation)
    on_gpu = prepared["machine"]["device"] == "cuda"
    cases, runs, profiles = {}, {}, {}
    for case in preparation.cases:
        cache = work / case.name
        cache.mkdir()
        results = {}
        for names in PAIRS_OF_RUNS:
            print(f"{case.name}: {' and '.join(names)} ...", file=sys.stderr, flush=True)
            jobs = [
                Job(
                    run=name,
                    model=prepared["model"],
                    adapter=prepared["adapter"],
                    pairs=prepared["pairs"][case.name],
                    pairs_per_step=case.pairs_per_step,
                    nf4=case.nf4,
                    cache=str(cache),
                    beta=BETA,
                    lr=lr,
                    tokens_per_batch=tokens_per_batch,
                    profile=profile and name == "ours_warm",
                )
                for name in names
            ]
            # Two processes would each keep what they once reserved of a GPU; its speed does not come and go.
            *found, peak = bench(*jobs, PeakRate(turns=1 + case.steps), at_once=not on_gpu)
            results |= {name: result | peak for name, result in zip(names, found, strict=True)}
        if profile:
            profiles[case.name] = results["ours_warm"].pop("profile")
        arithmetic = "rounded" if on_gpu or case.nf4 else "exact"
        lengths = prepared["lengths"][case.name]
        cases[case.name] = {"source": source_name(case)} | summarise(
            results, lengths, case.pairs_per_step, Shape(**prepared["shape"]), arithmetic
        )
        runs[case.name] = results | {"lengths": lengths}
    return environment_of(prepared) | {
        "shape": prepared["shape"],
        "minutes": (time.monotonic() - started) / 60,
        "cases": cases,
        "goals": judge_goals(cases),
        "runs": runs,
        "profiles": profiles,
    }


def measure_sweep(
    preparation: Preparation,
    betas: Sequence[float],
    tokens_per_batch: int | None,
    lr: float,
    out: Path | None,
    quick: bool,
) -> tuple[dict[str, Any], Path]:
    """Run the sweep, the only case of the preparation; everything measured, and the folder for it.

    What has ended stands in that folder as it ends, in `sweep-unfinished.json`.
    """
    started = time.monotonic()
    work = Path(preparation.folder)
    (prepared,) = Bench(work)(preparation)
    on_gpu = prepared["machine"]["device"] == "cuda"
    case = replace(preparation.cases[0], nf4=on_gpu)
    summary = environment_of(prepared) | {
        "source": source_name(case),
        "steps": case.steps,
        "pairs_per_step": case.pairs_per_step,
        "quick": quick,
    }
    out = out or results_folder(summary)
    unfinished = out / "sweep-unfinished.json"

    def keep(found: list[sweeps.Ended]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(summary | {"runs": [asdict(ended) for ended in found]}, indent=1) + "\n")

    found = sweeps.measure(sweeps.Sweep(case, prepared, betas, lr, tokens_per_batch, work), quick=quick, keep=keep)
    summary |= sweeps.summarise(found, "rounded" if on_gpu else "exact", on_gpu)
    summary |= {"minutes": (time.monotonic() - started) / 60, "runs": [asdict(ended) for ended in found]}
    unfinished.unlink()
    return summary, out


def environment_of(prepared: dict[str, Any]) -> dict[str, Any]:
    """When, where and with what a comparison was made."""
    return {
        "date": date.today().isoformat(),
        "machine": prepared["machine"],
        "versions": prepared["versions"],
        "model": Path(prepared["model"]).name,
    }


def source_name(case: Case) -> str:
    """What the table calls the data."""
    name = case.source if case.source.startswith("bundled:") else Path(case.source).parent.name
    return name + (f", text cut to {case.cut[0]}/{case.cut[1]}" if case.cut else "") + (", NF4" if case.nf4 else "")


def write(name: str, page: str, found: Sequence[tables.Table], summary: dict[str, Any], out: Path) -> None:
    """Print the tables, and write them as Markdown with everything measured as JSON."""
    console = Console(width=150)
    for title, (header, *rows) in found:
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(page)
    (out / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print(page.splitlines()[2])
    console.print(f"Written to {out}.")


def update_pages() -> None:
    """Put the newest results into README.md and docs/speed.md."""
    speed = ROOT / "docs" / "speed.md"
    blocks = {ROOT / "README.md": tables.readme_block(RESULTS), speed: tables.speed_block(RESULTS, speed)}
    for path, block in blocks.items():
        path.write_text(tables.with_block(path.read_text(), block))


def results_folder(summary: dict[str, Any]) -> Path:
    """Where a run's results go unless told otherwise."""
    machine = summary["machine"]
    where = (machine["gpu"] or f"{named(machine)} {machine['cores']} cores").lower()
    name = f"{summary['date']}-{re.sub('[^a-z0-9]+', '-', where).strip('-')}"
    return RESULTS / (f"{name}-quick" if summary["quick"] else name)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.against_trl", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="`--cases short sweep --steps 3`, and a smaller sweep")
    names = [case.name for case in (*CASES, SWEEP)]
    parser.add_argument("--cases", nargs="+", choices=names, help="some of the data only, or the sweep")
    parser.add_argument("--steps", type=int, help="optimizer steps of every run that are counted")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder of another base model")
    model.add_argument("--random-qwen3", choices=list(QWEN3_SIZES), help="a Qwen3 of this size with random weights")
    parser.add_argument("--tokens-per-batch", type=int, help="positions of one of our passes (1024; on a GPU 16384)")
    parser.add_argument("--parts", action="store_true", help="only what each part of ours brings, on the long pairs")
    parser.add_argument("--profile", action="store_true", help="one more step of ours under torch's profiler")
    parser.add_argument("--out", type=Path, help="folder for the results (tests/bench/results/<date>-<machine>)")
    parser.add_argument("--readme", action="store_true", help="only write the newest results into the pages")
    return parser.parse_args()


def run_parts(arguments: argparse.Namespace) -> None:
    """Print what each part of ours brings on the long pairs: warm runs that take turns, each without one part."""
    from tests.bench import parts  # with torch: a process that only starts others stays small

    with tempfile.TemporaryDirectory(prefix="against-trl-") as folder:
        (case,) = choose_cases([replace(CASES[0], steps=arguments.steps or CASES[0].steps)], REAL_DATA)
        bench = Bench(Path(folder))
        (prepared,) = bench(preparation_of(arguments, folder, (case,)))
        whole = Job(
            run="ours_cold",
            model=prepared["model"],
            adapter=prepared["adapter"],
            pairs=prepared["pairs"][case.name],
            pairs_per_step=case.pairs_per_step,
            nf4=False,
            cache=folder,
            beta=BETA,
            lr=LEARNING_RATE,
            tokens_per_batch=arguments.tokens_per_batch,
            profile=False,
        )
        bench(whole)  # fills the store
        results = bench(*(replace(whole, run="ours_warm", without=part) for part in parts.PARTS))
    rows = parts.table(dict(zip(parts.PARTS, results, strict=True)), case.pairs_per_step)
    where = tables.when_and_where(environment_of(prepared))
    print("\n".join([f"{case.name}, {where}", "", *tables.markdown_table(rows)]))


def preparation_of(arguments: argparse.Namespace, folder: str, cases: tuple[Case, ...]) -> Preparation:
    """What has to be made in the folder before these cases run."""
    return Preparation(folder=folder, model=arguments.model, random_qwen3=arguments.random_qwen3, cases=cases)


def run_cases(arguments: argparse.Namespace, cases: Sequence[Case], quick: bool) -> None:
    """Measure and write the rows of single runs."""
    with tempfile.TemporaryDirectory(prefix="against-trl-") as folder:
        preparation = preparation_of(arguments, folder, choose_cases(cases, REAL_DATA))
        summary = measure(preparation, arguments.tokens_per_batch, LEARNING_RATE, arguments.profile)
    summary["quick"] = quick
    out = arguments.out or results_folder(summary)
    write("results", tables.results_markdown(summary), tables.tables(summary), summary, out)
    if summary["profiles"]:
        (out / "profile.md").write_text(tables.profile_markdown(summary["profiles"]))


def run_sweep(arguments: argparse.Namespace, case: Case, quick: bool) -> None:
    """Measure and write the sweep."""
    with tempfile.TemporaryDirectory(prefix="against-trl-") as folder:
        preparation = preparation_of(arguments, folder, (on_real_data(case, REAL_DATA),))
        betas = sweeps.QUICK_BETAS if arguments.quick else sweeps.BETAS
        summary, out = measure_sweep(
            preparation, betas, arguments.tokens_per_batch, LEARNING_RATE, arguments.out, quick
        )
    write("sweep", tables.sweep_markdown(summary), tables.sweep_tables(summary), summary, out)


def main() -> None:
    """Measure and write, or only rewrite README.md and docs/speed.md."""
    arguments = parse()
    if arguments.readme:
        update_pages()
        return
    if arguments.parts:
        run_parts(arguments)
        return
    names = arguments.cases or (QUICK if arguments.quick else [case.name for case in (*CASES, SWEEP)])
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else None)
    cases, sweep = (
        [replace(case, steps=steps or case.steps) for case in known if case.name in names]
        for known in (CASES, (SWEEP,))
    )
    partial = bool(arguments.quick or arguments.steps)
    if cases:
        run_cases(arguments, cases, quick=partial or bool(arguments.cases))
    for case in sweep:
        run_sweep(arguments, case, quick=partial)
    if not partial and (sweep or not arguments.cases):
        print("`python -m tests.bench.against_trl --readme` puts the newest numbers into README.md and docs/speed.md.")


if __name__ == "__main__":
    main()
