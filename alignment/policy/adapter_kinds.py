"""What differs between kinds of adapters: peft's settings, what an adapter adds to each module, and merged weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignment.config.adapters import AdapterConfig

ADAPTER = "default"
"""peft's name of the adapter."""

_ADDED = (".lora_", ".vera_", ".oft_", ".boft_", ".modules_to_save.", ".trainable_tokens_")
_HOLDERS = ("lora_A", "lora_embedding_A", "vera_lambda_b", "oft_R", "boft_R")
"""Where peft's layers have an adapter's tensors, by its name."""
_WRAPPERS = re.compile(r"(\.(base_layer|original_module|token_adapter))+(?=\.|$)")
"""Around experts one layer is in another."""


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to one module.

    Attributes:
        name: of the module in the base.
        form: what decides the effect beside the tensors: a LoRA's factor, the size of blocks, ids of tokens.
        tensors: of the adapter.
    """

    name: str
    form: str
    tensors: tuple[Tensor, ...]


def peft_config(config: AdapterConfig, targets: list[str] | None = None, experts: list[str] | None = None) -> Any:
    """The settings as peft takes them; the adapter of a LoRA starts as peft starts it (see `adapter_start`).

    Args:
        config: the settings.
        targets, experts: from `chosen_targets`, where a model is at hand.
    """
    from peft import BOFTConfig, LoraConfig, OFTConfig, VeraConfig

    targets = config.target_modules if targets is None else targets
    is_pattern = targets == ["all-linear"]
    common: dict[str, Any] = {
        "target_modules": targets[0] if is_pattern else targets,
        "modules_to_save": config.modules_to_save or None,
        "layers_to_transform": None if is_pattern else config.layers_to_transform,
        "task_type": "CAUSAL_LM",
    }
    excluded: dict[str, Any] = {"exclude_modules": config.exclude_modules or None}
    if config.kind == "vera":
        return VeraConfig(**common, r=config.r, vera_dropout=config.dropout)  # type: ignore[arg-type]
    if config.kind == "oft":
        size: Any = config.block_size
        return OFTConfig(**common, **excluded, r=0, oft_block_size=size, module_dropout=config.dropout)
    if config.kind == "boft":
        size = config.block_size
        return BOFTConfig(**common, **excluded, boft_block_size=size, boft_dropout=config.dropout)
    return LoraConfig(
        **common,
        **excluded,
        r=config.r,  # type: ignore[arg-type]
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        target_parameters=experts,
        trainable_token_indices=list(config.trainable_tokens) or None,
        init_lora_weights=config.init if config.init in ("gaussian", "orthogonal") else True,  # type: ignore[arg-type]
        use_rslora=config.rslora,
        use_dora=config.kind == "dora",
    )


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with a LoRA, by their names in the base."""
    from peft.tuners.lora import LoraLayer

    causal: Any = model
    named = causal.get_base_model().named_modules()
    return {name: module for name, module in named if isinstance(module, LoraLayer)}


def plain_name(name: str) -> str | None:
    """The name that a tensor or module has in the base without peft; None for what an adapter adds."""
    if any(part in f".{name}." for part in _ADDED):
        return None
    return _WRAPPERS.sub("", name.removeprefix("base_model.model."))


def updates(model: nn.Module) -> Iterator[Update]:
    """What every active adapter adds to each module. One that changes nothing, as when it is fresh, is left out."""
    shared: set[int] = set()
    for name, module in model.named_modules():
        for key in _active(module):
            form, tensors, has_effect = _described(module, key)
            if not has_effect:
                continue
            yield Update(name, form, tensors)
            for matrix in (module.vera_A[key], module.vera_B[key]) if form == "vera" else ():
                if id(matrix) not in shared:  # one pair for all layers
                    shared.add(id(matrix))
                    yield Update("vera", "shared", (matrix,))


