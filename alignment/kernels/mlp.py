"""Gated MLPs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from alignment.kernels.base import (
    blocks,
    joined,
    normal_values,
    passed_over,
    probing,
    rows_of,
    shaped,
    subclass,
    without_autocast,
)
from alignment.kernels.fused import Fused
from alignment.kernels.linear import Projection, adapter_leaves, hooked, projection_of
from alignment.kernels.norm import NormOutput, keep, norm_output, recall


@dataclass(frozen=True, slots=True, eq=False)
class _Activation:
    """A function of one value and its derivative times an incoming gradient."""

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


@functools.cache
def _activations() -> tuple[_Activation, ...]:
    """Activations whose derivative this torch has and computes rightly: the operations are private to torch."""
    known: list[tuple[str, Callable[[Tensor], Tensor], str, dict[str, str]]] = [
        ("silu", F.silu, "silu_backward", {}),
        ("gelu_tanh", functools.partial(F.gelu, approximate="tanh"), "gelu_backward", {"approximate": "tanh"}),
    ]
    values = torch.linspace(-8, 8, 257, requires_grad=True)
    working = []
    for name, forward, operation, settings in known:
        try:
            with probing():
                (expected,) = torch.autograd.grad(forward(values).sum(), values)
            backward = functools.partial(getattr(torch.ops.aten, operation), **settings)
            found = backward(torch.ones_like(values), values.detach())
        except Exception as error:
            passed_over(f"torch's {operation} is", error)
            continue
        if torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            working.append(_Activation(name, forward, backward))
    return tuple(working)


@torch.no_grad()
def _activation_of(function: Any) -> _Activation | None:
    """The known activation that gives the same values over the range where these differ from each other."""
    if not callable(function) or (isinstance(function, nn.Module) and list(function.parameters())):
        return None
    values = torch.linspace(-8, 8, 257)
    found = function(values)
    return next((a for a in _activations() if torch.allclose(a.forward(values), found, rtol=1e-6, atol=1e-6)), None)


def _eager_gated(gate: Tensor, up: Tensor, activation: _Activation) -> Tensor:
    """`activation(gate) * up`."""
    return activation.forward(gate).mul_(up)


def _eager_gated_backward(
    gate: Tensor, up: Tensor, gradient: Tensor, activation: _Activation, needs_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the gradient of `activation(gate) * up` to those of gate and up, and the product itself if it is needed.

    The gradient of up takes the place of the incoming one.
    """
    active = activation.forward(gate)
    grad_gate = activation.backward(gradient * up, gate)
    gradient.mul_(active)
    return grad_gate, gradient, active.mul_(up) if needs_product else None


def _fit(*tensors: Tensor) -> bool:
    """Whether the kernels cover these values and gradients."""
    dtype = tensors[0].dtype
    for x in tensors:  # noqa: SIM110 (a generator takes longer)
        if x.dtype is not dtype or not x.is_contiguous():
            return False
    return True


def _examples(like: Tensor) -> list[tuple[Tensor, ...]]:
    """(gate, up, gradient) of an even and an odd size."""
    shapes = ((9, 1536), (3, 77))
    return [tuple(normal_values(shape, like.device, like.dtype, seed) for seed in range(3)) for shape in shapes]


_gated = Fused(
    _eager_gated,
    "gated_forward",
    fits=lambda gate, up, activation: _fit(gate, up),
    examples=lambda gate, up, activation: [(*tensors[:2], activation) for tensors in _examples(gate)],
)
_gated_backward = Fused(
    _eager_gated_backward,
    "gated_backward",
    fits=lambda gate, up, gradient, *options: _fit(gate, up, gradient),
    examples=lambda gate, up, gradient, *options: [(*tensors, *options) for tensors in _examples(gate)],
)


