"""Sample answers to prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from alignment.policy.adapter import has_adapter
from alignment.scoring.logps import autocast


def stop_tokens(tokenizer: Any, end_of_turn: int | None, own: Sequence[int]) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, the template's end of turn, and the model's own.

    A base model's EOS often differs from the end-of-turn token of its chat template. Nothing is learnt from the data,
    whose answers may be cut.

    Args:
        end_of_turn: of the chat template, if it has one.
        own: the EOS tokens of the model's generation settings.
    """
    return sorted({token for token in (tokenizer.eos_token_id, end_of_turn, *own) if token is not None})


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    stops: Sequence[int],
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device,
    seed: int,
) -> list[np.ndarray]:
    """One answer per tokenised prompt, in order: int32 tokens up to and including the first stop token.

    The model computes in the precision in which it is scored, so the policy that answers is the one that was trained.
    Greedy at temperature 0. Otherwise drawn with `seed`; the global random state is left alone.
    """
    answers: dict[int, np.ndarray] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # its default: every GPU it sees
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in members)
            ids = torch.zeros((len(members), width), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(members):
                ids[row, width - len(prompts[index]) :] = torch.from_numpy(prompts[index].astype(np.int64))
                mask[row, width - len(prompts[index]) :] = 1
            with autocast(model, device):
                output = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=max_new_tokens,
                    eos_token_id=list(stops),
                    pad_token_id=stops[0],  # the padding after an answer's end is cut off below
                    **sampling,
                )
            for row, index in enumerate(members):
                new = output[row, width:].to("cpu", torch.int32).numpy()
                ends = np.flatnonzero(np.isin(new, stops))
                answers[index] = new[: ends[0] + 1] if len(ends) else new
    model.train(was_training)
    return [answers[i] for i in range(len(prompts))]


def as_text(tokenizer: Any, answer: Sequence[int], stops: Sequence[int]) -> str:
    """The answer's text, without its stop tokens."""
    return tokenizer.decode([token for token in answer if token not in stops], skip_special_tokens=True).strip()


def presets(model: nn.Module) -> str:
    """The model's own generation settings, such as a repetition penalty, as JSON without the special tokens."""
    return _inner(model).generation_config.to_json_string(keys_to_pop=["bos_token_id", "eos_token_id", "pad_token_id"])


_REPLACED = ("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens")
"""Generation settings in whose place `sample` puts ours."""
_BESIDE = ("output_", "return_", "use_cache", "cache_", "transformers_version", "_from_model_config")
"""Beginnings of those that do not change which token is drawn."""


def presets_in_words(model: nn.Module, temperature: float) -> str | None:
    """A sentence on the model's own generation settings and which of them act on sampled answers; None without any."""
    own = {key: value for key, value in json.loads(presets(model)).items() if not key.startswith(_BESIDE)}
    acts = ", ".join(f"{key}={value}" for key, value in own.items() if key not in _REPLACED)
    idle = ", ".join(f"{key}={value}" for key, value in own.items() if key in _REPLACED)
    parts = [f"{acts} acts on sampled answers"] if acts else []
    parts += [f"{idle} does not, in place of which evaluation.temperature={temperature:g} counts"] if idle else []
    return f"Of the model's own generation settings, {'; '.join(parts)}." if parts else None


def _inner(model: Any) -> Any:
    return model.get_base_model() if has_adapter(model) else model


@contextmanager
def without_presets(model: nn.Module) -> Iterator[None]:
    """Switch off the model's own generation settings, such as a repetition penalty, to sample its plain distribution.

    `sample` sets temperature, top_k and top_p in any case.
    """
    inner = _inner(model)
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own
