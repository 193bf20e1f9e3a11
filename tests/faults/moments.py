"""What happens in the process that is to be disturbed: at its n-th use of a file in a phase, a fault."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.runs import same_code

PHASES = ("start", "sft", "reference", "preference", "report")
"""The phases of a run, in their order. The first ends with the first file of SFT, the last is all that comes after the
preference stage."""
_BEGINNINGS = {
    "/stages/sft/": "sft",
    "/cache/reference.sqlite": "reference",
    "/stages/preference/.held_out_start": "preference",
    "/stages/preference/.done.json": "report",
}
_USES = {"open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree", "sqlite3.connect"}


@dataclass(frozen=True)
class Disturbed:
    """To be called in the process before the command starts.

    Attributes:
        place: the folder with the run and its cache; other files do not count.
        phase: of the fault; "sweep" counts the uses of files in all phases.
        number: the use of a file in this phase at which the fault comes.
        fault: None to count only.
        counts: where the uses are written, by phase.
    """

    place: Path
    phase: str = "sweep"
    number: int = -1
    fault: Callable[[], None] | None = None
    counts: Path | None = None

    def __call__(self) -> None:
        """Begin to count."""
        os.environ["ALIGNMENT_CACHE"] = str(self.place / "cache")
        same_code()
        seen: Counter[str] = Counter()
        phase, main, is_inside = PHASES[0], threading.get_ident(), False

        def hook(event: str, arguments: tuple) -> None:
            nonlocal phase, is_inside
            if event not in _USES or is_inside or threading.get_ident() != main:
                return
            is_inside = True
            path = os.path.abspath(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes | Path) else ""
            if path.startswith(f"{self.place}/"):
                for beginning, name in _BEGINNINGS.items():
                    if beginning in path and PHASES.index(name) > PHASES.index(phase):
                        phase = name
                seen.update({phase: 1, "sweep": 1})
                if self.counts is not None:
                    self.counts.write_text(json.dumps(seen))
                # A use in a later phase leaves this phase's count as it is: it is no second moment.
                if self.fault is not None and self.phase in (phase, "sweep") and seen[self.phase] == self.number:
                    self.fault()
            is_inside = False

        sys.addaudithook(hook)


def report_instead() -> None:
    """`python -m alignment.report` in the process that would run `python -m alignment.run`."""
    import alignment.report
    import alignment.run

    alignment.run.main = lambda arguments: sys.exit(alignment.report.main(arguments))


# The faults


@dataclass(frozen=True)
class Signalled:
    """A signal, `delay` seconds after the moment."""

    signal: signal.Signals
    delay: float

    def __call__(self) -> None:
        """Send it from another thread; the process goes on until then."""
        timer = threading.Timer(self.delay, os.kill, (os.getpid(), self.signal))
        timer.daemon = True
        timer.start()


@dataclass(frozen=True)
class Noted:
    """To be called in a process before the command starts: it writes down its number."""

    path: Path

    def __call__(self) -> None:
        """Write it."""
        os.environ["ALIGNMENT_CACHE"] = str(self.path.parent / "cache")
        same_code()
        self.path.write_text(str(os.getpid()))


@dataclass(frozen=True)
class KilledOther:
    """SIGKILL for the process that has written its number into a file, `delay` seconds after the moment."""

    path: Path
    delay: float

    def __call__(self) -> None:
        """Send it from another thread, unless that process has ended."""
        timer = threading.Timer(self.delay, self._kill)
        timer.daemon = True
        timer.start()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(int(self.path.read_text()), signal.SIGKILL)


@dataclass(frozen=True)
class FullDisk:
    """The disk of a folder, which is a small one, is full but for `left` bytes."""

    folder: Path
    left: int

    def __call__(self) -> None:
        """Fill it with one file."""
        disk = os.statvfs(self.folder)
        with (self.folder / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - self.left))


@dataclass(frozen=True)
class ReadOnly:
    """A folder becomes a read-only mount of itself."""

    folder: Path

    def __call__(self) -> None:
        """Mount it; files that are open stay writable, as when the rights of a folder change."""
        self.folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", self.folder, self.folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", self.folder], check=True)


@dataclass(frozen=True)
class ClockJump:
    """The clock jumps by so many seconds."""

    seconds: float

    def __call__(self) -> None:
        """Shift it for this process: the clock of the machine is not ours."""
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + self.seconds
        time.time_ns = lambda: now_ns() + round(self.seconds * 1e9)


@dataclass(frozen=True)
class Marked:
    """A file appears, for whoever waits for the moment."""

    path: Path

    def __call__(self) -> None:
        """Make it."""
        self.path.touch()
