"""How far log-probs that came with answers are from a scoring pass of our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from alignment.evaluation.sampling.answer import Answer
from alignment.scoring.layout import BatchLayout
from alignment.scoring.logps import join_scores, score_groups
from alignment.types import Group, RaggedLogps


@dataclass(frozen=True, slots=True)
class Drift:
    """Differences of log-probs in nats per token: their mean size, the largest, and of how many tokens."""

    mean: float
    largest: float
    tokens: int


def measure_drift(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    answers: Sequence[Sequence[Answer]],
    layout: BatchLayout,
    tokens_per_batch: int,
    device: torch.device,
) -> tuple[Drift, RaggedLogps]:
    """Score the answers with the policy; returns the drift, and the scores of all answers in order."""
    groups = [Group(p, tuple(a.tokens for a in each)) for p, each in zip(prompts, answers, strict=True)]
    scores = join_scores(groups, list(score_groups(model, groups, layout, tokens_per_batch, device)))
    told = np.concatenate([answer.logps for each in answers for answer in each])
    difference = (scores.values.cpu().double() - torch.from_numpy(told).double()).abs()
    return Drift(difference.mean().item(), difference.max().item(), len(told)), scores
