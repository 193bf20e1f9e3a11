"""Tokens in files that are mapped into memory: written batch by batch, read item by item."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints, overload

import numpy as np

from alignment.files import file_digest
from alignment.types import Group

T = TypeVar("T")
Conversation = dict[str, list[int]]
"""An SFT sequence: its `input_ids`, and in `completion_mask` 1 for each that is scored."""

Arrays = dict[str, np.ndarray]
"""A batch of items by "field.part"; the parts of a field are those of its `Column`."""

_AT_ONCE = 1024
"""Items that iterating reads together."""


@dataclass(frozen=True, slots=True)
class Column:
    """One field of all items: a number, a text or an array, or a tuple of these; it may be None.

    Its parts are `values`, end to end; `lengths` of the texts or arrays; and `counts`, how many elements an item has:
    none for None.
    """

    kind: type
    is_tuple: bool
    is_optional: bool

    @classmethod
    def of(cls, hint: Any) -> Column:
        """The column for a field with this annotation.

        Raises:
            TypeError: no column holds that type.
        """
        found = hint
        is_optional = get_origin(found) in (Union, UnionType) and NoneType in get_args(found)
        if is_optional:
            found = get_args(found)[0]
        is_tuple = get_origin(found) is tuple and get_args(found)[1:] == (...,)
        if is_tuple:
            found = get_args(found)[0]
        if found not in (np.ndarray, str, float, int, bool):
            raise TypeError(f"No column holds fields of the type {hint}.")
        return cls(found, is_tuple, is_optional)

    def pack(self, fields: Sequence[Any]) -> Arrays:
        """The parts of the field for some items."""
        packed: Arrays = {}
        elements = [element for value in fields for element in self._elements(value)]
        if self.is_tuple or self.is_optional:
            packed["counts"] = np.array([len(self._elements(value)) for value in fields], dtype=np.int64)
        if self.kind is str:
            elements = [np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8) for text in elements]
        if self.kind in (str, np.ndarray):
            packed["lengths"] = np.array([len(element) for element in elements], dtype=np.int64)
            packed["values"] = np.concatenate(elements) if elements else np.zeros(0, dtype=np.uint8)
        else:
            packed["values"] = np.array(elements, dtype=self.kind)
        return packed

    def _elements(self, value: Any) -> Sequence[Any]:
        if value is None:
            return ()
        if self.is_tuple and self.is_optional and not value:
            raise ValueError("A field that may be None cannot be an empty tuple.")
        return value if self.is_tuple else (value,)

    def unpack(self, parts: Mapping[str, np.ndarray], start: int, stop: int) -> list[Any]:
        """The field of the items from `start` to before `stop`; here `counts` and `lengths` are sums up to an item."""
        ends = parts["counts"][start : stop + 1].tolist() if "counts" in parts else list(range(start, stop + 1))
        first, last = ends[0], ends[-1]
        elements: Sequence[Any]
        if "lengths" in parts:
            bounds = parts["lengths"][first : last + 1].tolist()
            values = parts["values"][bounds[0] : bounds[-1]].copy()  # of the process: torch writes to what it is given
            elements = [values[a - bounds[0] : b - bounds[0]] for a, b in pairwise(bounds)]
            if self.kind is str:
                elements = [element.tobytes().decode("utf-8", "surrogatepass") for element in elements]
        else:
            elements = parts["values"][first:last].tolist()
        found = [elements[a - first : b - first] for a, b in pairwise(ends)]
        if self.is_tuple:
            return [tuple(own) if own or not self.is_optional else None for own in found]
        return [own[0] if own else None for own in found]


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """What the items of a store are.

    Attributes:
        columns: of their fields.
        fields: the fields of an item.
        build: an item from its fields.
    """

    columns: dict[str, Column]
    fields: Callable[[T], Mapping[str, Any]]
    build: Callable[..., T]

    def pack(self, items: Sequence[T]) -> Arrays:
        """A batch of items as arrays."""
        found = [self.fields(item) for item in items]
        return {
            f"{name}.{part}": array
            for name, column in self.columns.items()
            for part, array in column.pack([fields[name] for fields in found]).items()
        }


GROUPS: Kind[Group] = Kind(
    {name: Column.of(hint) for name, hint in get_type_hints(Group).items()},
    lambda group: {name: getattr(group, name) for name in GROUPS.columns},
    Group,
)
CONVERSATIONS: Kind[Conversation] = Kind(
    {"input_ids": Column.of(np.ndarray), "completion_mask": Column.of(np.ndarray)},
    lambda sequence: {name: np.array(values, dtype=np.int32) for name, values in sequence.items()},
    lambda **fields: {name: values.tolist() for name, values in fields.items()},
)
TEXTS: Kind[str] = Kind({"text": Column.of(str)}, lambda text: {"text": text}, lambda text: text)


class StoreWriter:
    """Writes items of one kind to a folder that does not exist yet.

    Args:
        begun: goes on in a folder that exists: what `state` returned, and the digests of the files up to there by name.
            What else is in the folder is removed.
    """

    def __init__(
        self, folder: Path, kind: Kind[Any], begun: tuple[dict[str, Any], dict[str, Any]] | None = None
    ) -> None:
        self._folder = folder
        self._kind = kind
        self._files: dict[str, Any] = {}
        self._digests: dict[str, Any] = {}
        self._dtypes: dict[str, str] = {}
        self._sums: dict[str, int] = {}
        self.count = 0
        if begun is None:
            folder.mkdir(parents=True)
            return
        state, self._digests = begun
        self.count, self._dtypes, self._sums = state["count"], state["dtypes"], state["sums"]
        for path in folder.iterdir():
            if "." in path.name and path.name not in state["files"]:  # of a batch that was cut off
                path.unlink()
        for name, (size, _) in state["files"].items():
            self._files[name] = (folder / name).open("r+b")
            self._files[name].truncate(size)
            self._files[name].seek(size)

    @staticmethod
    def digest() -> Any:
        """The digest of an empty file."""
        return hashlib.blake2b(digest_size=32)

    def state(self) -> dict[str, Any]:
        """What was written up to now, in JSON, and is there for other processes too."""
        for file in self._files.values():
            file.flush()
        files = {name: [file.tell(), self._digests[name].hexdigest()] for name, file in self._files.items()}
        return {"count": self.count, "dtypes": self._dtypes, "sums": self._sums, "files": files}

    def add(self, items: Sequence[Any]) -> None:
        """Write some items."""
        if items:
            self.add_packed(self._kind.pack(items), len(items))

    def add_packed(self, batch: Arrays, count: int) -> None:
        """Write `count` items that `Kind.pack` has packed, here or in another process.

        Raises:
            ValueError: arrays of another type than before.
        """
        self.count += count
        for name, array in batch.items():
            if not name.endswith(".values"):  # sums, so that an item is found without reading those before it
                start = self._sums.get(name)
                array = np.cumsum(array, dtype=np.int64) + (start or 0)
                self._sums[name] = int(array[-1]) if len(array) else start or 0
                array = array if start is not None else np.concatenate([[0], array])
            elif not len(array):
                continue
            if self._dtypes.setdefault(name, array.dtype.str) != array.dtype.str:
                raise ValueError(f"{name} has values of the types {self._dtypes[name]} and {array.dtype.str}.")
            if name not in self._files:
                self._files[name] = (self._folder / name).open("xb")
                self._digests[name] = self.digest()
            data = np.ascontiguousarray(array).data.cast("B")
            self._files[name].write(data)
            self._digests[name].update(data)

    def close(self) -> dict[str, Any]:
        """End the files, on the disk; returns what `Stored` needs to read them."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        return {"count": self.count, "dtypes": self._dtypes, "digests": digests}


