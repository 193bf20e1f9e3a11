"""How far the policy moved from its start: KL(policy || start), estimated from the policy's own answers."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from alignment.evaluation.sampling.answer import Finish, Sampling
from alignment.evaluation.sampling.draw import Engine, draw
from alignment.ranks.shares import share_groups
from alignment.ranks.team import Post, Team, trained_parameters
from alignment.reference.frozen import FrozenPolicy
from alignment.scoring.layout import BatchLayout
from alignment.scoring.logps import join_scores, score_groups
from alignment.types import Group, RaggedLogps

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Share:
    """Answers that a rank scores with both policies."""

    answers: Sequence[Group]
    tokens_per_batch: int

    def ratios(
        self, model: nn.Module, start: FrozenPolicy, layout: BatchLayout, device: torch.device
    ) -> list[torch.Tensor]:
        """For each answer (tokens,) log policy - log start, fp64 on the CPU."""
        if not self.answers:
            return []

        def logps(scored: nn.Module) -> RaggedLogps:
            passes = score_groups(scored, self.answers, layout, self.tokens_per_batch, device)
            return join_scores(self.answers, list(passes))

        policy = logps(model)
        with start.active() as frozen:
            reference = logps(frozen)
        ratios = (policy.values.double() - reference.values.double()).cpu()
        return list(ratios.split(policy.lengths.tolist()))


def score_answers(post: Post, share: _Share) -> list[torch.Tensor]:
    """What a rank that follows has scored of the answers."""
    return share.ratios(post.model, post.start, post.layout, post.device)


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
    team: Team | None = None,
) -> dict[str, Any]:
    """Sample one answer per prompt at temperature 1, and score the sampled tokens with both policies.

    The mean of log policy(y|x) - log start(y|x) over y ~ policy is an unbiased estimate of the KL of answers of up to
    `max_new_tokens` tokens, stop token included. A single answer is noisy and may be below 0, unlike the KL.

    Args:
        team: the ranks that share the answers, each of which has kept the start; the engine shares its own work.

    Returns:
        "n": number of answers; "mean" and "se": nats per answer with standard error; "per_token" and "per_token_se":
        nats per token over all answers; "tokens": their number; "ended": the share of answers that ended before they
        were cut. The standard errors are None for a single answer.
    """
    log.info("Sampling %d answers for the KL to the start of this stage ...", len(prompts))
    how = Sampling(stops=tuple(stops), max_new_tokens=max_new_tokens, seed=seed)
    answers = [answer for (answer,) in draw(engine, prompts, 1, how)]
    groups = [Group(prompt, (answer.tokens,)) for prompt, answer in zip(prompts, answers, strict=True)]

    if team is None:
        found = _Share(groups, tokens_per_batch).ratios(model, start, layout, device)
    else:
        shares = share_groups(groups, team.size)
        scored = team.run(
            score_answers,
            [_Share([groups[i] for i in share], tokens_per_batch) for share in shares],
            lambda own: own.ratios(model, start, layout, device),
            trained_parameters(model),
        )
        places = [place for share in shares for place in share]
        by_place = dict(zip(places, itertools.chain(*scored), strict=True))
        found = [by_place[place] for place in range(len(groups))]
    by_token = RaggedLogps.from_sequences(found)
    ratios, lengths = by_token.sums(), by_token.lengths
    per_token = ratios.sum() / lengths.sum()
    # The error of a ratio of two means is, to first order, that of the mean of its residuals.
    residuals = (ratios - per_token * lengths) / lengths.double().mean()
    return {
        "n": len(answers),
        "mean": ratios.mean().item(),
        "se": _standard_error(ratios),
        "per_token": per_token.item(),
        "per_token_se": _standard_error(residuals),
        "tokens": int(lengths.sum()),
        "ended": float(np.mean([answer.finish is Finish.stop for answer in answers])),
    }


def _standard_error(values: torch.Tensor) -> float | None:
    """Standard error of the mean of independent values; None for one value."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
