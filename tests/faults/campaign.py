"""Runs that are disturbed at random moments, and how each of them ends."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alignment.policy.tiny_model import write_tiny_model
from tests.faults.moments import PHASES, ClockJump, Disturbed, FullDisk, Marked, ReadOnly, Signalled, report_instead
from tests.helpers.commands import Ended, command, write_project
from tests.helpers.runs import assert_same

RUN = ("recipe=tiny", "hydra.run.dir=one")
SWEEP = ("recipe=tiny", "-m", "loss.beta=0.1,0.2", "hydra.sweep.dir=many")
MOMENTS = (*PHASES, "sweep")
DISK = 24 * 2**20
"""Bytes of the disk that becomes full."""

FILES = {
    "reference store": "cache/reference.sqlite*",
    "stage store": "cache/stages/*/**/*",
    "checkpoint model": "run/one/stages/*/checkpoints/*/adapter_*",
    "checkpoint optimizer": "run/one/stages/*/checkpoints/*/optimizer.pt",
    "checkpoint trainer_state": "run/one/stages/*/checkpoints/*/trainer_state.json",
    "checkpoint other": "run/one/stages/*/checkpoints/*/[!ato]*",
    "adapter": "run/one/**/adapter_model.safetensors",
    "done.json": "run/one/stages/*/done.json",
    "plan.json": "run/one/stages/*/plan.json",
    "beginning.json": "run/one/stages/beginning.json",
    "held_out_start": "run/one/stages/preference/held_out_start.*",
    "answers": "run/one/stages/answers_*.json",
    "config.yaml": "run/one/config.yaml",
    "overrides.yaml": "run/one/.hydra/overrides.yaml",
    "metrics.jsonl": "run/one/metrics.jsonl",
}
"""The kinds of files whose bytes are damaged, and where they are."""
REPORTED = ("config.yaml", "summary.json", "metrics.jsonl", "samples.jsonl", "held_out.jsonl", "checksums.json")
"""The files of a finished run that reports are made from."""
FINISHED = "finished run"
WAYS = ("flip", "truncate", "zero")


class WrongError(AssertionError):
    """A run that ended neither right nor in one sentence."""


def require(condition: bool, message: str) -> None:
    """Raise `WrongError(message)` unless the condition holds."""
    if not condition:
        raise WrongError(message)


@dataclass(frozen=True)
class Verdict:
    """How a case ended: "equal", "sentence" or "wrong", and what was said."""

    outcome: str
    said: str


def words(ended: Ended) -> str:
    """How a command ended and what it said, without its progress bars."""
    lines = [line for line in (ended.out + ended.err).splitlines() if line.strip() and "step/s" not in line]
    return f"exit code {ended.code}: " + "\n".join(lines)[-3000:]


def said_in(ended: Ended) -> str:
    """The one sentence of a command that ended with it."""
    said = [line for line in ended.err.splitlines() if line.startswith(("Error: ", "Interrupted; continue with: "))]
    require(ended.code == 1 and bool(said) and "Traceback" not in ended.err + ended.out, words(ended))
    return said[-1]


def damage(path: Path, way: str, rng: random.Random) -> None:
    """Damage a file in one place."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if way == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif way == "truncate":
        del data[at:]
    else:
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    path.write_bytes(data)


