"""Results of finished stages: a run that would repeat a stage takes over the stored result.

A result is a folder `<cache>/stages/<key>` with the policy and `entry.json`. That file holds everything else that the
stage leaves, and a digest of every file. The key is a hash of the policy at the start of the stage, its tokens, its
settings, the device, the versions of the libraries and the code of this package: whatever could change the result
changes the key.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import alignment
from alignment.files import digests, file_lock, read_sealed, to_json, write_sealed
from alignment.runs.record import versions

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

_ENTRY = "entry.json"
_KEY_DIGITS = 32


@functools.cache
def _code() -> str:
    """Digest of all sources of the package: nobody knows which of them a stage uses without running it."""
    digest = hashlib.blake2b(digest_size=32)
    package = Path(alignment.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def stage_key(model: nn.Module, tokens: str, settings: Mapping[str, Any]) -> str:
    """Name of the result that a stage would have.

    Args:
        model: the policy at the start of the stage. A fresh adapter has no effect, so the identity of the policy does
            not show it; but training starts from its random tensors, so these count too.
        tokens: digest of the tokens of the training and of the held-out examples.
        settings: everything else that decides the result: optimizer, loop, seed.
    """
    # Imported here: `alignment.cache` lists and removes results without the libraries of models.
    from alignment.policy.adapter import has_adapter
    from alignment.policy.identity import trained_digest

    digest = _begun_key(model, settings)
    if has_adapter(model):
        digest.update(trained_digest(model).encode())
    digest.update(tokens.encode())
    return digest.hexdigest()


def _begun_key(model: Any, settings: Mapping[str, Any]) -> Any:
    """Digest of the model, the settings, the device, the libraries and the code."""
    import torch

    from alignment.policy.identity import policy_identity

    digest = hashlib.blake2b(digest_size=_KEY_DIGITS // 2)
    identity, description = policy_identity(model)
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    attention = model.config._attn_implementation
    digest.update(to_json([identity, description, attention, settings, name, versions(), _code()]))
    return digest


@dataclass(frozen=True, slots=True)
class StoredStage:
    """One result; `last_used` in seconds since 1970. `content` is empty if it cannot be read."""

    key: str
    content: dict[str, Any]
    bytes: int
    last_used: float


class StageStore:
    """The results in one folder. Several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold a key: another process that wants the same result waits, and then finds it."""
        waiting = f"Another run is doing this stage ({key[:12]}); waiting for its result ..."
        with file_lock(self.folder / f"{key}.lock", waiting):
            yield

    def take(self, key: str, policy: Path | None = None) -> dict[str, Any] | None:
        """Read a result and copy its policy to a folder that does not exist yet.

        Returns:
            The content; None if there is no such result. A damaged one is removed, with a warning.
        """
        entry = self.folder / key
        if not entry.is_dir():
            return None
        try:
            content = _checked(entry)
            if policy is not None:
                _copy(entry / "policy", policy, content["files"])
            os.utime(entry / _ENTRY)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("The stored result %s is damaged (%s): it is dropped and computed again.", key[:12], error)
            self.drop(key)
            return None
        return content

    def put(self, key: str, policy: Path | None, content: Mapping[str, Any]) -> None:
        """Store a result, with its policy if there is one; a crash at any moment leaves all of it or nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{key}-"))
        try:
            if policy is not None:
                shutil.copytree(policy, partial / "policy")
            write_sealed(partial / _ENTRY, {**content, "files": digests(policy) if policy is not None else {}})
            os.replace(partial, self.folder / key)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def drop(self, key: str) -> None:
        """Remove a result."""
        shutil.rmtree(self.folder / key, ignore_errors=True)

    def prune(
        self, *, key: str | None = None, older_than_days: float | None = None, max_bytes: int | None = None
    ) -> list[StoredStage]:
        """Remove results that meet any criterion, and return them.

        Args:
            key: exactly this one.
            older_than_days: not used for so many days; 0 removes everything.
            max_bytes: the least recently used ones, until the rest is no larger than this.
        """
        stored = self.stored()
        totals = accumulate(stage.bytes for stage in stored)
        removed = [
            stage
            for stage, total in zip(stored, totals, strict=True)
            if stage.key == key
            or (older_than_days is not None and stage.last_used <= time.time() - older_than_days * 86400)
            or (max_bytes is not None and total > max_bytes)
        ]
        for stage in removed:
            with self.locked(stage.key):
                self.drop(stage.key)
        return removed

    def stored(self) -> list[StoredStage]:
        """All results, the last used first."""
        found = []
        for entry in self.folder.glob("[0-9a-f]" * _KEY_DIGITS):
            try:
                content, used = read_sealed(entry / _ENTRY), (entry / _ENTRY).stat().st_mtime
            except (OSError, ValueError, KeyError, TypeError):
                content, used = {}, 0.0
            size = sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
            found.append(StoredStage(entry.name, content, size, used))
        return sorted(found, key=lambda stage: (-stage.last_used, stage.key))

    def verify(self) -> tuple[int, list[str]]:
        """Read every result and remove damaged ones; returns the number of sound ones and the keys of the removed."""
        damaged = []
        keys = [stage.key for stage in self.stored()]
        for key in keys:
            try:
                _checked(self.folder / key)
            except (OSError, ValueError, KeyError, TypeError):
                self.drop(key)
                damaged.append(key)
        return len(keys) - len(damaged), damaged


def _copy(policy: Path, target: Path, expected: Mapping[str, str]) -> None:
    """Copy a whole policy or nothing."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(policy, partial)
        if digests(partial) != expected:
            raise ValueError("its copy differs from it")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checked(entry: Path) -> dict[str, Any]:
    content = read_sealed(entry / _ENTRY)
    if digests(entry / "policy") != content["files"]:
        raise ValueError("its files have changed")
    return content
