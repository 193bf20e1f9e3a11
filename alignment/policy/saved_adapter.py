"""Saved adapters: what is in them, and whether the settings describe it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignment.config.adapters import RESIDUAL_INITS, AdapterConfig
from alignment.errors import UserError
from alignment.policy.adapter_kinds import peft_config
from alignment.policy.load import one_line
from alignment.policy.residual_start import ResidualStart, read_start

_WEIGHTS = "adapter_model.safetensors"

_SETTINGS: dict[str, dict[str, str]] = {
    "LoraConfig": {
        "r": "r",
        "alpha": "lora_alpha",
        "rslora": "use_rslora",
        "kind": "use_dora",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
        "modules_to_save": "modules_to_save",
        "trainable_tokens": "trainable_token_indices",
    },
    "VeraConfig": {"r": "r", "modules_to_save": "modules_to_save"},
    "OFTConfig": {"block_size": "oft_block_size", "modules_to_save": "modules_to_save"},
    "BOFTConfig": {"block_size": "boft_block_size", "modules_to_save": "modules_to_save"},
}
"""For each of peft's kinds that we have: our settings that a saved adapter must share, and its names for them."""
_SELECTS = {"target_modules", "target_parameters", "layers_to_transform", "layers_pattern", "exclude_modules"}
"""Fields that choose layers; which ones they have chosen is seen in the saved weights."""
_WITHOUT_EFFECT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "fan_in_fan_out", "megatron_core", "runtime_config", "loftq_config", "ensure_weight_tying"),
    *("eva_config", "corda_config", "lora_dropout", "vera_dropout", "module_dropout", "boft_dropout"),
    *("init_lora_weights", "init_weights"),
}
"""Fields that say nothing about what a saved adapter computes; of inits see `_UNCHANGED_BASE`."""
_UNCHANGED_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""peft's inits that leave the weights of the base as they are."""
_EXACT = ("pissa", "olora")
"""peft's inits that edit the base in a way that does not depend on chance or data, so that it can be done again."""

OR_NEW = "or set model.name to a merged model (export.merge=true writes one) to train a new adapter on it"


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """A saved adapter as it trains.

    Attributes:
        settings: as peft has them.
        init: of ours, where the adapter's start is a part of what is saved.
        weights: without that start; None where peft reads them.
        residual: the start.
    """

    settings: Any
    init: str | None = None
    weights: dict[str, Tensor] | None = None
    residual: ResidualStart | None = None


def read_adapter(folder: Path) -> SavedAdapter:
    """A saved adapter, of any kind that peft can read.

    Raises:
        UserError: it cannot be read.
    """
    from peft import PeftConfig

    try:
        if (weights_file := folder / _WEIGHTS).is_file():
            with safe_open(weights_file, "pt"):  # refuses a file that is cut, and reads no weights
                pass
        found = read_start(folder)
        if found is None:
            return SavedAdapter(PeftConfig.from_pretrained(str(folder)))
        settings, weights, residual = found
        return SavedAdapter(PeftConfig.from_peft_type(**settings), residual.init, weights, residual)
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model.name: the adapter in {folder} cannot be read: {one_line(error)}") from error


def require_known_form(folder: Path, saved: SavedAdapter, whole: bool) -> None:
    """Refuse a saved adapter that cannot be used.

    Args:
        folder: of the adapter.
        saved: what is in it.
        whole: it will become part of the weights, so that its form need not be one that our settings describe.

    Raises:
        UserError: it is of another kind than ours, or has what no setting describes.
    """
    settings = saved.settings
    kind = type(settings).__name__
    if kind not in _SETTINGS:
        raise UserError(
            f"model.name: the adapter in {folder} is a {kind.removesuffix('Config')}, and only a LoRA, DoRA, VeRA, OFT "
            f"or BOFT can be continued."
        )
    plain, found = type(settings)().to_dict(), settings.to_dict()
    accepted = set(_SETTINGS[kind].values()) | _SELECTS | _WITHOUT_EFFECT
    unknown = [key for key in found if key not in accepted and found[key] != plain.get(key)]
    init = found.get("init_lora_weights", True)
    if not whole and init not in (*_UNCHANGED_BASE, *_EXACT):
        unknown.append("init_lora_weights")
    if unknown:
        raise UserError(
            f"model.name: the adapter in {folder} has {', '.join(f'{key}={found[key]}' for key in unknown)}, which no "
            f"setting of adapter describes: merge it into its base first, and set model.name to the merged model."
        )


def require_same_form(folder: Path, config: AdapterConfig | None) -> None:
    """Check that the settings, which the report shows, are those of the saved adapter that the policy starts with.

    Raises:
        UserError: they differ, or the saved adapter is of a form that no settings describe.
    """
    saved = read_adapter(folder)
    require_known_form(folder, saved, whole=config is None)
    if config is None:
        return
    kind, wanted = type(saved.settings).__name__, peft_config(config)
    wrong: dict[str, Any] = {}
    if type(wanted) is not type(saved.settings):
        wrong["kind"] = _kind(saved.settings)
    else:
        for key, theirs in _SETTINGS[kind].items():
            before, now = _own(getattr(saved.settings, theirs)), _own(getattr(wanted, theirs))
            if (before or None) != (now or None):
                wrong[key] = _kind(saved.settings) if key == "kind" else before
    init = saved.init or getattr(saved.settings, "init_lora_weights", True)
    residual = saved.init is not None or init in _EXACT
    if init != config.init if residual else config.init_family in RESIDUAL_INITS:
        wrong["init"] = init if residual else "default"
    if wrong:
        settings = " ".join(f"adapter.{key}={_written(value)}" for key, value in wrong.items())
        raise UserError(
            f"model.name: the policy continues the adapter in {folder}: set {settings}, as it has, {OR_NEW}."
        )


def _own(value: Any) -> Any:
    """Without the patterns that peft adds to those of the settings, for stacked experts."""
    if not isinstance(value, dict):
        return value
    return {name: inner for name, inner in value.items() if not str(name).startswith(".*")}


def _kind(settings: Any) -> str:
    if getattr(settings, "use_dora", False):
        return "dora"
    return type(settings).__name__.removesuffix("Config").lower()


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | set | tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    if value is None:
        return "[]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
