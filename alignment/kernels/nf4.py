"""Weights that bitsandbytes packs into 4 bits (NF4, FP4), unpacked in one launch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from alignment.kernels.base import normal_values
from alignment.kernels.calibrated import CalibratedState
from alignment.kernels.fused import Fused

_NESTED_BLOCKSIZE = 256
"""bitsandbytes makes no other."""


def unpack(weight: Tensor, state: Any) -> Tensor:
    """The matrix of a packed weight.

    Args:
        weight: (values / 2, 1), two values a byte, the first in the higher bits.
        state: bitsandbytes' QuantState, or a `CalibratedState`.

    Returns:
        Of the state's shape and dtype.
    """
    if isinstance(state, CalibratedState):
        return state.add_to(unpack(weight, state.packed))
    if type(weight) is not Tensor:
        # bitsandbytes' parameters run Python code at every look at their dtype or shape, 2 us each.
        weight = weight.as_subclass(Tensor)
    return _unpacked(weight, *_parts(state))


def packed_product(x: Tensor, weight: Tensor, state: Any, bias: Tensor | None) -> Tensor:
    """(rows, in) times packed weights, by bitsandbytes' own kernels; arguments as those of `unpack`."""
    from bitsandbytes import matmul_4bit

    if isinstance(state, CalibratedState):
        return state.add_product(matmul_4bit(x, weight, quant_state=state.packed, bias=bias), x)
    return matmul_4bit(x, weight, quant_state=state, bias=bias)


def _parts(state: Any) -> tuple[Any, ...]:
    """Of a QuantState. They are read at every call, because moving it to another device replaces them."""
    inner = state.state2
    nested = (None, None, None) if inner is None else (inner.absmax, inner.code, inner.blocksize)
    return (
        state.absmax,
        state.code,
        state.offset,
        *nested,
        state.shape,
        state.blocksize,
        state.dtype,
        state.quant_type,
    )


def _eager_unpacked(
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
    """What bitsandbytes makes of a QuantState with these parts.

    A value is `code[bits] * absmax[block]` in fp32. A nested absmax is itself
    `nested_code[absmax[block]] * nested_absmax[block of blocks] + offset`, each operation rounded to fp32.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    nested = None
    if nested_absmax is not None:
        nested = QuantState(nested_absmax, code=nested_code, blocksize=nested_blocksize, dtype=torch.float32)
    state = QuantState(
        absmax, shape=shape, code=code, blocksize=blocksize, quant_type=quant_type, dtype=dtype, offset=offset,
        state2=nested,
    )  # fmt: skip
    result: Tensor = dequantize_4bit(weight, state)
    return result


def _fits(
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
) -> bool:
    """Whether the parts have the usual form; bitsandbytes knows others, such as bytes kept as another dtype."""
    count = math.prod(shape)
    plain = weight.dtype is torch.uint8 and weight.ndim == 2 and weight.shape[1] == 1 and weight.is_contiguous()
    if not plain or len(weight) != (count + 1) // 2 or len(weight) == 1 or code.dtype is not torch.float32:
        return False
    if absmax.ndim != 1 or not absmax.is_contiguous() or len(absmax) != -(-count // blocksize):
        return False
    if nested_absmax is None or nested_code is None or offset is None:
        return nested_absmax is None and absmax.dtype is torch.float32
    own = nested_absmax.dtype is nested_code.dtype is offset.dtype is torch.float32
    return (
        (own and absmax.dtype is torch.uint8 and offset.numel() == 1 and nested_absmax.is_contiguous())
        and nested_blocksize == _NESTED_BLOCKSIZE
        and len(nested_absmax) == -(-len(absmax) // _NESTED_BLOCKSIZE)
        and len(nested_code) == 256
    )


def _examples(weight: Tensor, *parts: Any) -> list[tuple[Any, ...]]:
    """Values of many sizes: some blocks, the last one not full, and more blocks than one of the outer kind holds."""
    from bitsandbytes.functional import quantize_4bit

    nested, (blocksize, dtype, quant_type) = parts[3] is not None, parts[7:]
    found = []
    for seed, shape in enumerate(((5, blocksize), (37, 130), (_NESTED_BLOCKSIZE, 3 * blocksize))):
        values = normal_values(shape, weight.device, dtype, seed)
        values[::3] *= 1e-2
        packed, state = quantize_4bit(values, None, None, blocksize, nested, quant_type)
        found.append((packed, *_parts(state)))
    return found


_unpacked = Fused(_eager_unpacked, "unpack_4bit", fits=_fits, examples=_examples, exact=True)