def _active(module: Any) -> list[str]:
    """The active adapters that a module has tensors of."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, TrainableTokensWrapper):
        layer: Any = module.token_adapter
        return [] if layer.tied_adapter is not None else [k for k in layer.active_adapters if k in layer.token_indices]
    if isinstance(module, ModulesToSaveWrapper):
        return [key for key in module.active_adapters if key in module.modules_to_save]
    if not isinstance(module, BaseTunerLayer):
        return []
    holders = (getattr(module, name, None) for name in _HOLDERS)
    known = {key for holder in holders if holder is not None for key in holder.keys()}  # noqa: SIM118
    return [key for key in module.active_adapters if key in known]


@torch.no_grad()
def _described(module: Any, key: str) -> tuple[str, tuple[Tensor, ...], bool]:
    """Form and tensors of a module's adapter, and whether it changes what the module computes."""
    if hasattr(module, "token_adapter"):
        layer = module.token_adapter
        delta, ids = layer.trainable_tokens_delta[key], list(layer.token_indices[key])
        own = layer.base_layer.weight[ids].to(delta.dtype)
        return f"tokens {ids}", (delta,), not torch.equal(delta, own)
    if hasattr(module, "modules_to_save"):
        copies = tuple(module.modules_to_save[key].parameters())
        originals = module.original_module.parameters()
        return "whole", copies, not all(torch.equal(a, b) for a, b in zip(copies, originals, strict=True))
    if hasattr(module, "vera_lambda_b"):
        b, d = module.vera_lambda_b[key], module.vera_lambda_d[key]
        return "vera", (b, d), bool(b.any() and d.any())
    if hasattr(module, "oft_R"):
        rotation = module.oft_R[key].weight
        return f"oft {module.oft_block_size[key]}", (rotation,), bool(rotation.any())
    if hasattr(module, "boft_R"):
        rotation, scale = module.boft_R[key], module.boft_s[key]
        turns = bool((rotation - rotation.transpose(-1, -2)).any() or (scale != 1).any())
        return f"boft {module.boft_block_size[key]}", (rotation, scale), turns
    return _described_lora(module, key)


def _described_lora(layer: Any, key: str) -> tuple[str, tuple[Tensor, ...], bool]:
    a: Tensor
    b: Tensor
    if key in layer.lora_A:
        a, b = layer.lora_A[key].weight, layer.lora_B[key].weight
    else:
        a, b = layer.lora_embedding_A[key], layer.lora_embedding_B[key]
    form, adds = repr(layer.scaling[key]), bool(a.any() and b.any())
    if key not in layer.lora_magnitude_vector:
        return form, (a, b), adds
    magnitude = layer.lora_magnitude_vector[key].weight
    return f"dora {form}", (a, b, magnitude), adds or not torch.equal(magnitude, dora_norm(layer, key))


@torch.no_grad()
def dora_norm(layer: Any, key: str) -> Tensor:
    """The magnitudes with which a DoRA without an update is the base: norms of rows, in the adapter's dtype.

    peft starts with norms in the dtype of the base, and then divides by those in the adapter's: on a base of 16 bits
    that moves the start by what rounding the magnitudes loses.
    """
    from peft.utils.integrations import dequantize_module_weight

    dora = layer.lora_magnitude_vector[key]
    weight = dequantize_module_weight(layer.get_base_layer()).to(dora.weight.dtype)
    norm: Tensor = dora.get_weight_norm(weight, torch.zeros((), device=weight.device, dtype=weight.dtype), 1.0)
    return norm.to(dora.weight.dtype)


def is_product_update(model: nn.Module) -> bool:
    """Whether all that trains beside the base are a LoRA's A and B, so that updates can be mixed exactly.

    An elastic connection (lora_iec) is folded into these at all times.
    """
    from peft.tuners.lora import LoraLayer

    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    known = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_iec.")
    plain = all(any(part in name for part in known) for name in names)
    return plain and not any(isinstance(m, LoraLayer) and m.lora_magnitude_vector for m in model.modules())


def merged_weight(layer: Any, weight: Tensor) -> Tensor:
    """The weight of an adapted layer with its active adapters in it.

    Args:
        layer: peft's layer of a linear layer or, for a LoRA, of an embedding.
        weight: of the base in fp32, as the layer stores it once it is de-quantised.
    """
    for key in _active(layer):
        if key in getattr(layer, "lora_variant", ()):  # such as DoRA, which rescales the sum
            weight = layer.lora_variant[key].merge_safe(layer, key, weight)
        elif hasattr(layer, "oft_R"):
            weight = weight @ layer.get_delta_weight(key).float().T  # it rotates the inputs
        elif hasattr(layer, "boft_R"):
            rotation, scale = layer.get_delta_weight(key)
            weight = (weight @ rotation.float().T) * scale.float()
        else:
            weight = weight + layer.get_delta_weight(key).float()
    return weight
