"""The reference store: exact values or none at all, whatever happens to processes and to the file."""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest

from alignment.errors import UserError
from alignment.files import cache_dir
from alignment.reference.store import REFERENCE_FILE, ReferenceStore, damaged_files
from tests.helpers.patience import patience

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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / REFERENCE_FILE


def filled(path: Path, count: int = 300) -> dict[bytes, np.ndarray]:
    items = sequences(range(count))
    with ReferenceStore(path) as store:
        store.register(A, {"model": "tiny"})
        store.put(A, items)
    return items


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
        assert store.identities()[0].sequences == 1


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
    assert (oldest.identity, oldest.sequences, oldest.tokens) == (A, 2, 7)
    assert oldest.bytes == 7 * 4 + 2 * (32 + 16)
    assert oldest.description == {"model": "tiny", "dtype": "float32"}
    assert before <= oldest.created <= oldest.last_used <= newest.last_used <= time.time()
    assert (newest.identity, newest.sequences, newest.tokens, newest.description) == (B, 1, 5, {})


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

WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.reference.test_store import A, B, ReferenceStore, sequences
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
            assert store.identities()[0].sequences % size == 0, "a transaction is stored whole or not at all"
            assert store.verify() == store.identities()[0].sequences
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


# --- damage -----------------------------------------------------------------------------------------------------------


def update(path: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement, values)
    connection.close()


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


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


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


# --- what the user can mend -------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_loses_nothing(path: Path) -> None:
    items = filled(path, 50)
    with ReferenceStore(path) as store:
        store._connection.execute(f"PRAGMA max_page_count = {path.stat().st_size // 4096 + 5}")
        with pytest.raises(UserError, match=r"database or disk is full.*free the disk"):
            store.put(A, sequences(range(1000, 5000)))
        assert store.identities()[0].sequences == 50
        assert_only_right(store.get(A, list(items)), items)
        assert store.damaged == {}


def test_a_path_that_cannot_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be used"):
        ReferenceStore(tmp_path / "file" / REFERENCE_FILE)
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
    monkeypatch.setattr("alignment.reference.store._BUSY_SECONDS", 0.05)
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
