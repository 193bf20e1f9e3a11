"""A checkpoint that ranks write together: each writes the parts that it holds, and any number of ranks reads them.

Nothing is gathered: a rank writes plain safetensors files, and at most one file's tensors are in main memory at a time.
The parts of a tensor follow each other by rank along its first dimension, so whoever reads rows of it finds them
whichever number of ranks has written.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_BYTES = 2**30
"""Of a file, or one tensor's part if that is larger."""


def write_part(folder: Path, rank: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one rank's parts of named tensors."""
    pending: dict[str, Tensor] = {}
    count = 0
    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > _BYTES:
            save_file(pending, folder / _file(rank, count))
            pending, count = {}, count + 1
        pending[name] = tensor.detach().cpu().contiguous()
    save_file(pending, folder / _file(rank, count))


def _file(rank: int | str, number: int | str) -> str:
    return f"part-{rank:0>5}-{number:0>5}.safetensors"


class PartFiles:
    """What ranks have written into a checkpoint; empty for one of another kind.

    Only what is asked for is read.
    """

    def __init__(self, folder: Path) -> None:
        self._parts: dict[str, list[Any]] = {}
        for path in sorted(folder.glob(_file("?" * 5, "?" * 5))):
            file = safe_open(path, "pt")
            for name in file.keys():  # noqa: SIM118
                self._parts.setdefault(name, []).append(file)

    def __bool__(self) -> bool:
        return bool(self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def below(self, prefix: str) -> list[str]:
        """What follows the prefix in the names that begin with it."""
        return [name.removeprefix(prefix) for name in self._parts if name.startswith(prefix)]

    def rows(self, name: str, own: slice = slice(None)) -> Tensor:
        """These rows of a tensor, on the CPU.

        Raises:
            KeyError: the checkpoint has no such tensor.
        """
        parts = [file.get_slice(name) for file in self._parts[name]]
        lengths = [part.get_shape()[0] for part in parts]
        start, stop, _ = own.indices(sum(lengths))
        found, first = [], 0
        for part, length in zip(parts, lengths, strict=True):
            begin, end = max(start - first, 0), min(stop - first, length)
            if begin < end:
                found.append(part[begin:end])
            first += length
        return torch.cat(found) if found else parts[0][:0]
