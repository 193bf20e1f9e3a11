"""Shows that a change leaves results alone: the same runs in two checkouts, compared file by file.

    git worktree add /tmp/before HEAD~1
    python -m tests.equivalence /tmp/before

Every kind of run is done with both packages, from data to the end; metrics, summaries, adapters, caches and
configurations must be equal, weights and log-probs to the last bit. Then each package continues on the other's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from alignment.policy.tiny_model import write_tiny_model
from tests.equivalence.compare import contents
from tests.equivalence.kinds import KINDS, PAIRS, Kind
from tests.helpers.commands import pair, write_lines, write_project

HERE = Path(__file__).parents[2]
ON_OLD_CACHE = "on_the_cache_before"
LOOP = ("trainer.tokens_per_batch=64", "trainer.checkpoint_every=0")
"""A pass holds two pairs or so: what a plan would choose depends on the memory that is free."""


class Side:
    """One checkout: a process with its package, that runs commands."""

    def __init__(self, checkout: Path, work: Path) -> None:
        self.work = work
        environment = os.environ | {
            **{"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
            **{"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"},  # peft writes sets
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "tests" / "equivalence" / "side.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=work,
        )
        started = self._process.stdout.readline() if self._process.stdout else ""
        package = json.loads(started)["package"] if started else None
        if package != str(checkout.resolve() / "alignment"):
            sys.exit(f"Error: {checkout} holds no package `alignment` that starts; found {package}.")

    def start(self, name: str, kind: Kind, project: Path) -> None:
        """Send a kind's commands off."""
        commands = [_arguments(command, project) for command in kind.commands]
        job = {"folder": str(self.work / name), "commands": commands, "killed_at": kind.killed_at}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def codes(self) -> list[int]:
        """Wait for the end of the kind that was started last; the exit codes of its commands."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _arguments(command: tuple[str, ...], project: Path) -> list[str]:
    """A kind's command as the command line gets it; a resumed run has its settings already."""
    arguments = ["--config-dir", str(project / "conf"), "recipe=tiny"]
    if any(word.startswith("resume=") for word in command):
        return [*arguments, *command]
    has_folder = any(word.startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for word in command)
    words = [word.replace("{data}", str(project / "data")) for word in command]
    loop = () if "loss=none" in command else LOOP
    return [*arguments, *loop, *([] if has_folder else ["hydra.run.dir=run"]), *words]


def write_inputs(project: Path) -> None:
    """A tiny model, the recipe `tiny`, and data files of pairs, rows, lists and scored pairs."""
    project.mkdir(parents=True)
    write_tiny_model(project / "model")
    write_project(project, project / "model")
    data = project / "data"
    pairs = [pair(number) for number in range(1, 13)]
    sides = ((p, side) for p in pairs for side in ("chosen", "rejected"))
    write_lines(
        data / "rows.jsonl",
        [{"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"} for p, side in sides],
    )
    scored = [p | {"score_chosen": 3.0, "score_rejected": 1.0} for p in pairs]
    write_lines(data / "scored.jsonl", scored[:9])
    write_lines(data / "held_out_scored.jsonl", scored[9:])
    lists = [
        {
            "prompt": p["prompt"],
            "completions": [p["chosen"], other["chosen"], p["rejected"]],
            "scores": [3.0, 2.0, 1.0],
        }
        for p, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
    ]
    write_lines(data / "lists.jsonl", lists[:9])
    write_lines(data / "held_out_lists.jsonl", lists[9:])


def main() -> int:
    """Compare; the exit status says whether every file is equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.equivalence", description=__doc__.split("\n\n")[0])
    parser.add_argument("before", type=Path, help="checkout of the version before")
    parser.add_argument("--after", type=Path, default=HERE, help="checkout of the version now (default: this one)")
    parser.add_argument("--kinds", help=f"some of {', '.join([*KINDS, ON_OLD_CACHE])}; default: all")
    parser.add_argument("--work", type=Path, help="keep everything in this new folder")
    parser.add_argument("--renamed", action="append", default=[], metavar="OLD=NEW", help="a key renamed on purpose")
    parser.add_argument(
        "--except", action="append", default=[], dest="left_out", metavar="NAME", help="a file changed on purpose"
    )
    options = parser.parse_args()
    names = options.kinds.split(",") if options.kinds else [*KINDS, ON_OLD_CACHE]
    if unknown := set(names) - {*KINDS, ON_OLD_CACHE}:
        parser.error(f"no kind of run is called {', '.join(unknown)}")

    # The two checkouts
    work = options.work or Path(tempfile.mkdtemp(prefix="equivalence-"))
    renamed = dict(text.split("=", 1) for text in options.renamed)
    write_inputs(work / "project")
    sides = {}
    for name, checkout in (("before", options.before), ("after", options.after)):
        (work / name).mkdir()
        sides[name] = Side(checkout.resolve(), work / name)
    console = Console(highlight=False, soft_wrap=True)
    total, failed = 0, []

    def compare(kind: str, codes: dict[str, list[int]]) -> None:
        nonlocal total
        found = {name: contents(work / name / kind, renamed) for name in sides}
        for files in found.values():
            for file in list(files):
                # The version before takes its own SFT result over; the one now trains, and adds its results.
                own = kind == ON_OLD_CACHE and file.startswith("cache/stages")
                if own or Path(file).name in options.left_out:
                    del files[file]
        every = set().union(*found.values())
        differing = sorted(file for file in every if len({files.get(file) for files in found.values()}) > 1)
        total += len(found["after"])
        ends = codes["before"] == codes["after"] and (codes["after"][-1] == 0)
        if differing or not ends or not found["after"]:
            failed.append(kind)
        verdict = f"{len(differing)} DIFFER: {', '.join(differing[:8])}" if differing else "equal"
        console.print(f"{kind:24} {len(found['after']):3} files  {verdict}" + ("" if ends else f"  exit codes {codes}"))

    # Kinds of runs, both sides at once
    for kind in (name for name in names if name in KINDS):
        for side in sides.values():
            side.start(kind, KINDS[kind], work / "project")
        compare(kind, {name: side.codes() for name, side in sides.items()})

    # Both continue on a cache that the version before has filled: equal results, and the reference is found there
    if ON_OLD_CACHE in names:
        again = Kind(((*PAIRS, "sft=quickstart", "sft.trainer.max_steps=2", "sft.data.source={data}/sft.jsonl"),))
        sides["before"].start("filled", again, work / "project")
        sides["before"].codes()
        for name, side in sides.items():
            shutil.copytree(work / "before" / "filled" / "cache", work / name / ON_OLD_CACHE / "cache")
            side.start(ON_OLD_CACHE, again, work / "project")
        codes = {name: side.codes() for name, side in sides.items()}
        compare(ON_OLD_CACHE, codes)
        summary = json.loads((work / "after" / ON_OLD_CACHE / "run" / "summary.json").read_text())
        if summary["reference"]["misses"]:
            failed.append("the reference cache before is not found again")
        if "taken_over" in summary["stages"]["sft"]:
            failed.append("an SFT result of other code was taken over")

    # The verdict
    for side in sides.values():
        side.close()
    if options.work is None and not failed:
        shutil.rmtree(work)
    console.print(
        f"{total} files compared; " + (f"not equal: {', '.join(failed)} (kept in {work})" if failed else "all equal.")
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
