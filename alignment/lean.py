"""The frozen layers of a policy, computed in less time and with less memory, equal to their own forward up to rounding.

`make_lean` gives modules that qualify a subclass of their own class with another forward. Parameters, names, saved
files and everything peft does with its layers stay as they are; a call that a lean forward is not made for (several
active adapters, dropout, merged weights, trained base weights, hooks) takes the module's own forward.

What a decoder layer keeps for its backward pass, in values per token of the dtype that it computes in, where h is the
hidden size, i the intermediate size, q and k the widths of all query heads and of all key heads together:

    2 h + 2 i + 2 q + 2 k

the inputs of both norms (2 h), whose outputs are computed again from them; the rotated queries and keys and the values
(q + 2 k); the output of the attention (q); gate and up (2 i). Norms on heads (Qwen3) keep their input too: q + k more.
On top come one fp32 value for each row of a norm (2, and one per head for norms on heads) and one per query head for
the attention's softmax; an attention that repeats keys and values for its query heads keeps 2 q in place of 2 k. A
layer whose norms are not of this kind (GPT-NeoX) keeps their outputs, 2 h more. Weights are referenced, not kept.
The layers' own forwards keep 2 h + 2 i and the rank of every adapter more (norm outputs, activation, its product with
up), and in 16 bits with an fp32 adapter an fp32 copy of every adapted layer's input besides.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from alignment.products import add_matmul, matmul, transposed_matmul

log = logging.getLogger(__name__)

_Static = TypeVar("_Static", bound=Callable[..., Any])

_ALL = slice(None)
_MIN_BLOCK_ROWS = 256
_BLOCK_VALUES = 2**18
"""A block of this size, 1 MiB in fp32, is still in a core's cache when the next operation reads it."""


