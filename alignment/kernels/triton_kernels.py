"""Triton kernels: norms, gated products, rotary positions, target log-probs, 4-bit weights and sums of rows.

Only `fused` imports this module, because triton is not everywhere. Every function has the arguments and the results of
an eager function elsewhere in this wing, and rounds where that one does. Offsets have 64 bits: a chunk of logits or a
long pass may hold more than 2**31 values.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignment.kernels.triton_rows import sum_rows as sum_rows
from alignment.kernels.triton_start import TritonKernel

_TILE = 4096
_GATED_BLOCK = 2048
_VOCABULARY_BLOCK = 8192
_PACKED_TILE = 2048


@triton.jit
def _row_tile(num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns, offsets and mask of a program's tile of contiguous rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    return rows, columns, rows[:, None] * WIDTH + columns[None, :], inside


@triton.jit
def _scale_rows(x, factors, scale, dtype: tl.constexpr, ROUNDS: tl.constexpr):
    """`x * factor * scale`; with ROUNDS the first product is rounded before the second."""
    y = x * factors[:, None]
    if ROUNDS:
        y = y.to(dtype).to(tl.float32)
    return (y * scale[None, :]).to(dtype)


@triton.jit
def _load_scale(weight, columns, WIDTH: tl.constexpr, SHIFTED: tl.constexpr):
    scale = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if SHIFTED:
        scale = scale + 1.0
    return scale


@triton.jit(do_not_specialize=["num_rows", "eps"])
def _norm_forward(
    x, weight, result, factors, num_rows, eps,
    WIDTH: tl.constexpr, SHIFTED: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns, offsets, inside = _row_tile(num_rows, WIDTH, ROWS, BLOCK)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, axis=1) / WIDTH + eps)
    tl.store(factors + rows, factor, mask=rows < num_rows)
    scale = _load_scale(weight, columns, WIDTH, SHIFTED)
    tl.store(result + offsets, _scale_rows(values, factor, scale, result.dtype.element_ty, ROUNDS), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_recompute(
    x, factors, weight, result, num_rows,
    WIDTH: tl.constexpr, SHIFTED: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns, offsets, inside = _row_tile(num_rows, WIDTH, ROWS, BLOCK)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factors + rows, mask=rows < num_rows, other=0.0)
    scale = _load_scale(weight, columns, WIDTH, SHIFTED)
    tl.store(result + offsets, _scale_rows(values, factor, scale, result.dtype.element_ty, ROUNDS), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_backward(
    gradient, x, factors, weight, result, num_rows,
    WIDTH: tl.constexpr, SHIFTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns, offsets, inside = _row_tile(num_rows, WIDTH, ROWS, BLOCK)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factors + rows, mask=rows < num_rows, other=0.0)
    scale = _load_scale(weight, columns, WIDTH, SHIFTED)
    grad = tl.load(gradient + offsets, mask=inside, other=0.0).to(tl.float32) * scale[None, :]
    slope = tl.sum(grad * values, axis=1) / WIDTH * factor * factor * factor
    grad = grad * factor[:, None] - values * slope[:, None]
    tl.store(result + offsets, grad.to(result.dtype.element_ty), mask=inside)


@functools.cache
def _tiles(width: int) -> tuple[int, int, int]:
    """Rows a program, values a padded row, and warps: several narrow rows or one wide row a program."""
    block = int(triton.next_power_of_2(width))
    rows = max(1, _TILE // block)
    return rows, block, min(16, max(4, rows * block // 1024))


def _rounds(weight: Tensor, shifted: bool) -> bool:
    return not shifted and weight.dtype is not torch.float32


_start_norm_forward = TritonKernel(_norm_forward)
_start_norm_recompute = TritonKernel(_norm_recompute)
_start_norm_backward = TritonKernel(_norm_backward)


def norm_forward(rows: Tensor, weight: Tensor, eps: float, shifted: bool) -> tuple[Tensor, Tensor]:
    """See `norm._forward`."""
    result = torch.empty_like(rows)
    count, width = rows.shape
    factors = rows.new_empty((count, 1), dtype=torch.float32)
    tile, block, warps = _tiles(width)
    tensors, constants = (rows, weight, result, factors), (width, shifted, _rounds(weight, shifted), tile, block)
    _start_norm_forward(-(-count // tile), tensors, (count, eps), constants, warps)
    return result, factors


def norm_recompute(rows: Tensor, factors: Tensor, weight: Tensor, shifted: bool) -> Tensor:
    """See `norm._scaled`."""
    result = torch.empty_like(rows)
    count, width = rows.shape
    tile, block, warps = _tiles(width)
    tensors, constants = (rows, factors, weight, result), (width, shifted, _rounds(weight, shifted), tile, block)
    _start_norm_recompute(-(-count // tile), tensors, (count,), constants, warps)
    return result


def norm_backward(gradient: Tensor, rows: Tensor, factors: Tensor, weight: Tensor, shifted: bool) -> Tensor:
    """See `norm._backward`."""
    result = torch.empty_like(rows)
    count, width = rows.shape
    tile, block, warps = _tiles(width)
    tensors, constants = (gradient, rows, factors, weight, result), (width, shifted, tile, block)
    _start_norm_backward(-(-count // tile), tensors, (count,), constants, warps)
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
def _gated_tile(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask of a program's part of one row. The width is a constant, so that loads are whole vectors."""
    parts: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    tile = tl.program_id(0)
    columns = tile % parts * BLOCK + tl.arange(0, BLOCK)
    return (tile // parts).to(tl.int64) * WIDTH + columns, columns < WIDTH


@triton.jit
def _gated_forward(gate, up, result, GELU: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    offsets, inside = _gated_tile(WIDTH, BLOCK)
    dtype = result.dtype.element_ty
    value, _ = _activation(tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32), GELU)
    factor = tl.load(up + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + offsets, (value.to(dtype).to(tl.float32) * factor).to(dtype), mask=inside)


@triton.jit
def _gated_backward(
    gate, up, gradient, grad_gate, product,
    GELU: tl.constexpr, PRODUCT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets, inside = _gated_tile(WIDTH, BLOCK)
    dtype = gradient.dtype.element_ty
    value, slope = _activation(tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32), GELU)
    factor = tl.load(up + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(gradient + offsets, mask=inside, other=0.0).to(tl.float32)
    active = value.to(dtype).to(tl.float32)
    tl.store(grad_gate + offsets, ((grad * factor).to(dtype).to(tl.float32) * slope).to(dtype), mask=inside)
    tl.store(gradient + offsets, (grad * active).to(dtype), mask=inside)
    if PRODUCT:
        tl.store(product + offsets, (active * factor).to(dtype), mask=inside)


_start_gated_forward = TritonKernel(_gated_forward)
_start_gated_backward = TritonKernel(_gated_backward)


def _gated_tiles(gate: Tensor) -> tuple[int, int, int]:
    """Programs, width and the width of a program's part."""
    width = gate.shape[-1]
    block = min(_GATED_BLOCK, triton.next_power_of_2(width))
    return gate.numel() // width * -(-width // block), width, block


def gated_forward(gate: Tensor, up: Tensor, activation: Any) -> Tensor:
    """See `mlp._gated`."""
    result = torch.empty_like(gate)
    tiles, width, block = _gated_tiles(gate)
    _start_gated_forward(tiles, (gate, up, result), (), (activation.name == "gelu_tanh", width, block))
    return result


def gated_backward(
    gate: Tensor, up: Tensor, gradient: Tensor, activation: Any, needs_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `mlp._gated_backward`."""
    grad_gate = torch.empty_like(gate)
    product = torch.empty_like(gate) if needs_product else None
    tiles, width, block = _gated_tiles(gate)
    tensors = (gate, up, gradient, grad_gate, grad_gate if product is None else product)
    constants = (activation.name == "gelu_tanh", needs_product, width, block)
    _start_gated_backward(tiles, tensors, (), constants)
    return grad_gate, gradient, product


@triton.jit
def _rotate_tile(
    tile, x, cos, sin, result, positions, tokens, x0, x1, x2, cos0, cos1, result0, result1, result2,
    HEADS: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The heads of one position, which share their cosines, follow each other.
    rows = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < positions * HEADS)[:, None] & (columns < HALF)[None, :]
    head = rows % HEADS
    token = rows // HEADS % tokens
    member = rows // HEADS // tokens
    at_x = ((member * x0 + token * x1 + head * x2) * UNIT)[:, None] + columns[None, :]
    at_cos = ((member * cos0 + token * cos1) * UNIT)[:, None] + columns[None, :]
    at_result = ((member * result0 + token * result1 + head * result2) * UNIT)[:, None] + columns[None, :]
    first = tl.load(x + at_x, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at_x + HALF, mask=inside, other=0.0).to(tl.float32)
    cos_1 = tl.load(cos + at_cos, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + at_cos + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + at_cos, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + at_cos + HALF, mask=inside, other=0.0).to(tl.float32)
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
    tl.store(result + at_result + HALF, right.to(dtype), mask=inside)


_ROTATE_NUMBERS = ["positions", "tokens", "tiles", "cos0", "cos1"]
_ROTATE_NUMBERS += [f"{name}{i}" for name in ("q", "rotated_q", "k", "rotated_k") for i in range(3)]


@triton.jit(do_not_specialize=_ROTATE_NUMBERS)
def _rotate(
    q, k, cos, sin, rotated_q, rotated_k, positions, tokens, tiles, cos0, cos1,
    q0, q1, q2, rotated_q0, rotated_q1, rotated_q2, k0, k1, k2, rotated_k0, rotated_k1, rotated_k2,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `tiles` programs rotate queries, the others keys."""
    tile = tl.program_id(0)
    if tile < tiles:
        _rotate_tile(
            tile, q, cos, sin, rotated_q, positions, tokens,
            q0, q1, q2, cos0, cos1, rotated_q0, rotated_q1, rotated_q2,
            HEADS, HALF, UNIT, BACKWARD, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _rotate_tile(
            tile - tiles, k, cos, sin, rotated_k, positions, tokens,
            k0, k1, k2, cos0, cos1, rotated_k0, rotated_k1, rotated_k2,
            KEY_HEADS, HALF, UNIT, BACKWARD, ROWS, BLOCK,
        )  # fmt: skip


_start_rotate = TritonKernel(_rotate)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """See `rotary._rotate`."""
    q, k, cos, sin = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, cos, sin))
    rotated_q, rotated_k = torch.empty_like(q), torch.empty_like(k)
    # One of the middle dimensions is the heads', and the tables have size 1 there.
    heads, at = (1, 2) if cos.shape[1] == 1 and q.shape[2] == k.shape[2] else (2, 1)
    members, width = len(q), q.shape[3]
    num_heads, num_keys, tokens = q.shape[heads], k.shape[heads], q.shape[at]
    strides = [0 if cos.shape[i] == 1 else cos.stride(i) for i in (0, at)]
    for x in (q, rotated_q, k, rotated_k):
        s = x.stride()
        strides += s[0], s[at], s[heads]
    # That all rows begin at a multiple of 16 values makes loads wide; the numbers themselves differ from pass to pass.
    unit = 16 if not any(s % 16 for s in strides) else 1
    half, positions = width // 2, members * tokens
    block = _tiles(half)[1]
    rows = max(1, _TILE // 2 // block)
    tiles = -(-positions * num_heads // rows)
    _start_rotate(
        tiles - (-positions * num_keys // rows), (q, k, cos, sin, rotated_q, rotated_k),
        (positions, tokens, tiles, *[s // unit for s in strides]),
        (num_heads, num_keys, half, unit, backward, rows, block),
    )  # fmt: skip
    return rotated_q, rotated_k


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


@triton.jit(do_not_specialize=["row_stride", "scale", "cap"])
def _target_log_probs(
    logits, targets, logps, weights, row_stride, scale, cap,
    UNIT: tl.constexpr, VOCABULARY: tl.constexpr, CAPPED: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride * UNIT
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


_start_target_log_probs = TritonKernel(_target_log_probs)


def target_log_probs(
    logits: Tensor, targets: Tensor, scale: float, cap: float | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """See `log_probs._target_log_probs`."""
    num_rows, vocabulary = logits.shape
    logps = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    weights = None if dtype is None else torch.empty(logits.shape, dtype=dtype, device=logits.device)
    block = min(_VOCABULARY_BLOCK, triton.next_power_of_2(vocabulary))
    stride = logits.stride(0)
    unit = 1 if stride % 16 else 16
    _start_target_log_probs(
        num_rows, (logits, targets, logps, logps if weights is None else weights),
        (stride // unit, float(scale), 1.0 if cap is None else float(cap)),
        (unit, vocabulary, cap is not None, weights is not None, block), num_warps=8,
    )  # fmt: skip
    return logps, weights


@triton.jit(do_not_specialize=["count", "num_blocks"])
def _unpack_4bit(
    packed, absmax, code, offset, nested_absmax, nested_code, result, count, num_blocks,
    BLOCKSIZE: tl.constexpr, FULL: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    known = blocks < num_blocks
    if NESTED:
        at = tl.load(absmax + blocks, mask=known, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + blocks // NESTED_BLOCKSIZE, mask=known, other=0.0)
        scale = tl.load(nested_code + at) * outer + tl.load(offset)
    else:
        scale = tl.load(absmax + blocks, mask=known, other=0.0)
    HALF: tl.constexpr = BLOCKSIZE // 2
    at_bytes = blocks[:, None] * HALF + tl.arange(0, HALF)[None, :]
    offsets = blocks[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    # Where every block is full, whole blocks are inside or outside, so loads and stores are wide.
    if FULL:
        bytes_inside = known[:, None]
        inside = known[:, None]
    else:
        bytes_inside = at_bytes < (count + 1) // 2
        inside = offsets < count
    pairs = tl.load(packed + at_bytes, mask=bytes_inside, other=0).to(tl.int32)
    first = tl.load(code + (pairs >> 4)) * scale[:, None]
    second = tl.load(code + (pairs & 15)) * scale[:, None]
    values = tl.interleave(first, second).to(result.dtype.element_ty)
    tl.store(result + offsets, values, mask=inside)


# A product and a sum in one rounding would give other bits than bitsandbytes.
_start_unpack_4bit = TritonKernel(_unpack_4bit, enable_fp_fusion=False)


def unpack_4bit(
    weight: Tensor,
    absmax: Tensor,
    code: Tensor,
    offset: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_blocksize: int | None,
    shape: tuple[int, ...],
    blocksize: int,
    dtype: torch.dtype,
    quant_type: str,
) -> Tensor:
    """See `nf4.unpack`."""
    result = weight.new_empty(shape, dtype=dtype)
    count = result.numel()
    blocks = max(1, _PACKED_TILE * 2 // blocksize)
    nested: Any = (code, code, code) if nested_absmax is None else (offset, nested_absmax, nested_code)
    _start_unpack_4bit(
        -(-len(absmax) // blocks), (weight, absmax, code, *nested, result), (count, len(absmax)),
        (blocksize, count % blocksize == 0, nested_absmax is not None, nested_blocksize, blocks),
    )  # fmt: skip
    return result
