"""How far log-probs that came with answers are from a scoring pass of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from alignment.evaluation.sampling.answer import Answer, Sampling, Wanted
from alignment.evaluation.sampling.draw import Engine
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
    groups = _groups(prompts, answers)
    scores = join_scores(groups, list(score_groups(model, groups, layout, tokens_per_batch, device)))
    return _drift([_off(answers, scores)]), scores


@dataclass(slots=True)
class ScoredEngine:
    """An engine that gives another one's answers the log-probs of the policy itself, and measures how far it was off.

    Attributes:
        engine: that draws.
        score: log-probs of groups under the policy.
    """

    engine: Engine
    score: Callable[[Sequence[Group]], RaggedLogps]
    _differences: list[torch.Tensor] = field(default_factory=list)

    def identity(self) -> tuple[str, dict[str, Any]]:
        """That of the engine."""
        return self.engine.identity()

    def decisive(self, how: Sampling) -> dict[str, Any]:
        """What the engine says of the settings."""
        return self.engine.decisive(how)

    def draw(self, wanted: Sequence[Wanted], how: Sampling) -> list[list[Answer]]:
        """The answers that are wanted of each prompt, in order, with log-probs of a scoring pass."""
        answers = self.engine.draw(wanted, how)
        scores = self.score(_groups([prompt for prompt, _ in wanted], answers))
        self._differences.append(_off(answers, scores))
        logps = iter(scores.values.float().cpu().split(scores.lengths.tolist()))
        return [[replace(answer, logps=next(logps).numpy()) for answer in each] for each in answers]

    @property
    def drift(self) -> Drift:
        """Of all answers so far, of which there must be some."""
        return _drift(self._differences)


def _groups(prompts: Sequence[np.ndarray], answers: Sequence[Sequence[Answer]]) -> list[Group]:
    return [Group(p, tuple(a.tokens for a in each)) for p, each in zip(prompts, answers, strict=True)]


def _off(answers: Sequence[Sequence[Answer]], scores: RaggedLogps) -> torch.Tensor:
    """(tokens,) fp64: how far each log-prob that came with the answers is from its score."""
    told = np.concatenate([answer.logps for each in answers for answer in each])
    return (scores.values.cpu().double() - torch.from_numpy(told).double()).abs()


def _drift(differences: Sequence[torch.Tensor]) -> Drift:
    every = torch.cat(list(differences))
    return Drift(every.mean().item(), every.max().item(), len(every))
