"""How much memory a training step needs, by arithmetic from the model's shapes.

A model may be on torch's meta device: only its modules and shapes are read. All sizes are bytes. Predictions are good
to about 15 %, on a GPU to 10 %; a run that needs more halves its budget by itself (`PreferenceTrainer.training_step`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from alignment.config.schema import AdapterConfig, Calibration, QuantizationConfig
from alignment.kernels.calibrated import is_calibrated
from alignment.policy.adapter import empty_adapter
from alignment.policy.adapter_kinds import plain_name
from alignment.policy.layers import decoder_layers
from alignment.policy.quantize import stacks, unquantised
from alignment.policy.stored import Checkpoint, nf4_bytes_per_weight
from alignment.scoring.head import LOGITS_PER_CHUNK
from alignment.training.master_weights import BYTES as MASTER_BYTES
from alignment.training.optimizers import optimizer_bytes

GIB = 2**30
USEFUL_TOKENS = {"cpu": (1024, 1024), "cuda": (8192, 16384)}
"""Least and most positions of a pass, by device, above which larger passes gain no time and only cost memory."""
FIXED_COST = {"cpu": 32, "cuda": 256}
"""Fixed cost of a pass in positions: next to none on a CPU; a GPU unpacks a 4-bit base in the time of 215 positions."""
_LAUNCHED = int(2.25e11)
"""Positions of a pass times the weights of one layer that take a GPU as long as the host needs to launch them.

For a layer forward and back, the host needs about 6 ms whatever the pass's width, and the GPU 4 operations for each
position and weight. At 150 TFLOP/s: memory is short on GPUs of that speed; an H200 did 270 for Qwen3-1.7B. The number
of layers does not matter: it multiplies both.
"""
USABLE_SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Share of the free memory that a plan uses: a CPU leaves some to other programs, a GPU a margin for the prediction."""
CONTEXT = {"cpu": int(0.7 * GIB), "cuda": int(0.6 * GIB)}
"""Memory of Python and its libraries on a CPU, of the driver's context and workspaces on a GPU."""
RECOMPUTED = 0.5
"""Share of a step's time that one more forward pass of a frozen base adds; forward and backward cost the same."""
ROUNDING = 64
"""Budgets are multiples of this many positions."""
_WORKING_MLP, _WORKING_HIDDEN = 4, 3
"""Tensors, as wide as the MLP and as the layer, that a layer's backward pass holds at once beside the saved ones."""
_WORKING_ROWS, _WORKING_GATES = 4, 6
"""The same of a mixture's experts, for each expert of a position: as wide as the layer, and as one expert."""
_PROBABILITY, _CHOICE = 8, 24
"""Bytes that a router keeps of each expert, and of each one that it chooses."""


_END_TENSORS = 4
_MASK = 1
"""Bytes per value under dropout: a GPU keeps a mask, a CPU the factors themselves."""
_LOGIT, _TRAINED_LOGIT = {"cpu": 8, "cuda": 6}, 12
"""Bytes per logit: fp32 logits and their log-softmax, or the derivatives in 16 bits that a GPU's kernel makes of them;
where the head trains, two gradients beside the log-softmax."""
_TRL_ROWS, _TRL_WIDTH, _TRL_LOGIT = 4096, 32768, 36
"""TRL's head works on tiles of so many positions and so wide; without Triton it takes nine fp32 copies of a tile."""


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


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers of a policy that decide the memory of its step.

    Attributes:
        weights, adapter, gradients, optimizer: bytes. The optimizer's include the masters of 16-bit weights.
        layers: in order; empty if the model's layers are not known.
        ends: bytes per position kept outside the layers: the last norm, the head's input, its derivatives.
        head: bytes per position of the logits that exist at one time.
        head_limit: upper limit of these logits' bytes.
        launched: positions of a pass that take a GPU as long as the host needs to launch it; 0 on a CPU.
        buffers: bytes of the largest weight while it is dequantised or has its adapter added.
        estimate: why the activations are a rough guess; empty if every tensor is counted.
        update: bytes that exist beside weights and states while the weights are updated, when no activation does.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    layers: tuple[Layer, ...]
    ends: int
    head: int
    head_limit: int
    buffers: int
    launched: int
    estimate: str = ""
    update: int = 0


