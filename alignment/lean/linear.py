"""Frozen linear layers and their adapters."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.lean.base import rows_of, shaped, subclass, without_autocast
from alignment.lean.norm import NormOutput, keep, norm_output, recall
from alignment.products import add_matmul, matmul, transposed_matmul


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer as one call finds it, and its adapter.

    Attributes:
        weight: (out, in), or packed 4-bit values with `state`.
        bias: (out,).
        a, b: (r, in) and (out, r), the adapter; None without one.
        scaling: the adapter's factor.
        state: bitsandbytes' QuantState.
        merged: form `weight + scaling * b @ a` for the call. It costs about r / rows of the product itself and spares
            two passes over the activations, but in 16 bits it would round the update away.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float
    state: Any
    merged: bool

    @property
    def num_out(self) -> int:
        """Width of the output."""
        return (self.weight if self.state is None else self.state).shape[0]

    def cast(self, dtype: torch.dtype) -> Projection:
        """With the adapter in the dtype of the activations."""
        if self.a is None or self.b is None or self.a.dtype is dtype:
            return self
        return replace(self, a=self.a.to(dtype), b=self.b.to(dtype))

    def without_tensors(self) -> Projection:
        """What may stay on an autograd node: its tensors are saved, so that hooks see them."""
        return replace(self, weight=None, bias=None, a=None, b=None)  # type: ignore[arg-type]

    def matrix(self) -> Tensor:
        """(out, in), what a row is multiplied with."""
        weight = self.weight
        if self.state is not None:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight, self.state)
        if self.merged:
            weight = add_matmul(weight, self.b * self.scaling, self.a)  # type: ignore[operator, arg-type]
        return weight

    def forward_matrix(self) -> Tensor | None:
        """The same; None where bitsandbytes has a product of its own."""
        return None if self.state is not None and not self.merged else self.matrix()

    def forward(self, x: Tensor, matrix: Tensor | None) -> Tensor:
        """(rows, in) to (rows, out)."""
        if matrix is None:
            from bitsandbytes import matmul_4bit

            y = matmul_4bit(x, self.weight, quant_state=self.state, bias=self.bias)
        else:
            y = matmul(x, matrix.t(), self.bias)
        if self.a is not None and self.b is not None and not self.merged:
            y.addmm_(matmul(x, self.a.t()), self.b.t(), alpha=self.scaling)
        return y

    def backward(self, gradient: Tensor, matrix: Tensor) -> Tensor:
        """(rows, out) to (rows, in)."""
        result = matmul(gradient, matrix)
        if self.a is not None and self.b is not None and not self.merged:
            result.addmm_(matmul(gradient, self.b), self.a, alpha=self.scaling)
        return result

    def adapter_gradients(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `a` and of the transposed `b` from these rows, without the factor `scaling`."""
        assert self.a is not None and self.b is not None
        return transposed_matmul(matmul(gradient, self.b), x), transposed_matmul(matmul(x, self.a.t()), gradient)


def is_adapted(module: nn.Module) -> bool:
    """Whether the module is one of peft's LoRA layers."""
    return "lora_A" in module._modules and "base_layer" in module._modules


def _is_linear(module: nn.Module) -> bool:
    """Linear layers with an adapter, and frozen ones without where another product is faster."""
    if not is_adapted(module):
        weight = getattr(module, "weight", None)
        cpu = isinstance(weight, Tensor) and weight.device.type == "cpu" and weight.dtype is torch.float32
        return type(module) is nn.Linear and cpu and not any(p.requires_grad for p in module.parameters())
    from peft.tuners import lora

    kinds = {lora.Linear, getattr(lora, "Linear4bit", lora.Linear)}
    return type(module) in kinds and not module.fan_in_fan_out


