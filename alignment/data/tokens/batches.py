"""Rows tokenised batch by batch: few of them here, many in several processes and into files."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tqdm import tqdm

from alignment.data.conversations.writer import Writer, WriterState
from alignment.data.rows.findings import Found
from alignment.data.rows.reasons import UnusableRows
from alignment.data.rows.row import BadRow, Row
from alignment.data.tokens.progress import Done, JournaledWriter
from alignment.data.tokens.token_store import Arrays, Kind, Stored
from alignment.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

ROWS_PER_BATCH = 1024
"""Rows that are one task."""

_SHOWN_AFTER = 3.0
"""Seconds after which progress is shown."""
_BAR: dict[str, Any] = {"delay": _SHOWN_AFTER, "disable": None, "leave": False}
_QUEUED = 2
"""Batches that a process is given at once, so that it never waits for the next one."""


@dataclass(slots=True)
class Batch(Generic[T]):
    """Some rows as tokens.

    Attributes:
        kept: which of the rows the items are.
        counts: of what was done, by name.
    """

    items: list[T] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    drops: list[BadRow] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class ProcessDied(UserError):
    """A process that tokenises rows has died; what was done stays for the next start."""


class BatchTokenizer(Protocol[T]):
    """Makes items of rows. All that it remembers from one batch to the next is in its writer and its encoder."""

    writer: Writer

    def memory(self) -> dict[str, Any]:
        """What it remembers of the rows before, in JSON."""
        ...

    def recall(self, memory: dict[str, Any]) -> None:
        """Remember what `memory` returned in another process."""
        ...

    def __call__(self, rows: Sequence[Row]) -> Batch[T]:
        """Tokenise some rows."""
        ...


@dataclass(frozen=True, slots=True)
class Tokenized(Generic[T]):
    """All rows as tokens.

    Attributes:
        kept: which of the rows the items are.
        written: describes the files of the items; None where they are in memory.
    """

    items: Sequence[T]
    kept: array[int]
    drops: list[BadRow]
    counts: Counter[str]
    findings: list[Found]
    written: dict[str, Any] | None


def tokenize_rows(
    rows: Sequence[Row], tokenize: BatchTokenizer[T], kind: Kind[T], folder: Path | None = None
) -> Tokenized[T]:
    """Tokenise all rows, in order. The result does not depend on the number of processes.

    Args:
        folder: the items are written to it; if some of them are there from a process that was killed, behind these.
            None: they stay in memory.

    Raises:
        UserError: a row cannot be written as text at all, too much was found in the rows, or no row is left.
    """
    done, items = Done(), list[T]()
    writer = None if folder is None else JournaledWriter(folder, kind)
    if writer is not None and writer.done.memory is not None:
        done = writer.done
        tokenize.recall(writer.done.memory)
        log.info("  %d of %d rows were tokenised before: going on with the others.", done.rows, len(rows))
    started, before = time.monotonic(), done.rows
    bar = tqdm(total=len(rows), initial=before, desc="Tokenising", unit=" rows", **_BAR)
    with bar:
        for batch, packed in _batches(rows, tokenize, kind, before, writer is not None):
            passed = min(ROWS_PER_BATCH, len(rows) - done.rows)
            if writer is None:
                items += batch.items
            else:
                arrays = packed if packed is not None else kind.pack(batch.items)
                found = batch.kept, batch.drops, batch.counts
                writer.add((arrays, len(batch.kept)), passed, *found, tokenize.memory())
            done.add(passed, batch.kept, batch.drops, batch.counts)
            bar.update(passed)
    if (seconds := time.monotonic() - started) > _SHOWN_AFTER:
        number = len(rows) - before
        log.info("  Tokenised %d rows in %.0f s, %.0f a second.", number, seconds, number / seconds)
    written = None if writer is None else writer.close()
    if len(rows) and not done.kept:
        raise UnusableRows(f"None of the {len(rows)} rows can be tokenised", done.drops, "")
    findings = tokenize.writer.settle(len(rows))
    every: Sequence[T] = items
    if folder is not None and written is not None:
        every = Stored(folder, kind, written, check=False)
    return Tokenized(every, done.kept, done.drops, done.counts, findings, written)


def _batches(
    rows: Sequence[Row], tokenize: BatchTokenizer[T], kind: Kind[T], first: int, many: bool
) -> Iterator[tuple[Batch[T], Arrays | None]]:
    """All batches from a row on, in order; those that another process has made come packed, without their items."""
    starts = range(first, len(rows), ROWS_PER_BATCH)
    processes = min(len(os.sched_getaffinity(0)), len(starts) - 1) if many and sys.platform == "linux" else 1

    def here(start: int) -> tuple[Batch[T], None]:
        return tokenize(rows[start : start + ROWS_PER_BATCH]), None

    if processes < 2:
        yield from map(here, starts)
        return
    yield here(first)  # what the first rows show about the template, the other processes know from the beginning

    def there(task: tuple[int, WriterState]) -> tuple[Batch[T], Arrays, Any] | None:
        """What another process does; None for a batch that has to be done here, after all before it."""
        start, state = task
        tokenize.writer.begin(state)
        batch = tokenize(rows[start : start + ROWS_PER_BATCH])
        notes = tokenize.writer.notes()
        packed = kind.pack(batch.items)
        batch.items = []
        return None if notes is None else (batch, packed, notes)

    with _workers(there, processes) as results:
        tasks = ((start, tokenize.writer.state()) for start in starts[1:])
        for start, result in zip(starts[1:], results(tasks), strict=True):
            if result is None:
                yield here(start)
            else:
                batch, packed, notes = result
                tokenize.writer.add(notes)
                yield batch, packed


# Processes


@contextmanager
def _workers(work: Callable[[Any], Any], processes: int) -> Iterator[Callable[[Iterator[Any]], Iterator[Any]]]:
    """Processes that are copies of this one and do some work for it; gives a function from tasks to results, in order.

    They end with this process, however it ends: each waits at a pipe that nobody else holds open.
    """
    context = multiprocessing.get_context("fork")
    ours: list[Connection] = []
    children = []
    gc.freeze()  # a collection in a copy would touch, and so copy, all that is here
    for _ in range(processes):
        near, far = context.Pipe()
        ours.append(near)
        child = context.Process(target=_serve, args=(work, far, list(ours)), daemon=True)
        child.start()
        far.close()
        children.append(child)
    try:
        yield lambda tasks: _results(tasks, ours)
    finally:
        for near in ours:
            near.close()
        for child in children:
            child.terminate()
            child.join()
        gc.unfreeze()


def _serve(work: Callable[[Any], Any], tasks: Connection, inherited: list[Connection]) -> None:
    """Do tasks until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for the results
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not copied
    for connection in inherited:
        connection.close()
    with suppress(EOFError, OSError):
        while True:
            task = tasks.recv()
            result = error = None
            try:
                result = work(task)
            except Exception as raised:  # and raised again where the result is asked for
                error = raised
            tasks.send((result, error))


def _results(tasks: Iterator[Any], workers: list[Connection]) -> Iterator[Any]:
    """The results of all tasks, in order.

    Raises:
        ProcessDied: a process has.
    """
    waiting: dict[Connection, list[int]] = {worker: [] for worker in workers}
    done: dict[int, Any] = {}
    asked = given = 0
    is_last = False
    while not is_last or given < asked:
        # A task is made when it is given: it knows what has been found up to then
        while not is_last and asked - given < 2 * _QUEUED * len(workers):
            idle = min(workers, key=lambda worker: len(waiting[worker]))
            if len(waiting[idle]) == _QUEUED:
                break
            task = next(tasks, None)
            if task is None:
                is_last = True
                break
            idle.send(task)
            waiting[idle].append(asked)
            asked += 1
        for worker in wait([worker for worker, numbers in waiting.items() if numbers]):
            assert isinstance(worker, Connection)
            try:
                done[waiting[worker].pop(0)] = worker.recv()
            except (EOFError, OSError):
                raise ProcessDied(
                    "A process that tokenises rows has died: free memory, or find what has ended it, and start again."
                ) from None
        while given in done:
            result, error = done.pop(given)
            if error is not None:
                raise error
            given += 1
            yield result
