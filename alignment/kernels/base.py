"""What the lean layers share: their classes, the shapes and blocks of their rows, and when two forwards agree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

_Static = TypeVar("_Static", bound=Callable[..., Any])

_MIN_BLOCK_ROWS = 256
_BLOCK_VALUES = 2**18
"""A block of this size, 1 MiB in fp32, is still in a core's cache when the next operation reads it."""


def subclass(kind: type, forward: Callable[..., Any]) -> type:
    """The class with this forward."""
    return type(f"Lean{kind.__name__}", (kind,), {"forward": forward, "_lean_of": kind, "__doc__": kind.__doc__})


def without_autocast(function: _Static) -> _Static:
    """Every operand has been given its dtype, so nothing may be cast behind it."""

    @functools.wraps(function)
    def wrapper(ctx: Any, first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *rest)

    return wrapper  # type: ignore[return-value]


def rows_of(x: Tensor) -> Tensor:
    """(rows, width), one after the other in memory: products of expanded or transposed rows are slow."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """(..., width) from new rows. Not a view, since autograd lets nobody write into a view that a function returned."""
    return torch.ops.aten._unsafe_view(rows, [*like.shape[:-1], rows.shape[-1]])


def blocks(rows: Tensor, width: int) -> Iterator[slice]:
    """Row ranges whose temporaries of that width stay in the cache of a CPU; everything at once elsewhere."""
    size = max(_MIN_BLOCK_ROWS, _BLOCK_VALUES // width) if rows.device.type == "cpu" else len(rows)
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


def normal(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Reproducible normal values that leave the global random state alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def agree(found: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding."""
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    if found.shape != expected.shape or found.dtype is not expected.dtype:
        return False
    difference, size = (found.double() - expected.double()).abs().max(), expected.double().abs().max()
    return bool(difference <= tolerance * size)
