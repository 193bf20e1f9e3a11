"""Values on disk, each under the identity of who computed it and a key of what was asked.

A store is one SQLite file, which several processes may use at once: in WAL mode those of one machine, and on a network
file system, where machines do not share the memory that WAL needs, without it. Every entry has a checksum over
identity, key and value. If the file or an entry is damaged, the file is set aside under another name and a fresh one is
begun: a damaged value is never returned, only computed again.
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
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from alignment.errors import UserError
from alignment.files import file_lock, network_file_system

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Own = TypeVar("_Own", bound="KeyedStore")

_VERSION = 1
_SCHEMA = (
    "CREATE TABLE identities (number INTEGER PRIMARY KEY, identity TEXT NOT NULL UNIQUE, description TEXT NOT NULL,"
    " created REAL NOT NULL, last_used REAL NOT NULL)",
    "CREATE TABLE {table} (row INTEGER PRIMARY KEY, identity INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL,"
    " checksum BLOB NOT NULL, UNIQUE (identity, key))",
)
_KEYS_PER_SELECT = 10_000  # SQLite allows 32766 variables in one statement
_BUSY_SECONDS = 60
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def damaged_files(path: Path) -> list[Path]:
    """Files that were set aside from `path`, with their -wal and -shm, oldest first."""
    return sorted(path.parent.glob(f"{path.name}.damaged-*"))


@dataclass(frozen=True, slots=True)
class IdentityInfo:
    """One identity in a store, with its entries.

    Attributes:
        value_bytes: of the values alone.
        bytes: of keys, values and checksums.
        created: seconds since 1970, as `last_used`.
    """

    identity: str
    description: dict[str, Any]
    entries: int
    value_bytes: int
    bytes: int
    created: float
    last_used: float


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `KeyedStore.prune` removed. `freed` is bytes on disk; it is less while another process is reading."""

    identities: list[IdentityInfo]
    freed: int


class _DamageError(Exception):
    """The file is broken. It never leaves this module."""


