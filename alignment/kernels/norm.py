"""RMSNorm, and how layers that read its output recompute it instead of keeping it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.kernels.base import all_close, blocks, normal_values, rows_of, shaped, subclass, without_autocast
from alignment.kernels.fused import Fused

_ALL = slice(None)


def _norm_scale(weight: Tensor, dtype: torch.dtype, shifted: bool) -> Tensor:
    return 1.0 + weight.to(dtype) if shifted else weight.to(dtype)


def _eager_scaled(rows: Tensor, factors: Tensor, weight: Tensor, shifted: bool) -> Tensor:
    """The norm's output from its input and its factors, in the weight's dtype and rounded as the norm does it."""
    wide = rows * factors
    if shifted or weight.dtype is wide.dtype:
        return wide.mul_(_norm_scale(weight, wide.dtype, shifted)).to(weight.dtype)
    return wide.to(weight.dtype).mul_(weight)


def _eager_forward(rows: Tensor, weight: Tensor, eps: float, shifted: bool) -> tuple[Tensor, Tensor]:
    """The norm's output and the factors, (rows, 1), with statistics in fp32 or better."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    result = torch.empty_like(rows)
    factors = torch.empty(len(rows), 1, dtype=wide, device=rows.device)
    for s in blocks(rows, rows.shape[1]):
        block = rows[s].to(wide)
        factors[s] = torch.rsqrt(block.square().mean(-1, keepdim=True).add_(eps))
        result[s] = _eager_scaled(block, factors[s], weight, shifted)
    return result, factors


def _eager_backward(incoming: Tensor, rows: Tensor, factors: Tensor, weight: Tensor, shifted: bool) -> Tensor:
    """The gradient of the norm's input."""
    result = torch.empty_like(rows)
    scale = _norm_scale(weight, factors.dtype, shifted)
    for s in blocks(rows, rows.shape[1]):
        block, factor = rows[s].to(factors.dtype), factors[s]
        grad = incoming[s] * scale
        slope = (grad * block).mean(-1, keepdim=True).mul_(factor**3)
        result[s] = grad.mul_(factor).addcmul_(block, slope, value=-1)
    return result


_WIDEST = 2**15
"""A fused norm holds whole rows in registers."""


def _fit(*tensors: Tensor) -> bool:
    """Whether the kernels cover these rows, weights and gradients."""
    dtype = tensors[0].dtype
    for x in tensors:
        if x.dtype is not dtype or not x.is_contiguous():
            return False
    return tensors[0].shape[1] <= _WIDEST


def _examples(weight: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(rows, factors, weight, gradient) of the weight's width and of odd ones."""
    found = []
    for count, width in ((37, len(weight)), (5, 77)):
        x, gradient, scale = (
            normal_values(shape, weight.device, weight.dtype, seed)
            for seed, shape in enumerate([(count, width), (count, width), (width,)])
        )
        x[::2] *= 1e-3
        factors = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        found.append((x, factors, scale, gradient))
    return found


_scaled = Fused(
    _eager_scaled,
    "norm_recompute",
    fits=lambda rows, factors, weight, shifted: _fit(rows, weight) and factors.is_contiguous(),
    examples=lambda rows, factors, weight, shifted: [(x, f, w, shifted) for x, f, w, _ in _examples(weight)],
)
_forward = Fused(
    _eager_forward,
    "norm_forward",
    fits=lambda rows, weight, eps, shifted: _fit(rows, weight),
    examples=lambda rows, weight, eps, shifted: [(x, w, eps, shifted) for x, _, w, _ in _examples(weight)],
)
_backward = Fused(
    _eager_backward,
    "norm_backward",
    fits=lambda gradient, rows, factors, weight, shifted: _fit(rows, gradient, weight),
    examples=lambda gradient, rows, factors, weight, shifted: [
        (g, x, f, w, shifted) for x, f, w, g in _examples(weight)
    ],
)


class _RMSNorm(torch.autograd.Function):
    """Root-mean-square norm with a frozen weight; keeps x and one factor per row.

    Returns the output and the factors, (rows, 1).
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, shifted: bool) -> tuple[Tensor, Tensor]:
        result, factors = _forward(rows_of(x), weight, eps, shifted)
        ctx.save_for_backward(x, factors, weight)
        ctx.mark_non_differentiable(factors)
        ctx.shifted = shifted
        return shaped(result, x), factors

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        x, factors, weight = ctx.saved_tensors
        return shaped(_backward(rows_of(gradient), rows_of(x), factors, weight, ctx.shifted), x), None, None, None


@dataclass(frozen=True, slots=True)
class NormOutput:
    """What it takes to recompute a norm's output, so that layers that read it need not keep it."""

    x: Tensor
    factors: Tensor
    weight: Tensor
    shifted: bool
    version: int


def norm_output(x: Any) -> NormOutput | None:
    """How to recompute x, if a patched norm returned it and nothing has written to it since."""
    found = getattr(x, "_norm_output", None)
    return found if found is not None and found.version == x._version else None


def keep(x: Tensor | None, norm: NormOutput | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What a layer saves to get x back in its backward pass; see `recall`."""
    return (x, None, None) if x is None or norm is None else (norm.x, norm.factors, norm.weight)


def recall(kept: Sequence[Any], shifted: bool | None, rows: slice = _ALL) -> Tensor:
    """Rows of the x that was given to `keep`."""
    x, factors, weight = kept
    if factors is None:
        return rows_of(x)[rows]
    return _scaled(rows_of(x)[rows], factors[rows], weight, bool(shifted))


def _norm_eps(module: Any) -> float | None:
    """The constant in the root, under either name that transformers' norms use."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _is_shifted(module: Any) -> bool | None:
    """Whether the norm multiplies by 1 + weight (Gemma) or by the weight; None if it does neither.

    It is compared with random weights, since its own may all be 0 or 1, and also on rows so small that eps matters.
    """
    eps = _norm_eps(module)
    if not isinstance(eps, float) or module.weight.ndim != 1 or module.weight.is_meta:
        return None
    # These norms compute in fp32 for any input.
    probe = copy.deepcopy(module).float() if module.weight.dtype is torch.float64 else copy.deepcopy(module)
    weight = probe.weight
    weight.copy_(normal_values(weight.shape, weight.device, weight.dtype, seed=1))
    x = normal_values((8, len(weight)), weight.device, weight.dtype)
    x[::2] *= 1e-3
    expected = probe(x)
    for shifted in (False, True):
        if all_close(_RMSNorm.apply(x, weight, eps, shifted)[0], expected):
            return shifted
    return None


def norm_class(module: nn.Module) -> type | None:
    """The patched class of a frozen RMSNorm, None for any other module."""
    kind: Any = type(module)
    names = [name for name, _ in module.named_parameters()]
    if list(module.children()) or "RMSNorm" not in kind.__name__ or names != ["weight"]:
        return None
    if len(inspect.signature(kind.forward).parameters) != 2:  # itself and x: one with a gate is another function
        return None
    shifted = _is_shifted(module)
    return None if shifted is None or module.weight.requires_grad else _class_of(kind, shifted)


@functools.cache
def _class_of(kind: Any, shifted: bool) -> type:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = self.weight
        usual = not args and not kwargs and x.dtype is weight.dtype and x.dtype is not torch.float64
        if weight.requires_grad or not usual:
            return kind.forward(self, x, *args, **kwargs)
        result, factors = _RMSNorm.apply(x, weight, _norm_eps(self), shifted)
        if result.requires_grad:
            result._norm_output = NormOutput(x.detach(), factors, weight, shifted, result._version)
        return result

    return subclass(kind, forward)
