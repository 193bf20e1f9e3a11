"""LoRA adapters: attach one to a model, load a saved one, and list what it adds to the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignment.config.schema import AdapterConfig
from alignment.errors import UserError, did_you_mean
from alignment.kernels.experts import stand_ins
from alignment.kernels.patch import patch_layers
from alignment.policy.load import one_line
from alignment.policy.quantize import stacks

_DESCRIBED = {"r", "lora_alpha", "lora_dropout", "target_modules", "init_lora_weights", "use_rslora"}
"""Fields of a saved adapter that our settings describe."""
_SELECTS = {"layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters"}
"""Fields that choose layers; which ones they have chosen is seen in the saved weights."""
_WITHOUT_EFFECT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "fan_in_fan_out", "megatron_core", "runtime_config", "loftq_config", "ensure_weight_tying"),
    *("eva_config", "corda_config"),
}
"""Fields that say nothing about what a saved adapter computes."""
_UNCHANGED_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Kinds of init that leave the weights of the base as they are."""

_OR_NEW = "or set model.name to a merged model (export.merge=true writes one) to train a new adapter on it"


def attach_adapter(model: nn.Module, config: AdapterConfig | None, seed: int) -> nn.Module:
    """Attach a fresh LoRA adapter, or with `config=None` make all weights trainable (full fine-tuning).

    Raises:
        UserError: a name of `target_modules` is no module of the model, or peft refuses the settings.
    """
    if config is None:
        patch_layers(model.requires_grad_(True))
        return model
    from peft import LoraConfig, get_peft_model

    with stand_ins(model):
        _require_targets(model, config.target_modules)
        target, experts = _targets(model, config.target_modules)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=target,
        target_parameters=experts,
        init_lora_weights=True if config.init == "default" else config.init,  # type: ignore[arg-type]
        use_rslora=config.rslora,
        task_type="CAUSAL_LM",
    )
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # its default: every GPU it sees
        torch.manual_seed(seed)  # the same adapter whatever was drawn before, in a resumed run too
        try:
            with stand_ins(model):
                adapted = get_peft_model(model, lora)
        except (ValueError, TypeError) as error:
            if "ParamWrapper" in str(error) and "lora_dropout" in str(error):
                raise UserError(
                    f"adapter.dropout={config.dropout}: an adapter of a mixture's experts has no dropout: set "
                    f"adapter.dropout=0, or name layers without the experts in adapter.target_modules."
                ) from error
            raise UserError(f"adapter: {one_line(error)}") from error
    patch_layers(adapted)
    return adapted


def _targets(model: nn.Module, targets: list[str]) -> tuple[str | list[str], list[str] | None]:
    """peft's `target_modules` and `target_parameters`; the latter are weights of experts, stacked in one tensor.

    peft itself knows the experts of some architectures by the names of the single ones, such as gate_proj.
    """
    if targets == ["all-linear"]:
        return "all-linear", None
    stacked = {leaf for _, _, leaf in stacks(model)}
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    layers = [target for target in targets if target not in stacked or target in modules]
    return layers, sorted(stacked & set(targets)) or None


def maps_experts(model: Any) -> bool:
    """Whether peft knows a mixture's stacked experts by the names of single ones, and all-linear takes them in."""
    try:
        from peft.utils import transformers_weight_conversion as known

        patterns, names = known._MODEL_TO_CONVERSION_PATTERN, known._MOE_TARGET_MODULE_MAPPING
    except (ImportError, AttributeError):
        return False
    return patterns.get(model.config.model_type) in names