def _linears(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, linear layer) of every linear layer of the base model, also inside an adapter."""
    for name, child in module.named_modules():
        parts = name.split(".")
        if "base_layer" in parts or any(part.startswith("lora_") for part in parts):
            continue
        if isinstance(getattr(child, "in_features", None), int) and isinstance(
            getattr(child, "out_features", None), int
        ):
            yield name, child


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
    it, keeps per position: the input of each norm; queries and keys before their own norms, if they have any; queries,
    keys, values and the output of attention; gate and up. With dropout each linear layer also keeps its dropped input
    and the mask, and the MLP its activation. If the base trains, the projections also keep their inputs, the norms
    the normalised values, and the MLP its activation and product.

    Of a mixture of experts with a LoRA it keeps the input, gate and up of each chosen expert, and the router's
    probabilities; one that trains keeps every expert's input and result too.

    Args:
        layer: with or without an adapter, also on the meta device.
        hidden: width of the model.
        value: bytes per value of the activations.
        experts_per_token: for a mixture of experts, otherwise 0.
        adapted: whether an adapter trains instead of the layer.
        dropout: whether that adapter drops inputs.
        keys_per_position: how many keys, and values, the attention keeps for each position.
    """
    linears = {name.rpartition(".")[2]: child for name, child in _linears(layer)}
    names = {name.rpartition(".")[2] for name, _ in layer.named_modules()}
    widths = {name: (child.in_features, child.out_features) for name, child in linears.items()}
    normed = sum("norm" in name for name, _ in layer.named_children()) * hidden
    saved = gathered = 0
    wide = 0
    if {"q_proj", "k_proj", "v_proj"} <= widths.keys():
        query, keys = widths["q_proj"][1], widths["k_proj"][1]
        saved += 2 * query + 2 * keys + (0 if adapted else hidden)
        gathered = round(2 * keys * (keys_per_position - 1))
        if {"q_norm", "k_norm"} <= names:
            normed += query + keys
    else:
        saved += sum(a + b for name, (a, b) in widths.items() if name not in _MLP)
    if {"gate_proj", "up_proj", "down_proj"} <= widths.keys():
        wide = widths["gate_proj"][1]
        if not adapted:
            saved += hidden + 4 * wide
        else:
            saved += (3 if dropout else 2) * wide
    routed = working = 0
    for experts in _expert_weights(layer):
        width = min(experts[-1][1:])
        wide = max(wide, experts_per_token * width)
        saved += hidden + experts_per_token * (2 * width if adapted else 5 * width + 2 * hidden)
        routed += _PROBABILITY * experts[-1][0] + _CHOICE * experts_per_token
        working = experts_per_token * (_WORKING_ROWS * hidden + _WORKING_GATES * width)
    if not wide:
        saved += sum(a + b for name, (a, b) in widths.items() if name in _MLP)
        wide = max((max(pair) for pair in widths.values()), default=hidden)
    size = (saved + gathered + normed) * value + routed
    if dropout:
        size += sum(a for a, _ in widths.values()) * (value + (_MASK if value < 4 else 4))
    if not adapted:
        size += normed * (value + (4 if value < 4 else 0))
    working = max(working, _WORKING_MLP * wide + _WORKING_HIDDEN * hidden)
    return Layer(hidden * value, size, working * value)


