"""Products of rows that are sorted by expert with stacks of matrices, one matrix for each expert."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.kernels.base import all_close, normal_values
from alignment.kernels.matmul import matmul, transposed_matmul

log = logging.getLogger(__name__)

_ALIGNED = 16
"""Bytes that the strides of a grouped product's operands are multiples of."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Which rows go to which expert. A row is a position with one of its experts; rows are sorted by expert.

    Attributes:
        experts: (rows,) int64, the expert of each row.
        order: (rows,) int64, which of the router's choices a row is, counted position by position.
        ends: (experts,) int32, where the rows of each expert end.
        top_k: experts of a position.
    """

    experts: Tensor
    order: Tensor
    ends: Tensor
    top_k: int

    @classmethod
    def of(cls, index: Tensor, num_experts: int) -> Routing:
        """From the router's choices, (positions, top_k); nothing waits for a GPU."""
        experts, order = index.reshape(-1).sort(stable=True)
        numbers = torch.arange(num_experts, device=index.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        return cls(experts, order, ends, index.shape[-1])

    def spread(self, x: Tensor) -> Tensor:
        """(positions, width) to (rows, width)."""
        return x.index_select(0, self.order // self.top_k)

    def gather(self, rows: Tensor) -> Tensor:
        """(rows, width) to (positions, width), the sum over the experts of a position."""
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(len(self.order), device=rows.device)
        return rows.index_select(0, inverse).view(-1, self.top_k, rows.shape[-1]).sum(1)

    def parts(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has rows, with them. On a GPU the host waits."""
        start = 0
        for expert, end in enumerate(self.ends.tolist()):
            if end > start:
                yield expert, slice(start, end)
            start = end


def _aligned(*tensors: Tensor) -> bool:
    """Whether each is a matrix, or a stack of them, that lies in memory as a grouped product takes it."""
    for x in tensors:
        lines = [stride for stride in x.stride() if stride != 1]
        if x.stride(-1) != 1 and x.stride(-2) != 1:
            return False
        if any(stride * x.element_size() % _ALIGNED for stride in lines) or x.data_ptr() % _ALIGNED:
            return False
    return True


def _grouped_mm() -> Any:
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@functools.cache
def _has_grouped(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch and this device multiply groups of rows in one launch, and rightly; one expert has no rows."""
    if device.type != "cuda" or dtype is not torch.bfloat16 or _grouped_mm() is None:
        return False
    routing = Routing.of(torch.tensor([0, 2, 2] * 16, device=device)[:, None], 3)
    rows = normal_values((48, 64), device, dtype)
    stack = normal_values((3, 64, 32), device, dtype, 1)
    turned = normal_values((3, 32, 64), device, dtype, 2).transpose(1, 2)
    try:
        agree = all(
            all_close(_grouped_mm()(rows, m, offs=routing.ends), _row_by_row(rows, m, routing)) for m in (stack, turned)
        )
        found = _outer_at_once(rows, rows[:, :32].contiguous(), routing)
        agree = agree and all_close(found, _outer_one_by_one(rows, rows[:, :32].contiguous(), routing))
    except RuntimeError as error:
        log.info(
            "Experts are multiplied one by one: this GPU has no product of groups (%s).", str(error).split("\n")[0]
        )
        return False
    if not agree:
        log.info("Experts are multiplied one by one: the product of groups gives other values here.")
    return agree


def _row_by_row(rows: Tensor, matrices: Tensor, routing: Routing) -> Tensor:
    result = rows.new_empty(len(rows), matrices.shape[2])
    for expert, part in routing.parts():
        result[part] = matmul(rows[part], matrices[expert])
    return result


def product(rows: Tensor, matrices: Tensor, routing: Routing) -> Tensor:
    """(rows, k) with (experts, k, n): each row times its expert's matrix, (rows, n)."""
    if _has_grouped(rows.dtype, rows.device) and _aligned(rows, matrices):
        result: Tensor = _grouped_mm()(rows, matrices, offs=routing.ends)
        return result
    return _row_by_row(rows, matrices, routing)


def _outer_at_once(left: Tensor, right: Tensor, routing: Routing) -> Tensor:
    found = _grouped_mm()(left.t(), right, offs=routing.ends)
    sizes = routing.ends.diff(prepend=routing.ends.new_zeros(1))
    return torch.where((sizes > 0)[:, None, None], found, 0)  # nothing is written for an expert without rows


def _outer_one_by_one(left: Tensor, right: Tensor, routing: Routing) -> Tensor:
    result = left.new_zeros(len(routing.ends), left.shape[1], right.shape[1])
    for expert, part in routing.parts():
        result[expert] = transposed_matmul(left[part], right[part])
    return result


def outer(left: Tensor, right: Tensor, routing: Routing) -> Tensor:
    """(rows, p) and (rows, q): for each expert the sum of outer products over its rows, (experts, p, q)."""
    if _has_grouped(left.dtype, left.device) and _aligned(left.t(), right):
        return _outer_at_once(left, right, routing)
    return _outer_one_by_one(left, right, routing)
