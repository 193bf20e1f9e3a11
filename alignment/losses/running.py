"""Statistics of a step, and the moving averages by which a loss follows them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

NO_MOMENTS = {"mean": 0.0, "std": 0.0}
"""The state of `moving_moments` before the first step."""


def in_order(values: Tensor) -> Tensor:
    """(n,) the same numbers sorted, in float64 and without gradient.

    Their sum has the same bits in whatever order the items came.
    """
    return values.detach().double().sort().values


def moving_moments(state: Mapping[str, float], values: Tensor, decay: float) -> dict[str, float]:
    """Exponential moving averages, starting at 0, of a step's mean and standard deviation (denominator n - 1)."""
    ordered = in_order(values)
    now = {"mean": ordered.mean().item(), "std": ordered.std().item()}
    return {key: decay * state[key] + (1 - decay) * now[key] for key in NO_MOMENTS}


def standardised(values: Tensor, moments: Mapping[str, float]) -> Tensor:
    """(n,) distances from the mean in standard deviations, without gradient.

    They are 0 while the deviation is 0: before the first step, and as long as the policy equals the reference.
    """
    centred = values.detach() - moments["mean"]
    return centred / moments["std"] if moments["std"] > 0 else 0 * centred
