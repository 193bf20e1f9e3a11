"""The reference store: per-token log-probs, addressed by what was computed and by nothing else.

A value is found under the identity of the policy that scored it (a digest of base weights, quantisation and active
adapters) and the content hash of prompt and completion tokens. Losses, hyper-parameters, seeds and run names are no
part of the key, so that every run that asks the same policy about the same tokens shares one computation. Every value
carries a checksum over identity, key and log-probs: a row that was damaged, or swapped with another, is a miss.

The store is one SQLite file in WAL mode, for any number of processes of one machine. It is a cache: a damaged file is
moved aside and a fresh one takes its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from alignment.errors import UserError

REFERENCE_FILE = "reference.sqlite"

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Stamp = tuple[int, int]

_VERSION = 1
_SCHEMA = (
    "CREATE TABLE identities (number INTEGER PRIMARY KEY, identity TEXT NOT NULL UNIQUE, description TEXT NOT NULL,"
    " created REAL NOT NULL, last_used REAL NOT NULL)",
    "CREATE TABLE logps (row INTEGER PRIMARY KEY, identity INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL,"
    " checksum BLOB NOT NULL, UNIQUE (identity, key))",
)
_KEYS_PER_SELECT = 10_000  # SQLite allows 32766 variables in one statement
_BUSY_SECONDS = 60
_LOCK_SECONDS = 600
_CHECKED_AT_OPEN = 64 * 2**20
"""Bytes up to which a cleanly closed file is checked page by page when it is opened (tenths of a second)."""

_SURROUNDINGS = {
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
}
"""Errors that blame the disk, the rights or another process; any other error of our fixed statements is damage."""


def damaged_files(path: Path) -> list[Path]:
    """Files that were moved aside from `path` (their -wal and -shm included), oldest first."""
    return sorted(path.parent.glob(f"{path.name}.damaged-*"))


@dataclass(frozen=True, slots=True)
class IdentityInfo:
    """One policy in the store. `bytes` counts keys, values and checksums; times are seconds since 1970."""

    identity: str
    description: dict[str, Any]
    sequences: int
    tokens: int
    bytes: int
    created: float
    last_used: float


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `ReferenceStore.verify` found.

    Attributes:
        sequences: rows whose checksum holds.
        corrupt: rows dropped since this store was opened, by this check or before it.
        damaged: file moved aside since this store was opened -> what was wrong with it.
    """

    sequences: int
    corrupt: int
    damaged: dict[Path, str] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """True if nothing was lost."""
        return not self.corrupt and not self.damaged


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `ReferenceStore.prune` removed; `freed` is bytes on disk, less while another process is reading."""

    identities: list[IdentityInfo]
    freed: int


class _DamageError(Exception):
    """The file itself is broken; never leaves this module."""


class ReferenceStore:
    """Per-token reference log-probs in the SQLite file `path`, which is created with its folder where it is absent.

    Several processes of one machine may use one file at once. An instance belongs to the process and thread that
    opened it: SQLite connections do not survive a fork, and a forked child that needs the store opens its own.

    Attributes:
        corrupt: rows dropped by this instance because their checksum did not hold.
        damaged: file moved aside by this instance -> what was wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.corrupt = 0
        self.damaged: dict[Path, str] = {}
        self._descriptions: dict[str, str] = {}
        self._pid = os.getpid()
        if self.path.is_dir():
            raise UserError(f"The reference store {self.path} is a folder; name a file in it, e.g. {REFERENCE_FILE}.")
        with self._locked():
            self._connection, self._inode = self._open()

    def register(self, identity: str, description: Mapping[str, Any]) -> None:
        """Mark an identity as used now and say what it is, in JSON values.

        `model`, `quantization`, `adapter` and `dtype` are what `alignment.cache list` shows.
        """
        self._descriptions[_checked(identity)] = json.dumps(dict(description), sort_keys=True)

        def write(connection: sqlite3.Connection) -> None:
            with _transaction(connection):
                self._touch(connection, identity)

        self._run(write)

    def get(self, identity: str, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The stored log-probs, (tokens,) float32, of those keys that are there with a valid checksum."""
        wanted = list(dict.fromkeys(keys))
        _checked(identity)

        def read(connection: sqlite3.Connection) -> dict[bytes, np.ndarray]:
            found, corrupt = {}, []
            for start in range(0, len(wanted), _KEYS_PER_SELECT):
                batch = wanted[start : start + _KEYS_PER_SELECT]
                rows = connection.execute(
                    "SELECT row, key, value, checksum FROM logps WHERE identity ="
                    " (SELECT number FROM identities WHERE identity = ?)"
                    f" AND key IN ({','.join('?' * len(batch))})",
                    (identity, *batch),
                )
                for row, key, value, checksum in rows:
                    if _holds(identity, key, value, checksum):
                        found[key] = np.frombuffer(value, dtype="<f4").astype(np.float32)
                    else:
                        corrupt.append(row)
            self._drop(connection, corrupt)
            return found

        return self._run(read)

    def put(self, identity: str, items: Mapping[bytes, np.ndarray]) -> None:
        """Store log-probs, (tokens,) float32 each, all or none; ValueError where one is empty or not finite."""
        _checked(identity)
        rows = []
        for key, logps in items.items():
            if logps.dtype != np.float32 or logps.ndim != 1 or not len(logps) or not np.isfinite(logps).all():
                raise ValueError(
                    f"Log-probs of sequence {key.hex()[:12]} must be a finite float32 vector with at least one token, "
                    f"not {logps.dtype} of shape {logps.shape} with {np.count_nonzero(~np.isfinite(logps))} not finite."
                )
            value = logps.astype("<f4").tobytes()
            rows.append((key, value, _checksum(identity, key, value)))

        def write(connection: sqlite3.Connection) -> None:
            with _transaction(connection):
                number = self._touch(connection, identity)
                connection.executemany(
                    "INSERT OR REPLACE INTO logps (identity, key, value, checksum) VALUES (?, ?, ?, ?)",
                    ((number, *row) for row in rows),
                )

        self._run(write)

    def forget(self, identity: str) -> int:
        """Remove an identity with all its log-probs; the number of sequences removed."""

        def write(connection: sqlite3.Connection) -> int:
            with _transaction(connection):
                removed = connection.execute(
                    "DELETE FROM logps WHERE identity = (SELECT number FROM identities WHERE identity = ?)", (identity,)
                ).rowcount
                connection.execute("DELETE FROM identities WHERE identity = ?", (identity,))
            return removed

        return self._run(write)

    @contextmanager
    def alone(self, identity: str) -> Iterator[None]:
        """Look up and compute for an identity alone: a process that lacks the same values waits, and finds them."""
        lock = FileLock(f"{self.path}.{identity[:16]}.lock")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _log.info("Another run is computing this reference (%s); waiting for it ...", identity[:12])
                lock.acquire()
        except OSError as error:
            raise self._unusable(error) from error
        try:
            yield
        finally:
            lock.release()

    def identities(self) -> list[IdentityInfo]:
        """Every identity in the store, most recently used first."""

        def read(connection: sqlite3.Connection) -> list[IdentityInfo]:
            rows = connection.execute(
                "SELECT i.identity, i.description, COALESCE(s.sequences, 0), COALESCE(s.tokens, 0),"
                " COALESCE(s.bytes, 0), COALESCE(CAST(i.created AS REAL), 0), COALESCE(CAST(i.last_used AS REAL), 0)"
                " FROM identities i LEFT JOIN (SELECT identity, COUNT(*) sequences, SUM(length(value)) / 4 tokens,"
                " SUM(length(key) + length(value) + length(checksum)) bytes FROM logps GROUP BY identity) s"
                " ON s.identity = i.number ORDER BY i.last_used DESC"
            )
            return [IdentityInfo(identity, _description(text), *numbers) for identity, text, *numbers in rows]

        return self._run(read)

    def verify(self) -> VerifyReport:
        """Check the structure of the file and the checksum of every row; what is damaged is removed and reported."""

        def check(connection: sqlite3.Connection) -> int:
            _check_pages(connection)
            with _transaction(connection):
                self.corrupt += connection.execute(
                    "DELETE FROM identities WHERE length(identity) <> 64 OR identity GLOB '*[^0-9a-f]*'"
                ).rowcount
            sound, corrupt = 0, []
            for row, identity, key, value, checksum in connection.execute(
                "SELECT s.row, i.identity, s.key, s.value, s.checksum"
                " FROM logps s LEFT JOIN identities i ON i.number = s.identity"
            ):
                if _holds(identity, key, value, checksum):
                    sound += 1
                else:
                    corrupt.append(row)
            self._drop(connection, corrupt)
            return sound

        sound = self._run(check)
        return VerifyReport(sound, self.corrupt, dict(self.damaged))

    def prune(
        self, *, older_than_days: float | None = None, identity: str | None = None, max_bytes: int | None = None
    ) -> Pruned:
        """Remove identities that meet any criterion, and shrink the file.

        Args:
            older_than_days: not used for so many days; 0 removes everything.
            identity: exactly this one.
            max_bytes: the least recently used ones, until the rest is no larger than this.
        """
        infos = sorted(self.identities(), key=lambda info: info.last_used)
        before, left, now = self.size(), sum(info.bytes for info in infos), time.time()
        removed = []
        for info in infos:
            # A clock that was set back must not make an entry immortal.
            days = max(0.0, now - info.last_used) / 86400
            if (
                info.identity == identity
                or (older_than_days is not None and days >= older_than_days)
                or (max_bytes is not None and left > max_bytes)
            ):
                left -= info.bytes
                removed.append(info)
        for info in removed:
            self.forget(info.identity)

        def shrink(connection: sqlite3.Connection) -> None:
            # As a script: execute() would stop after the first page.
            connection.executescript("PRAGMA incremental_vacuum")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

        self._run(shrink)
        return Pruned(removed, before - self.size())

    def size(self) -> int:
        """Bytes on disk, with what is still in the write-ahead log."""
        return _size(self.path) + _size(_beside(self.path, "-wal"))

    def close(self) -> None:
        """Close the file; the last process to do so folds the write-ahead log into it."""
        self._connection.close()

    def __enter__(self) -> ReferenceStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, operation: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do it; where the file proves damaged, do it again on the fresh one."""
        if os.getpid() != self._pid:
            raise RuntimeError("A ReferenceStore does not survive a fork: open another one in the child process.")
        if _inode(self.path) != self._inode:
            self._reopen(None)
        try:
            with self._errors():
                return operation(self._connection)
        except _DamageError as error:
            self._reopen(str(error))
        try:
            with self._errors():
                return operation(self._connection)
        except _DamageError as error:
            raise self._unusable(error) from error

    def _reopen(self, reason: str | None) -> None:
        self._connection.close()
        with self._locked():
            # Another process that met the same damage may have been here first; its fresh file must stay.
            if reason is not None and _inode(self.path) == self._inode:
                self._move_aside(reason)
            self._connection, self._inode = self._open()

    def _open(self) -> tuple[sqlite3.Connection, _Stamp | None]:
        """Connect, under the lock; a damaged file is moved aside first."""
        try:
            return self._connect(), _inode(self.path)
        except _DamageError as error:
            self._move_aside(str(error))
        try:
            return self._connect(), _inode(self.path)
        except _DamageError as error:
            raise self._unusable(error) from error

    def _connect(self) -> sqlite3.Connection:
        # The file is only ever touched through SQLite, never with open(): closing any descriptor of it would drop the
        # POSIX locks that other connections of this process hold.
        existed = self.path.exists()
        left_open = _size(_beside(self.path, "-wal")) > 0
        with self._errors():
            connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            connection.text_factory = lambda text: text.decode("utf-8", "replace")
            try:
                connection.execute("PRAGMA cell_size_check = ON")
                connection.execute("PRAGMA secure_delete = OFF")
                connection.execute("PRAGMA synchronous = NORMAL")
                if not existed:
                    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                    connection.execute("PRAGMA journal_mode = WAL")
                    with _transaction(connection):
                        for statement in _SCHEMA:
                            connection.execute(statement)
                        connection.execute(f"PRAGMA user_version = {_VERSION}")
                    return connection
                schema = tuple(sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL"))
                ours = schema == _SCHEMA and connection.execute("PRAGMA user_version").fetchone() == (_VERSION,)
                # Checksums guard the values in any case; this finds broken pages early, where it costs little or
                # where a process was killed.
                if not ours or left_open or _size(self.path) <= _CHECKED_AT_OPEN:
                    _check_pages(connection)
                if not schema:
                    raise _DamageError("it is empty")
                if not ours:
                    raise UserError(
                        f"{self.path} is an SQLite database of another program or of another version of this one; "
                        "move it away, or choose another folder with reference.path or ALIGNMENT_CACHE."
                    )
            except BaseException:
                connection.close()
                raise
        return connection

    def _move_aside(self, reason: str) -> None:
        target = _beside(self.path, f".damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}")
        try:
            # The database first: a log without its database is discarded by SQLite, a log beside a fresh one replayed.
            self.path.rename(target)
            for suffix in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    _beside(self.path, suffix).rename(_beside(target, suffix))
        except OSError as error:
            raise self._unusable(error) from error
        self.damaged[target] = reason
        _log.warning(
            "The reference store %s was damaged (%s); it is kept as %s and a fresh one is used.",
            self.path,
            reason,
            target.name,
        )

    def _touch(self, connection: sqlite3.Connection, identity: str) -> int:
        """Mark the identity as used, adding it where it is absent (also on a fresh file); its row number."""
        now = time.time()
        connection.execute(
            "INSERT INTO identities (identity, description, created, last_used) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (identity) DO UPDATE SET last_used = excluded.last_used,"
            " description = COALESCE(NULLIF(excluded.description, '{}'), description)",
            (identity, self._descriptions.get(identity, "{}"), now, now),
        )
        return connection.execute("SELECT number FROM identities WHERE identity = ?", (identity,)).fetchone()[0]

    def _drop(self, connection: sqlite3.Connection, rows: list[int]) -> None:
        if not rows:
            return
        # The row may be whole and the index astray, which no deletion mends.
        _check_pages(connection)
        self.corrupt += len(rows)
        _log.warning("Dropped %d corrupt rows of the reference store %s.", len(rows), self.path)
        with _transaction(connection):
            connection.executemany("DELETE FROM logps WHERE row = ?", ((row,) for row in rows))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Tell damage (`_DamageError`) from what the user can mend (`UserError`) and from bugs (as they are)."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            code = error.sqlite_errorcode
            # A header byte can declare the file read-only; then the file is at fault and not its rights.
            declared = code == sqlite3.SQLITE_READONLY and os.access(self.path, os.W_OK)
            truncated = code == sqlite3.SQLITE_IOERR_SHORT_READ
            if code & 0xFF in _SURROUNDINGS and not declared and not truncated:
                raise self._unusable(error) from error
            raise _DamageError(str(error)) from error
        except UnicodeDecodeError as error:  # SQLite's own message quotes damaged bytes
            raise _DamageError("its schema is malformed") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Opening, replacing and creating the file happen one process at a time."""
        lock = FileLock(f"{self.path}.lock", timeout=_LOCK_SECONDS)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, Timeout) as error:
            raise self._unusable(error) from error
        try:
            yield
        finally:
            lock.release()

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"The reference store {self.path} cannot be used ({error}); free the disk, mend the rights, or choose "
            "another folder with reference.path or ALIGNMENT_CACHE."
        )


def _checked(identity: str) -> str:
    """A name or a path in place of the digest would hit for other weights of the same name."""
    if not re.fullmatch("[0-9a-f]{64}", identity):
        raise ValueError(f"A policy identity is 64 lower-case hexadecimal digits, not {identity!r}.")
    return identity


def _checksum(identity: str, key: bytes, value: bytes) -> bytes:
    digest = hashlib.blake2b(identity.encode(), digest_size=16)
    digest.update(len(key).to_bytes(8, "little"))
    digest.update(key)
    digest.update(value)
    return digest.digest()


def _holds(identity: object, key: object, value: object, checksum: object) -> bool:
    """Damage can change the types of columns as well as their content."""
    return (
        isinstance(identity, str)
        and isinstance(key, bytes)
        and isinstance(value, bytes)
        and len(value) > 0
        and len(value) % 4 == 0
        and checksum == _checksum(identity, key, value)
    )


def _description(text: object) -> dict[str, Any]:
    """Only people read it, so an unreadable one is empty and costs no log-probs."""
    try:
        value = json.loads(str(text))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _check_pages(connection: sqlite3.Connection) -> None:
    """Structure only. Not quick_check: an index out of order would make its keys misses for ever."""
    (first,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if first != "ok":
        raise _DamageError(" ".join(first.split()))


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Take the write lock at once: a reader that turns into a writer can fail without waiting."""
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        yield


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
    """Bytes; another process may remove a log at any time."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _inode(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
