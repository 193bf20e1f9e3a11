"""How far the policy moved from its start: KL(policy || start), estimated from the policy's own answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from alignment.evaluation.sampling.answer import Finish, Sampling
from alignment.evaluation.sampling.draw import Engine, draw
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
    engine: Engine,
    max_new_tokens: int,
    layout: BatchLayout,
    tokens_per_batch: int,
    device: torch.device,
    seed: int,
) -> dict[str, Any]:
    """Sample one answer per prompt at temperature 1, and score the sampled tokens with both policies.

    The mean of log policy(y|x) - log start(y|x) over y ~ policy is an unbiased estimate of the KL of answers of up to
    `max_new_tokens` tokens, stop token included. A single answer is noisy and may be below 0, unlike the KL.

    Returns:
        "n": number of answers; "mean" and "se": nats per answer with standard error; "per_token" and "per_token_se":
        nats per token over all answers; "tokens": their number; "ended": the share of answers that ended before they
        were cut. The standard errors are None for a single answer.
    """
    log.info("Sampling %d answers for the KL to the start of this stage ...", len(prompts))
    how = Sampling(stops=tuple(stops), max_new_tokens=max_new_tokens, seed=seed)
    answers = [answer for (answer,) in draw(engine, prompts, 1, how)]
    groups = [Group(prompt, (answer.tokens,)) for prompt, answer in zip(prompts, answers, strict=True)]

    def logps(scored: nn.Module) -> RaggedLogps:
        return join_scores(groups, list(score_groups(scored, groups, layout, tokens_per_batch, device)))

    policy = logps(model)
    with start.active() as frozen:
        reference = logps(frozen)
    ratios = RaggedLogps(policy.values.double() - reference.values.double(), policy.offsets).sums()
    per_token = ratios.sum() / policy.lengths.sum()
    # The error of a ratio of two means is, to first order, that of the mean of its residuals.
    residuals = (ratios - per_token * policy.lengths) / policy.lengths.double().mean()
    return {
        "n": len(answers),
        "mean": ratios.mean().item(),
        "se": _standard_error(ratios),
        "per_token": per_token.item(),
        "per_token_se": _standard_error(residuals),
        "tokens": int(policy.lengths.sum()),
        "ended": float(np.mean([answer.finish is Finish.stop for answer in answers])),
    }


def _standard_error(values: torch.Tensor) -> float | None:
    """Standard error of the mean of independent values; None for one value."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
