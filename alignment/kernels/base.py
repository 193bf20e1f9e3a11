"""What the patched layers share: their classes, shapes and blocks of rows, and the comparison of two forwards."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_Static = TypeVar("_Static", bound=Callable[..., Any])

_MIN_BLOCK_ROWS = 256
_BLOCK_VALUES = 2**18
"""A block of this size, 1 MiB in fp32, is still in a core's cache when the next operation reads it."""


_HAS_UNSAFE_VIEW = hasattr(torch.ops.aten, "_unsafe_view")


def subclass(kind: type, forward: Callable[..., Any]) -> type:
    """A subclass of a module class with another forward."""
    members = {"forward": forward, "_original_class": kind, "__doc__": kind.__doc__}
    return type(f"Patched{kind.__name__}", (kind,), members)


def is_patched(module: nn.Module) -> bool:
    """Whether the module's class is a `subclass`."""
    return hasattr(type(module), "_original_class")


def original_class(module: nn.Module) -> type:
    """The class that the module had before it was patched."""
    return getattr(type(module), "_original_class", type(module))


@contextmanager
def probing() -> Iterator[None]:
    """For a probe that runs a backward pass, perhaps in the middle of a model's forward: nobody else sees its tensors.

    A checkpointed layer counts the tensors that its forward saves. A probe runs only once, so the count would differ
    when the layer is recomputed. Only the innermost hooks see a tensor, so hooks of its own shield the probe.
    """
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield


def without_autocast(function: _Static) -> _Static:
    """Turn autocast off inside a function whose operands already have their dtypes."""

    @functools.wraps(function)
    def wrapper(ctx: Any, first: Tensor, *rest: Any) -> Any:
        kind = first.device.type
        if not torch.is_autocast_enabled(kind):
            return function(ctx, first, *rest)
        # Hundreds of calls a pass: the context manager costs more than most of them.
        torch.set_autocast_enabled(kind, False)
        try:
            return function(ctx, first, *rest)
        finally:
            torch.set_autocast_enabled(kind, True)

    return wrapper  # type: ignore[return-value]


def rows_of(x: Tensor) -> Tensor:
    """(rows, width), contiguous: products of expanded or transposed rows are slow."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """(..., width) from new rows. Not a view, because autograd forbids writing into a view that a function returned."""
    shape = [*like.shape[:-1], rows.shape[-1]]
    # The operation is private to torch; a copy does the same, slower.
    return torch.ops.aten._unsafe_view(rows, shape) if _HAS_UNSAFE_VIEW else rows.view(shape).clone()


def blocks(rows: Tensor, width: int) -> Iterator[slice]:
    """Row ranges whose temporaries of this width stay in a CPU's cache; all rows at once on other devices."""
    size = max(_MIN_BLOCK_ROWS, _BLOCK_VALUES // width) if rows.device.type == "cpu" else len(rows)
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


def joined(parts: list[Tensor]) -> Tensor:
    """The rows of all blocks; one block, as on a GPU, is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_words(error: Exception) -> str:
    """An exception as one line: its kind and what it says."""
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:300]


def passed_over(faster: str, error: Exception, device: torch.device | None = None) -> None:
    """Say in one line that a faster way failed its probe, so that the slower one is taken.

    Args:
        faster: what is passed over, the beginning of a sentence.
        error: of any kind: nothing that only makes training faster may stop it.
        device: that it is for. On a GPU, which is rented for its speed, the line is a warning.
    """
    level = logging.WARNING if device is not None and device.type == "cuda" else logging.INFO
    log.log(level, "%s not used, because it failed here: %s.", faster, in_words(error).rstrip("."))


def normal_values(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Reproducible normal values; the global random state does not change."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def all_close(found: Tensor, expected: Tensor) -> bool:
    """Whether shape and dtype are equal, and the values up to rounding."""
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    if found.shape != expected.shape or found.dtype is not expected.dtype:
        return False
    difference, size = (found.double() - expected.double()).abs().max(), expected.double().abs().max()
    return bool(difference <= tolerance * size)