class Campaign:
    """A project, its undisturbed runs, and cases.

    Args:
        work: an empty folder.
        can_mount: whether small disks and read-only folders can be mounted here.
    """

    def __init__(self, work: Path, can_mount: bool) -> None:
        self.work = work
        work.mkdir(exist_ok=True)
        write_tiny_model(work / "model")
        self._project = write_project(work / "project", work / "model")
        self._numbers = iter(range(10**6))
        self._wholes: dict[tuple[str, ...], Path] = {}
        self._counts: dict[str, int] = {}
        self._killed: dict[str, list[Path]] = {}
        self.kinds: dict[str, Callable[[Path, random.Random, str], Verdict]] = {
            "kill": self.killed,
            "terminate": self.terminated,
            "clock jump": self.clock,
            "two on one cache": self.two,
            FINISHED: self.reported,
        }
        if can_mount:
            self.kinds |= {"full disk": self.full_disk, "read-only cache": self.read_only}

    def begin(self) -> None:
        """Make what all cases are compared with."""
        for arguments in (RUN, SWEEP):
            self.whole(arguments)

    def case(self, kind: str, moment: str, seed: str) -> Verdict:
        """One case; its folder stays only if it went wrong.

        Args:
            kind: of the fault, or of the file that is damaged.
            moment: phase of the fault, or way of the damage.
            seed: decides everything else.
        """
        rng, place = random.Random(seed), self._place()
        try:
            verdict = self.damaged(place, rng, kind, moment) if kind in FILES else self.kinds[kind](place, rng, moment)
        except Exception:
            return Verdict("wrong", f"{place}: {traceback.format_exc(limit=-1, chain=False)}")
        shutil.rmtree(place)
        return verdict

    # Parts of cases

    def _place(self) -> Path:
        folder = self.work / f"case-{next(self._numbers)}"
        (folder / "run").mkdir(parents=True)
        return folder

    def _command(self, place: Path, *arguments: str, patch: Disturbed | None = None, run: str = "run") -> Ended:
        """What the command prints goes to a folder of its own, which is never full or read-only."""
        said = self.work / "said" / place.name / run
        (place / run).mkdir(exist_ok=True)
        patch = patch or Disturbed(place)
        return command("--config-dir", str(self._project), *arguments, cwd=place / run, cache=said, patch=patch)

    def whole(self, arguments: tuple[str, ...]) -> Path:
        """The folder of the undisturbed command; counts the moments at which it could have been disturbed."""
        if arguments not in self._wholes:
            place, counts = self._place(), self.work / f"counts-{len(self._wholes)}"
            ended = self._command(place, *arguments, patch=Disturbed(place, counts=counts))
            assert ended.code == 0, ended.err
            found = json.loads(counts.read_text())
            self._counts |= {"sweep": found["sweep"]} if arguments == SWEEP else {p: found[p] for p in PHASES}
            self._wholes[arguments] = place / "run"
        return self._wholes[arguments]

    def _arguments(self, moment: str) -> tuple[str, ...]:
        return SWEEP if moment == "sweep" else RUN

    def _disturb(self, rng: random.Random, moment: str, place: Path, fault: Callable[[], None]) -> Ended:
        """The command with the fault at some use of a file in this phase."""
        arguments = self._arguments(moment)
        self.whole(arguments)
        number = rng.randint(1, self._counts[moment])
        return self._command(place, *arguments, patch=Disturbed(place, moment, number, fault))

    def _go_on(self, place: Path, moment: str, said: str = "", logged: bool = True) -> str:
        """Go on with what was disturbed, the fault being over; returns the sentence if it ends in one.

        A run that a sentence refuses to continue must work in another folder, on the same cache.

        Args:
            said: how to go on, if the disturbed command has said it.
            logged: see `assert_same`.
        """
        arguments, run = self._arguments(moment), "run"
        folder = place / "run" / "one"
        if " with: python -m alignment.run " in said:
            arguments = tuple(word for word in shlex.split(said.split(" with: ")[1])[3:])
            arguments = arguments[2:] if arguments[0] == "--config-dir" else arguments
        elif moment != "sweep" and (folder / "config.yaml").exists():
            if (folder / "summary.json").exists():
                # Killed once it was finished: what was being written then, the report, is written again.
                for path in folder.rglob(".*.tmp"):
                    path.unlink()
                printed = self.work / "said" / place.name / "report"
                ended = command("one", cwd=place / run, cache=printed, patch=report_instead)
                require(ended.code == 0, words(ended))
                self._compare(place, moment, run, logged)
                return ""
            arguments = ("resume=one",)
        said = ""
        ended = self._command(place, *arguments)
        if ended.code != 0:
            said, run = said_in(ended), "anew"
            ended = self._command(place, *self._arguments(moment), run=run)
            require(ended.code == 0, f"{said}\nand then, in another folder: {words(ended)}")
        self._compare(place, moment, run, logged)
        return said

    def _compare(self, place: Path, moment: str, run: str, logged: bool = True) -> None:
        whole = self.whole(self._arguments(moment))
        for name in ("many/0-tiny", "many/1-tiny") if moment == "sweep" else ("one",):
            assert_same(place / run / name, whole / name, logged)
        if moment == "sweep":
            require((place / run / "many" / "comparison.html").exists(), "no comparison")

    def _judged(self, ended: Ended, place: Path, moment: str, logged: bool = True) -> Verdict:
        """The verdict on a command that was not to be killed, and on going on after it."""
        said = "" if ended.code == 0 else said_in(ended)
        nothing_half_written(place)
        again = self._go_on(place, moment, said, logged)
        return Verdict("sentence" if said or again else "equal", said or again)

    # Processes and disks

    def killed(self, place: Path, rng: random.Random, moment: str) -> Verdict:
        """SIGKILL."""
        ended = self._disturb(rng, moment, place, Signalled(signal.SIGKILL, rng.choice([0, rng.uniform(0, 0.2)])))
        require(ended.code in (0, -signal.SIGKILL), words(ended))
        nothing_half_written(place)
        said = self._go_on(place, moment)
        require(not said, f"after SIGKILL: {said}")
        return Verdict("equal", "")

    def terminated(self, place: Path, rng: random.Random, moment: str) -> Verdict:
        """SIGTERM: one line says how to go on, and that works."""
        ended = self._disturb(rng, moment, place, Signalled(signal.SIGTERM, rng.choice([0, rng.uniform(0, 0.2)])))
        if ended.code == 130:  # before there was anything to continue
            require("Traceback" not in ended.err, words(ended))
            ended = Ended(0, ended.out, ended.err)
        return self._judged(ended, place, moment, logged=False)

    def clock(self, place: Path, rng: random.Random, moment: str) -> Verdict:
        """The clock jumps; the run must not care."""
        jump = ClockJump(rng.choice([-1, 1]) * rng.choice([3600.0, 86400.0, 400 * 86400.0]))
        return self._judged(self._disturb(rng, moment, place, jump), place, moment)

    def two(self, place: Path, rng: random.Random, moment: str) -> Verdict:
        """Another process with the same cache starts at the moment; the first may be killed a little later."""
        mark, ends = place / "mark", {}

        def first() -> None:
            ends["first"] = self._disturb(rng, moment, place, Marked(mark))

        thread = threading.Thread(target=first)
        thread.start()
        while not mark.exists() and thread.is_alive():
            time.sleep(0.01)
        second = self._command(place, *self._arguments(moment), run="beside")
        thread.join()
        require(second.code == 0, f"the second: {words(second)}")
        self._compare(place, moment, "beside")
        return self._judged(ends["first"], place, moment)

    def full_disk(self, place: Path, rng: random.Random, moment: str) -> Verdict:
        """The disk of the run and of the cache becomes full, with some bytes left, and is emptied again."""
        with mounted("-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", place):
            (place / "run").mkdir()
            ended = self._disturb(rng, moment, place, FullDisk(place, rng.choice([0, rng.randrange(200_000)])))
            (place / "ballast").unlink(missing_ok=True)
            return self._judged(ended, place, moment)

    def read_only(self, place: Path, rng: random.Random, moment: str) -> Verdict:
        """The cache becomes a read-only file system, and then is writable again."""
        cache = place / "cache"
        try:
            ended = self._disturb(rng, moment, place, ReadOnly(cache))
        finally:
            subprocess.run(["umount", "-l", cache], check=False, capture_output=True)
        return self._judged(ended, place, moment)

    # Bytes

    def damaged(self, place: Path, rng: random.Random, file: str, way: str) -> Verdict:
        """A killed run of which a file is damaged before it goes on."""
        while True:
            phase = rng.choice(PHASES[1:])
            killed = self._killed_in(rng, phase)
            if (killed / "run" / "one" / "summary.json").exists():
                continue  # nothing goes on with it
            found = sorted(p for p in killed.glob(FILES[file]) if p.is_file() and p.stat().st_size)
            if found:
                break
        shutil.copytree(killed, place, dirs_exist_ok=True)
        target = place / rng.choice(found).relative_to(killed)
        damage(target, way, rng)
        try:
            said = self._go_on(place, phase)
        except Exception as error:
            raise WrongError(f"{target.relative_to(place)} after {phase}: {error}") from error
        return Verdict("sentence" if said else "equal", f"{target.relative_to(place)}: {said}")

    def reported(self, place: Path, rng: random.Random, way: str) -> Verdict:
        """A finished run of which a file is damaged before its report, or a comparison, is written again."""
        run = place / "run"
        for name in ("one", "two"):
            shutil.copytree(self.whole(RUN) / "one", run / name)
        folders, page = rng.choice([(("one",), run / "one" / "report.md"), (("one", "two"), run / "comparison.md")])
        target, pages = run / "one" / rng.choice(REPORTED), []
        for number in range(2):
            if number:
                damage(target, way, rng)
            said = self.work / "said" / place.name / str(number)
            ended = command(*folders, cwd=run, cache=said, patch=report_instead)
            if ended.code:
                return Verdict("sentence", said_in(ended))
            pages.append(page.read_text())
        named = [line for line in pages[1].splitlines() if target.name in line]
        require(pages[0] == pages[1] or bool(named), f"another report, without a word of {target}")
        return Verdict("equal" if pages[0] == pages[1] else "sentence", f"{target.name}: {' '.join(named)}")

    def _killed_in(self, rng: random.Random, phase: str) -> Path:
        """One of a few runs that were killed in this phase."""
        killed = self._killed.setdefault(phase, [])
        if len(killed) < 3:
            place = self._place()
            self._disturb(rng, phase, place, Signalled(signal.SIGKILL, 0))
            killed.append(place)
        return rng.choice(killed)


@contextmanager
def mounted(*arguments: str | Path) -> Iterator[None]:
    """A mount, for as long as the block runs."""
    subprocess.run(["mount", *arguments], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", arguments[-1]], check=True)


def nothing_half_written(place: Path) -> None:
    """Every file with a final name can be read; checkpoints that are not marked as complete do not count."""
    for path in place.rglob("*"):
        inside = next((p for p in path.parents if p.name.startswith("checkpoint-")), None)
        hidden = any(part.startswith(".") for part in path.relative_to(place).parts)
        if hidden or ".partial" in str(path) or (inside is not None and not (inside / "complete").exists()):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                from safetensors.torch import load_file

                load_file(path)
        except Exception as error:
            raise WrongError(f"{path} is half written: {error}") from error
