"""Rows selected by position, and the backward pass: a sum for each position.

torch's own backward adds row by row in memory: on a GPU in an order that changes, and rounded to 16 bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignment.kernels.base import normal_values
from alignment.kernels.fused import Fused

_WIDEST = 8192
"""Values of a row that the fused kernel takes."""


def sum_rows(values: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """For each of T positions the sum of its rows, always in the same order, 16 bits summed in fp32.

    Args:
        values: (n, ...), contiguous.
        order: (n,) int32 or int64, the rows of the first position, then those of the second, and so on.
        starts: (T,) in the same dtype, where each position's rows start in `order`; a position may have none.

    Returns:
        (T, ...).
    """
    return _summed(values, order, starts)


def _eager_sum(values: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    sums = torch.embedding_bag(values.flatten(1), order, starts)[0]  # mode 0: sums
    return sums.view(len(starts), *values.shape[1:])


def _fits(values: Tensor, order: Tensor, starts: Tensor) -> bool:
    return values.is_contiguous() and len(starts) > 0 and values[0].numel() <= _WIDEST


def _examples(values: Tensor, order: Tensor, starts: Tensor) -> list[tuple[Tensor, ...]]:
    """Positions with several rows, one and none, the last ones among them, at two widths."""
    counts = torch.tensor([3, 0, 1, 2, 1, 1, 0])
    places = (counts.cumsum(0) - counts).to(starts)
    rows = torch.tensor([5, 0, 3, 1, 7, 2, 4, 6]).to(order)
    return [(normal_values((8, *shape), values.device, values.dtype, 0), rows, places) for shape in ((2, 64), (77,))]


_summed = Fused(_eager_sum, "sum_rows", fits=_fits, examples=_examples)


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.num_rows = len(x)
        return x.index_select(0, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        in_order, order = positions.sort(stable=True)
        starts = torch.searchsorted(in_order, torch.arange(ctx.num_rows, device=positions.device))
        return sum_rows(gradient.contiguous(), order, starts), None


def select_rows(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of x, any of them several times or never.

    Args:
        x: (T, width).
        positions: (n,) int64.

    Returns:
        (n, width).
    """
    result: Tensor = _Select.apply(x, positions)
    return result
