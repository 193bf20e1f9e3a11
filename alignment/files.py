"""Files and folders: atomic writes, digests, locks, JSON, the folders of assets and caches, secrets kept from files."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from alignment.errors import UserError, without_passwords

log = logging.getLogger(__name__)


def asset_dir(name: str) -> Path:
    """Folder `conf` or `recipes`: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    beside = package.parent / name
    return beside if beside.is_dir() else package / "_assets" / name


_SECRET_WORDS = frozenset({"token", "key", "apikey", "password", "passwd", "secret", "credential", "credentials"})


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: readers see the old content or the new one, never a part, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write UTF-8 text like `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode())


def write_sealed(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a value as JSON, with a digest by which `read_sealed` knows that it is whole."""
    atomic_write_bytes(path, to_json({"digest": _digest(to_json(content)), "content": content}, indent))


def read_sealed(path: Path) -> Any:
    """The value that `write_sealed` wrote.

    Raises:
        UserError: the file cannot be read, or a byte of its content is another.
    """
    try:
        found = json.loads(path.read_bytes())
        content = found["content"]
        if found["digest"] == _digest(to_json(content)):
            return content
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise damaged(path)


def damaged(path: Path) -> UserError:
    """The error for a file of an unfinished run that is not what the run wrote."""
    return UserError(f"{path} is damaged, or of another version of this package: start the run anew in another folder.")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def file_digest(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, by its path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}


@contextmanager
def file_lock(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock file `path`. If another process holds it, log `waiting` and wait for its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


_MOUNTS = Path("/proc/self/mounts")
_NETWORK = frozenset(
    (
        *("nfs", "nfs4", "lustre", "gpfs", "cifs", "smb2", "smb3", "smbfs", "beegfs", "beegfs_nodev", "ceph"),
        *("afs", "glusterfs", "wekafs", "panfs", "pvfs2", "orangefs", "sshfs", "juicefs", "gcsfuse", "s3fs", "rclone"),
    )
)
"""File systems that several machines share, as the table of mounts names them, some of them after `fuse.`"""


def network_file_system(path: Path) -> str | None:
    """The kind of the network file system that a path is on; None where it is on this machine, or that is not known."""
    try:
        rows = [line.split(" ") for line in _MOUNTS.read_text().splitlines()]
    except OSError:
        return None
    path, kind, longest = path.resolve(), "", -1
    for _, place, own, *_ in rows:
        mounted = Path(re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), place))  # a space is \040 there
        if path.is_relative_to(mounted) and len(mounted.parts) >= longest:  # of the same place the last one counts
            kind, longest = own.removeprefix("fuse."), len(mounted.parts)
    return kind if kind in _NETWORK else None


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Strict JSON as UTF-8. Infinities and NaN become strings like "-Infinity"; paths and enums become text."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)
    # UTF-8 cannot encode a lone surrogate (half an emoji, where a model's answer was cut); \udxxx is valid JSON.
    return text.encode("utf-8", "backslashreplace")


def to_json_lines(rows: Iterable[Any]) -> bytes:
    """`to_json` of each row, one per line."""
    return b"".join(to_json(row) + b"\n" for row in rows)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Path):
        return str(value)
    return value.name if isinstance(value, Enum) else value


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with '***' for every value under a key like api_key, hf_token or password, at any depth, and for passwords
    in addresses, wherever they stand in a text.

    Keys are split into words at case changes and at all characters but letters and digits, so `tokens_per_batch` holds
    no secret word. Null stays null: it shows that nothing was set.
    """
    return {key: _redacted(str(key), value) for key, value in mapping.items()}


def is_secret(key: str) -> bool:
    """Whether a key, or the name of a variable, says that its value is a secret; see `redact`."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key).lower()
    return not _SECRET_WORDS.isdisjoint(re.split(r"[^a-z0-9]+", words))


def _redacted(key: str, value: Any) -> Any:
    if value is not None and is_secret(key):
        return "***"
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, (list, tuple)):
        return [_redacted("", item) for item in value]
    return without_passwords(value) if isinstance(value, str) else value


def cache_dir(path: str | None) -> Path:
    """The cache folder: `path`, else `$ALIGNMENT_CACHE`, else `~/.cache/alignment`. It is not created here."""
    return Path(path or os.environ.get("ALIGNMENT_CACHE") or "~/.cache/alignment").expanduser().absolute()


class CacheKind(Enum):
    """All that runs keep in the cache folder. Whoever writes there asks its kind for the place.

    Attributes:
        place: name in the cache folder: of a file, or of a folder with an entry for each result.
        holds: what an entry is and what it saves, for people.
    """

    reference = ("reference.sqlite", "log-probs of a policy that is a reference")
    stages = ("stages", "the result of an SFT stage, or answers to held-out prompts")
    tokens = ("tokens", "a large data set, read and tokenised once")
    models = ("models", "a model of an installed package, converted once")
    calibration = ("calibration", "the constants of calibrated NF4 (quantization=icq), searched once per model")
    spectrum = ("spectrum", "signal to noise of a model's matrices (spectrum=...), measured once per model")
    answers = ("answers", "answers that a policy has drawn, by prompt, settings and seed")
    judgements = (
        "judgements",
        "the replies of a judge, asked once per prompt and answers; asking again may cost money",
    )
    adapter_starts = ("adapter_starts", "the start of an adapter (PiSSA, OLoRA, EVA, CorDA, LoftQ), computed once")

    def __init__(self, place: str, holds: str) -> None:
        self.place = place
        self.holds = holds

    def under(self, cache: Path) -> Path:
        """Where it is in a cache folder."""
        return cache / self.place


def replace_folder(new: Path, folder: Path) -> None:
    """Give a whole folder its name, in place of an older one, which is removed last."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def mark_used(path: Path) -> None:
    """Its time says when an entry of the cache was last of use. A cache that others own stays as it is."""
    with suppress(OSError):
        os.utime(path)