def make_lean(model: nn.Module) -> None:
    """Let every module of the model that qualifies compute leanly from now on; a second call changes nothing.

    A module qualifies by its structure. Before it is changed, both forwards are compared on random input, once for
    each class and size; where they differ, the module is left alone and a log line says so.
    """
    verdicts: dict[Any, bool] = {}
    inside_adapters = {
        id(part) for module in model.modules() if _is_adapted(module) for part in module.modules() if part is not module
    }
    for module in list(model.modules()):
        if id(module) in inside_adapters or any(p.is_meta for p in module.parameters()):
            continue
        lean = _lean_class(module)
        if lean is None:
            continue
        key = (lean, *((name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()))
        if key not in verdicts:
            verdicts[key] = _proven(module, lean)
        if verdicts[key]:
            module.__class__ = lean


def _lean_class(module: nn.Module) -> type | None:
    kind: Any = type(module)
    if hasattr(kind, "_lean_of") or "forward" in vars(module):
        return None
    if _is_linear(module):
        return _linear_class(kind)
    children = dict(module.named_children())
    if {"gate_proj", "up_proj", "down_proj"} <= set(children) <= {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        activation = _activation_of(getattr(module, "act_fn", None))
        return None if activation is None or vars(module)["_parameters"] else _mlp_class(kind, activation)
    if not children and "RMSNorm" in kind.__name__ and [name for name, _ in module.named_parameters()] == ["weight"]:
        shifted = _is_shifted(module)
        return None if shifted is None or module.weight.requires_grad else _norm_class(kind, shifted)
    if _rotary_function(kind) is not None:
        return _attention_class(kind)
    return None


def _subclass(kind: type, forward: Callable[..., Any]) -> type:
    return type(f"Lean{kind.__name__}", (kind,), {"forward": forward, "_lean_of": kind, "__doc__": kind.__doc__})


def _original(module: nn.Module) -> type:
    return getattr(type(module), "_lean_of", type(module))


# Proof


def _normal(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Reproducible normal values that leave the global random state alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding."""
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    if found.shape != expected.shape or found.dtype is not expected.dtype:
        return False
    difference, size = (found.double() - expected.double()).abs().max(), expected.double().abs().max()
    return bool(difference <= tolerance * size)


@torch.no_grad()
def _proven(module: nn.Module, lean: Any) -> bool:
    """Whether both forwards give the same on random input."""
    own: Any = type(module)
    if _rotary_function(own) is not None:
        return True  # the only thing that differs has been compared by itself
    weight = next(module.parameters())
    stored = getattr(weight, "quant_state", None) or weight
    x = _normal((8, stored.shape[-1]), weight.device, stored.dtype)
    with _evaluating(module), torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=x.dtype is torch.bfloat16):
        equal = _agree(lean.forward(module, x), own.forward(module, x))
    if not equal:
        log.info("%s keeps its own forward: a lean one would give other values.", own.__name__)
    return equal


# Linear layers


@dataclass(frozen=True, slots=True)
class _Projection:
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

    def cast(self, dtype: torch.dtype) -> _Projection:
        """With the adapter in the dtype of the activations."""
        if self.a is None or self.b is None or self.a.dtype is dtype:
            return self
        return replace(self, a=self.a.to(dtype), b=self.b.to(dtype))

    def without_tensors(self) -> _Projection:
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


def _is_adapted(module: nn.Module) -> bool:
    return "lora_A" in module._modules and "base_layer" in module._modules


def _is_linear(module: nn.Module) -> bool:
    """Linear layers with an adapter, and frozen ones without where another product is faster."""
    if not _is_adapted(module):
        weight = getattr(module, "weight", None)
        cpu = isinstance(weight, Tensor) and weight.device.type == "cpu" and weight.dtype is torch.float32
        return type(module) is nn.Linear and cpu and not any(p.requires_grad for p in module.parameters())
    from peft.tuners import lora

    kinds = {lora.Linear, getattr(lora, "Linear4bit", lora.Linear)}
    return type(module) in kinds and not module.fan_in_fan_out


def _hooked(*modules: nn.Module) -> bool:
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
    if special or type(down) is not nn.Linear or type(up) is not nn.Linear or _hooked(dropout, down, up):
        return None
    return down.weight, up.weight, layer.scaling[name]


def _projection(layer: Any, x: Tensor) -> _Projection | None:
    """What the layer computes for this input; None where only its own forward will do."""
    adapted = _is_adapted(layer)
    base = layer.base_layer if adapted else layer
    adapter = _active_adapter(layer) if adapted else (None, None, 0.0)
    if adapter is None or (adapted and _hooked(base)):
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
    return _Projection(weight, bias, a, b, scaling, state, merged)


def _adapter_computes_in(x: Tensor, a: Tensor | None) -> bool:
    """Whether peft would compute an adapter of this dtype in the dtype of x, as autocast makes it do."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type) is x.dtype
    return a is None or a.dtype is x.dtype


def _without_autocast(function: _Static) -> _Static:
    """Every operand has been given its dtype, so nothing may be cast behind it."""

    @functools.wraps(function)
    def wrapper(ctx: Any, first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *rest)

    return wrapper  # type: ignore[return-value]


def _rows(x: Tensor) -> Tensor:
    """(rows, width), one after the other in memory: products of expanded or transposed rows are slow."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """(..., width) from new rows. Not a view, since autograd lets nobody write into a view that a function returned."""
    return torch.ops.aten._unsafe_view(rows, [*like.shape[:-1], rows.shape[-1]])


class _Linear(torch.autograd.Function):
    """A frozen linear layer with its adapter; keeps its input, and not even that without an adapter to train."""

    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        weight: Tensor,
        projection: _Projection,
        norm: _NormOutput | None,
    ) -> Tensor:
        ctx.projection = projection.without_tensors()
        ctx.form = None if norm is None else norm.shifted
        ctx.save_for_backward(*_keep(x if any(ctx.needs_input_grad[1:3]) else None, norm), a, b, weight)
        projection = projection.cast(x.dtype)
        return _shaped(projection.forward(_rows(x), projection.forward_matrix()), x)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *kept, a, b, weight = ctx.saved_tensors
        projection = replace(ctx.projection, weight=weight, a=a, b=b).cast(gradient.dtype)
        rows = _rows(gradient)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = _shaped(projection.backward(rows, projection.matrix()), gradient)
        if kept[0] is not None:
            sums = projection.adapter_gradients(_recall(kept, ctx.form), rows)
            grad_a, grad_b = _adapter_leaves(sums, a, projection.scaling)
        return grad_x, grad_a, grad_b, None, None, None


def _adapter_leaves(sums: tuple[Tensor, Tensor], a: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The adapter's own gradients, in its dtype."""
    grad_a, grad_b = (part.to(a.dtype).mul_(scaling) for part in sums)
    return grad_a, grad_b.t()


@functools.cache
def _linear_class(kind: Any) -> type:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        projection = None if args or kwargs else _projection(self, x)
        if projection is None:
            return kind.forward(self, x, *args, **kwargs)
        return _Linear.apply(x, projection.a, projection.b, projection.weight, projection, _norm_output(x))

    return _subclass(kind, forward)


# Gated MLP


@dataclass(frozen=True, slots=True)
class _Activation:
    """A function of one value and its derivative times an incoming gradient."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


_ACTIVATIONS = (
    _Activation(F.silu, torch.ops.aten.silu_backward),
    _Activation(
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
)


@torch.no_grad()
def _activation_of(function: Any) -> _Activation | None:
    """The activation that gives the same values over the range where they differ from each other."""
    if not callable(function) or (isinstance(function, nn.Module) and list(function.parameters())):
        return None
    values = torch.linspace(-8, 8, 257)
    found = function(values)
    return next((a for a in _ACTIVATIONS if torch.allclose(a.forward(values), found, rtol=1e-6, atol=1e-6)), None)


def _blocks(rows: Tensor, width: int) -> Iterator[slice]:
    """Row ranges whose temporaries of that width stay in the cache of a CPU; everything at once elsewhere."""
    size = max(_MIN_BLOCK_ROWS, _BLOCK_VALUES // width) if rows.device.type == "cpu" else len(rows)
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


class _GatedMLP(torch.autograd.Function):
    """`down(activation(gate(x)) * up(x))`; keeps x, gate(x) and up(x), and computes the rest again, block by block."""

    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        activation: _Activation,
        projections: tuple[_Projection, ...],
        norm: _NormOutput | None,
        *weights: Tensor | None,
    ) -> Tensor:
        # Tensors that autograd has to see come in by themselves too: a, b, weight of gate, up and down.
        ctx.activation = activation
        ctx.projections = [p.without_tensors() for p in projections]
        ctx.form = None if norm is None else norm.shifted
        gate, up, down = (p.cast(x.dtype) for p in projections)
        matrices = [p.forward_matrix() for p in (gate, up, down)]
        rows = _rows(x)
        keeps = any(ctx.needs_input_grad)
        parts, gates, ups = [], [], []
        for s in _blocks(rows, gate.num_out):
            gated, upped = gate.forward(rows[s], matrices[0]), up.forward(rows[s], matrices[1])
            active = activation.forward(gated).mul_(upped)
            parts.append(down.forward(active, matrices[2]))
            if keeps:
                gates.append(gated)
                ups.append(upped)
        first_adapters = any(ctx.needs_input_grad[i] for i in (4, 5, 7, 8))
        ctx.save_for_backward(*_keep(x if first_adapters else None, norm), *weights, *gates, *ups)
        return _shaped(torch.cat(parts), x)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: a checkpointed layer gives its tensors only once
        kept, weights, blocks = saved[:3], saved[3:12], saved[12:]
        gates, ups = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
        gate, up, down = (
            replace(p, a=weights[3 * i], b=weights[3 * i + 1], weight=weights[3 * i + 2]).cast(gradient.dtype)
            for i, p in enumerate(ctx.projections)
        )
        need_x = ctx.needs_input_grad[0]
        trains = [ctx.needs_input_grad[4 + 3 * i] or ctx.needs_input_grad[5 + 3 * i] for i in range(3)]
        matrices = [gate.matrix() if need_x else None, up.matrix() if need_x else None, down.matrix()]
        rows = _rows(gradient)
        sums: list[list[Tensor] | None] = [None, None, None]
        grad_x = []

        def add(index: int, projection: _Projection, block: Tensor, grad: Tensor) -> None:
            if not trains[index]:
                return
            parts = projection.adapter_gradients(block, grad)
            if sums[index] is None:
                sums[index] = list(parts)
            else:
                for total, part in zip(sums[index], parts, strict=True):  # type: ignore[arg-type]
                    total.add_(part)

        for s, gated, upped in zip(_blocks(rows, gate.num_out), gates, ups, strict=True):
            grad = rows[s]
            active = ctx.activation.forward(gated)
            grad_up = down.backward(grad, matrices[2])
            add(2, down, active * upped, grad)
            grad_gate = ctx.activation.backward(grad_up * upped, gated)
            grad_up.mul_(active)
            if kept[0] is not None:
                block = _recall(kept, ctx.form, s)
                add(0, gate, block, grad_gate)
                add(1, up, block, grad_up)
            if need_x:
                grad_x.append(gate.backward(grad_gate, matrices[0]).add_(up.backward(grad_up, matrices[1])))
        leaves: list[Tensor | None] = []
        for i, projection in enumerate((gate, up, down)):
            total = sums[i]
            pair = (
                (None, None)
                if total is None
                else _adapter_leaves((total[0], total[1]), weights[3 * i], projection.scaling)
            )
            leaves += [*pair, None]
        joined = _shaped(torch.cat(grad_x), gradient) if need_x else None
        return joined, None, None, None, *leaves


@functools.cache
def _mlp_class(kind: Any, activation: _Activation) -> type:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        projections = []
        if not args and not kwargs and not _hooked(*layers):
            for layer in layers:
                projection = _projection(layer, x)
                if projection is None:
                    break
                projections.append(projection)
        if len(projections) < 3:
            return kind.forward(self, x, *args, **kwargs)
        weights = [tensor for p in projections for tensor in (p.a, p.b, p.weight)]
        return _GatedMLP.apply(x, activation, tuple(projections), _norm_output(x), *weights)

    return _subclass(kind, forward)


# RMSNorm


class _RMSNorm(torch.autograd.Function):
    """Root-mean-square norm with a frozen weight, statistics in fp32 or better; keeps x and one factor per row.

    Returns the output and the factors, (rows, 1).
    """

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, shifted: bool) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = _rows(x)
        result = torch.empty_like(rows)
        factors = torch.empty(len(rows), 1, dtype=wide, device=x.device)
        for s in _blocks(rows, rows.shape[1]):
            block = rows[s].to(wide)
            factors[s] = torch.rsqrt(block.square().mean(-1, keepdim=True).add_(eps))
            result[s] = _scaled(block, factors[s], weight, shifted)
        ctx.save_for_backward(x, factors, weight)
        ctx.mark_non_differentiable(factors)
        ctx.shifted = shifted
        return _shaped(result, x), factors

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        x, factors, weight = ctx.saved_tensors
        rows, incoming = _rows(x), _rows(gradient)
        result = torch.empty_like(rows)
        scale = _norm_scale(weight, factors.dtype, ctx.shifted)
        for s in _blocks(rows, rows.shape[1]):
            block, factor = rows[s].to(factors.dtype), factors[s]
            grad = incoming[s] * scale
            slope = (grad * block).mean(-1, keepdim=True).mul_(factor**3)
            result[s] = grad.mul_(factor).addcmul_(block, slope, value=-1)
        return _shaped(result, x), None, None, None


def _norm_scale(weight: Tensor, dtype: torch.dtype, shifted: bool) -> Tensor:
    return 1.0 + weight.to(dtype) if shifted else weight.to(dtype)


def _scaled(rows: Tensor, factors: Tensor, weight: Tensor, shifted: bool) -> Tensor:
    """The norm's output from its input and its factors, in the weight's dtype and rounded as the norm does it."""
    wide = rows * factors
    if shifted or weight.dtype is wide.dtype:
        return wide.mul_(_norm_scale(weight, wide.dtype, shifted)).to(weight.dtype)
    return wide.to(weight.dtype).mul_(weight)


@dataclass(frozen=True, slots=True)
class _NormOutput:
    """From what a norm's output can be computed again: layers that read it need not keep it."""

    x: Tensor
    factors: Tensor
    weight: Tensor
    shifted: bool
    version: int


def _norm_output(x: Any) -> _NormOutput | None:
    """How x came from a lean norm, if it did and has not been written to since."""
    found = getattr(x, "_lean_norm", None)
    return found if found is not None and found.version == x._version else None


def _keep(x: Tensor | None, norm: _NormOutput | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What a layer saves to have x again in its backward pass."""
    return (x, None, None) if x is None or norm is None else (norm.x, norm.factors, norm.weight)


def _recall(kept: Sequence[Any], shifted: bool | None, rows: slice = _ALL) -> Tensor:
    """Rows of what `_keep` kept."""
    x, factors, weight = kept
    if factors is None:
        return _rows(x)[rows]
    return _scaled(_rows(x)[rows], factors[rows], weight, bool(shifted))


def _norm_eps(module: Any) -> float | None:
    """The constant in the root, by the names that transformers' norms give it."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _is_shifted(module: Any) -> bool | None:
    """Whether the norm multiplies with 1 + weight (Gemma) or with the weight; None if it does neither.

    Compared with other weights than its own, of which all may be 0 or 1, on rows so small that eps counts as well.
    """
    eps = _norm_eps(module)
    if not isinstance(eps, float) or module.weight.ndim != 1 or module.weight.is_meta:
        return None
    # These norms compute in fp32 whatever they are given.
    probe = copy.deepcopy(module).float() if module.weight.dtype is torch.float64 else copy.deepcopy(module)
    weight = probe.weight
    weight.copy_(_normal(weight.shape, weight.device, weight.dtype, seed=1))
    x = _normal((8, len(weight)), weight.device, weight.dtype)
    x[::2] *= 1e-3
    expected = probe(x)
    for shifted in (False, True):
        if _agree(_RMSNorm.apply(x, weight, eps, shifted)[0], expected):
            return shifted
    return None


@functools.cache
def _norm_class(kind: Any, shifted: bool) -> type:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = self.weight
        usual = not args and not kwargs and x.dtype is weight.dtype and x.dtype is not torch.float64
        if weight.requires_grad or not usual:
            return kind.forward(self, x, *args, **kwargs)
        result, factors = _RMSNorm.apply(x, weight, _norm_eps(self), shifted)
        if result.requires_grad:
            result._lean_norm = _NormOutput(x.detach(), factors, weight, shifted, result._version)
        return result

    return _subclass(kind, forward)


# Rotary positions


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """`x * cos + rotate_half(x) * sin`, or the transposed map."""
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


class _Rotary(torch.autograd.Function):
    """Rotated queries and keys; keeps the tables of cosines and sines, which all layers share."""

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin, False), _rotate(k, cos, sin, False)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_q, cos, sin, True), _rotate(grad_k, cos, sin, True), None, None


@functools.cache
def _lean_rotary(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        whole = cos.shape[-1] == q.shape[-1] == k.shape[-1] and cos.shape[-1] % 2 == 0
        if not whole or not q.dtype is k.dtype is cos.dtype is sin.dtype or cos.requires_grad:
            return function(q, k, cos, sin, unsqueeze_dim)
        return _Rotary.apply(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))

    return rotary


_ROTARY_NAME = "apply_rotary_pos_emb"


@functools.cache
def _rotary_function(kind: Any) -> Callable[..., Any] | None:
    """The function by which an attention class turns queries and keys, if it is the usual one."""
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, types.FunctionType) or _ROTARY_NAME not in forward.__code__.co_names:
        return None
    function = forward.__globals__.get(_ROTARY_NAME)
    if not isinstance(function, types.FunctionType):
        return None
    if list(inspect.signature(function).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return None
    shapes = [(2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8)]
    q, k, cos, sin = (_normal(shape, torch.device("cpu"), torch.float32, seed) for seed, shape in enumerate(shapes))
    with torch.no_grad():
        found, expected = _lean_rotary(function)(q, k, cos, sin), function(q, k, cos, sin)
    if all(map(_agree, found, expected)):
        return function
    log.info("%s keeps its own rotary positions: lean ones would give other values.", kind.__name__)
    return None


@functools.cache
def _attention_class(kind: Any) -> type:
    """The class with its own forward, whose one name for the rotary function means the lean one."""
    own, function = kind.forward, _rotary_function(kind)
    assert function is not None
    names = {**own.__globals__, _ROTARY_NAME: _lean_rotary(function)}
    forward = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return _subclass(kind, functools.wraps(own)(forward))
