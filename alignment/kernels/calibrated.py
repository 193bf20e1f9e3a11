"""Calibrated 4-bit weights (ICQ, arXiv 2402.05445, section 3.2): each block has a constant beside its scale.

A block w is stored as NF4 of w - tau. What a layer computes is that of its packed weights, plus tau for every
value of the block: `x @ unpacked.T + pooled(x) @ tau.T`, where `pooled` sums x over the inputs of a block. No second
copy of the weights is kept.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64
"""Weights of a block, as bitsandbytes quantises them; they lie side by side in a row of the matrix."""
_GROUP = 256
"""Blocks whose constants share a scale."""


@dataclass(frozen=True, slots=True)
class CalibratedState:
    """A QuantState of bitsandbytes, and the constants of the blocks.

    Attributes:
        packed: of the packed weights.
        codes: (out, in / 64), uint8: the constants in bitsandbytes' signed dynamic map.
        scales: fp32, one per 256 constants.
    """

    packed: Any
    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        shape: torch.Size = self.packed.shape
        return shape

    def add_to(self, matrix: Tensor) -> Tensor:
        """Add the constants to (out, in) unpacked weights, in place."""
        constants = block_constants(self.codes, self.scales)
        matrix.view(*constants.shape, BLOCK).add_(constants.unsqueeze(-1))
        return matrix

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """Add what the constants give for (rows, in) inputs to (rows, out) outputs, in place."""
        constants = block_constants(self.codes, self.scales).to(x.dtype)
        return y.addmm_(_pooled(x), constants.t())


def _pooled(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, BLOCK)).sum(-1)


def pack_constants(constants: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of (out, in / 64) constants in fp32: 8 bits each, and a scale per 256 of them."""
    from bitsandbytes.functional import quantize_blockwise

    codes, state = quantize_blockwise(constants.contiguous(), blocksize=_GROUP)
    return codes.view(constants.shape), state.absmax


def block_constants(codes: Tensor, scales: Tensor) -> Tensor:
    """(out, in / 64) in fp32: what `pack_constants` has kept."""
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(codes, absmax=scales, blocksize=_GROUP)


def is_calibrated(layer: nn.Module) -> bool:
    """Whether the weights of this layer's blocks have constants."""
    return "tau_codes" in layer._buffers


def make_calibrated(layer: Any, codes: Tensor, scales: Tensor) -> None:
    """Have a `Linear4bit` add these constants to its weights.

    They are buffers: they move with the layer, and are part of what the model is.
    """
    layer.register_buffer("tau_codes", codes)
    layer.register_buffer("tau_scales", scales)
    kind: Any = type(layer)
    layer.__class__ = _class_of(kind)


def quantised_state(layer: Any) -> Any:
    """The state of a layer's packed weights, with the constants if it has any; None for plain weights."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None or not is_calibrated(layer):
        return state
    return CalibratedState(state, layer.tau_codes, layer.tau_scales)


@functools.cache
def _class_of(kind: Any) -> type:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = kind.forward(self, x)
        dtype = self.compute_dtype or x.dtype
        constants = block_constants(self.tau_codes, self.tau_scales).to(dtype)
        return y + F.linear(_pooled(x.to(dtype)), constants).to(y.dtype)

    return type(f"Calibrated{kind.__name__}", (kind,), {"forward": forward, "__doc__": kind.__doc__})
