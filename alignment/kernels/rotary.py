"""Rotary positions of attention."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.kernels.base import all_close, normal_values, subclass, without_autocast
from alignment.kernels.fused import Fused

log = logging.getLogger(__name__)


def _eager_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """`x * cos + rotate_half(x) * sin` of queries and of keys, or the transposed map."""
    return _eager_rotated(q, cos, sin, backward), _eager_rotated(k, cos, sin, backward)


def _eager_rotated(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    half = x.shape[-1] // 2
    result = torch.empty_like(x)
    (x1, x2), (y1, y2) = x.split(half, -1), result.split(half, -1)
    (cos1, cos2), (sin1, sin2) = cos.split(half, -1), sin.split(half, -1)
    if backward:
        torch.mul(x1, cos1, out=y1).addcmul_(x2, sin2)
        torch.mul(x2, cos2, out=y2).addcmul_(x1, sin1, value=-1)
    else:
        torch.mul(x1, cos1, out=y1).addcmul_(x2, sin1, value=-1)
        torch.mul(x2, cos2, out=y2).addcmul_(x1, sin2)
    return result


def _examples(x: Tensor, backward: bool) -> list[tuple[Tensor, Tensor, Tensor, Tensor, bool]]:
    """Both layouts of heads, tables for each row and for all, and an odd width."""
    found = []
    for batch, heads, tokens, width in ((1, 3, 37, x.shape[-1]), (2, 2, 5, 14)):
        q, k = (normal_values((batch, tokens, count, width), x.device, x.dtype, count) for count in (heads, 1))
        for tables in sorted({1, batch}):
            cos, sin = (normal_values((tables, 1, tokens, width), x.device, x.dtype, seed) for seed in (1, 2))
            found.append((q.transpose(1, 2), k.transpose(1, 2), cos, sin, backward))
            found.append((q, k, cos.transpose(1, 2), sin.transpose(1, 2), backward))
    return found


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> bool:
    """Whether queries and keys share their positions, and these one table for all heads."""
    return (
        (q.ndim == k.ndim == cos.ndim == 4 and q.dtype is k.dtype is cos.dtype is sin.dtype)
        and (cos.shape == sin.shape and cos.stride() == sin.stride())
        and any(cos.shape[heads] == 1 and q.shape[at] == k.shape[at] for heads, at in ((1, 2), (2, 1)))
    )


_rotate = Fused(_eager_rotate, "rotate", fits=_fits, examples=lambda q, k, cos, sin, backward: _examples(q, backward))


class _Rotary(torch.autograd.Function):
    """Rotated queries and keys; keeps only the tables of cosines and sines, which all layers share."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return *_rotate(grad_q, grad_k, cos, sin, True), None, None


@functools.cache
def _faster_rotary(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        whole = cos.shape[-1] == q.shape[-1] == k.shape[-1] and cos.shape[-1] % 2 == 0
        if not whole or not q.dtype is k.dtype is cos.dtype is sin.dtype or cos.requires_grad:
            return function(q, k, cos, sin, unsqueeze_dim)
        return _Rotary.apply(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))

    return rotary


_ROTARY_NAME = "apply_rotary_pos_emb"


@functools.cache
def rotary_function(kind: Any) -> Callable[..., Any] | None:
    """The function by which an attention class rotates queries and keys, if it is the usual one."""
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, types.FunctionType) or _ROTARY_NAME not in forward.__code__.co_names:
        return None
    function = forward.__globals__.get(_ROTARY_NAME)
    if not isinstance(function, types.FunctionType):
        return None
    if list(inspect.signature(function).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return None
    shapes = [(2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8)]
    cpu = torch.device("cpu")
    q, k, cos, sin = (normal_values(shape, cpu, torch.float32, seed) for seed, shape in enumerate(shapes))
    try:
        with torch.no_grad():
            found, expected = _faster_rotary(function)(q, k, cos, sin), function(q, k, cos, sin)
    except RuntimeError as error:  # one that takes other shapes, such as gpt-oss's
        log.info("%s keeps its own rotary positions: %s.", kind.__name__, str(error).rstrip("."))
        return None
    if all(map(all_close, found, expected)):
        return function
    log.info("%s keeps its own rotary positions: the faster ones give other values here.", kind.__name__)
    return None


def attention_class(module: nn.Module) -> type | None:
    """The patched class of an attention with the usual rotary positions, None for any other module."""
    kind: Any = type(module)
    return None if rotary_function(kind) is None else _class_of(kind)


@functools.cache
def _class_of(kind: Any) -> type:
    """The class with its own forward, in which the rotary function's name stands for the faster function."""
    own, function = kind.forward, rotary_function(kind)
    assert function is not None
    names = {**own.__globals__, _ROTARY_NAME: _faster_rotary(function)}
    forward = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return subclass(kind, functools.wraps(own)(forward))
