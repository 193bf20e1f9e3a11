"""Sample answers to prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from alignment.policy.adapter import has_adapter
from alignment.ranks.shares import evenly
from alignment.ranks.team import Post, Team, trained_parameters
from alignment.scoring.logps import autocast


def stop_tokens(tokenizer: Any, ends: Sequence[int], own: Sequence[int]) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, the templates' ends of turn, and the model's own.

    A base model's EOS often differs from the end-of-turn token of its chat template. Nothing is learnt from the data,
    whose answers may be cut.

    Args:
        ends: the ends of turn of the chat templates that write the data.
        own: the EOS tokens of the model's generation settings.
    """
    return sorted({token for token in (tokenizer.eos_token_id, *ends, *own) if token is not None})


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        stops: the tokens that end an answer.
        temperature: 0 for greedy ones.
        max_new_tokens: after which an answer is cut.
        batch_size: prompts at once.
        seed: of what is drawn.
    """

    stops: Sequence[int]
    temperature: float
    max_new_tokens: int
    batch_size: int
    seed: int


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
    team: Team | None = None,
) -> list[np.ndarray]:
    """One answer per tokenised prompt, in order: int32 tokens up to and including the first stop token.

    The model computes in the precision in which it is scored, so the policy that answers is the one that was trained.
    Greedy at temperature 0; then the ranks of a team share the batches. Otherwise drawn with `seed`; the global random
    state is left alone.
    """
    how = Sampling(stops, temperature, max_new_tokens, batch_size, seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if team is None or temperature > 0:  # what a batch draws depends on those before it
        found = [_sampled(model, [[prompts[i] for i in members] for members in batches], how, device)]
        shares = [list(range(len(batches)))]
    else:
        shares = evenly([sum(len(prompts[i]) + max_new_tokens for i in members) for members in batches], team.size)
        asked = [([[prompts[i] for i in batches[number]] for number in own], how) for own in shares]
        found = team.run(
            sample_share, asked, lambda own: _sampled(model, own[0], own[1], device), trained_parameters(model)
        )
    answers: dict[int, np.ndarray] = {}
    for own, results in zip(shares, found, strict=True):
        for number, texts in zip(own, results, strict=True):
            answers.update(zip(batches[number], texts, strict=True))
    return [answers[i] for i in range(len(prompts))]


def sample_share(post: Post, asked: tuple[list[list[np.ndarray]], Sampling]) -> list[list[np.ndarray]]:
    """The answers of a rank that follows to its batches."""
    return _sampled(post.model, asked[0], asked[1], post.device)


@torch.no_grad()
def _sampled(
    model: Any, batches: Sequence[Sequence[np.ndarray]], how: Sampling, device: torch.device
) -> list[list[np.ndarray]]:
    """The answers to the prompts of each batch."""
    answers: list[list[np.ndarray]] = []
    sampling: dict[str, Any] = {"do_sample": False}
    if how.temperature > 0:
        sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # its default: every GPU it sees
        torch.manual_seed(how.seed)
        for prompts in batches:
            width = max(len(prompt) for prompt in prompts)
            ids = torch.zeros((len(prompts), width), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(prompts):
                ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
                mask[row, width - len(prompt) :] = 1
            with autocast(model, device):
                output = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=how.max_new_tokens,
                    eos_token_id=list(how.stops),
                    pad_token_id=how.stops[0],  # the padding after an answer's end is cut off below
                    **sampling,
                )
            new = [answer[width:].to("cpu", torch.int32).numpy() for answer in output]
            ends = [np.flatnonzero(np.isin(answer, how.stops)) for answer in new]
            answers.append([a[: end[0] + 1] if len(end) else a for a, end in zip(new, ends, strict=True)])
    model.train(was_training)
    return answers


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
