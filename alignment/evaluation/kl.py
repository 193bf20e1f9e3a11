"""How far the policy went from where it started: KL(policy || start), from answers of the policy's own."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from alignment.config.schema import EvaluationConfig
from alignment.evaluation.generate import sample, without_presets
from alignment.reference.frozen import FrozenPolicy
from alignment.scoring.layout import BatchLayout
from alignment.scoring.logps import join_scores, score_groups
from alignment.types import Group, RaggedLogps

log = logging.getLogger(__name__)


def sampled_kl(
    model: nn.Module,
    start: FrozenPolicy,
    prompts: Sequence[np.ndarray],
    stops: Sequence[int],
    config: EvaluationConfig,
    layout: BatchLayout,
    tokens_per_batch: int,
    device: torch.device,
    seed: int,
) -> dict[str, Any]:
    """Answer every prompt once at temperature 1, and compare what both policies give to the very tokens sampled.

    The mean of log policy(y|x) - log start(y|x) over y ~ policy is an unbiased estimate of the KL of answers of up to
    `max_new_tokens` tokens, their stop token among them. One answer is noisy and may be below 0, the KL is not.

    Returns:
        {"n": answers, "mean", "se": nats per answer and its standard error, "per_token", "per_token_se": nats per token
        of all answers together, "tokens": how many those are, "ended": share of answers that ended before they were
        cut}; the standard errors are None where one answer is all there is.
    """
    log.info("Sampling %d answers for the KL to the start of this stage ...", len(prompts))
    with without_presets(model):
        answers = sample(
            model,
            prompts,
            stops,
            temperature=1.0,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            device=device,
            seed=seed,
        )
    groups = [Group(prompt, (tokens,)) for prompt, tokens in zip(prompts, answers, strict=True)]

    def logps(scored: nn.Module) -> RaggedLogps:
        return join_scores(groups, list(score_groups(scored, groups, layout, tokens_per_batch, device)))

    policy = logps(model)
    with start.active() as frozen:
        reference = logps(frozen)
    ratios = RaggedLogps(policy.values.double() - reference.values.double(), policy.offsets).sums()
    per_token = ratios.sum() / policy.lengths.sum()
    # The ratio of two means: its error to first order is that of the mean of what is left beside it.
    beside = (ratios - per_token * policy.lengths) / policy.lengths.double().mean()
    return {
        "n": len(answers),
        "mean": ratios.mean().item(),
        "se": _standard_error(ratios),
        "per_token": per_token.item(),
        "per_token_se": _standard_error(beside),
        "tokens": int(policy.lengths.sum()),
        "ended": float(np.mean([tokens[-1] in stops for tokens in answers])),
    }


def _standard_error(values: torch.Tensor) -> float | None:
    """Of the mean of independent values."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
