"""How far the policy has moved from the one that has drawn its answers, by what both say of these."""

from __future__ import annotations

import torch

from alignment.types import RaggedLogps


def departure(drawn: RaggedLogps, now: RaggedLogps) -> dict[str, float]:
    """What a round's answers are worth to the policy that it ends with.

    Args:
        drawn: log-probs of answers under the policy that has drawn them, at temperature 1 and unfiltered.
        now: of the same tokens under the policy as it is now.

    Returns:
        `kl_round`: KL(drawn || now) in nats per answer, the mean of -d over answers with d = log now(y) - log drawn(y);
        noisy, so it may be below 0. `staleness`: the mean of d per token. `effective`: the effective sample size by the
        importance weights w = exp(d), as a share of the answers: (sum w)^2 / (n sum w^2) (Kong 1992), 1 for a policy
        that has not moved.
    """
    ratios = (now.values.double() - drawn.values.double().to(now.values.device)).cpu()
    d = RaggedLogps(ratios, now.offsets.cpu()).sums()
    weights = (d - d.max()).exp()
    effective = weights.sum().square() / (len(d) * weights.square().sum())
    return {"kl_round": -d.mean().item(), "staleness": ratios.mean().item(), "effective": effective.item()}


def kl_start(now: RaggedLogps, start: RaggedLogps) -> float:
    """KL(now || start) in nats per answer, from answers that the policy as it is now has drawn at temperature 1."""
    ratios = now.values.double().cpu() - start.values.double().cpu()
    found: torch.Tensor = RaggedLogps(ratios, now.offsets.cpu()).sums().mean()
    return found.item()