def _require_targets(model: nn.Module, targets: list[str]) -> None:
    """Refuse names that peft would pass over, because others in the list match."""
    if targets == ["all-linear"]:
        return
    if "all-linear" in targets:
        raise UserError("adapter.target_modules: all-linear stands for all linear layers, so it must stand alone.")
    modules = {name: module for name, module in model.named_modules() if name}
    leaves = {name.rpartition(".")[2] for name, module in modules.items() if _is_matrix(module)}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:  # all experts in one; peft knows them by the names of the single ones
            leaf = name.rpartition(".")[2]
            single = leaf == "gate_up_proj" and maps_experts(model)
            leaves |= {leaf, "gate_proj", "up_proj"} if single else {leaf}
    for target in targets:
        if target not in leaves and not any(name == target or name.endswith(f".{target}") for name in modules):
            raise UserError(
                f"adapter.target_modules: the model has no module {target}{did_you_mean(target, leaves)}; "
                f"its layers are {', '.join(sorted(leaves))}."
            )


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def require_same_form(folder: Path, config: AdapterConfig | None) -> None:
    """Check that the settings, which the report shows, are those of the saved adapter that the policy starts with.

    Raises:
        UserError: they differ, or the saved adapter is of a form that no settings describe.
    """
    saved = saved_adapter(folder, whole=config is None)
    if config is None:
        return
    init = True if config.init == "default" else config.init
    pairs: dict[str, tuple[Any, Any]] = {
        "r": (saved.r, config.r),
        "alpha": (saved.lora_alpha, config.alpha),
        "rslora": (saved.use_rslora, config.rslora),
    }
    if init != saved.init_lora_weights and not {init, saved.init_lora_weights} <= set(_UNCHANGED_BASE):
        pairs["init"] = ("default" if saved.init_lora_weights is True else saved.init_lora_weights, config.init)
    wrong = {key: before for key, (before, now) in pairs.items() if before != now}
    if wrong:
        wanted = " ".join(f"adapter.{key}={_written(value)}" for key, value in wrong.items())
        raise UserError(
            f"model.name: the policy continues the adapter in {folder}: set {wanted}, as it has, {_OR_NEW}."
        )


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def continue_adapter(model: nn.Module, folder: Path, config: AdapterConfig, seed: int) -> nn.Module:
    """Attach an adapter with the weights of a saved one, after `require_same_form`, to train these further.

    Raises:
        UserError: the saved adapter has other layers than the settings choose, or weights beside its updates.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    adapted = attach_adapter(model, config, seed)
    weights = load_peft_weights(str(folder), device="cpu")
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    updates = {key: tensor for key, tensor in weights.items() if ".lora_" in key}
    if {key: tensor.shape for key, tensor in updates.items()} != {key: tensor.shape for key, tensor in own.items()}:
        layers = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in updates})
        raise UserError(
            f"model.name: the policy continues the adapter in {folder}, which has adapted other layers than "
            f"adapter.target_modules=[{','.join(config.target_modules)}] chooses: set those of the adapter "
            f"({', '.join(layers)}), {_OR_NEW}."
        )
    base = adapted.state_dict()
    for key in weights.keys() - updates.keys():
        # peft saves embeddings and head beside an adapter of theirs; they must be those of the base.
        if key not in base or not torch.equal(weights[key].to(base[key]), base[key]):
            raise UserError(
                f"model.name: the adapter in {folder} has weights beside its updates ({key}): merge it into its base "
                f"first, and set model.name to the merged model."
            )
    set_peft_model_state_dict(adapted, updates)
    return adapted


def saved_adapter(folder: Path, whole: bool = False) -> Any:
    """The settings of a saved adapter, as peft's `LoraConfig`.

    Args:
        folder: of the adapter.
        whole: it will become part of the weights, so that its form need not be one of ours.

    Raises:
        UserError: it is not a LoRA, or one of a form that cannot be used.
    """
    from peft import LoraConfig, PeftConfig

    try:
        saved: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"model.name: the adapter in {folder} cannot be read: {one_line(error)}") from error
    if type(saved) is not LoraConfig:
        kind = type(saved).__name__.removesuffix("Config")
        raise UserError(f"model.name: the adapter in {folder} is a {kind}, and only a LoRA can be continued.")
    accepted = _DESCRIBED | _SELECTS | _WITHOUT_EFFECT
    if whole:
        accepted = accepted | {"use_dora", "rank_pattern", "alpha_pattern"}
    plain, found = LoraConfig().to_dict(), saved.to_dict()
    unknown = [key for key in found if key not in accepted and found[key] != plain.get(key)]
    if unknown:
        raise UserError(
            f"model.name: the adapter in {folder} has {', '.join(f'{key}={found[key]}' for key in unknown)}, which no "
            f"setting of adapter describes: merge it into its base first, and set model.name to the merged model."
        )
    return saved


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Attach a saved adapter, trainable. If the model has one of the same form, that one takes the saved weights."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), model.active_adapter, is_trainable=True, torch_device=str(model.device))
        return model
    with stand_ins(model):
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    patch_layers(adapted)
    return adapted


def has_adapter(model: nn.Module) -> bool:
    """Whether the model carries a peft adapter."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def lora_updates(model: nn.Module) -> Iterator[tuple[str, float, Tensor, Tensor]]:
    """(layer, scaling, A, B) of every active, non-zero LoRA update, on linear layers and on embeddings."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for key in layer.active_adapters:
            if key in layer.lora_A:
                a, b = layer.lora_A[key].weight, layer.lora_B[key].weight
            elif key in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A[key], layer.lora_embedding_B[key]
            else:
                continue
            if a.any() and b.any():
                yield name, layer.scaling[key], a, b  # type: ignore[misc]


def starts_at_base(model: nn.Module) -> bool:
    """Whether the model computes the same with its adapter off: all updates are zero, and the base was not edited."""
    if not has_adapter(model):
        return False
    if any(config.init_lora_weights not in (True, "gaussian") for config in model.peft_config.values()):
        return False
    return next(lora_updates(model), None) is None


def check_adapter_gradients(model: nn.Module) -> None:
    """After a backward pass, check that every trainable tensor has a gradient.

    Raises:
        UserError: some have none, for example because a fused kernel reads a layer's weight and ignores its adapter.
    """
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise UserError(
            f"{len(missing)} trainable tensors received no gradient (the first: {missing[0]}): take these layers out "
            f"of adapter.target_modules, because their adapter would never learn."
        )
