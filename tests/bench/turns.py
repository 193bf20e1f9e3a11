"""Processes that take turns: one works, the others wait, so that a slow minute of the machine hits them all.

A process holds the turn from its start. Whenever it passes the turn on, it waits until it gets it back; its end passes
the turn on for good. Turn and answer are single bytes in two pipes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


def pass_on(done: int, go: int) -> None:
    """In a worker: give up the turn, and wait for the next one.

    Args:
        done: pipe end to write to when the turn is over.
        go: pipe end to read from; closed when nobody hands out turns any more.
    """
    os.write(done, b".")
    if not os.read(go, 1):
        sys.exit("The process that hands out the turns is gone.")


@dataclass(frozen=True, slots=True)
class Command:
    """A worker to start: its command, which gets the numbers of its two pipe ends too, and the file of its output."""

    words: tuple[str, ...]
    log: Path
    folder: Path
    environment: dict[str, str]


class _Worker:
    def __init__(self, command: Command) -> None:
        self.log = command.log
        self._done, done = os.pipe()
        go, self._go = os.pipe()
        with command.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command.words, str(done), str(go)],
                cwd=command.folder,
                env=command.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(done, go),
            )
        # Only the worker may hold them: then its end is the end of the pipe.
        os.close(done)
        os.close(go)

    def turn_over(self) -> bool:
        """Wait for the end of its turn; False if it has ended altogether."""
        return bool(os.read(self._done, 1))

    def give_turn(self) -> None:
        """Hand it the turn; one that has died waiting does not take it, which `turn_over` then finds."""
        with suppress(BrokenPipeError):
            os.write(self._go, b".")

    def close(self) -> None:
        os.close(self._done)
        os.close(self._go)
        self.process.wait()


def take_turns(commands: Sequence[Command]) -> None:
    """Start the workers one after the other, each when the one before passes its turn on; then go round until all end.

    Raises:
        RuntimeError: one has failed, with the end of its output; the others are stopped.
    """
    waiting: deque[_Worker] = deque()
    try:
        for command in commands:
            _await(_Worker(command), waiting)
        while waiting:
            worker = waiting.popleft()
            worker.give_turn()
            _await(worker, waiting)
    finally:
        for worker in waiting:
            worker.process.terminate()
            worker.close()


def _await(worker: _Worker, waiting: deque[_Worker]) -> None:
    """To the end of its turn, after which it waits for the next one, unless it has ended."""
    if worker.turn_over():
        waiting.append(worker)
        return
    worker.close()
    if worker.process.returncode:
        raise RuntimeError(f"{worker.log} ends with status {worker.process.returncode}:\n{tail(worker.log)}")


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-4000:]
