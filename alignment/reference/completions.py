"""The completions that a reference is asked about, and what it says of each token, with few bytes of memory for each.

A completion is known by its content hash. Its first 8 bytes are kept here; the values, and the whole hash by which they
are found out to be of another completion, stand in files.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from alignment.types import Group, MadeOnDemand

_KEY_BYTES = 32


class Completions(MadeOnDemand[tuple[bytes, Group]]):
    """All completions of some groups, each with its key and as a group of its own; `first` tells the different ones.

    Attributes:
        hashes: (different,) uint64, ascending, the first bytes of their keys.
        first: (different,) the first place of each.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        hashes, ends = array("Q"), array("I")
        for group in groups:
            hashes.extend(map(_short, group.keys()))
            ends.append(len(hashes))
        self._ends = np.frombuffer(ends, np.uint32)
        self.hashes, first = np.unique(np.frombuffer(hashes, np.uint64), return_index=True)
        self.first = first.astype(np.uint32)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def item(self, place: int) -> tuple[bytes, Group]:
        """A completion's key, and its group alone."""
        owner = int(np.searchsorted(self._ends, place, "right"))
        group = self._groups[owner]
        k = place - int(self._ends[owner]) + len(group.completions)
        return group.key(k), group.only(k)

    def different(self) -> Iterator[tuple[bytes, Group]]:
        """The different ones, in the order in which they come first."""
        is_first = np.zeros(len(self), dtype=np.bool_)
        is_first[self.first] = True
        place = 0
        for group in self._groups:
            for k in range(len(group.completions)):
                if is_first[place]:
                    yield group.key(k), group.only(k)
                place += 1


class CompletionValues:
    """Rows of values, one for each scored token, of different completions.

    Args:
        folder: for the files, which have no name and end with the process.
        hashes: as of `Completions`.
        rows: of values.
    """

    def __init__(self, folder: Path, hashes: np.ndarray, rows: int) -> None:
        self._hashes = hashes
        self._numbers = np.full(len(hashes), -1, dtype=np.int32)  # in the order in which values were added
        self._ends = array("q", [0])
        self._keys: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._blocks: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, (rows, tokens) of one after the other
        self._rows = rows

    def __len__(self) -> int:
        return int(np.count_nonzero(self._numbers >= 0))

    def known(self) -> np.ndarray:
        """(different,) bool, which completions have values."""
        return self._numbers >= 0

    def has(self, key: bytes) -> bool:
        """Whether one of the different completions has values."""
        return bool(self._numbers[self._place(key)] >= 0)

    def add(self, key: bytes, values: np.ndarray) -> None:
        """Keep the (rows, tokens) float32 values of a completion."""
        place = self._place(key)
        assert values.dtype == np.float32 and len(values) == self._rows, "the rows that it was made for"
        self._blocks.write(np.ascontiguousarray(values).data)
        self._keys.write(key)
        self._numbers[place] = len(self._ends) - 1
        self._ends.append(self._ends[-1] + values.shape[1])

    def get(self, key: bytes) -> np.ndarray:
        """(rows, tokens) float32, a completion's values.

        Raises:
            KeyError: there are none.
        """
        number = int(self._numbers[self._place(key)])
        if number < 0 or _read(self._keys, number * _KEY_BYTES, _KEY_BYTES).tobytes() != key:
            raise KeyError(key.hex())
        start, end = (4 * self._rows * self._ends[i] for i in (number, number + 1))
        return _read(self._blocks, start, end - start).view(np.float32).reshape(self._rows, -1)

    def _place(self, key: bytes) -> int:
        place = int(np.searchsorted(self._hashes, np.uint64(_short(key))))
        if place == len(self._hashes) or self._hashes[place] != _short(key):
            raise KeyError(key.hex())
        return place

    def arrays(self) -> dict[str, np.ndarray]:
        """`keys` (completions, 32), `lengths` (completions,) and `values` (rows, tokens) end to end, in one order."""
        flat, ends = _mapped(self._blocks).view(np.float32), [self._rows * end for end in self._ends]
        if self._rows == 1:  # as it stands in the file
            values = flat[None]
        else:
            blocks = [flat[start:end].reshape(self._rows, -1) for start, end in pairwise(ends)]
            values = np.concatenate([flat[:0].reshape(self._rows, 0), *blocks], axis=1)
        return {
            "keys": _mapped(self._keys).reshape(-1, _KEY_BYTES),
            "lengths": np.diff(np.frombuffer(self._ends, np.int64)),
            "values": values,
        }

    @classmethod
    def of(cls, folder: Path, keys: np.ndarray, lengths: np.ndarray, values: np.ndarray) -> CompletionValues:
        """From what `arrays` gave."""
        found = cls(folder, np.sort(keys[:, :8].copy().view(">u8")[:, 0].astype(np.uint64)), len(values))
        end = 0
        for key, length in zip(keys, lengths.tolist(), strict=True):
            found.add(key.tobytes(), values[:, end : end + length])
            end += length
        return found

    def close(self) -> None:
        """Close the files."""
        for file in (self._keys, self._blocks):
            file.close()


def _short(key: bytes) -> int:
    return int.from_bytes(key[:8], "big")


def _read(file: Any, start: int, size: int) -> np.ndarray:
    file.flush()
    found = np.empty(size, dtype=np.uint8)  # of the process: torch writes to what it is given
    os.preadv(file.fileno(), [found.data], start)
    return found


def _mapped(file: Any) -> np.ndarray:
    """(bytes,) uint8 of a file, which take no memory that others need."""
    file.flush()
    size = os.fstat(file.fileno()).st_size
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else bytearray(), np.uint8)
