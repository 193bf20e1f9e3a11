"""How the weights of a base are stored: what a checkpoint says, what a run may do with it, and what was loaded."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alignment.config.gpu import bitsandbytes_problem
from alignment.config.schema import QuantizationConfig, RunConfig
from alignment.errors import UserError, require
from alignment.policy.adapter_kinds import plain_name

log = logging.getLogger(__name__)

_LIBRARIES = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "auto-round": ("auto_round",),
    "compressed-tensors": ("compressed_tensors",),
    "bitsandbytes": ("bitsandbytes",),
    "hqq": ("hqq",),
    "torchao": ("torchao",),
    "aqlm": ("aqlm",),
    "eetq": ("kernels",),
}
"""What transformers imports to load a checkpoint of each kind."""
_DEQUANTISED = ("mxfp4", "fp8", "mxfp8", "compressed-tensors")
"""Kinds that transformers computes with, but not back through: loaded as the plain weights that they stand for."""
_TITLES = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4", "mxfp8": "MXFP8"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How a checkpoint says that it is quantised.

    Attributes:
        method: transformers' name of the method; "" for one that is not quantised.
        settings: the rest of what it says.
    """

    method: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, config: Any) -> Checkpoint:
        """From a model's configuration, as transformers reads it."""
        found = getattr(config, "quantization_config", None)
        if found is None:
            found = getattr(config.get_text_config(), "quantization_config", None)
        settings = {} if found is None else dict(found if isinstance(found, Mapping) else found.to_dict())
        if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
            return cls("bitsandbytes", settings)
        return cls(str(getattr(settings.get("quant_method"), "value", settings.get("quant_method") or "")), settings)

    @property
    def is_packed(self) -> bool:
        """Whether the weights stay packed in memory, so that only an adapter can train."""
        return bool(self.method) and not self.is_dequantised

    @property
    def is_dequantised(self) -> bool:
        """Whether the weights become plain ones as they load."""
        return self.method in _DEQUANTISED

    @property
    def is_nf4(self) -> bool:
        """Whether it is what quantization=nf4 would make."""
        return bool(self.settings.get("load_in_4bit")) and self.settings.get("bnb_4bit_quant_type") == "nf4"

    @property
    def title(self) -> str:
        """For people."""
        if self.method == "bitsandbytes":
            four = str(self.settings.get("bnb_4bit_quant_type", "fp4")).upper()
            return f"bitsandbytes {four if self.settings.get('load_in_4bit') else '8 bit'}"
        return _TITLES.get(self.method, self.method)

    def bytes_per_weight(self) -> float:
        """Of a packed weight with its scales."""
        if self.method == "bitsandbytes":
            if self.settings.get("load_in_4bit"):
                return nf4_bytes_per_weight(bool(self.settings.get("bnb_4bit_use_double_quant")))
            return 1.0
        bits = self.settings.get("bits") or self.settings.get("w_bit") or 4
        group = self.settings.get("group_size") or self.settings.get("q_group_size") or 128
        return bits / 8 + (2 + bits / 8) / max(group, 1)  # a scale in 16 bits and a zero point for each group


def nf4_bytes_per_weight(double: bool, calibrated: bool = False) -> float:
    """Half a byte, and one scale per 64 weights: in fp32, or in 8 bits with an fp32 scale per 256 of these scales.

    If calibrated, a constant beside every scale, in 8 bits with an fp32 scale per 256.
    """
    packed = 1 / 64 + 4 / (64 * 256)
    return 0.5 + (packed if double else 4 / 64) + (packed if calibrated else 0)


def require_loadable(name: str, found: Checkpoint, quantization: QuantizationConfig | None) -> None:
    """Refuse a checkpoint that this installation cannot read, or that a run asks to quantise once more.

    Args:
        name: of the model, as the settings have it.

    Raises:
        UserError: says what to install, or which setting contradicts the checkpoint.
    """
    missing = [module for module in _LIBRARIES.get(found.method, ()) if importlib.util.find_spec(module) is None]
    if missing:
        packages = " and ".join(module.replace("_", "-") for module in missing)
        raise UserError(
            f"model.name={name} is quantised already ({found.title}), and reading it needs {packages}: install that, "
            f"or use the model's checkpoint that is not quantised."
        )
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    require(
        found.method in ("", "bitsandbytes") or found.method in AUTO_QUANTIZATION_CONFIG_MAPPING,
        f"model.name={name} is quantised already ({found.title}), which this transformers cannot read: use the model's "
        f"checkpoint that is not quantised, or another format.",
    )
    if found.method == "bitsandbytes" and (problem := bitsandbytes_problem(torch.cuda.is_available())) is not None:
        raise UserError(f"model.name={name} is quantised already ({found.title}), and this machine lacks {problem}.")
    require(
        not (found.is_packed and quantization is not None and not found.is_nf4),
        f"quantization=nf4: model.name={name} is quantised already ({found.title}): set quantization=none to train an "
        f"adapter on it as it is, or use the model's checkpoint that is not quantised.",
    )


