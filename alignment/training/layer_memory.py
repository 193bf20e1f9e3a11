"""What one decoder layer keeps for its backward pass, by arithmetic from its modules' shapes and what trains in them.

A frozen layer and a plain LoRA run through the fused forwards of `kernels`. A layer that trains itself runs its own
forward, and every other adapter peft's; each keeps more, which is counted here for each linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_LAUNCHED = int(2.25e11)
"""Positions of a pass times the weights of one layer that take a GPU as long as the host needs to launch them.

For a layer forward and back, the host needs about 6 ms whatever the pass's width, and the GPU 4 operations for each
position and weight. At 150 TFLOP/s: memory is short on GPUs of that speed; an H200 did 270 for Qwen3-1.7B. The number
of layers does not matter: it multiplies both.
"""
_WORKING_MLP, _WORKING_HIDDEN = 4, 3
"""Tensors, as wide as the MLP and as the layer, that a layer's backward pass holds at once beside the saved ones."""
_WORKING_EXPERTS = {True: (4, 6), False: (3, 4)}
"""The same of a mixture's experts, with and without adapters of theirs, for each expert of a position: as wide as the
layer, and as one expert."""
_PROBABILITY, _CHOICE = 8, 24
"""Bytes that a router keeps of each expert, and of each one that it chooses."""
_HOLDERS = ("lora_", "vera_", "oft_", "boft_", "original_module", "modules_to_save")
"""Where peft has modules of its own, or two of one."""
_ROTATION, _BOFT, _DORA = 16, 5, 4
"""Bytes of OFT's rotations by their number of values, and (n, n) or (n, m) matrices that exist in a forward at once."""
_MASK = 1
"""Bytes per value under dropout: a GPU keeps a mask, a CPU the factors themselves."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Bytes of one decoder layer, per position.

    Attributes:
        entering: its input; a checkpointed layer keeps nothing else.
        saved: what its backward pass reads, including its input.
        working: what exists beside that at the widest moment of its backward pass.
        copies: in total, not per position: copies of weights that its backward pass reads.
    """

    entering: int
    saved: int
    working: int
    copies: int = 0


