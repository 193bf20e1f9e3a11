"""The reference store: exact values or none at all, whatever happens to processes and to the file."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest

from alignment.errors import UserError
from alignment.files import CacheKind, cache_dir
from alignment.reference.keyed_store import damaged_files
from alignment.reference.store import ReferenceStore
from tests.helpers.patience import patience
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


def test_every_float32_round_trips_to_the_bit(path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, size=20_000, dtype=np.uint64).astype(np.uint32)
    special = np.array([-0.0, 0.0, 1e-45, -1e-45, -3.4028235e38, -1e-8], dtype=np.float32)
    values = np.concatenate([special, bits.view(np.float32)])
    values = values[np.isfinite(values)]
    key, _ = sequence(0)
    with ReferenceStore(path) as store:
        store.put(A, {key: values})
    with ReferenceStore(path) as store:
        found = store.get(A, [key])[key]
    assert found.tobytes() == values.tobytes()
    assert found.flags.writeable


def test_an_identity_is_computed_by_one_at_a_time(path: Path) -> None:
    with ReferenceStore(path) as first, ReferenceStore(path) as second, ThreadPoolExecutor(1) as other:

        def enter(identity: str) -> None:
            with second.locked(identity):
                pass

        with first.locked(A):
            other.submit(enter, B).result(patience(10))
            waiting = other.submit(enter, A)
            assert wait([waiting], timeout=0.2).not_done
        waiting.result(patience(10))


def test_identities_never_mix(path: Path) -> None:
    key, logps = sequence(0)
    other, _ = sequence(1)
    with ReferenceStore(path) as store:
        store.put(A, {key: logps})
        assert store.get(B, [key]) == {}
        store.put(B, {key: logps - 1, other: logps})
        assert set(store.get(A, [key, other, key])) == {key}
        np.testing.assert_array_equal(store.get(A, [key])[key], logps)
        np.testing.assert_array_equal(store.get(B, [key])[key], logps - 1)
        assert store.forget(B) == 2
        assert store.get(B, [key, other]) == {}
        assert set(store.get(A, [key])) == {key}


def test_the_same_again_is_fine_and_the_latest_value_wins(path: Path) -> None:
    key, logps = sequence(0)
    with ReferenceStore(path) as store:
        store.put(A, {key: logps})
        store.put(A, {key: logps})
        store.put(A, {key: logps * 2})
        np.testing.assert_array_equal(store.get(A, [key])[key], logps * 2)
        assert store.identities()[0].entries == 1


@pytest.mark.parametrize(
    "bad",
    [
        np.array([-1.0, np.nan], np.float32),
        np.array([-np.inf], np.float32),
        np.array([], np.float32),
        np.array([-1.0], np.float64),
        np.array([[-1.0]], np.float32),
    ],
)
def test_refused_values_leave_nothing_of_their_batch(path: Path, bad: np.ndarray) -> None:
    key, logps = sequence(0)
    with ReferenceStore(path) as store:
        with pytest.raises(ValueError, match="finite float32 vector"):
            store.put(A, {key: logps, b"k" * 32: bad})
        assert store.get(A, [key]) == {}


@pytest.mark.parametrize("identity", ["", "Qwen/Qwen3-0.6B", "A" * 64, "a" * 63])
def test_a_name_is_no_identity(path: Path, identity: str) -> None:
    with ReferenceStore(path) as store:
        for use in (store.get, store.put, store.register):
            with pytest.raises(ValueError, match="64 lower-case hexadecimal"):
                use(identity, {})


def test_statistics_are_counted(path: Path) -> None:
    before = time.time()
    with ReferenceStore(path) as store:
        store.register(A, {"model": "tiny", "dtype": "float32"})
        store.put(A, {b"1" * 32: np.zeros(3, np.float32), b"2" * 32: np.zeros(4, np.float32)})
        store.put(B, {b"1" * 32: np.zeros(5, np.float32)})
        newest, oldest = store.identities()
    assert (oldest.identity, oldest.entries, oldest.value_bytes) == (A, 2, 4 * 7)
    assert oldest.bytes == 7 * 4 + 2 * (32 + 16)
    assert oldest.description == {"model": "tiny", "dtype": "float32"}
    assert before <= oldest.created <= oldest.last_used <= newest.last_used <= time.time()
    assert (newest.identity, newest.entries, newest.value_bytes, newest.description) == (B, 1, 4 * 5, {})


def test_get_of_many_keys_is_a_few_statements(path: Path) -> None:
    items = {index.to_bytes(32, "little"): np.array([-index], np.float32) for index in range(20_000)}
    with ReferenceStore(path) as store:
        store.put(A, items)
        statements: list[str] = []
        store._connection.set_trace_callback(statements.append)
        found = store.get(A, list(items))
        plan = " ".join(row[3] for row in store._connection.execute("EXPLAIN QUERY PLAN " + statements[0]).fetchall())
    assert len(found) == 20_000
    assert_only_right(found, items)
    assert len(statements) <= 3
    assert "(identity=? AND key=?)" in plan


def test_the_file_format_stays(path: Path) -> None:
    """What users have stored must be found, and what is stored now be read by older versions: the layout by hand."""
    key, logps = sequence(0)
    checksum = hashlib.blake2b(A.encode() + (32).to_bytes(8, "little") + key + logps.tobytes(), digest_size=16).digest()
    schema = (
        "CREATE TABLE identities (number INTEGER PRIMARY KEY, identity TEXT NOT NULL UNIQUE, description TEXT NOT NULL,"
        " created REAL NOT NULL, last_used REAL NOT NULL)",
        "CREATE TABLE logps (row INTEGER PRIMARY KEY, identity INTEGER NOT NULL, key BLOB NOT NULL,"
        " value BLOB NOT NULL, checksum BLOB NOT NULL, UNIQUE (identity, key))",
    )
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    for statement in ("PRAGMA auto_vacuum = INCREMENTAL", "PRAGMA journal_mode = WAL", *schema):
        connection.execute(statement)
    connection.execute("PRAGMA user_version = 1")
    connection.execute('INSERT INTO identities VALUES (1, ?, \'{"model": "tiny"}\', 5.0, 6.0)', (A,))
    connection.execute("INSERT INTO logps VALUES (1, 1, ?, ?, ?)", (key, logps.tobytes(), checksum))
    connection.commit()
    connection.close()
    with ReferenceStore(path) as store:
        assert store.get(A, [key])[key].tobytes() == logps.tobytes()
        assert store.verify() == 1
    fresh = path.with_name("fresh.sqlite")
    with ReferenceStore(fresh) as store:
        store.put(A, {key: logps})
    written = sqlite3.connect(fresh)
    assert written.execute("SELECT key, value, checksum FROM logps").fetchall() == [(key, logps.tobytes(), checksum)]
    found = tuple(sql for (sql,) in written.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL"))
    assert found == schema and written.execute("PRAGMA user_version").fetchone() == (1,)
    written.close()


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("damaged_before", [False, True])
def test_four_processes_create_and_write_at_once(path: Path, damaged_before: bool) -> None:
    if damaged_before:
        filled(path)
        overwrite(path, 0, noise(9000))
    writers = [start_writer(path, 100 * index, 400, 20) for index in range(4)]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    expected = sequences(range(700))
    with ReferenceStore(path) as store:
        found = store.get(A, list(expected))
        assert len(store.identities()) == 1
        assert store.verify() == 700
        assert not store.damaged
    assert len(found) == 700
    assert_only_right(found, expected)
    assert len(damaged_files(path)) == damaged_before, "only the first to come moves it aside"


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_transactions(path: Path) -> None:
    size = 50
    for round_ in range(3):
        writer = start_writer(path, 0, 50_000, size)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        acknowledged = 0
        while acknowledged < size * (2 + 5 * round_):
            acknowledged = int(writer.stdout.readline())
        time.sleep(0.003 * round_)
        writer.kill()
        acknowledged = max([acknowledged, *(int(line) for line in writer.stdout.read().split())])
        writer.wait()
        writer.stdout.close()
        expected = sequences(range(acknowledged + size))
        with ReferenceStore(path) as store:
            found = store.get(A, list(expected))
            assert store.identities()[0].entries % size == 0, "a transaction is stored whole or not at all"
            assert store.verify() == store.identities()[0].entries
            store.forget(A)
        assert len(found) >= acknowledged, "what put() returned from survives the process"
        assert_only_right(found, expected)
    assert damaged_files(path) == []


def test_a_forked_child_is_refused(path: Path) -> None:
    items = filled(path, 5)
    with ReferenceStore(path) as store:
        child = os.fork()
        if child == 0:
            try:
                store.get(A, list(items))
            except RuntimeError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert len(store.get(A, list(items))) == 5


# --- what the user can mend -------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_loses_nothing(path: Path) -> None:
    items = filled(path, 50)
    with ReferenceStore(path) as store:
        store._connection.execute(f"PRAGMA max_page_count = {path.stat().st_size // 4096 + 5}")
        with pytest.raises(UserError, match=r"database or disk is full.*free the disk"):
            store.put(A, sequences(range(1000, 5000)))
        assert store.identities()[0].entries == 50
        assert_only_right(store.get(A, list(items)), items)
        assert store.damaged == {}


def test_a_path_that_cannot_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be used"):
        ReferenceStore(CacheKind.reference.under(tmp_path / "file"))
    with pytest.raises(UserError, match="is a folder"):
        ReferenceStore(tmp_path)


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE notes (text)", "PRAGMA user_version = 2", "ALTER TABLE logps ADD COLUMN more"]
)
def test_another_database_is_left_alone(path: Path, statement: str) -> None:
    if statement.startswith("CREATE"):
        path.parent.mkdir()
    else:
        filled(path, 5)
    update(path, statement)
    before = path.read_bytes()
    with pytest.raises(UserError, match="another program or of another version"):
        ReferenceStore(path)
    assert path.read_bytes() == before
    assert damaged_files(path) == []


def test_a_busy_store_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignment.reference.keyed_store._BUSY_SECONDS", 0.05)
    key, logps = sequence(0)
    with ReferenceStore(path) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="locked"):
            store.put(A, {key: logps})
        other.close()
        store.put(A, {key: logps})
        assert store.damaged == {}


@pytest.mark.parametrize(
    ("argument", "environment", "expected"),
    [("/x/y", "/e", "/x/y"), (None, "/e", "/e"), (None, "", "/home/me/.cache/alignment"), ("~/z", "/e", "/home/me/z")],
)
def test_cache_dir(monkeypatch: pytest.MonkeyPatch, argument: str | None, environment: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("ALIGNMENT_CACHE", environment)
    assert cache_dir(argument) == Path(expected)


# --- pruning ----------------------------------------------------------------------------------------------------------


def aged(path: Path) -> list[str]:
    """Three identities of 200 sequences, last used 40, 10 and 0 days ago."""
    names = ["a" * 64, "b" * 64, "c" * 64]
    with ReferenceStore(path) as store:
        for name, days in zip(names, (40, 10, 0), strict=True):
            store.put(name, sequences(range(200)))
            update(path, "UPDATE identities SET last_used = ? WHERE identity = ?", time.time() - days * 86400, name)
    return names


@pytest.mark.parametrize(
    ("criterion", "kept"),
    [
        ({"older_than_days": 30}, "bc"),
        ({"older_than_days": 5}, "c"),
        ({"older_than_days": 41}, "abc"),
        ({"older_than_days": 0}, ""),
        ({"identity": "b" * 64}, "ac"),
        ({"identity": "d" * 64}, "abc"),
        ({"max_bytes": 0}, ""),
        ({"max_bytes": 10**9}, "abc"),
        ({}, "abc"),
    ],
)
def test_prune_keeps_the_rest(path: Path, criterion: dict, kept: str) -> None:
    names = aged(path)
    expected = sequences(range(200))
    with ReferenceStore(path) as store:
        before = path.stat().st_size
        pruned = store.prune(**criterion)
        assert {info.identity[0] for info in pruned.identities} == set("abc") - set(kept)
        assert "".join(sorted(info.identity[0] for info in store.identities())) == kept
        for name in names:
            assert len(store.get(name, list(expected))) == (200 if name[0] in kept else 0)
        assert pruned.freed >= before - path.stat().st_size >= sum(info.bytes for info in pruned.identities)
        assert store.verify() == 200 * len(kept)


def test_prune_to_a_size_removes_the_least_recently_used(path: Path) -> None:
    aged(path)
    with ReferenceStore(path) as store:
        each = store.identities()[0].bytes
        assert [info.identity[0] for info in store.prune(max_bytes=2 * each).identities] == ["a"]
        assert [info.identity[0] for info in store.prune(max_bytes=2 * each - 1).identities] == ["b"]


def test_a_clock_that_was_set_back_does_not_protect(path: Path) -> None:
    aged(path)
    update(path, "UPDATE identities SET last_used = ?", time.time() + 9e6)
    with ReferenceStore(path) as store:
        assert len(store.prune(older_than_days=0).identities) == 3
