"""Triton kernels: norms, gated products, rotary positions and target log-probs, each in one pass over its tensors.

Only `fused` imports this module, because triton is not everywhere. Every function has the arguments and the results of
an eager function elsewhere in this wing, and rounds where that one does. Offsets have 64 bits: a chunk of logits or a
long pass may hold more than 2**31 values.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
_GATED_BLOCK = 2048
_VOCABULARY_BLOCK = 8192


@triton.jit
def _row_tile(num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns, offsets and mask of a program's tile of contiguous rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    return rows, columns, rows[:, None] * width + columns[None, :], inside


@triton.jit
def _scale_rows(x, factors, scale, dtype: tl.constexpr, ROUNDS: tl.constexpr):
    """`x * factor * scale`; with ROUNDS the first product is rounded before the second."""
    y = x * factors[:, None]
    if ROUNDS:
        y = y.to(dtype).to(tl.float32)
    return (y * scale[None, :]).to(dtype)


@triton.jit
def _load_scale(weight, columns, width, SHIFTED: tl.constexpr):
    scale = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    if SHIFTED:
        scale = scale + 1.0
    return scale


@triton.jit(do_not_specialize=["num_rows"])
def _norm_forward(
    x, weight, result, factors, num_rows, width, eps,
    SHIFTED: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns, offsets, inside = _row_tile(num_rows, width, ROWS, BLOCK)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
    tl.store(factors + rows, factor, mask=rows < num_rows)
    scale = _load_scale(weight, columns, width, SHIFTED)
    tl.store(result + offsets, _scale_rows(values, factor, scale, result.dtype.element_ty, ROUNDS), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_recompute(
    x, factors, weight, result, num_rows, width,
    SHIFTED: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns, offsets, inside = _row_tile(num_rows, width, ROWS, BLOCK)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factors + rows, mask=rows < num_rows, other=0.0)
    scale = _load_scale(weight, columns, width, SHIFTED)
    tl.store(result + offsets, _scale_rows(values, factor, scale, result.dtype.element_ty, ROUNDS), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_backward(
    gradient, x, factors, weight, result, num_rows, width,
    SHIFTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns, offsets, inside = _row_tile(num_rows, width, ROWS, BLOCK)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factors + rows, mask=rows < num_rows, other=0.0)
    scale = _load_scale(weight, columns, width, SHIFTED)
    grad = tl.load(gradient + offsets, mask=inside, other=0.0).to(tl.float32) * scale[None, :]
    slope = tl.sum(grad * values, axis=1) / width * factor * factor * factor
    grad = grad * factor[:, None] - values * slope[:, None]
    tl.store(result + offsets, grad.to(result.dtype.element_ty), mask=inside)


def _tiles(num_rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and sizes for whole rows: several narrow rows or one wide row a program."""
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    warps = min(16, max(4, rows * block // 1024))
    return (triton.cdiv(num_rows, rows),), {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def _rounds(weight: Tensor, shifted: bool) -> bool:
    return not shifted and weight.dtype is not torch.float32


def norm_forward(rows: Tensor, weight: Tensor, eps: float, shifted: bool) -> tuple[Tensor, Tensor]:
    """See `norm._forward`."""
    result = torch.empty_like(rows)
    factors = torch.empty(len(rows), 1, dtype=torch.float32, device=rows.device)
    grid, sizes = _tiles(*rows.shape)
    rounds = _rounds(weight, shifted)
    _norm_forward[grid](rows, weight, result, factors, *rows.shape, eps, SHIFTED=shifted, ROUNDS=rounds, **sizes)
    return result, factors


def norm_recompute(rows: Tensor, factors: Tensor, weight: Tensor, shifted: bool) -> Tensor:
    """See `norm._scaled`."""
    result = torch.empty_like(rows)
    grid, sizes = _tiles(*rows.shape)
    rounds = _rounds(weight, shifted)
    _norm_recompute[grid](rows, factors, weight, result, *rows.shape, SHIFTED=shifted, ROUNDS=rounds, **sizes)
    return result


def norm_backward(gradient: Tensor, rows: Tensor, factors: Tensor, weight: Tensor, shifted: bool) -> Tensor:
    """See `norm._backward`."""
    result = torch.empty_like(rows)
    grid, sizes = _tiles(*rows.shape)
    _norm_backward[grid](gradient, rows, factors, weight, result, *rows.shape, SHIFTED=shifted, **sizes)
    return result


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _activation(x, GELU: tl.constexpr):
    """The activation (SiLU, or GELU by tanh) and its derivative."""
    if GELU:
        tanh = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
        value = 0.5 * x * (1.0 + tanh)
        slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner
    else:
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    return value, slope


@triton.jit
def _gated_forward(gate, up, result, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    dtype = result.dtype.element_ty
    value, _ = _activation(tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32), GELU)
    factor = tl.load(up + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + offsets, (value.to(dtype).to(tl.float32) * factor).to(dtype), mask=inside)


@triton.jit
def _gated_backward(
    gate, up, gradient, grad_gate, product, count, GELU: tl.constexpr, PRODUCT: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    dtype = gradient.dtype.element_ty
    value, slope = _activation(tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32), GELU)
    factor = tl.load(up + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(gradient + offsets, mask=inside, other=0.0).to(tl.float32)
    active = value.to(dtype).to(tl.float32)
    tl.store(grad_gate + offsets, ((grad * factor).to(dtype).to(tl.float32) * slope).to(dtype), mask=inside)
    tl.store(gradient + offsets, (grad * active).to(dtype), mask=inside)
    if PRODUCT:
        tl.store(product + offsets, (active * factor).to(dtype), mask=inside)


def gated_forward(gate: Tensor, up: Tensor, activation: Any) -> Tensor:
    """See `mlp._gated`."""
    result = torch.empty_like(gate)
    count = gate.numel()
    grid = (triton.cdiv(count, _GATED_BLOCK),)
    _gated_forward[grid](gate, up, result, count, GELU=activation.name == "gelu_tanh", BLOCK=_GATED_BLOCK)
    return result


def gated_backward(
    gate: Tensor, up: Tensor, gradient: Tensor, activation: Any, needs_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `mlp._gated_backward`."""
    grad_gate = torch.empty_like(gate)
    product = torch.empty_like(gate) if needs_product else None
    count = gate.numel()
    _gated_backward[(triton.cdiv(count, _GATED_BLOCK),)](
        gate, up, gradient, grad_gate, grad_gate if product is None else product, count,
        GELU=activation.name == "gelu_tanh", PRODUCT=needs_product, BLOCK=_GATED_BLOCK,
    )  # fmt: skip
    return grad_gate, gradient, product


@triton.jit(do_not_specialize=["num_rows", "size1", "size2"])
def _rotate(
    x, cos, sin, result, num_rows, size1, size2, half,
    x0, x1, x2, cos0, cos1, cos2, sin0, sin1, sin2, result0, result1, result2,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < half)[None, :]
    i2 = rows % size2
    i1 = rows // size2 % size1
    i0 = rows // size2 // size1
    at_x = (i0 * x0 + i1 * x1 + i2 * x2)[:, None] + columns[None, :]
    at_cos = (i0 * cos0 + i1 * cos1 + i2 * cos2)[:, None] + columns[None, :]
    at_sin = (i0 * sin0 + i1 * sin1 + i2 * sin2)[:, None] + columns[None, :]
    at_result = (i0 * result0 + i1 * result1 + i2 * result2)[:, None] + columns[None, :]
    first = tl.load(x + at_x, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at_x + half, mask=inside, other=0.0).to(tl.float32)
    cos_1 = tl.load(cos + at_cos, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + at_cos + half, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + at_sin, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + at_sin + half, mask=inside, other=0.0).to(tl.float32)
    dtype = result.dtype.element_ty
    left = (first * cos_1).to(dtype).to(tl.float32)
    right = (second * cos_2).to(dtype).to(tl.float32)
    if BACKWARD:
        left = left + second * sin_2
        right = right - first * sin_1
    else:
        left = left - second * sin_1
        right = right + first * sin_2
    tl.store(result + at_result, left.to(dtype), mask=inside)
    tl.store(result + at_result + half, right.to(dtype), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """See `rotary._rotate`."""
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    result = torch.empty_like(x)
    # In the order of x in memory, so that heads of one position, which share their cosines, follow each other.
    order = sorted(range(3), key=x.stride, reverse=True)
    laid_out = [t.expand(x.shape).permute(*order, 3) for t in (x, cos, sin, result)]
    size0, size1, size2, width = laid_out[0].shape
    num_rows, half = size0 * size1 * size2, width // 2
    block = triton.next_power_of_2(half)
    rows = max(1, _TILE // 2 // block)
    _rotate[(triton.cdiv(num_rows, rows),)](
        *(x, cos, sin, result), num_rows, size1, size2, half, *(s for t in laid_out for s in t.stride()[:3]),
        BACKWARD=backward, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return result


@triton.jit
def _transformed(logits, inside, scale, cap, CAPPED: tl.constexpr):
    """Transformed logits with -inf outside, and the derivative of the transform."""
    if CAPPED:
        tanh = _tanh(logits / cap)
        values = cap * tanh
        slope = 1.0 - tanh * tanh
    else:
        values = logits * scale
        slope = tl.full(logits.shape, 1.0, tl.float32) * scale
    return tl.where(inside, values, float("-inf")), slope


@triton.jit
def _target_log_probs(
    logits, targets, logps, weights, row_stride, scale, cap,
    VOCABULARY: tl.constexpr, CAPPED: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    # Largest logit, and the sum of exponentials relative to it
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + columns < VOCABULARY
        block = tl.load(logits + start + columns, mask=inside, other=0.0)
        values, _ = _transformed(block, inside, scale, cap, CAPPED)
        higher = tl.maximum(largest, tl.max(values, axis=0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(values - higher), axis=0)
        largest = higher
    log_total = tl.log(total)
    at_target = tl.load(logits + target)
    if CAPPED:  # noqa: SIM108
        at_target = cap * _tanh(at_target / cap)
    else:
        at_target = at_target * scale
    tl.store(logps + row, at_target - largest - log_total)
    # Derivative of the log-prob by every logit
    if WEIGHTS:
        weights += row * VOCABULARY
        for start in range(0, VOCABULARY, BLOCK):
            inside = start + columns < VOCABULARY
            block = tl.load(logits + start + columns, mask=inside, other=0.0)
            values, slope = _transformed(block, inside, scale, cap, CAPPED)
            hit = tl.where(start + columns == target, 1.0, 0.0)
            derivative = (hit - tl.exp(values - largest - log_total)) * slope
            tl.store(weights + start + columns, derivative.to(weights.dtype.element_ty), mask=inside)


def target_log_probs(
    logits: Tensor, targets: Tensor, scale: float, cap: float | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """See `log_probs._target_log_probs`."""
    num_rows, vocabulary = logits.shape
    logps = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    weights = None if dtype is None else torch.empty(logits.shape, dtype=dtype, device=logits.device)
    block = min(_VOCABULARY_BLOCK, triton.next_power_of_2(vocabulary))
    _target_log_probs[(num_rows,)](
        logits, targets, logps, logps if weights is None else weights, logits.stride(0),
        float(scale), 1.0 if cap is None else float(cap), VOCABULARY=vocabulary,
        CAPPED=cap is not None, WEIGHTS=weights is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return logps, weights
