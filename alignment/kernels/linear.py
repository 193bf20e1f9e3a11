"""Frozen linear layers and their adapters."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.kernels.base import original_class, rows_of, shaped, subclass, without_autocast
from alignment.kernels.calibrated import quantised_state
from alignment.kernels.matmul import add_matmul, matmul, transposed_matmul, wide_matmul
from alignment.kernels.nf4 import packed_product, unpack
from alignment.kernels.norm import NormOutput, keep, norm_output, recall

_UNPACKED_FROM = 2048
"""From so many rows on, bitsandbytes too unpacks the weights and multiplies them by cuBLAS."""


def _is_gpu(x: Tensor) -> bool:
    return x.is_cuda


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer and its adapter, as one call uses them.

    Attributes:
        weight: (out, in), or packed 4-bit values with `state`.
        bias: (out,).
        a, b: (r, in) and (out, r), the adapter; None without one.
        scaling: the adapter's factor.
        state: bitsandbytes' QuantState, or a `CalibratedState`.
        merged: form `weight + scaling * b @ a` for the call. That costs about r / rows of the product itself and saves
            two passes over the activations, but 16 bits would round the update away.
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
        """The part to keep on an autograd node. The tensors are saved separately, so that hooks see them."""
        return replace(self, weight=None, bias=None, a=None, b=None)  # type: ignore[arg-type]

    def matrix(self) -> Tensor:
        """(out, in), the matrix that a row is multiplied by."""
        weight = self.weight
        if self.state is not None:
            weight = unpack(weight, self.state)
        if self.merged:
            weight = add_matmul(weight, self.b * self.scaling, self.a)  # type: ignore[operator, arg-type]
        return weight

    def forward_matrix(self) -> Tensor | None:
        """The matrix; None where bitsandbytes multiplies packed weights itself."""
        return None if self.state is not None and not self.merged else self.matrix()

    def _narrows(self, rows: Tensor) -> bool:
        return _is_gpu(rows) and self.a is not None and self.b is not None and not self.merged

    def narrowed(self, x: Tensor) -> Tensor | None:
        """(rows, r): a GPU's rows in the adapter's own width, kept for the backward pass; None elsewhere.

        They are a hundredth of what a layer keeps, and save a pass over its input.
        """
        return x @ self.a.t() if self._narrows(x) else None  # type: ignore[union-attr]

    def narrowed_gradient(self, gradient: Tensor) -> Tensor | None:
        """(rows, r): a GPU's gradient in the adapter's own width; None elsewhere."""
        return gradient @ self.b if self._narrows(gradient) else None  # type: ignore[operator]

    def forward(self, x: Tensor, matrix: Tensor | None, narrow: Tensor | None = None) -> Tensor:
        """(rows, in) to (rows, out); `narrow` is from `narrowed`."""
        if matrix is None and _is_gpu(x) and len(x) >= _UNPACKED_FROM:
            matrix = self.matrix()
        if matrix is not None and narrow is not None:
            # The large product is added to the adapter's part as it is computed: no pass over the result.
            y = (narrow @ self.b.t()).addmm_(x, matrix.t(), beta=self.scaling)  # type: ignore[union-attr]
            return y if self.bias is None else y.add_(self.bias)
        if matrix is None:
            y = packed_product(x, self.weight, self.state, self.bias)
        else:
            y = matmul(x, matrix.t(), self.bias)
        if self.a is not None and self.b is not None and not self.merged:
            part = matmul(x, self.a.t()) if narrow is None else narrow
            y.addmm_(part, self.b.t(), alpha=self.scaling)
        return y

    def backward(
        self, gradient: Tensor, matrix: Tensor, narrow: Tensor | None = None, total: Tensor | None = None
    ) -> Tensor:
        """(rows, out) to (rows, in); added to `total` if there is one, which may be overwritten.

        `narrow` is the gradient times `b` where it is known already.
        """
        if narrow is not None:
            if total is None:
                return (narrow @ self.a).addmm_(gradient, matrix, beta=self.scaling)  # type: ignore[operator]
            return total.addmm_(narrow, self.a, alpha=self.scaling).addmm_(gradient, matrix)  # type: ignore[arg-type]
        result = matmul(gradient, matrix)
        if self.a is not None and self.b is not None and not self.merged:
            result.addmm_(matmul(gradient, self.b), self.a, alpha=self.scaling)
        return result if total is None else total.add_(result)

    def adapter_gradients(
        self, x: Tensor, gradient: Tensor, narrow: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `a` and of `b` from these rows, without the factor `scaling`.

        `narrow` has what a GPU knows already: x times the transposed `a`, and the gradient times `b`.
        """
        assert self.a is not None and self.b is not None
        if narrow is not None:
            return wide_matmul(narrow[1].t(), x), wide_matmul(gradient.t(), narrow[0])
        down, up = matmul(gradient, self.b), matmul(x, self.a.t())
        return transposed_matmul(down, x), transposed_matmul(up, gradient).t()