def _expert_weights(module: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Shapes (experts, ., .) of the stacked weights of each mixture of experts, packed or not, the down one last."""
    for child in module.modules():
        first = next((name for name in ("gate_up_proj", "up_proj") if name in child._parameters), None)
        if first is None or "down_proj" not in child._parameters:
            continue
        shapes = [_shape(child._parameters[name]) for name in (first, "down_proj")]
        if all(len(shape) == 3 for shape in shapes):
            yield shapes


def _shape(parameter: Any) -> tuple[int, ...]:
    state = getattr(parameter, "quant_state", None)
    return tuple((parameter if state is None else state).shape)


def launched_tokens(layers: Sequence[nn.Module], experts_per_token: int) -> int:
    """Positions of a pass that take a GPU as long as the host needs to launch it; 0 if the layers are not known."""
    weights = max((sum(a.in_features * a.out_features for _, a in _linears(layer)) for layer in layers), default=0)
    for experts in (found for layer in layers[-1:] for found in _expert_weights(layer)):
        weights += experts_per_token * sum(math.prod(shape[1:]) for shape in experts)
    return _LAUNCHED // weights if weights else 0


_MLP = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2"}


def is_counted(layer: nn.Module) -> bool:
    """Whether the layer has the usual form, so that all of its tensors are counted."""
    names = {name.rpartition(".")[2] for name, _ in _linears(layer)}
    mixes = any(True for _ in _expert_weights(layer))
    return {"q_proj", "k_proj", "v_proj"} <= names and (mixes or {"gate_proj", "up_proj", "down_proj"} <= names)


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a policy's weights.

    Attributes:
        base: the base model, with embeddings and head.
        adapter: its adapter.
        trained: number of weights that train.
        trained_value: bytes of each of them.
        quantised: whether linear layers are packed.
    """

    base: int
    adapter: int
    trained: int
    trained_value: int
    quantised: bool


def count_weights(model: nn.Module) -> Weights:
    """The weights of a loaded policy, with the scales of packed weights."""
    base = adapter = trained = 0
    trained_value = 4
    quantised = False
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size() + _scales(getattr(parameter, "quant_state", None))
        if plain_name(name) is None:
            adapter += size
        else:
            base += size
        if parameter.requires_grad:
            trained += parameter.numel()
            trained_value = parameter.element_size()
        quantised = quantised or hasattr(parameter, "quant_state")
    for module in model.modules():
        if is_calibrated(module):
            base += sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    return Weights(base, adapter + _shared_bytes(model), trained, trained_value, quantised)


def _shared_bytes(model: nn.Module) -> int:
    """Bytes of the random matrices that all layers of a VeRA share."""
    return sum(b.numel() * b.element_size() for name, b in model.named_buffers() if ".vera_" in name)


def _scales(state: Any) -> int:
    """Bytes of the scales of a packed weight."""
    if state is None:
        return 0
    nested = 0 if state.state2 is None else state.state2.absmax.numel() * state.state2.absmax.element_size()
    return state.absmax.numel() * state.absmax.element_size() + nested


def plan_weights(
    model: nn.Module, value: int, adapter: AdapterConfig | None, quantization: QuantizationConfig | None
) -> Weights:
    """The weights that a model on the meta device will have once it is loaded as configured.

    Args:
        model: a causal LM, not quantised, without adapter.
        value: bytes per weight that is not quantised.
        adapter: None trains the whole model.
        quantization: None packs nothing.
    """
    causal: Any = model
    head = causal.get_output_embeddings()
    linears = [(name, layer) for name, layer in _linears(model) if layer is not head]
    total = sum(parameter.numel() for parameter in model.parameters())
    stored = Checkpoint.of(causal.config)
    is_packed = quantization is not None or stored.is_packed
    packed = 0
    if is_packed:
        whole = set(unquantised(model))
        packed = sum(
            layer.weight.numel()
            for name, layer in linears
            if isinstance(layer, nn.Linear) and not whole & {name, *name.split(".")}
        )
        packed += sum(module.get_parameter(leaf).numel() for _, module, leaf in stacks(model))
    base = (total - packed) * value
    if is_packed:
        each = stored.bytes_per_weight()
        if quantization is not None and not stored.is_packed:
            each = nf4_bytes_per_weight(quantization.double, quantization.calibration is not Calibration.none)
        base += round(packed * each)
    if adapter is None:
        return Weights(base, 0, total, value, False)
    adapted = empty_adapter(copy.deepcopy(model), adapter)
    added = [p for name, p in adapted.named_parameters() if plain_name(name) is None]
    count = sum(p.numel() for p in added if p.requires_grad)
    return Weights(base, 4 * count + _shared_bytes(adapted), count, 4, is_packed)


def _hidden_share(model: Any) -> float:
    """Share of the weights that are neither embeddings nor head."""
    modules = {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    ends = {id(p): p.numel() for module in modules.values() for p in module.parameters()}
    return 1 - sum(ends.values()) / sum(p.numel() for p in model.parameters())


def adapter_estimate(adapter: AdapterConfig | None) -> str:
    """Why the activations of an adapter are an estimate; empty if they are counted."""
    if adapter is None or adapter.kind == "lora":
        return ""
    return f"adapter.kind={adapter.kind} runs peft's own forward, which keeps more than a LoRA's that is counted"


def sizes_of(
    model: nn.Module,
    weights: Weights,
    *,
    value: int,
    optimizer: str,
    device: str,
    master_weights: bool = True,
    dropout: bool = False,
    supervised: bool = False,
    keys_per_position: float = 1.0,
    estimate: str = "",
) -> Sizes:
    """The sizes of a policy that decide the memory of its step.

    Args:
        model: loaded, or on the meta device without its adapter.
        weights: its weights.
        value: bytes per value of its activations.
        optimizer: name, as in `optimizers.OPTIMIZERS`.
        device: "cpu" or "cuda".
        master_weights: whether weights that train in 16 bits have fp32 masters.
        dropout: whether the adapter drops inputs in this stage.
        supervised: True for the SFT stage, whose head is TRL's.
        keys_per_position: of the passes, as `layout.keys_per_position` counts them. Only a GPU keeps gathered keys.
        estimate: why the activations are one, where the model itself gives no other reason.
    """
    causal: Any = model
    config = causal.config.get_text_config()
    embeddings = causal.get_input_embeddings()
    hidden = getattr(config, "hidden_size", embeddings.embedding_dim)
    vocabulary = embeddings.num_embeddings
    adapted = weights.adapter > 0
    experts = getattr(config, "num_experts_per_tok", None) or 0
    modules = decoder_layers(model)
    keys = keys_per_position if device == "cuda" else 1.0
    layers = tuple(layer_of(layer, hidden, value, experts, adapted, dropout, keys) for layer in modules)
    if adapted and layers and value < weights.trained_value:  # the adapter in the dtype of the activations
        cast = weights.trained * value // len(layers)
        layers = tuple(replace(layer, copies=layer.copies + cast) for layer in layers)
    largest = max((layer.in_features * layer.out_features for m in modules for _, layer in _linears(m)), default=0)
    if not modules:
        estimate = f"the layers of {type(model).__name__} are not known"
    elif not all(map(is_counted, modules)):
        estimate = f"the layers of {type(model).__name__} have another form than the usual one"
    if supervised:
        width = min(vocabulary, _TRL_WIDTH)
        head = width * (value if device == "cuda" else _TRL_LOGIT)
        head_limit = _TRL_ROWS * head
    else:
        logit = _LOGIT[device] if adapted else _TRAINED_LOGIT
        head = vocabulary * logit
        head_limit = LOGITS_PER_CHUNK[device] * logit
    copies = (2 if weights.quantised else 1) if weights.adapter else 0
    trained, stepped = weights.trained, weights.trained_value
    has_masters = stepped < MASTER_BYTES and master_weights
    if has_masters:
        stepped = MASTER_BYTES
    states = optimizer_bytes(optimizer, stepped, 1.0 if adapted else _hidden_share(causal))
    stacked = max((math.prod(shape) for m in modules for shapes in _expert_weights(m) for shape in shapes), default=0)
    unpacked = max(copies * largest, stacked if weights.quantised else 0)
    return Sizes(
        weights=weights.base,
        adapter=weights.adapter,
        gradients=trained * weights.trained_value,
        optimizer=round(trained * (states + (MASTER_BYTES if has_masters else 0))),
        layers=layers,
        ends=_END_TENSORS * hidden * value,
        head=head,
        head_limit=head_limit,
        buffers=unpacked * value,
        launched=launched_tokens(modules, experts) if device == "cuda" else 0,
        estimate=estimate,
        update=trained * (MASTER_BYTES - weights.trained_value) if has_masters else 0,
    )