class KeyedStore:
    """Values in the SQLite file `path`, which is created if it does not exist. A kind of store says what they are.

    Several processes may use one file at once. An instance belongs to the process and thread that
    opened it: SQLite connections do not survive a fork, so a forked child opens its own.

    Attributes:
        damaged: each file that this instance set aside -> what was wrong with it.
        table: of the entries.
        title: of this kind of store, for messages.
        example: of a path.
        elsewhere: how another folder is chosen.

    Raises:
        UserError: `path` is a folder, cannot be read or written, or is another program's database.
    """

    table: ClassVar[str]
    title: ClassVar[str]
    example: ClassVar[str]
    elsewhere: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()
        self.damaged: dict[Path, str] = {}
        self._descriptions: dict[str, str] = {}
        self._pid = os.getpid()
        self._network = network_file_system(self.path.parent)
        if self.path.is_dir():
            raise UserError(f"The {self.title} {self.path} is a folder; name a file in it, e.g. {self.example}.")
        with self._file_lock():
            self._open()

    def register(self, identity: str, description: Mapping[str, Any]) -> None:
        """Mark an identity as used now and say what it is, in JSON values."""
        self._descriptions[_checked(identity)] = json.dumps(dict(description), sort_keys=True)

        def write(connection: sqlite3.Connection) -> None:
            with _transaction(connection):
                self._mark_used(connection, identity)

        self._run(write)

    def get_bytes(self, identity: str, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The stored values of those keys that the store has."""
        wanted = list(dict.fromkeys(keys))
        _checked(identity)

        def read(connection: sqlite3.Connection) -> dict[bytes, bytes]:
            found = {}
            for start in range(0, len(wanted), _KEYS_PER_SELECT):
                batch = wanted[start : start + _KEYS_PER_SELECT]
                rows = connection.execute(
                    f"SELECT key, value, checksum FROM {self.table} WHERE identity ="
                    " (SELECT number FROM identities WHERE identity = ?)"
                    f" AND key IN ({','.join('?' * len(batch))})",
                    (identity, *batch),
                )
                for key, value, checksum in rows:
                    self._check_entry(identity, key, value, checksum)
                    found[key] = value
            return found

        return self._run(read)

    def put_bytes(self, identity: str, items: Mapping[bytes, bytes]) -> None:
        """Store values: all or none."""
        _checked(identity)
        rows = [(key, value, _checksum(identity, key, value)) for key, value in items.items()]

        def write(connection: sqlite3.Connection) -> None:
            with _transaction(connection):
                number = self._mark_used(connection, identity)
                connection.executemany(
                    f"INSERT OR REPLACE INTO {self.table} (identity, key, value, checksum) VALUES (?, ?, ?, ?)",
                    ((number, *row) for row in rows),
                )

        self._run(write)

    def is_value(self, value: bytes) -> bool:
        """Whether bytes can be a value of this kind of store."""
        return len(value) > 0

    def forget(self, identity: str) -> int:
        """Remove an identity with all its entries; returns their number."""

        def write(connection: sqlite3.Connection) -> int:
            with _transaction(connection):
                removed = connection.execute(
                    f"DELETE FROM {self.table} WHERE identity = (SELECT number FROM identities WHERE identity = ?)",
                    (identity,),
                ).rowcount
                connection.execute("DELETE FROM identities WHERE identity = ?", (identity,))
            return removed

        return self._run(write)

    def locked(self, identity: str) -> AbstractContextManager[None]:
        """Hold an identity's lock, so that a process that lacks the same values waits for them instead of computing."""
        waiting = f"Another run is filling the {self.title} ({identity[:12]}); waiting for it ..."
        return self._lock(f".{identity[:16]}.lock", waiting)

    def identities(self) -> list[IdentityInfo]:
        """Every identity in the store, most recently used first."""

        def read(connection: sqlite3.Connection) -> list[IdentityInfo]:
            rows = connection.execute(
                "SELECT i.identity, i.description, COALESCE(s.entries, 0), COALESCE(s.value_bytes, 0),"
                " COALESCE(s.bytes, 0), i.created, i.last_used"
                " FROM identities i LEFT JOIN (SELECT identity, COUNT(*) entries, SUM(length(value)) value_bytes,"
                f" SUM(length(key) + length(value) + length(checksum)) bytes FROM {self.table} GROUP BY identity) s"
                " ON s.identity = i.number ORDER BY i.last_used DESC"
            )
            return [
                IdentityInfo(identity, json.loads(description), *numbers) for identity, description, *numbers in rows
            ]

        return self._run(read)

    def verify(self) -> int:
        """Check the structure of the file and the checksum of every entry; returns the number of sound ones.

        If something is damaged, the file is set aside, `damaged` says so, and the fresh one is empty.
        """

        def check(connection: sqlite3.Connection) -> int:
            [(first,)] = connection.execute("PRAGMA integrity_check(1)").fetchall()
            if first != "ok":
                raise _DamageError(" ".join(first.split()))
            sound = 0
            for row in connection.execute(
                "SELECT i.identity, s.key, s.value, s.checksum"
                f" FROM {self.table} s LEFT JOIN identities i ON i.number = s.identity"
            ):
                self._check_entry(*row)
                sound += 1
            return sound

        return self._run(check)

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
        """Bytes on disk, including the write-ahead log."""
        return _size(self.path) + _size(_beside(self.path, "-wal"))

    def close(self) -> None:
        """Close the file; the last process to do so folds the write-ahead log into it."""
        self._connection.close()

    def __enter__(self: _Own) -> _Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, operation: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do it; if the file turns out to be damaged, do it again on a fresh one."""
        if os.getpid() != self._pid:
            raise RuntimeError("A store does not survive a fork: open another one in the child process.")
        damage = None
        if _inode(self.path) == self._inode:
            try:
                with self._errors():
                    return operation(self._connection)
            except _DamageError as error:
                damage = str(error)
        self._connection.close()
        with self._file_lock():
            # Another process may have met the same damage first: its fresh file stays.
            if damage is not None and _inode(self.path) == self._inode:
                self._set_aside(damage)
            self._open()
        try:
            with self._errors():
                return operation(self._connection)
        except _DamageError as error:
            raise self._unusable(error) from error

    def _open(self) -> None:
        """Connect, under the lock, and set a damaged file aside first."""
        try:
            self._connection = self._connect()
        except _DamageError as error:
            self._set_aside(str(error))
            self._connection = self._connect()
        self._inode = _inode(self.path)

    def _connect(self) -> sqlite3.Connection:
        # The file is only ever touched through SQLite, never with open(): closing any descriptor of it would drop the
        # POSIX locks that other connections of this process hold.
        with self._errors():
            connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                connection.execute("PRAGMA cell_size_check = ON")
                connection.execute("PRAGMA secure_delete = OFF")
                connection.execute(f"PRAGMA synchronous = {'FULL' if self._network else 'NORMAL'}")
                if self._network:  # a file that was begun elsewhere too
                    connection.execute("PRAGMA journal_mode = DELETE")
                wanted = tuple(statement.format(table=self.table) for statement in _SCHEMA)
                schema = tuple(sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL"))
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                if not schema and not version:
                    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                    connection.execute(f"PRAGMA journal_mode = {'DELETE' if self._network else 'WAL'}")
                    with _transaction(connection):
                        for statement in wanted:
                            connection.execute(statement)
                        connection.execute(f"PRAGMA user_version = {_VERSION}")
                elif (schema, version) != (wanted, _VERSION):
                    raise UserError(
                        f"{self.path} is an SQLite database of another program or of another version of this one; "
                        f"move it away, or choose another folder with {self.elsewhere}."
                    )
            except BaseException:
                connection.close()
                raise
        return connection

    def _set_aside(self, reason: str) -> None:
        target = _beside(self.path, f".damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}")
        try:
            # The database first: SQLite discards a log without its database, and replays a log beside a fresh one.
            self.path.rename(target)
            for suffix in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    _beside(self.path, suffix).rename(_beside(target, suffix))
        except OSError as error:
            raise self._unusable(error) from error
        self.damaged[target] = reason
        _log.warning(
            "The %s %s was damaged (%s). It is kept as %s; its values are computed again when needed.",
            *(self.title, self.path, reason, target.name),
        )

    def _mark_used(self, connection: sqlite3.Connection, identity: str) -> int:
        """Mark the identity as used now and add it if it is absent, as on a fresh file; returns its number."""
        now = time.time()
        connection.execute(
            "INSERT INTO identities (identity, description, created, last_used) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (identity) DO UPDATE SET last_used = excluded.last_used,"
            " description = COALESCE(NULLIF(excluded.description, '{}'), description)",
            (identity, self._descriptions.get(identity, "{}"), now, now),
        )
        return connection.execute("SELECT number FROM identities WHERE identity = ?", (identity,)).fetchone()[0]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Tell damage (`_DamageError`) from what the user can mend (`UserError`); bugs pass as they are."""
        try:
            yield
        except (UserError, sqlite3.ProgrammingError):
            raise
        except sqlite3.DatabaseError as error:
            # Python's own errors, such as text that is not UTF-8, have no code.
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
            if code & 0xFF in _DAMAGE or code == sqlite3.SQLITE_IOERR_SHORT_READ:
                raise _DamageError(str(error)) from error
            raise self._unusable(error) from error
        except ValueError as error:  # a description that is not JSON, a message of SQLite that quotes damaged bytes
            raise _DamageError("it holds unreadable text") from error

    def _file_lock(self) -> AbstractContextManager[None]:
        """One process at a time creates, opens or replaces the file."""
        return self._lock(".lock", f"Another run is opening the {self.title} {self.path}; waiting for it ...")

    @contextmanager
    def _lock(self, suffix: str, waiting: str) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(_beside(self.path, suffix), waiting))
            except OSError as error:
                raise self._unusable(error) from error
            yield

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"The {self.title} {self.path} cannot be used ({error}); free the disk, mend the rights, or choose "
            f"another folder with {self.elsewhere}."
        )

    def _check_entry(self, identity: object, key: object, value: object, checksum: object) -> None:
        """Damage can change the types of columns as well as their content."""
        if not (
            isinstance(identity, str)
            and isinstance(key, bytes)
            and isinstance(value, bytes)
            and self.is_value(value)
            and checksum == _checksum(identity, key, value)
        ):
            raise _DamageError("an entry does not match its checksum")


def _checked(identity: str) -> str:
    """Refuse a name or a path: it would match other weights of the same name."""
    if not re.fullmatch("[0-9a-f]{64}", identity):
        raise ValueError(f"An identity is 64 lower-case hexadecimal digits, not {identity!r}.")
    return identity


def _checksum(identity: str, key: bytes, value: bytes) -> bytes:
    digest = hashlib.blake2b(identity.encode(), digest_size=16)
    digest.update(len(key).to_bytes(8, "little"))
    digest.update(key)
    digest.update(value)
    return digest.digest()


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


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
