"""Reference stores for tests: sequences whose values follow from their keys, writers in other processes, damage."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np

from alignment.reference.store import ReferenceStore

A, B = "a" * 64, "b" * 64


def sequence(name: int | str) -> tuple[bytes, np.ndarray]:
    """A key and log-probs that follow from it, so that any process can tell what must be stored under it."""
    key = hashlib.blake2b(str(name).encode(), digest_size=32).digest()
    generator = np.random.default_rng(list(key))
    return key, -generator.exponential(2.0, size=1 + key[0] % 60).astype(np.float32)


def sequences(names: range) -> dict[bytes, np.ndarray]:
    return dict(sequence(name) for name in names)


def assert_only_right(found: dict[bytes, np.ndarray], expected: dict[bytes, np.ndarray]) -> None:
    """What is missing is a miss; what is there is right to the bit."""
    for key, logps in found.items():
        assert logps.dtype == np.float32
        assert logps.tobytes() == expected[key].tobytes()


def filled(path: Path, count: int = 300) -> dict[bytes, np.ndarray]:
    items = sequences(range(count))
    with ReferenceStore(path) as store:
        store.register(A, {"model": "tiny"})
        store.put(A, items)
    return items


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.helpers.stores import A, B, ReferenceStore, sequences
path, first, count, size = Path(sys.argv[1]), *map(int, sys.argv[2:])
with ReferenceStore(path) as store:
    store.register(A, {{"model": "tiny"}})
    print("open", flush=True)
    for start in range(first, first + count, size):
        store.put(A, sequences(range(start, start + size)))
        print(start + size, flush=True)
"""


def start_writer(path: Path, first: int, count: int, size: int) -> subprocess.Popen[str]:
    script = WRITER.format(tests=str(Path(__file__).parents[2]))
    arguments = [sys.executable, "-c", script, str(path), str(first), str(count), str(size)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def update(path: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement, values)
    connection.close()


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)
