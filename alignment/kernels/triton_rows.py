"""A Triton kernel that sums rows by position; `triton_kernels` names it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from alignment.kernels.triton_start import TritonKernel


@triton.jit(do_not_specialize=["num_positions", "num_rows"])
def _sum_rows(values, order, starts, result, num_positions, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    at = tl.load(starts + position)
    end = tl.load(starts + position + 1, mask=position + 1 < num_positions, other=num_rows)
    total = tl.zeros([BLOCK], tl.float32)
    while at < end:  # the interpreter has no range of loaded numbers
        row = tl.load(order + at).to(tl.int64)
        total += tl.load(values + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        at += 1
    tl.store(result + position.to(tl.int64) * WIDTH + columns, total.to(result.dtype.element_ty), mask=inside)


_start = TritonKernel(_sum_rows)


def sum_rows(values: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """See `gather.sum_rows`."""
    width = values[0].numel()
    result = values.new_empty(len(starts), *values.shape[1:])
    _start(
        len(starts), (values, order, starts, result), (len(starts), len(order)),
        (width, triton.next_power_of_2(width)),
    )  # fmt: skip
    return result
