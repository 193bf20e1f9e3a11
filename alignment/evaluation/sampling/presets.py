"""A model's own generation settings: which of them act on drawn answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig

from alignment.policy.adapter import has_adapter

REPLACED = {"num_beams": 1, "guidance_scale": None, "watermarking_config": None, "cache_implementation": None}
"""Settings that have no part in drawing one token after the other, with the values that switch them off."""
_OURS = ("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", *REPLACED)
"""Settings in whose place ours count."""
_BESIDE = ("output_", "return_", "use_cache", "cache_", "transformers_version", "_from_model_config")
"""Beginnings of those that do not change which token is drawn."""


def inner(model: Any) -> Any:
    """The model inside its adapter."""
    return model.get_base_model() if has_adapter(model) else model


def presets(model: nn.Module) -> str:
    """The model's own generation settings, such as a repetition penalty, as JSON without the special tokens."""
    return inner(model).generation_config.to_json_string(keys_to_pop=["bos_token_id", "eos_token_id", "pad_token_id"])


def acting(model: nn.Module) -> dict[str, Any]:
    """The model's own generation settings that act on drawn answers."""
    own = json.loads(presets(model))
    return {key: value for key, value in own.items() if not key.startswith(_BESIDE) and key not in _OURS}


def presets_in_words(model: nn.Module, temperature: float) -> str | None:
    """A sentence on the model's own generation settings and which of them act on sampled answers; None without any."""
    acts = ", ".join(f"{key}={value}" for key, value in acting(model).items())
    own = json.loads(presets(model))
    idle = ", ".join(f"{key}={own[key]}" for key in own if key in _OURS and not key.startswith(_BESIDE))
    parts = [f"{acts} acts on sampled answers"] if acts else []
    parts += [f"{idle} does not, in place of which evaluation.temperature={temperature:g} counts"] if idle else []
    return f"Of the model's own generation settings, {'; '.join(parts)}." if parts else None


@contextmanager
def without_presets(model: nn.Module) -> Iterator[None]:
    """Switch off the model's own generation settings, to draw from its plain distribution."""
    base = inner(model)
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
