"""Causal attention on a CPU for long sequences: blocks of queries against the keys that they see.

torch's flash kernel for CPUs multiplies small matrices with products that are slow on some CPUs, once per query head.
Here all query heads of one key head are rows of one matrix, multiplied by the fastest product available.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignment.kernels.matmul import matmul, transposed_matmul

_BLOCK = 128
"""Query tokens of a block."""
_FINE, _FINE_TO, _COARSE = 64, 512, 256
"""Numbers of keys are multiples of the first, above the second of the last, so that products have few shapes."""

Part = tuple[range, range]
"""Positions of queries that see each other causally, and of a prompt that all of them see (may be empty)."""


def _round_up(count: int) -> int:
    unit = _FINE if count <= _FINE_TO else _COARSE
    return -(-count // unit) * unit


@functools.lru_cache(maxsize=8)
def _future(dtype: torch.dtype) -> Tensor:
    """(block, 1, columns): -inf where a column is later than the row."""
    hidden = torch.ones(_BLOCK, _BLOCK + _COARSE, dtype=torch.bool).triu(1)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)[:, None]


def _by_key_head(x: Tensor, num_key_heads: int) -> Tensor:
    """(1, heads, T, D) to (key heads, T and some rows of zeros, heads of each, D), so that every block is a slice."""
    grouped = x[0].unflatten(0, (num_key_heads, -1)).transpose(1, 2)
    out = x.new_zeros(num_key_heads, x.shape[2] + _BLOCK + _COARSE, *grouped.shape[2:])
    out[:, : x.shape[2]] = grouped
    return out


def _seen(rows: Tensor, part: Part) -> Tensor:
    """(key heads, padded, D): the rows that a part sees, prompt first; the rows that follow serve as padding."""
    own, prompt = part
    padded = _round_up(len(prompt) + len(own))
    own_rows = rows[:, own.start : own.start + padded - len(prompt), 0]
    return torch.cat([rows[:, prompt.start : prompt.stop, 0], own_rows], 1) if prompt else own_rows


def _probabilities(queries: Tensor, keys: Tensor, seen: int) -> Tensor:
    """(block, g, columns): softmax of the scores; the first row sees `seen` keys before its own."""
    columns = min(_round_up(seen + _BLOCK), len(keys))
    scores = matmul(queries, keys[:columns].t()).view(_BLOCK, -1, columns)
    scores[..., seen:] += _future(scores.dtype)[..., : columns - seen]
    return torch.softmax(scores, -1)


class _BlockAttention(torch.autograd.Function):
    """Keeps its inputs and its result, nothing of the size of the scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], scale: float) -> Tensor:
        num_key_heads, size, width = k.shape[1], q.shape[2], q.shape[3]
        group = q.shape[1] // num_key_heads
        queries, keys, values = (_by_key_head(x, num_key_heads) for x in (q * scale, k, v))
        out = q.new_empty(1, size, q.shape[1], width)
        for part in parts:
            own, prompt = part
            seen_keys, seen_values = _seen(keys, part), _seen(values, part)
            for j in range(num_key_heads):
                for start in range(own.start, own.stop, _BLOCK):
                    block = queries[j, start : start + _BLOCK].view(-1, width)
                    p = _probabilities(block, seen_keys[j], len(prompt) + start - own.start)
                    attended = matmul(p.flatten(0, 1), seen_values[j, : p.shape[2]]).view(_BLOCK, group, width)
                    stop = min(start + _BLOCK, own.stop)
                    out[0, start:stop, j * group : (j + 1) * group] = attended[: stop - start]
        ctx.save_for_backward(q, k, v, out)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        num_key_heads, width = k.shape[1], q.shape[3]
        group = q.shape[1] // num_key_heads
        queries, keys, values, gradients, means = (
            _by_key_head(x, num_key_heads)
            for x in (
                q * ctx.scale,
                k,
                v,
                gradient.transpose(1, 2),
                (gradient * out).sum(-1, keepdim=True).transpose(1, 2),
            )
        )
        # Laid out like the projections, so that these receive contiguous gradients.
        dq = torch.empty_like(out)
        dk, dv = (x.new_zeros(1, x.shape[2], x.shape[1], x.shape[3]) for x in (k, v))
        for part in ctx.parts:
            own, prompt = part
            seen_keys, seen_values = _seen(keys, part), _seen(values, part)
            key_sums, value_sums = (torch.zeros_like(x.transpose(1, 2)) for x in (seen_keys, seen_values))
            for j in range(num_key_heads):
                for start in range(own.start, own.stop, _BLOCK):
                    stop = min(start + _BLOCK, own.stop)
                    rows = slice(start, start + _BLOCK)
                    block, incoming = queries[j, rows].view(-1, width), gradients[j, rows].view(-1, width)
                    p = _probabilities(block, seen_keys[j], len(prompt) + start - own.start)
                    p[stop - start :] = 0  # rows of what follows in the row
                    columns = p.shape[2]
                    value_sums[j, :, :columns] += transposed_matmul(incoming, p.flatten(0, 1))
                    scores = matmul(incoming, seen_values[j, :columns].t()).view_as(p).sub_(means[j, rows]).mul_(p)
                    scores = scores.flatten(0, 1)
                    key_sums[j, :, :columns] += transposed_matmul(block, scores)
                    back = matmul(scores, seen_keys[j, :columns]).view(_BLOCK, group, width)
                    dq[0, start:stop, j * group : (j + 1) * group] = back[: stop - start]
            for sums, grad in ((key_sums, dk), (value_sums, dv)):
                by_position = sums.permute(2, 0, 1)
                grad[0, prompt.start : prompt.stop] += by_position[: len(prompt)]
                grad[0, own.start : own.stop] += by_position[len(prompt) : len(prompt) + len(own)]
        return dq.mul_(ctx.scale).transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None


def block_attention(q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], scale: float) -> Tensor:
    """Attention in blocks.

    Args:
        q: (1, H, T, D) queries.
        k, v: (1, H_kv, T, D) with H a multiple of H_kv.
        parts: every position is a query of exactly one.
        scale: factor of the products.

    Returns:
        (1, T, H, D), contiguous.
    """
    return _BlockAttention.apply(q, k, v, parts, scale)
