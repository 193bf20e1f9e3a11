"""Commands as their users start them, measured from outside: wall and CPU time from start to end, and peak memory.

Sides that share the machine run in slices of a few seconds, during which the others are stopped, so that a slow stretch
of the machine hits them all. A side may get several slices in a row, where it has more to do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tests.bench.turns import Command, tail

SECONDS = 5.0
"""Of a slice: long beside what it costs to stop and to go on, short beside how the speed of a machine changes."""


@dataclass(frozen=True, slots=True)
class Side:
    """Commands that run one after the other, and how many slices in a row they get."""

    name: str
    commands: tuple[Command, ...]
    share: int = 1


@dataclass(frozen=True, slots=True)
class Spent:
    """What a command took, with the processes that it started and waited for; while it is stopped nothing counts.

    Attributes:
        seconds: from its start to its end.
        user: CPU seconds of all threads.
        system: CPU seconds of the kernel on its behalf.
        peak_bytes: the most that one of its processes had in memory; no less than the one that starts it has.
    """

    seconds: float
    user: float
    system: float
    peak_bytes: int


class _Running:
    def __init__(self, command: Command) -> None:
        self.command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._seconds = 0.0

    def go_on(self, seconds: float) -> Spent | None:
        """Start it, or let it go on, and stop it after so many seconds; what it took if it ends before."""
        started = time.monotonic()
        if self._process is None:
            self._process = self._start()
        self._signal(signal.SIGCONT)
        while (elapsed := time.monotonic() - started) < seconds:
            # Neither Popen nor getrusage tells the usage of one child from that of the others.
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                unit = 1 if sys.platform == "darwin" else 1024
                return Spent(self._seconds + elapsed, usage.ru_utime, usage.ru_stime, usage.ru_maxrss * unit)
            time.sleep(0.01)
        self._signal(signal.SIGSTOP)
        self._seconds += time.monotonic() - started
        return None

    def _start(self) -> subprocess.Popen[bytes]:
        with self.command.log.open("wb") as log:
            # A group is stopped as a whole. In our session the system ends its stopped groups if this process dies.
            return subprocess.Popen(
                self.command.words,
                cwd=self.command.folder,
                env=self.command.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    @property
    def status(self) -> int | None:
        """Its exit status; None while it has none."""
        return None if self._process is None else self._process.returncode

    def kill(self) -> None:
        """End it if it runs or is stopped."""
        if self._process is not None and self._process.returncode is None:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def run_sides(sides: Sequence[Side], seconds: float = SECONDS) -> Iterator[tuple[str, int, Spent]]:
    """Run all commands of all sides; what each took, as it ends: name of the side, number of the command, and that.

    A command that fails ends its side, and no other.

    Raises:
        RuntimeError: when all have ended, where one has failed, with the end of its output.
    """
    left = {side.name: [_Running(command) for command in side.commands] for side in sides}
    failures = []
    try:
        while any(left.values()):
            for side in sides:
                waiting = left[side.name]
                if not waiting:
                    continue
                running = waiting[0]
                spent = running.go_on(side.share * seconds)
                if spent is None:
                    continue
                del waiting[0]
                if running.status:
                    log = running.command.log
                    failures.append(f"{log} ends with status {running.status}:\n{tail(log)}")
                    waiting.clear()
                else:
                    yield side.name, len(side.commands) - len(waiting) - 1, spent
    finally:
        for waiting in left.values():
            for running in waiting:
                running.kill()
    if failures:
        raise RuntimeError("\n\n".join(failures))
