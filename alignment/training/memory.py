"""How much memory a training step needs, by arithmetic from the model's shapes.

A model may be on torch's meta device: only its modules and shapes are read. All sizes are bytes. Predictions are good
to about 15 %, on a GPU to 10 %; a run that needs more halves its budget by itself (`PreferenceTrainer.training_step`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from alignment.config.schema import AdapterConfig, Calibration, QuantizationConfig, ReferenceConfig, ReferenceMode
from alignment.kernels.calibrated import is_calibrated
from alignment.policy.adapter import empty_adapter, has_adapter
from alignment.policy.adapter_kinds import plain_name
from alignment.policy.layers import decoder_layers
from alignment.policy.quantize import stacks, unquantised
from alignment.policy.sharding import is_part
from alignment.policy.stored import Checkpoint, nf4_bytes_per_weight
from alignment.reference.frozen import most_updates
from alignment.scoring.head import LOGITS_PER_CHUNK
from alignment.training.layer_memory import (
    Layer,
    expert_weights,
    fixed_share,
    is_counted,
    launched_tokens,
    layer_of,
    layer_weights,
    linears,
    passing_bytes,
)
from alignment.training.master_weights import BYTES as MASTER_BYTES
from alignment.training.optimizers import optimizer_bytes, projected_bytes, projected_matrices

GIB = 2**30
USEFUL_TOKENS = {"cpu": (1024, 1024), "cuda": (8192, 16384)}
"""Least and most positions of a pass, by device, above which larger passes gain no time and only cost memory."""
FIXED_COST = {"cpu": 32, "cuda": 256}
"""Fixed cost of a pass in positions: next to none on a CPU; a GPU unpacks a 4-bit base in the time of 215 positions.

