"""Disturbs runs at random moments, and counts how they end.

    python -m tests.faults --minutes 10

The tiny recipe of the tests is killed, stopped, left without disk, given damaged files, and continued. A case ends
right where the run is equal to an undisturbed one in the end, or where one sentence says what is wrong and what it
says works. Everything else is wrong, is printed, and sets the exit status.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.campaign import FILES, FINISHED, MOMENTS, WAYS, Campaign
from tests.faults.moments import PHASES
from tests.faults.ranked import RANKED, RankedCampaign

OUTCOMES = ("equal", "sentence", "wrong")
_INSIDE = "ALIGNMENT_FAULTS_INSIDE"


def enter_namespace() -> bool:
    """Start again where mounts are this process's own and need no rights; returns whether mounts can be made here."""
    if os.environ.get(_INSIDE):
        return True
    unshare = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)))
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        return False
    os.environ[_INSIDE] = "1"
    os.execvp("unshare", [*unshare, sys.executable, "-m", "tests.faults", *sys.argv[1:]])


def cases(kinds: list[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Every kind at every moment in a random order, then all again in another order."""
    own = dict.fromkeys((*FILES, FINISHED), WAYS) | dict.fromkeys(RANKED, PHASES)
    every = [(kind, moment) for kind in kinds for moment in own.get(kind, MOMENTS)]
    while True:
        yield from rng.sample(every, len(every))


def table(title: str, kinds: list[str], columns: tuple[str, ...], counts: Counter) -> Table:
    """How many ended equal / in a sentence / wrong."""
    drawn = Table(title=title, title_justify="left")
    for name in ("", *columns, "all"):
        drawn.add_column(name, justify="left" if not name else "right")
    for kind in kinds:
        cells = [[counts[kind, column, outcome] for outcome in OUTCOMES] for column in columns]
        cells.append([sum(numbers) for numbers in zip(*cells, strict=True)])
        drawn.add_row(kind, *("/".join(map(str, cell)) if any(cell) else "" for cell in cells))
    return drawn


def main() -> int:
    """Run the campaign; the exit status says whether anything went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="another one, other moments")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long it may take")
    parser.add_argument("--kinds", help="some of the kinds, separated by commas; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--verbose", action="store_true", help="print every case, not only the wrong ones")
    parser.add_argument("--cases", type=int, default=10**6, help="at most so many")
    options = parser.parse_args()
    started, can_mount = time.monotonic(), enter_namespace()
    console = Console(highlight=False, soft_wrap=True)
    work = Path(tempfile.mkdtemp(prefix="faults-")).resolve()
    campaign, ranked = Campaign(work, can_mount), RankedCampaign(work / "ranks", can_mount)
    known = sorted([*campaign.kinds, *ranked.kinds, *FILES], key=lambda kind: kind in (*FILES, FINISHED))
    kinds = options.kinds.split(",") if options.kinds else known
    if unknown := set(kinds) - set(known):
        parser.error(f"no kind is called {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    campaign.begin()
    if not set(kinds).isdisjoint(RANKED):
        ranked.begin()
    if not can_mount:
        console.print("Nothing can be mounted here, so the full disk and the read-only cache are left out.")

    # Cases, until the time is over; what runs then goes on to its end
    counts: Counter = Counter()
    upcoming = itertools.islice(enumerate(cases(kinds, random.Random(options.seed))), options.cases)
    lock = threading.Lock()

    def work_off() -> None:
        while time.monotonic() - started < 60 * options.minutes - 20:
            with lock:
                number, (kind, moment) = next(upcoming, (None, ("", "")))
            if number is None:
                return
            verdict = (ranked if kind in RANKED else campaign).case(kind, moment, f"{options.seed} {number}")
            counts[kind, moment, verdict.outcome] += 1
            if verdict.outcome == "wrong" or options.verbose:
                console.print(f"[{number}] {kind}, {moment}: {verdict.outcome}. {verdict.said}", markup=False)

    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(work_off) for _ in range(options.jobs)]:
            done.result()

    # The tables
    of_files = [kind for kind in kinds if kind in (*FILES, FINISHED)]
    of_runs = [kind for kind in kinds if kind not in of_files]
    if of_runs:
        console.print(table("Disturbed in (equal/sentence/wrong)", of_runs, MOMENTS, counts))
    if of_files:
        console.print(table("Damaged bytes of (equal/sentence/wrong)", of_files, WAYS, counts))
    total = Counter({name: sum(n for key, n in counts.items() if key[2] == name) for name in OUTCOMES})
    console.print(
        f"{total.total()} cases in {time.monotonic() - started:.0f} s, seed {options.seed}: {total['equal']} equal, "
        f"{total['sentence']} in a sentence, {total['wrong']} wrong."
    )
    if not total["wrong"]:
        shutil.rmtree(work)
    return bool(total["wrong"])


if __name__ == "__main__":
    sys.exit(main())
