"""Sequences that take little memory however long they are: rows in a file, and some items of another sequence."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from alignment.data.rows.row import Row

T = TypeVar("T")

KEPT_ROWS = 8192
"""As many rows stay in memory; more go into a file."""

_FIELDS = tuple(field.name for field in fields(Row))
_TUPLES = tuple(field.name for field in fields(Row) if str(field.type).startswith("tuple"))
_AT_ONCE = 1024


class SpilledList(Sequence[T]):
    """Items to which more can be added. Many of them go into a file without a name, which ends with the process.

    Args:
        folder: for the file; None: all items stay in memory.
        dump, load: from an item to the bytes that the file has, and back.
    """

    def __init__(self, folder: Path | None, dump: Callable[[T], bytes], load: Callable[[bytes], T]) -> None:
        self._folder = folder
        self._dump = dump
        self._load = load
        self._items: list[T] = []
        self._file: Any = None
        self._ends = array("q", [0])

    @property
    def in_file(self) -> bool:
        """Whether the items are in a file."""
        return self._file is not None

    def append(self, item: T) -> None:
        """Add an item."""
        if self._file is not None:
            self._write(item)
            return
        self._items.append(item)
        if self._folder is not None and len(self._items) > KEPT_ROWS:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=2**20)  # noqa: SIM115
            for kept in self._items:
                self._write(kept)
            self._items = []

    def _write(self, item: T) -> None:
        self._ends.append(self._ends[-1] + self._file.write(self._dump(item)))

    def flush(self) -> None:
        """Let other processes see all items."""
        if self._file is not None:
            self._file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._file is not None else len(self._items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if self._file is None:
            return self._items[index]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._load(self._read(place, place + 1))

    def __iter__(self) -> Iterator[T]:
        if self._file is None:
            yield from self._items
            return
        for start in range(0, len(self), _AT_ONCE):
            stop = min(start + _AT_ONCE, len(self))
            found, first = self._read(start, stop), self._ends[start]
            for place in range(start, stop):
                yield self._load(found[self._ends[place] - first : self._ends[place + 1] - first])

    def _read(self, start: int, stop: int) -> bytes:
        """Several processes may read at once: none moves a common place in the file."""
        self.flush()
        first, last = self._ends[start], self._ends[stop]
        found = b""
        while len(found) < last - first:
            found += os.pread(self._file.fileno(), last - first - len(found), first + len(found))
        return found


class RowList(SpilledList[Row]):
    """Rows to which more can be added; in a file, each is a line of JSON."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder, as_line, from_line)


def as_line(row: Row) -> bytes:
    """The row as one line of JSON. What JSON does not know becomes text."""
    return json.dumps([getattr(row, name) for name in _FIELDS], default=str).encode("ascii") + b"\n"


def from_line(line: bytes | str) -> Row:
    """The row that `as_line` wrote."""
    values = dict(zip(_FIELDS, json.loads(line), strict=True))
    return Row(**values | {name: tuple(values[name]) for name in _TUPLES if values[name] is not None})


class StoredRows(Sequence[Row]):
    """Rows that were written as lines by `as_line`."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [from_line(line) for line in self._lines[index]]
        return from_line(self._lines[index])


class Picked(Sequence[T], Generic[T]):
    """Some items of a sequence, in an order of their own.

    Args:
        indices: (items,) of the items in the sequence.
    """

    def __init__(self, items: Sequence[T], indices: Sequence[int] | np.ndarray) -> None:
        self._items = items
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Picked(self._items, self._indices[index])
        return self._items[int(self._indices[index])]

    def __iter__(self) -> Iterator[T]:
        return (self._items[index] for index in self._indices.tolist())
