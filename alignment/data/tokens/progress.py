"""What a preparation has done up to now, so that one that was killed goes on where it was.

Beside the files of a store stands a journal, to which each batch adds a line: how long the files are with it, the
digests of all that is in them, and what else was made of its rows. A store goes on behind the last line for which the
files have these digests; what follows is cut off and made anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignment.data.rows.row import BadRow
from alignment.data.tokens.token_store import Arrays, Kind, StoreWriter

JOURNAL = "journal"
_AT_ONCE = 2**22
"""Bytes that are read together."""


@dataclass(slots=True)
class Done:
    """What was made of the rows up to one of them.

    Attributes:
        rows: how many there are.
        kept: which of them became items.
        counts: of what was done, by name.
        memory: what the tokenizer remembers of them; None before the first batch.
    """

    rows: int = 0
    kept: array[int] = field(default_factory=lambda: array("q"))
    drops: list[BadRow] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    memory: dict[str, Any] | None = None

    def add(self, passed: int, kept: list[int], drops: list[BadRow], counts: Counter[str]) -> None:
        """Add a batch of `passed` rows; `kept` counts from its first."""
        self.kept.extend(self.rows + index for index in kept)
        self.drops += drops
        self.counts.update(counts)
        self.rows += passed


class JournaledWriter:
    """Writes the items of a store batch by batch, from where an earlier process was ended.

    Attributes:
        done: what was made before.
    """

    def __init__(self, folder: Path, kind: Kind[Any]) -> None:
        self.folder = folder
        self.done = Done()
        lines, end, digests = _sound(folder)
        if not lines:
            shutil.rmtree(folder, ignore_errors=True)
        for line in lines:
            kept = list(range(line["passed"])) if line["kept"] is None else line["kept"]
            self.done.add(line["passed"], kept, [BadRow(**row) for row in line["drops"]], Counter(line["counts"]))
            self.done.memory = line["memory"]
        self.store = StoreWriter(folder, kind, (lines[-1]["store"], digests) if lines else None)
        self._journal = (folder / JOURNAL).open("ab")
        self._journal.truncate(end)

    def add(
        self,
        items: tuple[Arrays, int],
        passed: int,
        kept: list[int],
        drops: list[BadRow],
        counts: Counter[str],
        memory: dict[str, Any],
    ) -> None:
        """Write a batch of `passed` rows: packed items with their number, and what else was made of the rows."""
        self.store.add_packed(*items)
        line = {
            "passed": passed,
            "kept": None if len(kept) == passed else kept,
            "drops": [asdict(row) for row in drops],
            "counts": counts,
            "memory": memory,
            "store": self.store.state(),
        }
        self._journal.write(_sealed(json.dumps(line)))
        self._journal.flush()  # a killed process has written what it has flushed

    def close(self) -> dict[str, Any]:
        """End the files; what `StoreWriter.close` returns."""
        self._journal.close()
        return self.store.close()


def _sealed(text: str) -> bytes:
    line = text.encode("ascii")
    return hashlib.blake2b(line, digest_size=16).hexdigest().encode("ascii") + b" " + line + b"\n"


def _lines(folder: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole lines of a journal, each with where it ends."""
    try:
        with (folder / JOURNAL).open("rb") as file:
            for line in file:
                text = line.partition(b" ")[2].rstrip(b"\n").decode("ascii", "replace")
                if not line.endswith(b"\n") or _sealed(text) != line:
                    return
                yield json.loads(text), file.tell()
    except (FileNotFoundError, UnicodeEncodeError):
        return


def _sound(folder: Path) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
    """The lines for which the files are what was written, where the last of them ends, and the digests up to there."""
    sound: list[dict[str, Any]] = []
    end = 0
    digests: dict[str, Any] = {}
    places: dict[str, int] = {}
    for line, ends in _lines(folder):
        files = line["store"]["files"]
        further = {name: digests[name].copy() if name in digests else StoreWriter.digest() for name in files}
        for name, (size, digest) in files.items():
            _read_on(folder / name, places.get(name, 0), size, further[name])
            if further[name].hexdigest() != digest:
                return sound, end, digests
        digests, end = further, ends
        places = {name: size for name, (size, _) in files.items()}
        sound.append(line)
    return sound, end, digests


def _read_on(path: Path, start: int, end: int, digest: Any) -> None:
    """Add bytes of a file to a digest, as many as there are."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            while start < end and (data := file.read(min(_AT_ONCE, end - start))):
                digest.update(data)
                start += len(data)
    except FileNotFoundError:
        return
