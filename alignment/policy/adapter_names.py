"""The names in an adapter's settings, against the model's modules and the tokenizer's tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alignment.config.adapters import AdapterConfig
from alignment.errors import UserError, did_you_mean
from alignment.policy.layers import decoder_layers
from alignment.policy.quantize import stacks
from alignment.policy.targets import AUTO, auto_targets, linear_targets


def with_targets(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The settings with the names of layers in place of `auto`; without weights, by the model's structure alone.

    Beside a tower for pictures, whose layers have the names of the language model's, names become whole ones too: a
    tower does not run on text.
    """
    if config.target_modules == [AUTO]:
        names = (linear_targets if next(model.parameters()).is_meta else auto_targets)(model)
    elif config.target_modules != ["all-linear"] and (towers := _outside(model)):
        names = [whole for name in config.target_modules for whole in _inside(model, name, towers)]
    else:
        return config
    if config.layers_to_transform is not None:  # peft does not look at layers where a name is whole
        layers = enumerate(decoder_layers(model))
        chosen = {id(part) for i, layer in layers if i in config.layers_to_transform for part in layer.modules()}
        modules = dict(model.named_modules())
        names = [name for name in names if name not in modules or id(modules[name]) in chosen]
    return replace(config, target_modules=names or [AUTO])


def _outside(model: Any) -> set[str]:
    """Names of the linear layers that are in no part that runs on text."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    inside = {id(module) for part in parts if part is not None for module in part.modules()}
    return {name for name, module in model.named_modules() if _is_matrix(module) and id(module) not in inside}


def _inside(model: nn.Module, name: str, towers: set[str]) -> list[str]:
    """The whole names of the layers of a name that are in no tower; the name itself where that leaves none."""
    matched = [full for full, _ in model.named_modules() if full == name or full.endswith(f".{name}")]
    return [full for full in matched if full not in towers] or [name]


def chosen_targets(model: nn.Module, config: AdapterConfig) -> tuple[list[str], list[str] | None]:
    """peft's `target_modules` and `target_parameters`; the latter are weights of experts, stacked in one tensor.

    Where only some layers get adapters, all-linear becomes names: peft takes it for a pattern, which goes with no
    choice of layers. peft itself knows the experts of some architectures by the names of the single ones, such as
    gate_proj.

    Raises:
        UserError: experts for a kind that has no form for them.
    """
    targets = config.target_modules
    if targets == ["all-linear"]:
        if config.layers_to_transform is None:
            return targets, None
        parts = [part for layer in decoder_layers(model) for part in layer.named_modules()]
        return sorted({name.rpartition(".")[2] for name, m in parts if isinstance(m, nn.Linear | Conv1D)}), None
    stacked = {leaf for _, _, leaf in stacks(model)}
    experts = sorted(stacked & set(targets))
    if experts and config.kind != "lora":
        raise UserError(
            f"adapter.target_modules: {experts[0]} holds the weights of all experts in one, which only "
            f"adapter.kind=lora can adapt: use it, or leave the experts out."
        )
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [target for target in targets if target not in stacked or target in modules], experts or None


def expert_names(model: Any) -> dict[str, str]:
    """The names by which peft knows the single experts, and of the stacked weights that these are in.

    Empty where it knows none; where it knows some, all-linear takes in the experts.
    """
    try:
        from peft.utils import transformers_weight_conversion as known

        patterns, names = known._MODEL_TO_CONVERSION_PATTERN, known._MOE_TARGET_MODULE_MAPPING
    except (ImportError, AttributeError):
        return {}
    return dict(names.get(patterns.get(model.config.model_type, ""), {}))


def require_modules(model: nn.Module, config: AdapterConfig) -> None:
    """Refuse names in the settings that peft would pass over, because others match.

    Raises:
        UserError: the model has no module of a name, or no layer of a number.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    leaves = {name.rpartition(".")[2] for name, module in modules.items() if _is_matrix(module)}
    singles = expert_names(model)
    matched = list(modules)  # what a pattern may match
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:  # all experts in one; peft knows them by the names of the single ones
            matched.append(name)
            leaf = name.rpartition(".")[2]
            leaves |= {leaf} | {single for single, stacked in singles.items() if stacked == leaf}
    targets = config.target_modules
    for whole in (AUTO, "all-linear"):
        if whole in targets and len(targets) > 1:
            raise UserError(f"adapter.target_modules: {whole} stands for a list of layers, so it must stand alone.")
    targets = [target for target in targets if target not in (AUTO, "all-linear")]
    named: dict[str, Iterable[str]] = {
        "target_modules": targets,
        "exclude_modules": config.exclude_modules,
        "modules_to_save": config.modules_to_save,
    }
    for key, names in named.items():
        for name in names:
            if name not in leaves and not any(full == name or full.endswith(f".{name}") for full in modules):
                raise UserError(
                    f"adapter.{key}: the model has no module {name}{did_you_mean(name, leaves)}; its layers are "
                    f"{', '.join(sorted(leaves))}."
                )
    for name in config.modules_to_save:
        packed = next((f for f, m in modules.items() if _is_packed(m) and f".{f}.".find(f".{name}.") >= 0), None)
        if packed is not None:
            raise UserError(
                f"adapter.modules_to_save: {packed} is in 4 bits, so it cannot train whole: give it an adapter by "
                f"adapter.target_modules, or set quantization=none."
            )
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", full) for full in matched):  # as peft matches them
                raise UserError(
                    f"adapter.{key}: {pattern} is the name of no module{did_you_mean(pattern, leaves)}; the model's "
                    f"layers are {', '.join(sorted(leaves))}."
                )
    _require_free_embeddings(model, modules, config)
    count = len(decoder_layers(model))
    last = max(config.layers_to_transform or [0])
    if count and last >= count:
        raise UserError(f"adapter.layers_to_transform: the model has layers 0 to {count - 1}, and no layer {last}.")


def _require_free_embeddings(model: Any, modules: dict[str, nn.Module], config: AdapterConfig) -> None:
    """Refuse to train some rows of embeddings that train in another way already; so does a head that shares them."""
    if not config.trainable_tokens:
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embeddings.weight
    for key in ("modules_to_save", "target_modules"):
        for name in getattr(config, key):
            found = [module for full, module in modules.items() if full == name or full.endswith(f".{name}")]
            if any(module is embeddings or (is_tied and module is head) for module in found):
                what = "the embeddings" if any(module is embeddings for module in found) else "a head that shares them"
                raise UserError(
                    f"adapter.trainable_tokens trains rows of the embeddings, and adapter.{key} has {name}, {what}, "
                    f"train in another way: leave out one of the two."
                )


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _is_packed(module: nn.Module) -> bool:
    return hasattr(getattr(module, "weight", None), "quant_state")


def with_token_ids(config: AdapterConfig | None, tokenizer: Any) -> AdapterConfig | None:
    """The settings with `trainable_tokens` as ids.

    Raises:
        UserError: the tokenizer has no such token.
    """
    if config is None or not config.trainable_tokens:
        return config
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    ids = set(vocabulary.values())
    found = []
    for token in config.trainable_tokens:
        if token not in (ids if isinstance(token, int) else vocabulary):
            added = [str(known) for known in tokenizer.added_tokens_decoder.values()]
            raise UserError(
                f"adapter.trainable_tokens: the tokenizer has no token {token}{did_you_mean(str(token), added)}; its "
                f"special tokens are {', '.join(added)}."
            )
        found.append(token if isinstance(token, int) else vocabulary[token])
    return replace(config, trainable_tokens=found)
