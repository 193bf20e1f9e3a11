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
            with second.alone(identity):
                pass

        with first.alone(A):
            other.submit(enter, B).result(timeout=10)
            waiting = other.submit(enter, A)
            assert wait([waiting], timeout=0.2).not_done
        waiting.result(timeout=10)


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
        assert store.verify().sound
    assert len(found) == 700
    assert_only_right(found, expected)
    assert len(damaged_files(path)) == damaged_before, "only the first to come moves it aside"


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
            assert store.verify().sound
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
def test_a_changed_row_is_dropped_and_never_returned(path: Path, statement: str) -> None:
    items = {key: logps - 0.5 for key, logps in (sequence(1), sequence(4))}
    victim, other = items
    assert len(items[victim]) > 1
    with ReferenceStore(path) as store:
        store.put(A, items)
        update(path, statement, victim)
        assert set(store.get(A, [victim, other])) == {other}
        assert store.corrupt == 1
        assert store.identities()[0].sequences == 1
        store.put(A, items)
        np.testing.assert_array_equal(store.get(A, [victim])[victim], items[victim])


def test_a_row_moved_to_another_identity_is_dropped(path: Path) -> None:
    key, logps = sequence(0)
    with ReferenceStore(path) as store:
        store.put(A, {key: logps})
        store.register(B, {})
        update(path, "UPDATE logps SET identity = (SELECT number FROM identities WHERE identity = ?)", B)
        assert store.get(B, [key]) == {}
        assert store.corrupt == 1


@pytest.mark.parametrize("name", ["b" * 64, "not an identity", "b" * 63])
def test_a_renamed_identity_has_no_rows(path: Path, name: str) -> None:
    items = filled(path, 5)
    update(path, "UPDATE identities SET identity = ?", name)
    with ReferenceStore(path) as store:
        assert store.get(A, list(items)) == {}
        report = store.verify()
        assert (report.sequences, report.sound) == (0, False)
        assert all(len(info.identity) == 64 for info in store.identities())
        assert store.verify().sequences == 0