def linears(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, linear layer) of every linear layer of the base model, also inside an adapter."""
    for name, child in module.named_modules():
        parts = name.split(".")
        if "base_layer" in parts or any(part.startswith(_HOLDERS) for part in parts):
            continue
        if isinstance(getattr(child, "in_features", None), int) and isinstance(
            getattr(child, "out_features", None), int
        ):
            yield name, child


@dataclass(frozen=True, slots=True)
class _Form:
    """What a linear layer of (n, m) keeps beside what every layer keeps, because of what trains in it.

    Attributes:
        fused: whether it runs in the fused forward, which recomputes what it reads.
        reads: whether its backward pass reads its input, which neighbours with the same input share.
        values: per position, as wide as the activations.
        fixed: bytes in total.
        passing: bytes in total of matrices that exist only while its forward runs.
    """

    fused: bool = False
    reads: bool = False
    values: int = 0
    fixed: int = 0
    passing: int = 0


def _form(layer: Any, value: int, adapted: bool) -> _Form:
    """The form of a linear layer, as peft's layers and torch's compute it.

    VeRA keeps its result and what lies between its two matrices. DoRA keeps its input, and the results of the layer and
    of the update, to which its magnitudes give factors. OFT keeps its input, BOFT its input, the result before its
    factors, and rotations as large as (n, n). In 16 bits the fp32 adapters of DoRA and OFT make every layer keep a copy
    of its input, where neighbours would share one.
    """
    n, m = layer.in_features, layer.out_features
    is_wide = value >= 4
    if hasattr(layer, "boft_R"):
        block = next(iter(layer.boft_block_size.values()))
        rotations = (2 if is_wide else 3) * n * n * value + _ROTATION * n * block
        return _Form(reads=True, values=m, fixed=rotations, passing=_BOFT * n * n * value)
    if hasattr(layer, "oft_R"):
        block = next(iter(layer.oft_block_size.values()))
        return _Form(reads=is_wide, values=0 if is_wide else n, fixed=_ROTATION * n * block)
    if hasattr(layer, "vera_lambda_d"):
        rank = len(next(iter(layer.vera_lambda_d.values())))
        return _Form(values=m + rank, fixed=0 if is_wide else rank * (n + m) * value)
    if getattr(layer, "lora_magnitude_vector", None):
        kept = 2 * m + next(iter(layer.r.values()))
        return _Form(reads=is_wide, values=kept if is_wide else kept + n, passing=_DORA * n * m * 4)
    if hasattr(layer, "modules_to_save") or (not adapted and layer.weight.requires_grad):
        return _Form(reads=True)
    weight = getattr(layer.get_base_layer(), "weight", None) if hasattr(layer, "lora_A") else None
    if weight is not None and weight.dtype is torch.int8:
        return _Form(reads=is_wide, values=next(iter(layer.r.values())) + (0 if is_wide else n))
    return _Form(fused=True)


def passing_bytes(layer: nn.Module, value: int, adapted: bool) -> int:
    """Bytes of the matrices that the widest linear layer makes anew in each forward, beside a dequantised weight."""
    return max((_form(child, value, adapted).passing for _, child in linears(layer)), default=0)


def layer_of(
    layer: nn.Module,
    hidden: int,
    value: int,
    experts_per_token: int,
    adapted: bool,
    dropout: bool,
    keys_per_position: float = 1.0,
) -> Layer:
    """Count the tensors that the backward pass of one decoder layer reads.

    The usual layer (attention with separate projections, gated MLP) with a LoRA without dropout, as `kernels` computes
    it, keeps per position: the input of each norm, and the layer's and the MLP's own where their norms come after them;
    queries and keys before their own norms, if they have any; queries, keys, values and the output of attention; gate
    and up. With dropout each linear layer also keeps its dropped input and the mask, and the MLP its activation.
    Projections that train, and some adapters, also keep their inputs (see `_form`), and an MLP that does not run fused
    its activation. Norms that train keep the normalised values too.

    Of a mixture of experts with a LoRA it keeps the input, gate and up of each chosen expert, and the router's
    probabilities; one that trains keeps every expert's input and result too.

    Args:
        layer: with or without an adapter, also on the meta device. Without one that `adapted` promises, its linear
            layers are taken for those of a LoRA.
        hidden: width of the model.
        value: bytes per value of the activations.
        experts_per_token: for a mixture of experts, otherwise 0.
        adapted: whether an adapter trains instead of the layer.
        dropout: whether that adapter drops inputs.
        keys_per_position: how many keys, and values, the attention keeps for each position.
    """
    children = {name.rpartition(".")[2]: child for name, child in linears(layer)}
    names = {name.rpartition(".")[2] for name, _ in layer.named_modules()}
    widths = {name: (child.in_features, child.out_features) for name, child in children.items()}
    forms = {name: _form(child, value, adapted) for name, child in children.items()}
    reading = {name for name, form in forms.items() if form.reads}
    norms = [name for name, _ in layer.named_children() if "norm" in name]
    after = 2 if norms and all(name.startswith("post") for name in norms) else 0  # attention and MLP have none before
    normed = (len(norms) + after) * hidden
    saved = sum(form.values for form in forms.values())
    gathered = wide = 0

    # Attention and MLP
    if {"q_proj", "k_proj", "v_proj"} <= widths.keys():
        query, keys = widths["q_proj"][1], widths["k_proj"][1]
        saved += 2 * query + 2 * keys + (hidden if reading & {"q_proj", "k_proj", "v_proj"} else 0)
        gathered = round(2 * keys * (keys_per_position - 1))
        if names & {"q_norm", "query_layernorm"}:
            normed += query + keys
    else:
        saved += sum(a + b for name, (a, b) in widths.items() if name not in _MLP)
    own_mlp = dropout or any(not form.fused for name, form in forms.items() if name in _MLP)
    if {"gate_proj", "up_proj", "down_proj"} <= widths.keys():
        wide = widths["gate_proj"][1]
        saved += (3 if own_mlp else 2) * wide
        saved += (hidden if reading & {"gate_proj", "up_proj"} else 0) + (wide if "down_proj" in reading else 0)

    # Experts, and layers of another form
    routed = working = 0
    adapters = [name for name, _ in layer.named_parameters() if ".lora_" in name]
    for module, experts in expert_weights(layer):
        width = math.prod(experts[-1][1:]) // hidden
        wide = max(wide, experts_per_token * width)
        frozen = adapted or not any(p.requires_grad for p in module.parameters())
        saved += hidden + experts_per_token * (2 * width if frozen else 5 * width + 2 * hidden)
        routed += _PROBABILITY * experts[-1][0] + _CHOICE * experts_per_token
        rows, gates = _WORKING_EXPERTS[not adapters or any("experts" in name for name in adapters)]
        working = experts_per_token * (rows * hidden + gates * width)
    if not wide:
        saved += sum(a + b for name, (a, b) in widths.items() if name in _MLP)
        joined = {"gate_up_proj": 2}  # gate and up in one
        wide = max((max(n, m // joined.get(name, 1)) for name, (n, m) in widths.items()), default=hidden)

    # In bytes
    size = (saved + gathered + normed) * value + routed
    if dropout:
        size += sum(a for a, _ in widths.values()) * (value + (_MASK if value < 4 else 4))
    if not adapted and any(p.requires_grad for name, p in layer.named_parameters() if "norm" in name):
        size += normed * 4  # the normalised values; in 16 bits the input is kept in fp32
    working = max(working, _WORKING_MLP * wide + _WORKING_HIDDEN * hidden)
    return Layer(hidden * value, size, working * value, sum(form.fixed for form in forms.values()))


def expert_weights(module: nn.Module) -> Iterator[tuple[nn.Module, list[tuple[int, ...]]]]:
    """Each mixture of experts, with the shapes (experts, ., .) of its stacked weights, packed or not, the down one
    last."""
    for child in module.modules():
        first = next((name for name in ("gate_up_proj", "up_proj") if name in child._parameters), None)
        if first is None or "down_proj" not in child._parameters:
            continue
        shapes = [_shape(child._parameters[name]) for name in (first, "down_proj")]
        if all(len(shape) == 3 for shape in shapes):
            yield child, shapes


def _shape(parameter: Any) -> tuple[int, ...]:
    state = getattr(parameter, "quant_state", None)
    return tuple((parameter if state is None else state).shape)


def layer_weights(layer: nn.Module, experts_per_token: int) -> tuple[int, int]:
    """How many weights a layer has in its matrices, and how many of them compute one position."""
    total = active = sum(linear.in_features * linear.out_features for _, linear in linears(layer))
    for _, experts in expert_weights(layer):
        total += sum(math.prod(shape) for shape in experts)
        active += max(1, experts_per_token) * sum(math.prod(shape[1:]) for shape in experts)
    return total, active


def launched_tokens(weights: Sequence[tuple[int, int]]) -> int:
    """Positions of a pass that take a GPU as long as the host needs to launch it; 0 if the layers are not known.

    Args:
        weights: of each layer, as `layer_weights` counts them.
    """
    most = max((active for _, active in weights), default=0)
    return _LAUNCHED // most if most else 0


def fixed_share(weights: Sequence[tuple[int, int]]) -> float:
    """How many weights a pass unpacks for each one that computes a position: 1 but for mixtures of experts."""
    active = sum(active for _, active in weights)
    return sum(total for total, _ in weights) / active if active else 1.0


_MLP = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2"}


def is_counted(layer: nn.Module) -> bool:
    """Whether the layer has the usual form, so that all of its tensors are counted; state-space blocks have not."""
    names = {name.rpartition(".")[2] for name, _ in linears(layer)}
    mixes = any(True for _ in expert_weights(layer))
    usual = {"q_proj", "k_proj", "v_proj"} <= names and (mixes or {"gate_proj", "up_proj", "down_proj"} <= names)
    return usual and not has_states(layer)


def has_states(layer: nn.Module) -> bool:
    """Whether the layer has a state-space block, linear attention or the like: all begin with a convolution."""
    return any(isinstance(module, nn.Conv1d) for module in layer.modules())
