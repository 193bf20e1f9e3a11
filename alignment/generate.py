"""Sampled answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from alignment.config import EvaluationConfig
from alignment.groups import Group


def stop_tokens(tokenizer: Any, groups: Sequence[Group]) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS and the one that most training answers end with.

    A base model's EOS often differs from the end-of-turn token of its chat template.
    """
    last = np.array([completion[-1] for group in groups for completion in group.completions])
    stops = {int(np.bincount(last).argmax())} if len(last) else set()
    return sorted(stops | {tokenizer.eos_token_id})


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    config: EvaluationConfig,
    stops: Sequence[int],
    device: torch.device,
    seed: int,
) -> list[str]:
    """One answer per tokenised prompt, in order; greedy at temperature 0, else sampled from a seed of its own."""
    answers: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(order), config.batch_size):
            members = order[start : start + config.batch_size]
            width = max(len(prompts[i]) for i in members)
            ids = torch.full((len(members), width), tokenizer.pad_token_id, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(members):
                ids[row, width - len(prompts[index]) :] = torch.from_numpy(prompts[index].astype(np.int64))
                mask[row, width - len(prompts[index]) :] = 1
            sampling: dict[str, Any] = {"do_sample": False}
            if config.temperature > 0:
                sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=config.max_new_tokens,
                eos_token_id=list(stops),
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
            for row, index in enumerate(members):
                new = output[row, width:].tolist()
                end = next((i for i, token in enumerate(new) if token in stops), len(new))
                answers[index] = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
    model.train(was_training)
    return [answers[i] for i in range(len(prompts))]
