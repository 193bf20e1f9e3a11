"""The merged model: base plus adapter as one plain folder of safetensors."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignment.config.schema import RunConfig
from alignment.policy.load import resolve_dtype

log = logging.getLogger(__name__)

_NEW_TOKENS = 16


def _base_weight(layer: Any) -> Tensor:
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.data
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def _linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """The de-quantised weight, adapter added, of every adapted or quantised linear layer, by its plain name."""
    from peft.tuners.lora import LoraLayer

    weights: dict[str, Tensor] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            weight = _base_weight(module.base_layer).float()
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter).float()  # type: ignore[attr-defined]
            weights[name] = weight
        elif getattr(getattr(module, "weight", None), "quant_state", None) is not None and "base_layer" not in name:
            weights[name] = _base_weight(module).float()
    return weights


@torch.no_grad()
def export_merged(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    config: RunConfig,
    source: str,
    device: torch.device,
    prompts: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Write base plus adapter as one model, with tokenizer and template, and compare it with the policy.

    A quantised base is de-quantised: the adapter is added to the weights that it was trained on, NF4 rounding included,
    and each weight takes 16 bits again. Rounding to 16 bits is the only change.

    Args:
        folder: where to write; it appears whole or not at all.
        source: the base model, for everything that the adapter does not touch.
        prompts: tokenised prompts that both models continue greedily.

    Returns:
        {"dtype", "max_logp_difference" in nats over the next-token distribution, "generation_agrees"}.
    """
    from transformers import AutoModelForCausalLM

    # Merge and write
    dtype = resolve_dtype(config.export.dtype, device)
    merged: Any = AutoModelForCausalLM.from_pretrained(
        source,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        dtype=dtype,
        attn_implementation=config.model.attention,
        use_safetensors=True,
    )
    merged.to(device)
    for name, weight in _linear_weights(model).items():
        merged.get_submodule(name).weight.copy_(weight.to(dtype))
    partial = folder.with_name(f"{folder.name}.partial")
    for stale in (partial, folder):
        shutil.rmtree(stale, ignore_errors=True)
    merged.save_pretrained(str(partial), safe_serialization=True)
    tokenizer.save_pretrained(str(partial))
    partial.rename(folder)

    # Compare with the policy
    was_training = model.training
    model.eval()
    difference, agrees = 0.0, True
    for prompt in prompts:
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
        ours, theirs = (m(input_ids=ids).logits[0, -1].double().log_softmax(-1) for m in (model, merged))
        likely = ours > ours.max() - 10  # no decoding reaches the far tail, which is rounding noise
        difference = max(difference, (ours - theirs)[likely].abs().max().item())
        options = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": _NEW_TOKENS,
            "do_sample": False,
            "pad_token_id": tokenizer.pad_token_id,
        }
        texts = [m.generate(input_ids=ids, **options)[0].tolist() for m in (model, merged)]
        agrees = agrees and texts[0] == texts[1]
    model.train(was_training)
    quantised = "the base was de-quantised from NF4, " if config.quantization is not None else ""
    log.info(
        "Merged model in %s: %sweights in %s; next-token log-probs differ by at most %.2g nats, greedy answers %s.",
        folder,
        quantised,
        str(dtype).removeprefix("torch."),
        difference,
        "agree" if agrees else "differ",
    )
    if not agrees:
        log.warning(
            "The merged model answers differently because of the rounding to 16 bits; export.dtype=float32 avoids it."
        )
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "max_logp_difference": difference,
        "generation_agrees": agrees,
    }