class _GatedMLP(torch.autograd.Function):
    """`down(activation(gate(x)) * up(x))`; keeps x, gate(x) and up(x) and recomputes the rest, block by block."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        activation: _Activation,
        projections: tuple[Projection, ...],
        norm: NormOutput | None,
        *weights: Tensor | None,
    ) -> Tensor:
        # `weights` are a, b and weight of gate, up and down: autograd must see them as arguments.
        ctx.activation = activation
        ctx.leaf = next((a.dtype for a in weights[::3] if a is not None), None)
        projections = tuple(p.cast(x.dtype) for p in projections)
        ctx.projections = [p.without_tensors() for p in projections]
        ctx.form = None if norm is None else norm.shifted
        gate, up, down = projections
        matrices = [p.forward_matrix() for p in (gate, up, down)]
        rows = rows_of(x)
        keeps = any(ctx.needs_input_grad)
        parts, gates, ups = [], [], []
        narrow: list[Tensor | None] = [None, None, None]  # of the only block, as a GPU has it
        for s in blocks(rows, gate.num_out):
            narrow[:2] = gate.narrowed(rows[s]), up.narrowed(rows[s])
            gated = gate.forward(rows[s], matrices[0], narrow[0])
            upped = up.forward(rows[s], matrices[1], narrow[1])
            active = _gated(gated, upped, activation)
            narrow[2] = down.narrowed(active)
            parts.append(down.forward(active, matrices[2], narrow[2]))
            if keeps:
                gates.append(gated)
                ups.append(upped)
        first_adapters = any(ctx.needs_input_grad[i] for i in (4, 5, 7, 8))
        tensors = [tensor for p in projections for tensor in (p.a, p.b, p.weight)]
        kept = keep(x if first_adapters else None, norm)
        ctx.save_for_backward(*kept, *tensors, *(narrow if keeps else [None] * 3), *gates, *ups)
        return shaped(joined(parts), x)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        # What was saved. It is read only once, because a checkpointed layer gives its tensors only once.
        saved = ctx.saved_tensors
        kept, weights, narrow, blocked = saved[:3], saved[3:12], saved[12:15], saved[15:]
        gates, ups = blocked[: len(blocked) // 2], blocked[len(blocked) // 2 :]
        projections = [
            replace(p, a=weights[3 * i], b=weights[3 * i + 1], weight=weights[3 * i + 2])
            for i, p in enumerate(ctx.projections)
        ]
        gate, up, down = projections

        # Which gradients are wanted, and the weights for them
        need_x = ctx.needs_input_grad[0]
        trains = [ctx.needs_input_grad[4 + 3 * i] or ctx.needs_input_grad[5 + 3 * i] for i in range(3)]
        matrices = [gate.matrix() if need_x else None, up.matrix() if need_x else None, down.matrix()]
        rows = rows_of(gradient)
        sums: list[list[Tensor] | None] = [None, None, None]
        grad_x = []

        def add(index: int, projection: Projection, block: Tensor, grad: Tensor, back: Tensor | None) -> None:
            if not trains[index]:
                return
            known = None if back is None or narrow[index] is None else (narrow[index], back)
            parts = projection.adapter_gradients(block, grad, known)
            if sums[index] is None:
                sums[index] = list(parts)
            else:
                for total, part in zip(sums[index], parts, strict=True):  # type: ignore[arg-type]
                    total.add_(part)

        # Block by block: recompute the activation, then go back through down, the product, gate and up
        for s, gated, upped in zip(blocks(rows, gate.num_out), gates, ups, strict=True):
            grad = rows[s]
            back_down = down.narrowed_gradient(grad)
            grad_product = down.backward(grad, matrices[2], back_down)
            grad_gate, grad_up, product = _gated_backward(gated, upped, grad_product, ctx.activation, trains[2])
            if product is not None:
                add(2, down, product, grad, back_down)
            del product
            back_gate, back_up = gate.narrowed_gradient(grad_gate), up.narrowed_gradient(grad_up)
            if kept[0] is not None:
                block = recall(kept, ctx.form, s)
                add(0, gate, block, grad_gate, back_gate)
                add(1, up, block, grad_up, back_up)
            if need_x:
                total = gate.backward(grad_gate, matrices[0], back_gate)
                grad_x.append(up.backward(grad_up, matrices[1], back_up, total))

        # The adapters' gradients, summed over the blocks
        leaves: list[Tensor | None] = []
        for projection, own in zip(projections, sums, strict=True):
            pair = (None, None) if own is None else adapter_leaves((own[0], own[1]), ctx.leaf, projection.scaling)
            leaves += [*pair, None]
        total_x = shaped(joined(grad_x), gradient) if need_x else None
        return total_x, None, None, None, *leaves


def mlp_class(module: nn.Module) -> type | None:
    """The patched class of a gated MLP, None for any other module."""
    children = dict(module.named_children())
    if not {"gate_proj", "up_proj", "down_proj"} <= set(children) <= {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    kind: Any = type(module)
    activation = _activation_of(getattr(module, "act_fn", None))
    return None if activation is None or vars(module)["_parameters"] else _class_of(kind, activation)


@functools.cache
def _class_of(kind: Any, activation: _Activation) -> type:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        projections = []
        if not args and not kwargs and not hooked(*layers):
            for layer in layers:
                projection = projection_of(layer, x)
                if projection is None:
                    break
                projections.append(projection)
        if len(projections) < 3:
            return kind.forward(self, x, *args, **kwargs)
        weights = [tensor for p in projections for tensor in (p.a, p.b, p.weight)]
        return _GatedMLP.apply(x, activation, tuple(projections), norm_output(x), *weights)

    return subclass(kind, forward)
