"""Mixtures of experts whose weights are stacked, one tensor for all: packed into 4 bits, with adapters, or both.

transformers stacks experts as (experts, out, in), and peft adds an adapter of them to a copy of the whole stack, whose
gradient is as large. Here the rows of each expert are multiplied by its weights and by its adapter, as in a linear
layer. Kept for the backward pass are x, and what enters the gate; packed weights are unpacked again.

A module qualifies by transformers' own description of its experts (`use_experts_implementation`). Others, and calls
that this does not cover, run their own forward, on weights that are unpacked for the call.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.kernels.base import all_close, is_patched, normal_values, passed_over, subclass, without_autocast
from alignment.kernels.grouped import Routing, outer, product
from alignment.kernels.linear import active_adapter, adapter_leaves, hooked, is_lora_layer
from alignment.kernels.nf4 import unpack

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stack:
    """One projection of all experts with its adapter, as one call uses it.

    Attributes:
        weight: (experts, out, in), or (experts, in, out) where `turned`; or packed values with `state`.
        state: bitsandbytes' QuantState.
        turned: how the weight is stored.
        bias: (experts, out).
        a, b: (experts, r, in) and (experts, out, r), the adapter; None without one.
        scaling: the adapter's factor.
    """

    weight: Tensor
    state: Any
    turned: bool
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in."""
        found: torch.dtype = (self.weight if self.state is None else self.state).dtype
        return found

    def matrices(self) -> Tensor:
        """(experts, in, out); a view of the weight, or new memory where it is packed."""
        weight = self.weight if self.state is None else unpack(self.weight, self.state)
        return weight if self.turned else weight.transpose(1, 2)

    def forward(self, rows: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """(rows, out), and the rows in the adapter's own width, (rows, r)."""
        result, narrow = product(rows, self.matrices(), routing), None
        if self.a is not None and self.b is not None:
            narrow = product(rows, self.a.transpose(1, 2), routing)
            result.add_(product(narrow, self.b.transpose(1, 2), routing), alpha=self.scaling)
        if self.bias is not None:
            result.add_(self.bias.index_select(0, routing.experts))
        return result, narrow

    def backward(self, gradient: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """(rows, in), and the gradient in the adapter's own width, (rows, r)."""
        result, narrow = product(gradient, self.matrices().transpose(1, 2), routing), None
        if self.a is not None and self.b is not None:
            narrow = product(gradient, self.b, routing)
            result.add_(product(narrow, self.a, routing), alpha=self.scaling)
        return result, narrow

    def without_tensors(self) -> Stack:
        """The part to keep on an autograd node."""
        return replace(self, weight=None, bias=None, a=None, b=None)  # type: ignore[arg-type]

    def with_tensors(
        self, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, dtype: torch.dtype
    ) -> Stack:
        """The whole, with the adapter in the dtype of the activations, and in memory as it is multiplied."""
        if a is not None and b is not None:
            a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
        return replace(self, weight=weight, bias=bias, a=a, b=b)


# The mixture


class _Experts(torch.autograd.Function):
    """The weighted sum of a position's experts; keeps x and what enters the gate, and recomputes the rest."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, index: Tensor, gate: Any, stacks: tuple[Stack, Stack], *adapters: Any
    ) -> Tensor:
        # `adapters` are a and b of both stacks: autograd must see them as arguments
        pairs = zip(stacks, adapters[::2], adapters[1::2], strict=True)
        tensors = [(stack.weight, stack.bias, a, b) for stack, a, b in pairs]
        first, last = (s.with_tensors(*own, x.dtype) for s, own in zip(stacks, tensors, strict=True))
        ctx.leaf = next((a.dtype for a in adapters if a is not None), None)
        ctx.gate, ctx.stacks = gate, (first.without_tensors(), last.without_tensors())
        routing = Routing.of(index, len(first.weight) if first.state is None else first.state.shape[0])
        entering, narrow_first = first.forward(routing.spread(x), routing)
        result, narrow_last = last.forward(gate(entering), routing)
        factors = weights.reshape(-1)[routing.order][:, None]
        ctx.top_k = routing.top_k
        trains = any(ctx.needs_input_grad[5:7])
        ctx.save_for_backward(
            x if trains else None, weights, routing.experts, routing.order, routing.ends, entering,
            narrow_first if trains else None, narrow_last, *tensors[0], *tensors[1],
        )  # fmt: skip
        return routing.gather(result * factors).to(x.dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        # What was saved; a checkpointed layer gives its tensors only once
        saved = ctx.saved_tensors
        x, weights, experts, order, ends, entering, narrow_first, narrow_last = saved[:8]
        first, last = (
            s.with_tensors(*saved[i : i + 4], entering.dtype) for s, i in zip(ctx.stacks, (8, 12), strict=True)
        )
        routing = Routing(experts, order, ends, ctx.top_k)
        factors = weights.reshape(-1)[order][:, None].to(entering.dtype)

        # Back through the last projection. The derivative of a factor is the gradient times the expert's result, which
        # equals what comes back through the projection times what entered it, so the result is not needed.
        with torch.enable_grad():
            leaf = entering.detach().requires_grad_()
            active = ctx.gate(leaf)
        plain = routing.spread(gradient.to(entering.dtype))
        back, narrow = last.backward(plain, routing)
        grad_weights = None
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(back.dtype, torch.float32)
            along = (back * active.detach()).to(wide).sum(1)
            if last.bias is not None:
                along += (plain * last.bias.index_select(0, experts)).to(wide).sum(1)
            grad_weights = torch.empty_like(along)
            grad_weights[order] = along
            grad_weights = grad_weights.view_as(weights).to(weights.dtype)
        leaves: list[Any] = [None] * 4
        if ctx.needs_input_grad[7] or ctx.needs_input_grad[8]:
            sums = outer(narrow * factors, active.detach(), routing), outer(plain * factors, narrow_last, routing)
            leaves[2:] = adapter_leaves(sums, ctx.leaf, last.scaling)

        # Through the gate and the first projection
        (grad_entering,) = torch.autograd.grad(active, leaf, back * factors)
        del leaf, active, back, plain
        grad_rows, narrow = first.backward(grad_entering, routing)
        if x is not None:
            sums = outer(narrow, routing.spread(x), routing), outer(grad_entering, narrow_first, routing)
            leaves[:2] = adapter_leaves(sums, ctx.leaf, first.scaling)
        grad_x = routing.gather(grad_rows).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weights, None, None, None, *leaves


# Which modules, and which calls


def is_packed(parameter: Any) -> bool:
    """Whether a parameter holds stacked weights that are packed into 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return state is not None and len(state.shape) == 3


def packed_weights(module: nn.Module) -> dict[str, Any]:
    """The module's own packed stacks, by name."""
    return {name: parameter for name, parameter in module._parameters.items() if is_packed(parameter)}


@contextmanager
def unpacked(module: nn.Module) -> Iterator[None]:
    """Have a module's packed stacks as plain tensors, for a forward that reads them as they are."""
    own = dict(module._parameters)
    for name, parameter in packed_weights(module).items():
        weight = unpack(parameter, parameter.quant_state)
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        module._parameters.clear()  # in the old order too, which peft changes when it takes its adapter out
        module._parameters.update(own)


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Have empty tensors of the true shapes in place of packed stacks, for peft, which reads shapes and dtypes."""
    found = [(module, packed) for module in model.modules() if (packed := packed_weights(module))]
    for module, packed in found:
        for name, parameter in packed.items():
            state = parameter.quant_state
            empty = torch.empty(1, dtype=state.dtype, device=parameter.device).expand(state.shape)
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    try:
        yield
    finally:
        for module, packed in found:
            module._parameters.update(packed)


def expert_layers(module: nn.Module) -> tuple[Any, dict[str, Any]]:
    """The module that holds the experts, and peft's layers around it by the name of the weight that each adapts."""
    wrappers: dict[str, Any] = {}
    inner: Any = module
    while is_lora_layer(inner) and hasattr(inner, "parameter_name"):
        wrappers[inner.parameter_name] = inner
        inner = inner.base_layer
    return inner, wrappers


def _stacks_of(experts: Any, wrappers: dict[str, Any]) -> tuple[Stack, Stack] | None:
    """Both projections with their adapters; None where only the module's own forward knows what it computes."""
    flags = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
    if not all(hasattr(experts, flag) for flag in flags):
        return None
    if getattr(experts, "has_post_expert_norm", False) or getattr(experts, "_is_expert_parallel", False):
        return None
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    if hooked(experts, *wrappers.values()) or not wrappers.keys() <= set(names):
        return None
    stacks = []
    for name in names:
        weight = experts._parameters.get(name)
        if weight is None or weight.requires_grad:
            return None
        bias = experts._parameters.get(f"{name}_bias") if experts.has_bias else None
        if (bias is None) == experts.has_bias or (bias is not None and bias.requires_grad):
            return None
        stack = Stack(weight, getattr(weight, "quant_state", None), experts.is_transposed, bias, None, None, 0.0)
        if name in wrappers:
            found = active_adapter(wrappers[name])
            if found is None:
                return None
            down, up, scaling = found
            if down is not None and up is not None:
                # peft keeps (experts * r, in) and (out, r * experts)
                a = down.view(experts.num_experts, -1, down.shape[1])
                b = up.view(up.shape[0], -1, experts.num_experts).permute(2, 0, 1)
                stack = replace(stack, a=a, b=b, scaling=scaling)
        stacks.append(stack)
    first, last = stacks
    return None if first.dtype is not last.dtype else (first, last)


def _mixture(experts: Any, stacks: tuple[Stack, Stack], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    gate = experts._apply_gate if experts.has_gate else experts.act_fn
    adapters = [tensor for stack in stacks for tensor in (stack.a, stack.b)]
    bare = tuple(replace(stack, a=None, b=None) for stack in stacks)
    result: Tensor = _Experts.apply(x.to(stacks[0].dtype), weights, index, gate, bare, *adapters)
    return result.to(x.dtype)


@functools.cache
def _class_of(kind: Any, fast: bool) -> type:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        experts, wrappers = expert_layers(self)
        if fast and len(args) == 2 and not kwargs and x.ndim == 2 and len(x) > 0:
            stacks = _stacks_of(experts, wrappers)
            if stacks is not None:
                return _mixture(experts, stacks, x, *args)
        with unpacked(experts):
            result: Tensor = kind.forward(self, x, *args, **kwargs)
            return result

    return subclass(kind, forward)


def patch_experts(model: nn.Module) -> None:
    """Let packed experts compute, and compute frozen ones without copies of what is not needed.

    The faster way is compared with the module's own forward, once for each class and size. Where they differ or it
    fails, the module keeps its own, on weights that are unpacked for each call, and a log line says so.
    """
    verdicts: dict[Any, bool] = {}
    inside: set[int] = set()
    for module in list(model.modules()):  # outer modules come first
        experts, wrappers = expert_layers(module)
        if id(module) in inside or is_patched(module) or "forward" in vars(module):
            inside.update(id(part) for part in module.modules() if wrappers and part is not module)
            continue
        packed = packed_weights(experts)
        own = [p for p in experts._parameters.values() if p is not None]
        stacked = hasattr(experts, "num_experts") and any(p.ndim == 3 for p in own)
        if not (packed or (stacked and not any(p.requires_grad for p in own))) or any(p.is_meta for p in own):
            continue
        inside.update(id(part) for part in module.modules() if part is not module)
        shapes = ((name, p.shape, p.dtype) for name, p in experts.named_parameters(recurse=False))
        key = (type(module), type(experts), *sorted(wrappers), *shapes)
        if key not in verdicts:
            verdicts[key] = _agrees(module)
        if verdicts[key] or packed:
            kind: Any = type(module)
            module.__class__ = _class_of(kind, verdicts[key])


@torch.no_grad()
def _agrees(module: nn.Module) -> bool:
    """Whether both ways give the same on random rows."""
    experts, wrappers = expert_layers(module)
    own: Any = type(module)
    try:
        stacks = _stacks_of(experts, wrappers)
        if stacks is None:
            log.info("%s keeps its own forward: its experts are of another form.", own.__name__)
            return False
        weight = stacks[0].weight if stacks[0].state is None else stacks[0].state
        width, device = weight.shape[1 if experts.is_transposed else 2], stacks[0].weight.device
        x = normal_values((8, width), device, stacks[0].dtype)
        index = torch.arange(16, device=device).view(8, 2) % experts.num_experts
        weights = normal_values((8, 2), device, stacks[0].dtype, 1).softmax(-1)
        found = _mixture(experts, stacks, x, index, weights)
        with unpacked(experts):
            equal = all_close(found, own.forward(module, x, index, weights))
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        passed_over(f"A faster forward of {own.__name__} is", error, next(experts.parameters()).device)
        return False
    if not equal:
        log.info("%s keeps its own forward: the faster one gives other values here.", own.__name__)
    return equal