def require_stored(name: str, model: Any, found: Checkpoint) -> None:
    """Refuse a loaded model whose files are not what its configuration says, or that gradients cannot pass.

    Args:
        name: of the model, as the settings have it.
        model: as transformers has loaded it.

    Raises:
        UserError: plain weights where the configuration says packed ones, or a format that nothing trains on.
    """
    if not found.is_packed:
        return
    if found.method == "bitsandbytes":
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        plain = [
            path
            for path, layer in model.named_modules()
            if (isinstance(layer, Linear4bit) and getattr(layer.weight, "quant_state", None) is None)
            or (isinstance(layer, Linear8bitLt) and getattr(layer.weight, "SCB", None) is None)
        ]
        require(
            not plain,
            f"model.name={name}: its config.json says that it is quantised ({found.title}), and its files have plain "
            f"weights (the first: {plain[0] if plain else ''}): take quantization_config out of config.json, and set "
            f"quantization=nf4 to pack them here.",
        )
    quantizer = getattr(model, "hf_quantizer", None)
    require(
        quantizer is None or bool(quantizer.is_trainable),
        f"model.name={name} is quantised already ({found.title}), and transformers lets no gradient through that "
        f"format: use the model's checkpoint that is not quantised.",
    )


def require_usable(config: RunConfig, found: Checkpoint) -> None:
    """Refuse what cannot be done with a checkpoint that stays packed.

    Raises:
        UserError: the run would train its weights, or merge into weights that cannot be unpacked.
    """
    require_loadable(config.model.name, found, config.quantization)
    if not found.is_packed:
        return
    require(
        config.adapter is not None,
        f"model.name={config.model.name} is quantised already ({found.title}), and its weights cannot be trained: "
        f"choose an adapter, or use the model's checkpoint that is not quantised.",
    )
    require(
        not config.export.merge or found.method == "bitsandbytes",
        f"export.merge=true: nothing can be added to weights that are stored in {found.title}: set export.merge=false "
        f"and use the adapter on this base.",
    )


# What is said about it


def stored_weights(model: nn.Module) -> dict[str, int]:
    """How many weights of a loaded base are stored in which form, the most first; an adapter's do not count."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    for name, module in model.named_modules():
        if plain_name(name) is None:
            continue
        packed = module._buffers.get("qweight")
        if packed is not None:  # GPTQ, AWQ: several values in an int32
            outputs, inputs = getattr(module, "out_features", 0), getattr(module, "in_features", 0)
            count = outputs * inputs or packed.numel() * 8
            found[f"{round(32 * packed.numel() / count)} bit"] += count
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                found[state.quant_type.upper()] += math.prod(state.shape)
            else:
                found[f"{8 * parameter.element_size()} bit"] += parameter.numel()
    return dict(found.most_common())


def in_shares(stored: Mapping[str, int]) -> str:
    """Such as "NF4 96 %, 16 bit 4 %"."""
    total = sum(stored.values())
    return ", ".join(
        f"{form} {100 * count / total:.{0 if count >= total / 100 else 2}f} %" for form, count in stored.items()
    )


def stored_facts(model: Any) -> dict[str, Any]:
    """For the record of a run: {"weights": counts by form, "stored": the same in words, "notes": what is amiss}."""
    stored = stored_weights(model)
    plain = sum(count for form, count in stored.items() if form in ("16 bit", "32 bit", "64 bit"))
    notes = []
    if getattr(model.config, "quantization_config", None) is not None and 2 * plain > sum(stored.values()):
        notes.append(
            f"The base counts as quantised, but most of its weights are not ({in_shares(stored)}): its layers are of "
            f"kinds that are not packed."
        )
    return {"weights": stored, "stored": in_shares(stored), "notes": notes}


def describe_stored(model: nn.Module, name: str, found: Checkpoint, quantization: QuantizationConfig | None) -> None:
    """Log in what a base is stored, and warn where it is not what its settings promise."""
    if not found.method and quantization is None:
        return
    if found.is_packed:
        log.info("%s is quantised already, and stays as it is: %s.", name, found.title)
    elif found.is_dequantised:
        log.info("%s is stored in %s, which cannot be trained on: its weights are unpacked.", name, found.title)
    facts = stored_facts(model)
    log.info("Weights of the base: %s.", facts["stored"])
    for note in facts["notes"]:
        log.warning("%s", note)