def test_an_unreadable_description_costs_no_values(path: Path) -> None:
    items = filled(path, 5)
    update(path, "UPDATE identities SET description = CAST(x'7bff' AS TEXT)")
    with ReferenceStore(path) as store:
        assert store.identities()[0].description == {}
        assert len(store.get(A, list(items))) == 5


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.fixture
def unchecked_at_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a large file that was closed cleanly: the operations themselves must cope."""
    monkeypatch.setattr("alignment.reference.store._CHECKED_AT_OPEN", -1)


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


@pytest.mark.parametrize("fraction", [0.0, 0.0005, 0.01, 0.3, 0.5, 0.9])
def test_a_truncated_file_is_set_aside(path: Path, fraction: float, caplog: pytest.LogCaptureFixture) -> None:
    items = filled(path)
    os.truncate(path, int(path.stat().st_size * fraction))
    with caplog.at_level(logging.WARNING), ReferenceStore(path) as store:
        assert store.get(A, list(items)) == {}
        assert list(store.damaged) == damaged_files(path)
        store.put(A, items)
        assert len(store.get(A, list(items))) == len(items)
    assert len(caplog.records) == 1
    assert damaged_files(path)[0].name in caplog.text
    with ReferenceStore(path) as store:
        assert store.damaged == {}
        assert len(store.get(A, list(items))) == len(items)


def test_a_torn_last_page_costs_its_own_rows(path: Path) -> None:
    items = filled(path)
    os.truncate(path, path.stat().st_size - 60)
    with ReferenceStore(path) as store:
        found = store.get(A, list(items))
        assert 0 < len(found) < len(items)
        assert_only_right(found, items)
        assert store.corrupt == len(items) - len(found)


@pytest.mark.parametrize("content", [noise(100), b"\0" * 4096, b"hello", b"SQLite format 3\0" + noise(84)])
def test_a_garbage_header_is_set_aside(path: Path, content: bytes) -> None:
    items = filled(path)
    overwrite(path, 0, content)
    with ReferenceStore(path) as store:
        assert store.get(A, list(items)) == {}
        assert len(store.damaged) == 1


def test_a_header_that_declares_the_file_read_only_is_damage(path: Path) -> None:
    items = filled(path)
    overwrite(path, 18, b"\x07")
    with ReferenceStore(path) as store:
        assert_only_right(store.get(A, list(items)), items)
        store.put(A, items)
        assert len(store.damaged) == 1
        assert len(store.get(A, list(items))) == len(items)


def test_a_schema_that_is_no_text_is_damage(path: Path) -> None:
    filled(path)
    overwrite(path, path.read_bytes().index(b"sqlite_autoindex_logps_1"), b"sqlite\xff")
    with ReferenceStore(path) as store:
        assert store.identities() == []
        assert len(store.damaged) == 1


def test_an_index_astray_is_damage_of_the_file(path: Path, unchecked_at_open: None) -> None:
    """A wrong row number behind a key: the row that it leads to is sound, and dropping it would mend nothing."""
    items = filled(path, 20)
    (row, key), (other, _) = sqlite3.connect(path).execute("SELECT row, key FROM logps LIMIT 2 OFFSET 5").fetchall()
    content = path.read_bytes()
    entry = key + bytes([row])
    places = [at for at in range(len(content)) if content.startswith(entry, at)]
    (place,) = (at for at in places if not content.startswith(key + items[key].tobytes(), at))
    overwrite(path, place + len(key), bytes([other]))
    with ReferenceStore(path) as store:
        assert_only_right(store.get(A, list(items)), items)
        assert len(store.damaged) == 1
        store.put(A, items)
        assert len(store.get(A, list(items))) == 20


@pytest.mark.parametrize("checked_at_open", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_garbage_anywhere_never_changes_a_value(
    path: Path, seed: int, checked_at_open: bool, request: pytest.FixtureRequest
) -> None:
    if not checked_at_open:
        request.getfixturevalue("unchecked_at_open")
    items = filled(path)
    generator = np.random.default_rng(seed)
    length = int(generator.choice([1, 4, 64, 4096, 20_000]))
    overwrite(path, int(generator.integers(100, path.stat().st_size)), noise(length, seed))
    with ReferenceStore(path) as store:
        assert_only_right(store.get(A, list(items)), items)
        store.identities()
        store.verify()
        assert store.verify().sequences == len(store.get(A, list(items)))
        store.put(A, items)
        found = store.get(A, list(items))
    assert len(found) == len(items)
    assert_only_right(found, items)


def damage_in_place(path: Path) -> None:
    """All pages but the first, which holds the header and the schema."""
    overwrite(path, 4096, noise(path.stat().st_size - 4096))


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


def test_a_file_left_by_a_killed_process_is_checked_when_it_is_opened(path: Path, unchecked_at_open: None) -> None:
    left_by_a_killed_writer(path)
    damage_in_place(path)
    with ReferenceStore(path) as store:
        assert len(store.damaged) == 1


def test_a_small_file_is_checked_when_it_is_opened(path: Path) -> None:
    filled(path)
    damage_in_place(path)
    with ReferenceStore(path) as store:
        assert len(store.damaged) == 1


def test_the_log_moves_with_its_damaged_database(path: Path) -> None:
    items = sequences(range(20))
    with ReferenceStore(path) as first, ReferenceStore(path) as second:
        first.put(A, items)
        content = path.with_name(path.name + "-wal").read_bytes()
        second._reopen("seen by the second")
        (kept,) = second.damaged
        assert kept.with_name(kept.name + "-wal").read_bytes() == content
        assert second.identities() == []


def test_a_log_truncated_while_open_is_damage(path: Path) -> None:
    items = sequences(range(300))
    with ReferenceStore(path) as writer, ReferenceStore(path) as reader:
        writer.put(A, items)
        os.truncate(path.with_name(path.name + "-wal"), 5000)
        assert_only_right(reader.get(A, list(items)), items)
        assert len(reader.damaged) == 1
        writer.put(A, items)
        assert len(reader.get(A, list(items))) == 300


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_log_never_changes_a_value(path: Path, seed: int) -> None:
    log = left_by_a_killed_writer(path)
    size = log.stat().st_size
    if seed == 0:
        log.write_bytes(noise(size))
    elif seed == 1:
        os.truncate(log, size // 2 + 7)
    elif seed == 2:
        os.truncate(path, path.stat().st_size // 2)
    else:
        overwrite(log, int(np.random.default_rng(seed).integers(0, size)), noise(1 + 97 * seed, seed))
    expected = sequences(range(2000))
    with ReferenceStore(path) as store:
        assert_only_right(store.get(A, list(expected)), expected)
        store.put(A, expected)
        assert len(store.get(A, list(expected))) == 2000
        assert store.verify().sequences >= 2000


def test_a_log_without_its_database_is_not_replayed(path: Path) -> None:
    items = filled(path, 20)
    log = path.with_name(path.name + "-wal")
    with ReferenceStore(path) as store:
        store.put(B, items)
        content = log.read_bytes()
    assert len(content) > 4096
    path.unlink()
    log.write_bytes(content)
    with ReferenceStore(path) as store:
        assert store.identities() == []
        store.put(A, items)
        assert len(store.get(A, list(items))) == 20
    assert damaged_files(path) == []


def test_damage_while_open_is_set_aside_once(path: Path, unchecked_at_open: None) -> None:
    items = filled(path)
    damage_in_place(path)
    with ReferenceStore(path) as first, ReferenceStore(path) as second:
        assert first._inode == second._inode
        assert first.get(A, list(items)) == {}
        first.put(A, items)
        assert len(second.get(A, list(items))) == len(items), "the second must find the fresh file and keep it"
        assert (len(first.damaged), len(second.damaged)) == (1, 0)
    assert len([file for file in damaged_files(path) if file.name[-4:] not in ("-wal", "-shm")]) == 1
    with ReferenceStore(path) as store:
        assert len(store.get(A, list(items))) == len(items), "closing the old connection harmed the fresh file"


def test_two_that_meet_the_same_damage_replace_it_once(path: Path, unchecked_at_open: None) -> None:
    items = filled(path)
    damage_in_place(path)
    with ReferenceStore(path) as first, ReferenceStore(path) as second:
        first._reopen("seen by the first")
        first.put(A, items)
        second._reopen("seen by the second")
        assert second.damaged == {}
        assert len(second.get(A, list(items))) == len(items)


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
        assert store.verify().sound


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