def is_lora_layer(module: nn.Module) -> bool:
    """Whether the module is one of peft's LoRA layers."""
    return "lora_A" in module._modules and "base_layer" in module._modules


def _is_linear(module: nn.Module) -> bool:
    """Linear layers with an adapter, and frozen ones without on a CPU, where oneDNN's product may be faster."""
    if not is_lora_layer(module):
        weight = getattr(module, "weight", None)
        cpu = isinstance(weight, Tensor) and weight.device.type == "cpu" and weight.dtype is torch.float32
        return type(module) is nn.Linear and cpu and not any(p.requires_grad for p in module.parameters())
    from peft.tuners import lora

    kinds = {lora.Linear, getattr(lora, "Linear4bit", lora.Linear)}
    return type(module) in kinds and not module.fan_in_fan_out


def hooked(*modules: nn.Module) -> bool:
    """Whether a call of one of these modules runs more than its class's forward."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m)
        for m in modules
    )


_Adapter = tuple[Tensor | None, Tensor | None, float]


def active_adapter(layer: Any) -> _Adapter | None:
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
    """What the layer computes for this input; None where only its own forward covers the case."""
    adapted = is_lora_layer(layer)
    adapter: _Adapter | None = (None, None, 0.0)
    base = layer
    if adapted:
        adapter, base = active_adapter(layer), layer.base_layer
    if adapter is None or (adapted and hooked(base)):
        return None
    weight, bias = base.weight, base.bias
    a, b, scaling = adapter
    if weight.requires_grad or (bias is not None and (bias.requires_grad or bias.dtype is not x.dtype)):
        return None
    state = getattr(weight, "quant_state", None)
    if state is None:
        known = original_class(base) is nn.Linear and weight.dtype is x.dtype
    else:
        settled = getattr(base, "compute_type_is_set", False) and not getattr(state, "packing_format_for_cpu", False)
        known = settled and base.compute_dtype is x.dtype and state.dtype is x.dtype
        state = quantised_state(base)
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


class _Linear(torch.autograd.Function):
    """A frozen linear layer with its adapter; keeps its input, and only if the adapter trains."""

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
        ctx.form = None if norm is None else norm.shifted
        ctx.leaf = None if a is None else a.dtype
        projection = projection.cast(x.dtype)
        ctx.projection = projection.without_tensors()
        rows, trains = rows_of(x), any(ctx.needs_input_grad[1:3])
        narrow = projection.narrowed(rows)
        kept = keep(x if trains else None, norm)
        ctx.save_for_backward(*kept, projection.a, projection.b, weight, narrow if trains else None)
        return shaped(projection.forward(rows, projection.forward_matrix(), narrow), x)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *kept, a, b, weight, narrow = ctx.saved_tensors
        projection = replace(ctx.projection, weight=weight, a=a, b=b)
        rows = rows_of(gradient)
        back = projection.narrowed_gradient(rows)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = shaped(projection.backward(rows, projection.matrix(), back), gradient)
        if kept[0] is not None:
            known = None if narrow is None or back is None else (narrow, back)
            sums = projection.adapter_gradients(recall(kept, ctx.form), rows, known)
            grad_a, grad_b = adapter_leaves(sums, ctx.leaf, projection.scaling)
        return grad_x, grad_a, grad_b, None, None, None


def adapter_leaves(sums: tuple[Tensor, Tensor], dtype: torch.dtype, scaling: float) -> tuple[Tensor, Tensor]:
    """The adapter's own gradients, in its dtype."""
    grad_a, grad_b = (part.to(dtype) for part in sums)
    torch._foreach_mul_([grad_a, grad_b], scaling)
    return grad_a, grad_b


def linear_class(module: nn.Module) -> type | None:
    """The patched class of a linear layer, None for any other module."""
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
