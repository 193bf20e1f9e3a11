"""The merged model: base plus adapter as one plain model, and as one folder of safetensors that was checked."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from alignment.config.schema import RunConfig
from alignment.errors import UserError
from alignment.files import replace_folder
from alignment.policy.adapter_kinds import merged_weight
from alignment.policy.load import load_base, load_model, one_line, read_shape, resolve_dtype
from alignment.policy.quantize import is_packed_by_bitsandbytes, load_arguments, plain_weight, without_packing
from alignment.policy.requantise import Sequences, drift_of_steps, largest, next_logps
from alignment.policy.reward_model import is_reward_model, put_reward_head, rewards_of_texts, save_trained
from alignment.policy.saved_adapter import read_adapter, require_known_form
from alignment.policy.stored import Checkpoint

log = logging.getLogger(__name__)

_NEW_TOKENS = 16
_LIMIT_32_BITS = 1e-3
"""Nats by which any likely next token may differ where weights and arithmetic have 32 bits."""
_LIMIT_16_BITS = 0.15
"""Nats by which next tokens may differ on average with 16 bits. On 135M parameters it is 0.04, for a single one 0.5."""


def _turned(weight: Tensor, layer: nn.Module) -> Tensor:
    """Between (out, in) and the order in which a layer of this kind stores its weight."""
    return weight.T if isinstance(layer, Conv1D) else weight


def _merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every adapted or quantised weight, de-quantised, adapter added, by its plain name; of linear layers (out, in).

    Quantised layers always store (out, in), also in place of a `Conv1D`, which stores (in, out).
    """
    from peft.tuners.lora import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    weights: dict[str, Tensor] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):  # all experts of a mixture in one parameter, in wrappers of wrappers
            deltas = [module.get_delta_weight(adapter).float() for adapter in module.active_adapters]
            plain = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            weights[plain] = sum(deltas, plain_weight(module.get_base_layer(), module.parameter_name))
        elif isinstance(module, ModulesToSaveWrapper):
            copy = module.modules_to_save[module.active_adapters[0]]
            weights |= {f"{name}.{key}": _turned(p.detach().float(), copy) for key, p in copy.named_parameters()}
        elif isinstance(module, TrainableTokensWrapper):
            layer: Any = module.token_adapter
            weights[f"{name}.weight"] = layer.get_merged_weights(layer.active_adapters).detach().float()
        elif isinstance(module, BaseTunerLayer) and "token_adapter" not in name:
            base: Any = module.get_base_layer()
            weights[f"{name}.weight"] = _turned(merged_weight(module, plain_weight(base)), base)
        else:
            for leaf, parameter in module._parameters.items():
                plain = f"{name.replace('.base_layer', '')}.{leaf}"
                # A layer around this one, which comes first, may have added its adapter already
                if parameter is not None and is_packed_by_bitsandbytes(parameter) and plain not in weights:
                    weights[plain] = plain_weight(module, leaf)
    return weights


def _put_weights(model: Any, weights: dict[str, Tensor]) -> None:
    """Write weights of `_merged_weights` into a plain model.

    Embeddings and head that are one tensor become two where only one of them was adapted.
    """
    ends = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    shared = ends["head"] is not None and ends["head"].weight is ends["embeddings"].weight
    if shared and any(_layer(model, name) in ends.values() for name in weights):
        ends["head"].weight = nn.Parameter(ends["head"].weight.detach().clone(), requires_grad=False)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        model.tie_weights()  # nothing is tied any more, which what is saved goes by
    for name, weight in weights.items():
        model.get_parameter(name).data.copy_(_turned(weight, _layer(model, name)))


def _layer(model: nn.Module, weight: str) -> nn.Module:
    return model.get_submodule(weight.rpartition(".")[0])


@torch.no_grad()
def merge_adapter(model: Any, folder: Path) -> nn.Module:
    """Add a saved adapter to the weights of a plain model, in place.

    Raises:
        UserError: the adapter is none that can be added, or it does not fit the model.
    """
    from peft import PeftModel

    require_known_form(folder, read_adapter(folder), whole=True)
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"model.name: the adapter in {folder} does not fit its base: {one_line(error)}") from error
    weights = _merged_weights(adapted)
    base = adapted.unload()
    _put_weights(base, weights)
    return base


