"""Files behind an address with `://`: fsspec's file systems, each where its package is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from alignment.config.places import MAGIC, is_data_name
from alignment.errors import UserError

T = TypeVar("T")
_TAGS = ("ETag", "etag", "blob_id", "sha256", "md5Hash", "content_md5")
"""Where file systems keep what changes with the content of a file."""


@dataclass(frozen=True, slots=True, order=True)
class RemoteFile:
    """A file at an address, with what readers ask of a path."""

    url: str

    @property
    def name(self) -> str:
        """Its last part, without the question that may follow it on the web."""
        web = self.url.startswith(("http://", "https://"))
        return PurePosixPath(urlsplit(self.url).path if web else self.url).name

    def open(self, mode: str = "rb") -> Any:
        """The file, open for reading; as a context it is closed again."""
        import fsspec

        return _asked(self.url, lambda: fsspec.open(self.url, mode).open())

    def stamp(self) -> str | None:
        """What its place says that changes with its content: its size with an ETag or a digest; None without these."""
        import fsspec

        fs, path = _asked(self.url, lambda: fsspec.core.url_to_fs(self.url))
        info = _asked(self.url, lambda: fs.info(path))
        tag = next((str(info[name]) for name in _TAGS if info.get(name)), None)
        return None if tag is None or tag.startswith("W/") else f"{info.get('size')} {tag}"

    def __str__(self) -> str:
        return self.url


File = Path | RemoteFile


def remote_files(url: str) -> dict[str, File]:
    """The files at an address by their paths below it; one file alone has its name.

    Raises:
        UserError: the address's file system is not installed or not known, cannot be reached, or has nothing there.
    """
    if is_data_name(RemoteFile(url).name) and not MAGIC.search(url.partition("?")[0]):
        return {RemoteFile(url).name: RemoteFile(url)}
    import fsspec

    fs, root = _asked(url, lambda: fsspec.core.url_to_fs(url))
    is_folder = not MAGIC.search(root) and _asked(url, lambda: fs.isdir(root))
    found = _asked(url, lambda: fs.find(root) if is_folder else fs.glob(root))
    start = len(root.rstrip("/")) + 1 if is_folder else 0
    names = {path: path[start:] if is_folder else path for path in sorted(found)}
    files: dict[str, File] = {
        name: RemoteFile(fs.unstrip_protocol(path))
        for path, name in names.items()
        if not any(part.startswith(".") for part in name.split("/"))
    }
    if not files:
        raise UserError(f"There is nothing at {url}: check the address and who may read it.")
    return files


def _asked(url: str, action: Callable[[], T]) -> T:
    """What the file system answers.

    Raises:
        UserError: it cannot.
    """
    try:
        return action()
    except Exception as error:  # of many libraries: packages, networks, rights, names
        cause = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        if isinstance(error, ImportError):
            remedy = "install that package, or copy the files to this machine"
        else:
            remedy = "check the address, the network and your rights, or copy the files to this machine"
        raise UserError(f"{url} cannot be read ({cause}): {remedy}.") from error
