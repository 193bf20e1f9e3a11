"""Layers of bitsandbytes in 8 bits, by their weights alone.

bitsandbytes rounds the inputs of such a layer to 8 bits too (LLM.int8, Dettmers et al. 2022, arXiv:2208.07339). Two
passes that differ by rounding in the last bit then differ by hundredths of a nat, more than policy and reference may.
So the weights are unpacked for each call, as those in 4 bits are, and the product has the inputs' own precision.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.kernels.base import rows_of, shaped, without_autocast
from alignment.kernels.matmul import matmul


def row_scales(layer: Any) -> Tensor | None:
    """(out,) fp32: the scales of a layer in 8 bits, which bitsandbytes keeps in one of two places; else None."""
    weight = layer._parameters.get("weight")
    if weight is None or weight.dtype is not torch.int8:
        return None
    scales: Tensor | None = getattr(weight, "SCB", None)
    return scales if scales is not None else layer.state.SCB


def unpack_rows(weight: Tensor, scales: Tensor) -> Tensor:
    """(out, in) fp32 from 8 bits."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(weight.data, scales).float()


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias`; keeps the packed weight, and unpacks it again for the gradient of x."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scales)
        matrix = unpack_rows(weight, scales).to(x.dtype)
        return shaped(matmul(rows_of(x), matrix.t(), None if bias is None else bias.to(x.dtype)), x)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scales = ctx.saved_tensors
        matrix = unpack_rows(weight, scales).to(gradient.dtype)
        return shaped(matmul(rows_of(gradient), matrix), gradient), None, None, None


def use_weights_alone(layer: nn.Module) -> None:
    """Have a layer in 8 bits compute with its unpacked weights and whole inputs; any other one stays as it is."""
    if row_scales(layer) is not None:
        kind: Any = type(layer)
        layer.__class__ = _class_of(kind)


@functools.cache
def _class_of(kind: Any) -> type:
    def forward(self: Any, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, row_scales(self), self.bias)

    return type(f"WeightOnly{kind.__name__}", (kind,), {"forward": forward, "__doc__": kind.__doc__})