Of a dense model. A mixture unpacks all experts and computes a position with few: its fixed cost is as much larger.
"""
USABLE_SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Share of the free memory that a plan uses: a CPU leaves some to other programs, a GPU a margin for the prediction."""
CONTEXT = {"cpu": int(0.7 * GIB), "cuda": int(0.6 * GIB)}
"""Memory of Python and its libraries on a CPU, of the driver's context and workspaces on a GPU."""
RECOMPUTED = 0.5
"""Share of a step's time that one more forward pass of a frozen base adds; forward and backward cost the same."""
ROUNDING = 64
"""Budgets are multiples of this many positions."""
_END_TENSORS = 4
_LOGIT, _TRAINED_LOGIT = {"cpu": 8, "cuda": 6}, 12
"""Bytes per logit: fp32 logits and their log-softmax, or the derivatives in 16 bits that a GPU's kernel makes of them;
where the head trains, two gradients beside the log-softmax."""
_TRL_ROWS, _TRL_WIDTH, _TRL_LOGIT = 4096, 32768, 36
"""TRL's head works on tiles of so many positions and so wide; without Triton it takes nine fp32 copies of a tile."""


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
        fixed_share: weights of the layers for each weight that computes a position; 1 but for mixtures of experts.
        update: bytes that exist beside weights and states while the weights are updated or the embeddings arrive from
            other ranks, when no activation does.
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
    fixed_share: float = 1.0
    update: int = 0


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a policy's weights.

    Attributes:
        base: the base model, with embeddings and head.
        adapter: its adapter, with what that holds beside weights that train.
        trained: number of weights that train, by the bytes of each.
        quantised: whether linear layers are packed.
        gathered, arriving: where ranks share the base, of layers that are whole for a moment, and of embeddings that
            are before a pass has any activations.
    """

    base: int
    adapter: int
    trained: dict[int, int]
    quantised: bool
    gathered: int = 0
    arriving: int = 0

    @property
    def count(self) -> int:
        """Number of weights that train."""
        return sum(self.trained.values())


def count_weights(model: nn.Module) -> Weights:
    """The weights of a loaded policy, with the scales of packed weights."""
    base = adapter = 0
    trained: dict[int, int] = {}
    quantised = False
    for name, parameter in model.named_parameters():
        size = _here(parameter).nbytes + _scales(getattr(parameter, "quant_state", None))
        if plain_name(name) is None:
            adapter += size
        else:
            base += size
        if parameter.requires_grad:
            each = parameter.element_size()
            trained[each] = trained.get(each, 0) + _here(parameter).numel()
        quantised = quantised or hasattr(parameter, "quant_state")
    for module in model.modules():
        if is_calibrated(module):
            base += sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    return Weights(base, adapter + _fixed_bytes(model), trained, quantised)


def _here(parameter: Any) -> Tensor:
    """What this rank holds of a parameter."""
    return parameter.to_local() if is_part(parameter) else parameter


def _fixed_bytes(model: nn.Module) -> int:
    """Bytes of the matrices of an adapter that do not train: those that VeRA's layers share, BOFT's permutations."""
    names = (".vera_", ".boft_P")
    return sum(b.numel() * b.element_size() for name, b in model.named_buffers() if any(part in name for part in names))


def _scales(state: Any) -> int:
    """Bytes of the scales of a packed weight."""
    if state is None:
        return 0
    nested = 0 if state.state2 is None else state.state2.absmax.numel() * state.state2.absmax.element_size()
    return state.absmax.numel() * state.absmax.element_size() + nested


def plan_policy(
    model: nn.Module,
    value: int,
    adapter: AdapterConfig | None,
    quantization: QuantizationConfig | None,
    spectrum: float | None = None,
) -> tuple[nn.Module, Weights]:
    """A model with the adapter that a run gives it, and the weights that it will have once it is loaded as configured.

    Args:
        model: a causal LM on the meta device, not quantised, without adapter.
        value: bytes per weight that is not quantised.
        adapter: None trains the whole model.
        quantization: None packs nothing.
        spectrum: share of the matrices of each type that train; None: all. The matrices of a type have one size.

    Returns:
        On the meta device. With `spectrum` every matrix has an adapter there, or trains: which ones will is not known.
    """
    base, packed = base_bytes(model, value, quantization)
    policy = copy.deepcopy(model)
    share = 1.0 if spectrum is None else spectrum
    if adapter is None:
        if spectrum is None:
            return policy, Weights(base, 0, {value: sum(p.numel() for p in policy.parameters())}, False)
        head = policy.get_output_embeddings()  # type: ignore[operator]
        policy.requires_grad_(False)
        for _, layer in linears(policy):
            layer.requires_grad_(layer is not head)
        count = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        return policy, Weights(base, 0, {value: round(share * count)}, False)
    policy = empty_adapter(policy, adapter)
    trained: dict[int, int] = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            each = value if ".modules_to_save." in name else 4
            trained[each] = trained.get(each, 0) + parameter.numel()
    trained = {each: round(share * count) for each, count in trained.items()}
    own = sum(each * count for each, count in trained.items())
    return policy, Weights(base, own + _fixed_bytes(policy), trained, packed)


def reference_bytes(
    reference: ReferenceConfig, weights: Weights, *, whole: bool, at_base: bool, refreshes: int | None
) -> int:
    """Bytes of what a live reference keeps beside the policy.

    Args:
        reference: its settings.
        weights: of the policy.
        whole: whether the whole model trains, which is copied then.
        at_base: whether the policy starts at its base, so that its adapter switched off is the reference.
        refreshes: how often the reference follows the policy; None: as often as makes a difference.
    """
    if reference.mode is not ReferenceMode.live:
        return 0
    if whole:
        return weights.base
    most = most_updates(reference.sync_mix)
    copies = (0 if at_base else 1) + (most if refreshes is None else refreshes)
    return min(copies, most) * sum(each * count for each, count in weights.trained.items())


def base_bytes(model: nn.Module, value: int, quantization: QuantizationConfig | None) -> tuple[int, bool]:
    """Bytes of a model on the meta device once it is loaded, and whether layers are packed then.

    Args:
        value: bytes per weight that is not packed.
    """
    causal: Any = model
    head = causal.get_output_embeddings()
    total = sum(parameter.numel() for parameter in model.parameters())
    stored = Checkpoint.of(causal.config)
    if quantization is None and not stored.is_packed:
        return total * value, False
    whole = set(unquantised(model))
    packed = sum(
        layer.weight.numel()
        for name, layer in linears(model)
        if layer is not head and isinstance(layer, nn.Linear) and not whole & {name, *name.split(".")}
    )
    packed += sum(module.get_parameter(leaf).numel() for _, module, leaf in stacks(model))
    each = stored.bytes_per_weight()
    if quantization is not None and not stored.is_packed:
        each = nf4_bytes_per_weight(quantization.double, quantization.calibration is not Calibration.none)
    return (total - packed) * value + round(packed * each), True


def _hidden_share(model: Any) -> float:
    """Share of the weights that are neither embeddings nor head."""
    modules = {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    ends = {id(p): p.numel() for module in modules.values() for p in module.parameters()}
    return 1 - sum(ends.values()) / sum(p.numel() for p in model.parameters())


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
    projected: Sequence[str] | None = None,
) -> Sizes:
    """The sizes of a policy that decide the memory of its step.

    Args:
        model: loaded, or on the meta device. One without the adapter that its weights have counts as one with a LoRA.
        weights: its weights.
        value: bytes per value of its activations.
        optimizer: name, as in `optimizers.OPTIMIZERS`.
        device: "cpu" or "cuda".
        master_weights: whether weights that train in 16 bits have fp32 masters.
        dropout: whether the adapter drops inputs in this stage.
        supervised: True for the SFT stage, whose head is TRL's.
        keys_per_position: of the passes, as `layout.keys_per_position` counts them. Only a GPU keeps gathered keys.
        projected: `optim.target_modules`.
    """
    causal: Any = model
    config = causal.config.get_text_config()
    embeddings, head_layer = causal.get_input_embeddings(), causal.get_output_embeddings()
    hidden = getattr(config, "hidden_size", embeddings.embedding_dim)
    vocabulary = embeddings.num_embeddings
    adapted = weights.adapter > 0
    is_bare = adapted and not has_adapter(model)
    experts = getattr(config, "num_experts_per_tok", None) or 0

    # Layers, down to the lowest that trains: the backward pass ends there
    modules = decoder_layers(model)
    matrices = [layer_weights(layer, experts) for layer in modules]
    keys = keys_per_position if device == "cuda" else 1.0
    layers = tuple(layer_of(layer, hidden, value, experts, adapted, dropout, keys) for layer in modules)
    if adapted and layers and value < 4:  # the adapter in the dtype of the activations
        cast = weights.trained.get(4, 0) * value // len(layers)
        layers = tuple(replace(layer, copies=layer.copies + cast) for layer in layers)
    if not is_bare and not _trains(embeddings):
        lowest = next((i for i, layer in enumerate(modules) if _trains(layer)), 0)
        layers = (*(Layer(0, 0, 0),) * lowest, *layers[lowest:])
    kind = type(causal.get_base_model() if has_adapter(model) else model).__name__
    estimate = attention_estimate(config._attn_implementation)
    if not modules:
        estimate = f"the layers of {kind} are not known"
    elif not all(map(is_counted, modules)):
        estimate = f"the layers of {kind} have another form than the usual one, and only a run measures what they keep"

    # The head
    head_trains = not is_bare and _trains(head_layer)
    if supervised:
        width = min(vocabulary, _TRL_WIDTH)
        head = width * (value if device == "cuda" else _TRL_LOGIT)
        head_limit = _TRL_ROWS * head
    else:
        logit = _TRAINED_LOGIT if head_trains else _LOGIT[device]
        head = vocabulary * logit
        head_limit = LOGITS_PER_CHUNK[device] * logit

    # Weights and the largest matrix that exists for a moment
    largest = max((layer.in_features * layer.out_features for m in modules for _, layer in linears(m)), default=0)
    stacked = max((math.prod(shape) for m in modules for _, own in expert_weights(m) for shape in own), default=0)
    unpacked = max(((2 if weights.quantised else 1) if adapted else 0) * largest, stacked if weights.quantised else 0)
    passing = max((passing_bytes(m, value, adapted) for m in modules), default=0)
    if hasattr(head_layer, "token_adapter"):  # new rows in a tied head: each pass makes a whole head with them
        passing += vocabulary * hidden * value

    # What the optimizer keeps
    states = 0.0
    masters = update = 0
    hidden_share = _hidden_share(causal) if not adapted and _trains(embeddings) else 1.0
    low_rank = projected_matrices(model, optimizer, projected)
    usual = max(weights.trained, key=lambda each: weights.trained[each], default=0)  # the dtype of the matrices
    for each, count in weights.trained.items():
        has_masters = each < MASTER_BYTES and master_weights
        stepped = MASTER_BYTES if has_masters else each
        whole = count
        if each == usual:
            states += sum(projected_bytes(optimizer, matrix.shape, stepped) for matrix in low_rank)
            whole -= sum(matrix.numel() for matrix in low_rank)
        states += whole * optimizer_bytes(optimizer, stepped, hidden_share)
        masters += count * MASTER_BYTES * has_masters
        update += count * (MASTER_BYTES - each) * has_masters
    return Sizes(
        weights=weights.base,
        adapter=weights.adapter,
        gradients=sum(each * count for each, count in weights.trained.items()),
        optimizer=round(states + masters),
        layers=layers,
        ends=_END_TENSORS * hidden * value,
        head=head,
        head_limit=head_limit,
        buffers=max(unpacked * value, passing) + weights.gathered,
        launched=launched_tokens(matrices) if device == "cuda" else 0,
        estimate=estimate,
        fixed_share=fixed_share(matrices),
        update=max(update, weights.arriving),
    )


def attention_estimate(attention: str | None) -> str:
    """Why the activations of layers with this attention are an estimate; empty if they are counted."""
    if attention != "eager":
        return ""
    return "attention=eager keeps several values for each pair of positions of a sequence, which are not counted"


def _trains(module: Any) -> bool:
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())