def load_plain(source: str, config: RunConfig, dtype: torch.dtype, device: torch.device, own: bool = True) -> Any:
    """The model in a folder or on the hub, in plain weights; `own` for the run's model, not its export."""
    model = config.model if own else replace(config.model, revision=None)
    stored = load_arguments(Checkpoint.of(read_shape(source, model)), None, dtype)
    return without_packing(load_model(source, model, dtype=dtype, **stored), dtype).to(device).eval()


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
    """Write base plus adapter as one model, with tokenizer and template, and compare what was written with the policy.

    A quantised base is de-quantised: the adapter is added to the weights that it was trained on, NF4 rounding included.
    Rounding to `export.dtype` is the only change. Of a reward model the rewards are compared.

    Args:
        folder: where to write; it appears whole and checked, or stays as it was.
        source: the base model, for everything that the adapter does not touch.
        prompts: tokenised prompts that both models continue greedily.

    Returns:
        {"dtype", "max_logp_difference" in nats over the next-token distributions, "generation_agrees"}; with a
        quantised base also "drift", what merging and quantising again change (see `drift_of_steps`). Of a reward model
        {"dtype", "max_reward_difference"}.

    Raises:
        UserError: the written model is not the policy.
    """
    dtype = resolve_dtype(config.export.dtype, device)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged = load_plain(source, config, dtype, device)
    rewards = is_reward_model(model)
    if rewards:
        put_reward_head(merged)
    _put_weights(merged, _merged_weights(model))
    save_trained(merged, tokenizer, partial)

    # What the files hold, not what was meant to be written
    del merged
    if rewards:
        return _checked_rewards(model, partial, folder, prompts, dtype, device)
    merged = load_plain(str(partial), config, dtype, device, own=False)
    found = _compare(model, merged, prompts, device)
    precise = {dtype, model.dtype} <= {torch.float32, torch.float64}
    if (problem := _problem(found, precise)) is not None:
        shutil.rmtree(partial, ignore_errors=True)
        rounding = (
            "" if precise or dtype is torch.float32 else "; export.dtype=float32 leaves out the rounding of weights"
        )
        raise UserError(
            f"export.merge: the merged model is not the policy, because {problem}, so it was removed{rounding}; the "
            f"trained adapter is whole."
        )
    is_quantised = config.quantization is not None
    both = [next_logps(m, found.sequences) for m in (model, merged)] if is_quantised else []
    del merged
    replace_folder(partial, folder)

    written = str(dtype).removeprefix("torch.")
    quantised = "the base was de-quantised from NF4, " if is_quantised else ""
    log.info(
        "Merged model in %s: %sweights in %s; next-token log-probs differ by at most %.2g nats, greedy answers %s.",
        folder,
        quantised,
        written,
        found.difference,
        "agree" if found.agrees else f"differ where two tokens are within {found.gap:.2g} nats",
    )
    described = {"dtype": written, "max_logp_difference": found.difference, "generation_agrees": found.agrees}
    if is_quantised:
        again = bind(load_base, replace(config.model, revision=None), config.quantization, str(folder), device)
        steps = described["drift"] = drift_of_steps(both[0], both[1], found.sequences, again)
        log.info(
            "Next-token log-probs drift by %.2g nats from the policy to the merged model, by %.2g from there to NF4 "
            "again, by %.2g together.",
            *steps.values(),
        )
    return described


def _checked_rewards(
    model: Any, partial: Path, folder: Path, texts: Sequence[np.ndarray], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Compare the rewards of what was written with the policy's, and give it its name; see `export_merged`."""
    from transformers import AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification
    merged = kind.from_pretrained(str(partial), dtype=dtype, use_safetensors=True).to(device).eval()
    was_training = model.training
    ours = rewards_of_texts(model.eval(), texts, device)
    model.train(was_training)
    ids = [torch.from_numpy(text.astype(np.int64))[None].to(device) for text in texts]
    theirs = torch.cat([merged(input_ids=tokens).logits[:, 0].double() for tokens in ids])
    difference = (ours - theirs).abs().max().item()
    limit = _LIMIT_32_BITS if {dtype, model.dtype} <= {torch.float32, torch.float64} else _LIMIT_16_BITS
    if not difference <= limit * max(1.0, ours.abs().max().item()):
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"export.merge: the merged reward model is not the trained one, because its rewards differ by up to "
            f"{difference:.2g}, so it was removed; the trained adapter is whole."
        )
    replace_folder(partial, folder)
    written = str(dtype).removeprefix("torch.")
    log.info("Merged reward model in %s: weights in %s; rewards differ by at most %.2g.", folder, written, difference)
    return {"dtype": written, "max_reward_difference": difference}


@dataclass(frozen=True, slots=True)
class _Comparison:
    """How a merged model differs from the policy.

    Attributes:
        difference: the largest, in nats, over likely next tokens; nan where a number is.
        mean: nats, over next tokens as the policy draws them.
        agrees: whether all greedy answers are the same.
        gap: nats between the policy's best two tokens where answers part, the largest such gap.
        sequences: the policy's answers after their prompts, and where the next tokens begin to count.
    """

    difference: float
    mean: float
    agrees: bool
    gap: float
    sequences: Sequences = ()


def _compare(model: Any, merged: Any, prompts: Sequence[np.ndarray], device: torch.device) -> _Comparison:
    """Compare greedy answers, and next-token distributions along those of the policy."""
    base = model.get_base_model()
    presets, was_training = base.generation_config, model.training
    base.generation_config = merged.generation_config = GenerationConfig()  # a penalty would hide what is compared
    model.eval()
    differences, means, gaps = [0.0], [0.0], [0.0]
    agrees = True
    sequences = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": _NEW_TOKENS, "do_sample": False}
        whole, other = (m.generate(input_ids=ids, **options) for m in (model, merged))
        start = ids.shape[1] - 1
        sequences.append((whole, start))
        ours, theirs = (m(input_ids=whole).logits[0, start:].double().log_softmax(-1) for m in (model, merged))
        apart = (ours - theirs).abs()
        differences.append(largest(ours, theirs))
        means.append((ours.exp() * apart).sum(-1).mean().item())
        parting = (whole != other)[0, start + 1 :].nonzero()
        if len(parting):
            agrees = False
            best = ours[parting[0, 0]].topk(2).values
            gaps.append((best[0] - best[1]).item())
    model.train(was_training)
    base.generation_config = presets
    return _Comparison(float(np.max(differences)), float(np.max(means)), agrees, max(gaps), sequences)


def _problem(found: _Comparison, precise: bool) -> str | None:
    """What rounding does not explain; None if it explains everything."""
    limit, nats = (_LIMIT_32_BITS, found.difference) if precise else (_LIMIT_16_BITS, found.mean)
    if not nats <= limit:
        how, bits = ("up to", 32) if precise else ("on average", 16)
        return f"its next-token log-probs differ by {how} {nats:.2g} nats (in {bits} bits {limit:g} may be rounding)"
    if found.gap > 2 * found.difference + limit:  # two tokens change places only if both move towards each other
        return f"its greedy answers differ where the policy's best two tokens are {found.gap:.2g} nats apart"
    return None
