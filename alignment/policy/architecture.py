"""What the architecture of a checkpoint offers: a class that loads its language model, and kinds of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

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


def unknown_architecture(source: str, revision: str | None) -> str | None:
    """What to do about a `model_type` that this transformers does not know; None where that is not what is wrong.

    Args:
        source: folder, file or hub id of a configuration.
        revision: of a hub id.
    """
    import transformers

    try:
        found, _ = transformers.PreTrainedConfig.get_config_dict(source, revision=revision)
    except Exception:  # it cannot be read at all
        return None
    kind = found.get("model_type")
    if not kind or kind in transformers.CONFIG_MAPPING:
        return None
    return (
        f"transformers {transformers.__version__} knows no architecture {kind}: install a version that does, or set "
        f"model.trust_remote_code=true if the model brings code of its own."
    )


def build_model(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The model without its weights, on torch's meta device."""
    with torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    show_decoder(model)
    return model


def show_decoder(model: Any) -> None:
    """Let `get_decoder` find the decoder of a class that names a part which it has not, as Llama 4's for text does.

    It would give the whole model, and scoring would keep all logits of a pass.
    """
    if model.get_decoder() is model and isinstance(getattr(model, "model", None), PreTrainedModel):
        model.base_model_prefix = "model"


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
