"""A damaged reference store: set aside and begun anew, and never a wrong value."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from alignment.files import CacheKind
from alignment.reference.keyed_store import damaged_files
from alignment.reference.store import ReferenceStore
from tests.helpers.stores import (
    A,
    B,
    assert_only_right,
    filled,
    noise,
    overwrite,
    sequence,
    sequences,
    start_writer,
    update,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return CacheKind.reference.under(tmp_path / "cache")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE logps SET value = CAST(x'00' || substr(value, 2) AS BLOB) WHERE key = ?",
        "UPDATE logps SET value = x'' WHERE key = ?",
        "UPDATE logps SET value = CAST(substr(value, 1, length(value) - 1) AS BLOB) WHERE key = ?",
        "UPDATE logps SET value = CAST(substr(value, 5) AS BLOB) WHERE key = ?",
        "UPDATE logps SET value = 'text' WHERE key = ?",
        "UPDATE logps SET value = (SELECT value FROM logps WHERE key <> ?1 LIMIT 1) WHERE key = ?1",
        "UPDATE logps SET (value, checksum) = (SELECT value, checksum FROM logps WHERE key <> ?1) WHERE key = ?1",
        "UPDATE logps SET checksum = zeroblob(16) WHERE key = ?",
        "UPDATE logps SET checksum = 0 WHERE key = ?",
    ],
)
def test_a_changed_entry_is_never_returned(path: Path, statement: str) -> None:
    items = {key: logps - 0.5 for key, logps in (sequence(1), sequence(4))}
    victim, other = items
    assert len(items[victim]) > 1
    with ReferenceStore(path) as store:
        store.put(A, items)
        update(path, statement, victim)
        assert set(store.get(A, [other])) == {other} and not store.damaged
        assert store.get(A, [victim, other]) == {}
        assert list(store.damaged.values()) == ["an entry does not match its checksum"]
        store.put(A, items)
        np.testing.assert_array_equal(store.get(A, [victim])[victim], items[victim])


@pytest.mark.parametrize("found_by", ["get", "verify"])
def test_an_entry_moved_to_another_identity_is_damage(path: Path, found_by: str) -> None:
    key, logps = sequence(0)
    with ReferenceStore(path) as store:
        store.put(A, {key: logps})
        store.register(B, {})
        update(path, "UPDATE logps SET identity = (SELECT number FROM identities WHERE identity = ?)", B)
        assert not (store.get(B, [key]) if found_by == "get" else store.verify())
        assert len(store.damaged) == 1


@pytest.mark.parametrize("name", ["b" * 64, "not an identity"])
def test_a_renamed_identity_has_no_entries(path: Path, name: str) -> None:
    items = filled(path, 5)
    update(path, "UPDATE identities SET identity = ?", name)
    with ReferenceStore(path) as store:
        assert store.get(A, list(items)) == {}
        assert store.verify() == 0
        assert len(store.damaged) == 1 and store.identities() == []


@pytest.mark.parametrize("text", ["x'7bff'", "x'7b'"])  # not UTF-8, not JSON
def test_an_unreadable_description_is_damage(path: Path, text: str) -> None:
    filled(path, 5)
    update(path, f"UPDATE identities SET description = CAST({text} AS TEXT)")
    with ReferenceStore(path) as store:
        assert store.identities() == []
        assert len(store.damaged) == 1


@pytest.mark.parametrize("fraction", [0.0005, 0.01, 0.3, 0.5, 0.9])
def test_a_truncated_file_is_set_aside(path: Path, fraction: float, caplog: pytest.LogCaptureFixture) -> None:
    items = filled(path)
    os.truncate(path, int(path.stat().st_size * fraction))
    with caplog.at_level(logging.WARNING), ReferenceStore(path) as store:
        assert store.get(A, list(items)) == {}
        assert list(store.damaged) == damaged_files(path)
        store.put(A, items)
        assert len(store.get(A, list(items))) == len(items)
    [record] = caplog.records
    assert damaged_files(path)[0].name in record.getMessage() and "\n" not in record.getMessage()
    with ReferenceStore(path) as store:
        assert store.damaged == {}
        assert len(store.get(A, list(items))) == len(items)


def test_an_empty_file_is_a_fresh_store(path: Path) -> None:
    items = filled(path, 5)
    os.truncate(path, 0)
    with ReferenceStore(path) as store:
        assert store.get(A, list(items)) == {}
        store.put(A, items)
        assert len(store.get(A, list(items))) == 5


@pytest.mark.parametrize("content", [noise(100), b"\0" * 4096, b"hello", b"SQLite format 3\0" + noise(84)])
def test_a_garbage_header_is_set_aside(path: Path, content: bytes) -> None:
    items = filled(path)
    overwrite(path, 0, content)
    with ReferenceStore(path) as store:
        assert store.get(A, list(items)) == {}
        assert len(store.damaged) == 1


@pytest.mark.parametrize("seed", range(12))
def test_garbage_anywhere_never_changes_a_value(path: Path, seed: int) -> None:
    items = filled(path)
    generator = np.random.default_rng(seed)
    length = int(generator.choice([1, 4, 64, 4096, 20_000]))
    overwrite(path, int(generator.integers(100, path.stat().st_size)), noise(length, seed))
    with ReferenceStore(path) as store:
        assert_only_right(store.get(A, list(items)), items)
        store.identities()
        store.verify()
        assert store.verify() == len(store.get(A, list(items)))
        store.put(A, items)
        found = store.get(A, list(items))
    assert len(found) == len(items)
    assert_only_right(found, items)


def left_by_a_killed_writer(path: Path) -> Path:
    """A store with a write-ahead log that nobody folded into it; the log."""
    filled(path, 20)
    writer = start_writer(path, 20, 50_000, 20)
    assert writer.stdout is not None
    for _ in range(10):
        writer.stdout.readline()
    writer.kill()
    writer.communicate()
    log = path.with_name(path.name + "-wal")
    assert log.stat().st_size > 10_000
    return log


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["garbage", "truncated", "database truncated", "some bytes"])
def test_a_damaged_log_never_changes_a_value(path: Path, damage: str) -> None:
    log = left_by_a_killed_writer(path)
    size = log.stat().st_size
    if damage == "garbage":
        log.write_bytes(noise(size))
    elif damage == "truncated":
        os.truncate(log, size // 2 + 7)
    elif damage == "database truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        overwrite(log, size // 3, noise(291))
    expected = sequences(range(2000))
    with ReferenceStore(path) as store:
        assert_only_right(store.get(A, list(expected)), expected)
        store.put(A, expected)
        assert len(store.get(A, list(expected))) == 2000
        assert store.verify() >= 2000


def test_damage_while_open_is_set_aside_once(path: Path) -> None:
    items = filled(path)
    with ReferenceStore(path) as first, ReferenceStore(path) as second:
        overwrite(path, 4096, noise(path.stat().st_size - 4096))  # all pages but the header and the schema
        assert first.get(A, list(items)) == {}
        first.put(A, items)
        assert len(second.get(A, list(items))) == len(items), "the second must find the fresh file and keep it"
        assert (len(first.damaged), len(second.damaged)) == (1, 0)
    assert len([file for file in damaged_files(path) if file.name[-4:] not in ("-wal", "-shm")]) == 1
    with ReferenceStore(path) as store:
        assert len(store.get(A, list(items))) == len(items), "closing the old connection harmed the fresh file"


def test_the_description_follows_to_a_fresh_file(path: Path) -> None:
    key, logps = sequence(0)
    with ReferenceStore(path) as store:
        store.register(A, {"model": "tiny"})
        for file in path.parent.iterdir():
            file.unlink()
        path.parent.rmdir()
        store.put(A, {key: logps})
        assert store.identities()[0].description == {"model": "tiny"}
    with ReferenceStore(path) as store:
        assert set(store.get(A, [key])) == {key}
