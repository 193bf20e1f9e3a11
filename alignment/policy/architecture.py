"""What the architecture of a checkpoint offers: a class that loads its language model, and kinds of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alignment.errors import UserError

AUTO_ATTENTION = "auto"
"""`model.attention` that leaves the choice to the model's class: sdpa where it has it, else eager."""


def auto_class(config: Any) -> Any:
    """The class of transformers that builds a language model of this configuration.

    Some checkpoints that also see or hear have no causal language model of their own: the whole model is built then,
    under the names that its files and everybody else's programs have, and only its language model is run.

    Args:
        config: from `AutoConfig`.

    Raises:
        UserError: transformers knows no model for it that writes text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    remote = getattr(config, "auto_map", None) or {}
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping or kind.__name__ in remote:
            return kind
    raise UserError(
        f"model.name: transformers builds no language model of a {config.model_type}: use a checkpoint that "
        f"AutoModelForCausalLM loads."
    )


def build_model(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The model without its weights, on torch's meta device."""
    with torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    return model


def attentions(config: Any) -> list[str]:
    """The kinds of attention that the model's class declares; empty where the class comes with the checkpoint."""
    known = auto_class(config)._model_mapping
    if type(config) not in known:
        return []
    found = known[type(config)]
    model = found[0] if isinstance(found, (list, tuple)) else found
    declared = {
        "sdpa": model._supports_sdpa,
        "flash_attention_2": model._supports_flash_attn,
        "flex_attention": model._supports_flex_attn,
    }
    return ["eager", *(name for name, has in declared.items() if has)]
