"""Prepared data in the cache: a set that is large is read and tokenised once, and found by every later start.

An entry is a folder `<cache>/tokens/<key>` with the files of each part, and `entry.json`, which holds everything else
and the digests of the files. The key is a hash of the bytes of the source files, the settings, the tokenizer with its
template, the versions of the libraries and the code of this package that makes the tokens.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import alignment
from alignment.config.data import DataConfig
from alignment.data.layouts.recognition import Stage
from alignment.data.rows.sequences import KEPT_ROWS
from alignment.data.sources.hub import at_commits
from alignment.data.sources.loading import origins
from alignment.data.sources.opening import BUNDLED
from alignment.data.sources.remote import File
from alignment.data.tokens.batches import ProcessDied
from alignment.data.tokens.progress import JOURNAL
from alignment.errors import UserError
from alignment.files import CacheKind, file_digest, file_lock, mark_used, read_sealed, to_json, write_sealed

log = logging.getLogger(__name__)

SOURCES = "sources"
"""Folder for the tokens of the sources of a mixture, until those of the mixture are whole."""
_ENTRY = "entry.json"
_SMALL = 2**18
"""Bytes of source files that hold fewer rows than are worth keeping; what is bundled is small."""
_ABANDONED = 86400
"""Seconds after which an unfinished folder is of a process that was killed."""
_LIBRARIES = ("transformers", "tokenizers", "jinja2")


class Place:
    """Where the data of one preparation go.

    Attributes:
        folder: for what is made; it goes away with the preparation unless that is kept. If a process that prepared the
            same was killed, it has what that one had made.
    """

    def __init__(self, folder: Path, entry: Path | None) -> None:
        self.folder = folder
        self._entry = entry

    def take(self) -> tuple[Path, dict[str, Any]] | None:
        """The folder and the content of the entry; None if there is none yet."""
        if self._entry is not None and (self.folder / _ENTRY).is_file():  # of a process that was killed at its end
            self._rename()
        if self._entry is None or not self._entry.is_dir():
            return None
        try:
            content = read_sealed(self._entry / _ENTRY)
        except UserError as error:
            self.drop(error)
            return None
        mark_used(self._entry)
        log.info("The tokens of these data are in the cache (%s).", self._entry.name[:12])
        return self._entry, content

    def drop(self, error: Exception) -> None:
        """Remove a damaged entry."""
        assert self._entry is not None
        log.warning("The tokens in %s are damaged (%s): they are made again.", self._entry, error)
        shutil.rmtree(self._entry, ignore_errors=True)

    def put(self, content: Mapping[str, Any]) -> None:
        """Keep what is in the folder; a crash at any moment leaves all of it or nothing."""
        if self._entry is not None:
            write_sealed(self.folder / _ENTRY, content)
            self._rename()

    def _rename(self) -> None:
        assert self._entry is not None
        shutil.rmtree(self.folder / SOURCES, ignore_errors=True)
        for journal in self.folder.glob(f"*/{JOURNAL}"):
            journal.unlink()
        os.replace(self.folder, self._entry)


@contextmanager
def prepared(
    config: DataConfig, stage: Stage, tokenizer: Any, day: date | None, cache: Path | None, more: str = ""
) -> Iterator[tuple[DataConfig, Place | None]]:
    """The settings by which to read, and the place for the data; another process that prepares the same waits for them.

    No place without a cache: everything stays in memory. `more` names what is kept beside what every such place has.
    """
    if cache is None:
        yield config, None
        return
    config = at_commits(config)
    store = CacheKind.tokens.under(cache)
    key = _key(config, stage, tokenizer, day, more)
    if key is None:
        with _unfinished(store / f".{os.getpid()}-{time.time_ns()}", goes_on=False) as folder:
            yield config, Place(folder, None)
            if folder.exists():  # there were many rows
                log.info("  These tokens are for this start alone: %s.", _why_not(config))
        return
    waiting = f"Another run is preparing these data ({key[:12]}); waiting for their tokens ..."
    with file_lock(store / f"{key}.lock", waiting), _unfinished(store / f".{key}", goes_on=True) as folder:
        yield config, Place(folder, store / key)


@contextmanager
def _unfinished(folder: Path, goes_on: bool) -> Iterator[Path]:
    """A folder that is gone afterwards, unless it was renamed. Files that are mapped stay readable.

    Args:
        goes_on: it stays for the next process, which takes the same folder, unless the data cannot be used.
    """
    for rest in folder.parent.glob(".*"):
        if rest.is_dir() and rest.stat().st_mtime < time.time() - _ABANDONED:
            shutil.rmtree(rest, ignore_errors=True)
    try:
        yield folder
    except BaseException as error:
        if not goes_on or (isinstance(error, UserError) and not isinstance(error, ProcessDied)):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _key(config: DataConfig, stage: Stage, tokenizer: Any, day: date | None, more: str) -> str | None:
    """Name of the entry; None where the data are few, or come from where their content cannot be told beforehand."""
    if not config.sources and config.limit is not None and config.limit <= KEPT_ROWS:
        return None
    found = origins(config)
    own = [one for one in found or [] if not isinstance(one, Path) or one.parent != BUNDLED]
    if not found or sum(one.stat().st_size if isinstance(one, Path) else _SMALL for one in own) < _SMALL:
        return None
    stamps = [[str(one), _stamp(one)] for one in found]
    if any(stamp is None for _, stamp in stamps):
        return None
    templates = [tokenizer.chat_template, *(part.chat_template for part in config.parts.values() or [config])]
    writes_date = any("strftime_now" in str(template) for template in templates)
    content = [
        stamps,
        asdict(config),
        stage + more,
        _tokenizer_digest(tokenizer),
        str(day or date.today()) if writes_date else None,
        [version(name) for name in _LIBRARIES],
        _code(),
    ]
    return hashlib.blake2b(to_json(content), digest_size=16).hexdigest()


def _why_not(config: DataConfig) -> str:
    whose = "a source of the mixture" if config.sources else "its source"
    return (
        f"nothing tells before the reading whether {whose} has changed; a file here, a set on a hub that answers, or "
        "its commit as data.revision does"
    )


def _stamp(origin: File | str) -> str | None:
    """What changes with the content; None where nothing does."""
    if isinstance(origin, str):  # a commit
        return ""
    return file_digest(origin) if isinstance(origin, Path) else origin.stamp()


def _tokenizer_digest(tokenizer: Any) -> str:
    """Digest of all that decides a tokenizer's ids and texts."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if hasattr(backend, "to_str") else sorted(tokenizer.get_vocab().items())
    special = {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()}
    added = {str(number): repr(token) for number, token in tokenizer.added_tokens_decoder.items()}
    traits = [type(tokenizer).__name__, str(tokenizer.chat_template), getattr(tokenizer, "split_special_tokens", None)]
    return hashlib.blake2b(to_json([vocabulary, special, added, traits]), digest_size=16).hexdigest()


@functools.cache
def _code() -> str:
    """Digest of the sources that make tokens of rows."""
    digest = hashlib.blake2b(digest_size=16)
    package = Path(alignment.__file__).parent
    for path in sorted([*package.glob("data/**/*.py"), *package.glob("config/*.py"), package / "types.py"]):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