class Stored(Sequence[T]):
    """The items of a folder. The files are mapped: what is not being read takes no memory that others need.

    Args:
        written: what `StoreWriter.close` returned.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not what was written.
    """

    def __init__(self, folder: Path, kind: Kind[T], written: Mapping[str, Any], check: bool = True) -> None:
        self._kind = kind
        self._count: int = written["count"]
        self._parts: dict[str, dict[str, np.ndarray]] = {
            name: {"values": np.zeros(0, dtype=np.uint8)} for name in kind.columns
        }
        self._maps: list[Any] = []
        self._touched = 0
        for name, dtype in written["dtypes"].items():
            if check and file_digest(folder / name) != written["digests"][name]:
                raise ValueError(f"its file {name} has changed")
            mapped = _mapped(folder / name)
            self._maps += [mapped] if hasattr(mapped, "madvise") else []
            field, _, part = name.rpartition(".")
            self._parts[field][part] = np.frombuffer(mapped, dtype=dtype)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._count)
            return self._read(start, max(start, stop)) if step == 1 else [self[i] for i in range(start, stop, step)]
        place = range(self._count)[index]
        return self._read(place, place + 1)[0]

    def __iter__(self) -> Iterator[T]:
        for start in range(0, self._count, _AT_ONCE):
            yield from self._read(start, min(start + _AT_ONCE, self._count))

    def counts(self, name: str) -> np.ndarray:
        """(items,) how many elements each item has of a field that is a tuple; none where that is None."""
        sums = self._parts[name].get("counts")
        return np.zeros(self._count, dtype=np.int64) if sums is None else np.diff(sums)

    def _read(self, start: int, stop: int) -> list[T]:
        if start == stop:
            return []
        columns = [column.unpack(self._parts[name], start, stop) for name, column in self._kind.columns.items()]
        self._let_go(stop - start)
        names = list(self._kind.columns)
        return [self._kind.build(**dict(zip(names, fields, strict=True))) for fields in zip(*columns, strict=True)]

    def _let_go(self, items: int) -> None:
        """Now and then, leave what was read to the system: its pages would count as this process's for ever."""
        self._touched += max(_AT_ONCE // 64, items)  # an item by itself brings its neighbours along
        if self._touched >= _AT_ONCE // 2:
            self._touched = 0
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


def write_anew(folder: Path, kind: Kind[T], items: Iterable[T]) -> tuple[Stored[T], dict[str, Any]]:
    """Write all items to a folder, whatever a process that was killed has left there.

    Returns:
        The items, and what describes their files.
    """
    shutil.rmtree(folder, ignore_errors=True)
    writer, rest = StoreWriter(folder, kind), iter(items)
    while batch := list(islice(rest, _AT_ONCE)):
        writer.add(batch)
    written = writer.close()
    return Stored(folder, kind, written, check=False), written


def _mapped(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