def hooked(*modules: nn.Module) -> bool:
    """Whether a call of one of these modules does more than its class's forward."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m)
        for m in modules
    )


_Adapter = tuple[Tensor | None, Tensor | None, float]


def _active_adapter(layer: Any) -> _Adapter | None:
    """(a, b, scaling) of the one active plain LoRA, (None, None, 0.0) if there is none, None for anything else."""
    if layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or not names:
        return None, None, 0.0
    name = names[0]
    dropout, down, up = layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name]
    drops = not isinstance(dropout, nn.Identity) and (dropout.p > 0 and dropout.training)
    special = len(names) > 1 or name in layer.lora_variant or layer.lora_bias[name] or drops
    if special or type(down) is not nn.Linear or type(up) is not nn.Linear or hooked(dropout, down, up):
        return None
    return down.weight, up.weight, layer.scaling[name]


def projection_of(layer: Any, x: Tensor) -> Projection | None:
    """What the layer computes for this input; None where only its own forward will do."""
    adapted = is_adapted(layer)
    base = layer.base_layer if adapted else layer
    adapter = _active_adapter(layer) if adapted else (None, None, 0.0)
    if adapter is None or (adapted and hooked(base)):
        return None
    weight, bias = base.weight, base.bias
    a, b, scaling = adapter
    if weight.requires_grad or (bias is not None and (bias.requires_grad or bias.dtype is not x.dtype)):
        return None
    state = getattr(weight, "quant_state", None)
    if state is None:
        known = _original(base) is nn.Linear and weight.dtype is x.dtype
    else:
        settled = getattr(base, "compute_type_is_set", False) and not getattr(state, "packing_format_for_cpu", False)
        known = settled and base.compute_dtype is x.dtype and state.dtype is x.dtype
    rows = x.numel() // x.shape[-1]
    if not known or rows == 0 or not _adapter_computes_in(x, a):
        return None
    exact = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    num_out, num_in = (weight if state is None else state).shape
    merged = a is not None and exact and rows * (num_in + num_out) >= num_in * num_out
    return Projection(weight, bias, a, b, scaling, state, merged)


def _adapter_computes_in(x: Tensor, a: Tensor | None) -> bool:
    """Whether peft would compute an adapter of this dtype in the dtype of x, as autocast makes it do."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type) is x.dtype
    return a is None or a.dtype is x.dtype


def _original(module: nn.Module) -> type:
    return getattr(type(module), "_lean_of", type(module))


class _Linear(torch.autograd.Function):
    """A frozen linear layer with its adapter; keeps its input, and not even that without an adapter to train."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        weight: Tensor,
        projection: Projection,
        norm: NormOutput | None,
    ) -> Tensor:
        ctx.projection = projection.without_tensors()
        ctx.form = None if norm is None else norm.shifted
        ctx.save_for_backward(*keep(x if any(ctx.needs_input_grad[1:3]) else None, norm), a, b, weight)
        projection = projection.cast(x.dtype)
        return shaped(projection.forward(rows_of(x), projection.forward_matrix()), x)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *kept, a, b, weight = ctx.saved_tensors
        projection = replace(ctx.projection, weight=weight, a=a, b=b).cast(gradient.dtype)
        rows = rows_of(gradient)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = shaped(projection.backward(rows, projection.matrix()), gradient)
        if kept[0] is not None:
            sums = projection.adapter_gradients(recall(kept, ctx.form), rows)
            grad_a, grad_b = adapter_leaves(sums, a, projection.scaling)
        return grad_x, grad_a, grad_b, None, None, None


def adapter_leaves(sums: tuple[Tensor, Tensor], a: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The adapter's own gradients, in its dtype."""
    grad_a, grad_b = (part.to(a.dtype).mul_(scaling) for part in sums)
    return grad_a, grad_b.t()


def linear_class(module: nn.Module) -> type | None:
    """The lean class of a linear layer, None for any other module."""
    kind: Any = type(module)
    return _class_of(kind) if _is_linear(module) else None


@functools.cache
def _class_of(kind: Any) -> type:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        projection = None if args or kwargs else projection_of(self, x)
        if projection is None:
            return kind.forward(self, x, *args, **kwargs)
        return _Linear.apply(x, projection.a, projection.b, projection.weight, projection, norm_output(x))

    return subclass(kind, forward)
