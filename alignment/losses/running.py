"""Statistics of a step, and how a loss follows them from step to step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

NO_MOMENTS = {"mean": 0.0, "std": 0.0}
"""The state of `moving_moments` before the first step."""


def in_order(values: Tensor) -> Tensor:
    """(n,) the same numbers sorted, in float64 and without gradient.

    A sum over them is the same to the last bit whatever the order of the items was.
    """
    return values.detach().double().sort().values


def moving_moments(state: Mapping[str, float], values: Tensor, decay: float) -> dict[str, float]:
    """Exponential moving averages, from 0 on, of a step's mean and standard deviation (n - 1 in the denominator)."""
    ordered = in_order(values)
    now = {"mean": ordered.mean().item(), "std": ordered.std().item()}
    return {key: decay * state[key] + (1 - decay) * now[key] for key in NO_MOMENTS}


def standardised(values: Tensor, moments: Mapping[str, float]) -> Tensor:
    """(n,) distances from the mean in standard deviations, without gradient.

    All 0 where the deviation is: before the first step, and as long as the policy is exactly the reference.
    """
    centred = values.detach() - moments["mean"]
    return centred / moments["std"] if moments["std"] > 0 else 0 * centred
