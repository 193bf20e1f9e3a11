"""Pairs of tensors by name that runs keep in the cache: written with a checksum, and read whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from alignment.files import atomic_write_bytes, mark_used
from alignment.policy.digest import hash_tensor

Pairs = Mapping[str, tuple[Tensor, Tensor]]


def write_pairs(path: Path, pairs: Pairs, parts: tuple[str, str]) -> None:
    """Write the pairs; `parts` names their first and their second tensors in the file."""
    tensors = {f"{name}.{part}": t for name, pair in pairs.items() for part, t in zip(parts, pair, strict=True)}
    atomic_write_bytes(path, save(tensors, {"checksum": _checksum(pairs)}))


def read_pairs(path: Path, parts: tuple[str, str]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """What `write_pairs` wrote; None where the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            names = {key.rpartition(".")[0] for key in file.keys()}  # noqa: SIM118
            pairs = {
                name: (file.get_tensor(f"{name}.{parts[0]}"), file.get_tensor(f"{name}.{parts[1]}")) for name in names
            }
            if (file.metadata() or {}).get("checksum") == _checksum(pairs):
                mark_used(path)
                return pairs
    except (SafetensorError, OSError):
        pass
    return None


def _checksum(pairs: Pairs) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(pairs):
        digest.update(name.encode())
        for tensor in pairs[name]:
            hash_tensor(digest, tensor)
    return digest.hexdigest()
