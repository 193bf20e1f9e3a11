"""Before the first update: is the reference the policy, and does the loss start where its formula says?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from alignment.errors import UserError
from alignment.losses import LossInputs, Quantity
from alignment.reference.base import comparison_tolerance
from alignment.training.trainer import PreferenceTrainer
from alignment.types import Group, RaggedLogps


def _exact(logps: RaggedLogps) -> RaggedLogps:
    return RaggedLogps(logps.values.double(), logps.offsets)


def _at_reference(inputs: LossInputs) -> LossInputs:
    """The inputs, in float64, of a policy whose log-probs are exactly those of the reference."""
    reference = _exact(inputs.policy if inputs.reference is None else inputs.reference)
    quantities = {quantity: _exact(values) for quantity, values in inputs.quantities.items()}
    if (divergence := quantities.get(Quantity.divergence)) is not None:
        divergence.values.zero_()
    return replace(
        inputs,
        policy=reference,
        reference=None if inputs.reference is None else reference,
        prompts=None if inputs.prompts is None else _exact(inputs.prompts),
        quantities=quantities,
    )


@torch.no_grad()
def check_start(trainer: PreferenceTrainer, groups: Sequence[Group]) -> dict[str, float]:
    """Compare policy and reference, and the loss with its closed form, on the groups of the first step.

    Without a reference the policy stands for it: the closed form of a reference-free loss is one of log-probs.

    Returns:
        {"loss": value of the loss, "closed_form": what it must be, "max_token_difference": nats}.

    Raises:
        UserError: they disagree; training would optimise something else than the objective's name says.
    """
    loss = trainer.loss
    found = trainer.step_values(groups)
    exact = _at_reference(found.inputs)
    difference = (found.inputs.policy.values.double() - exact.policy.values).abs()
    tolerance = comparison_tolerance(trainer.model, len(difference))
    if not difference.mean().item() <= tolerance:
        raise UserError(
            f"The reference of loss {loss.name} is not the policy that this stage starts from: their log-probs differ "
            f"by {difference.mean():.3g} nats per token on the first step (at most {tolerance:g} is rounding)."
        )
    weights = torch.tensor([group.weight for group in groups], dtype=torch.float64, device=difference.device)
    expected = (weights * loss.at_reference(exact)).mean().item()
    step_statistics = trainer.objective.step_statistics(groups, tokens_per_batch=None)
    if step_statistics is not None:
        step_statistics = step_statistics.double()
    computed = (weights * loss(exact, step_statistics).losses).mean().item()
    # On equal log-probs only the arithmetic of float64 is left. What the model computes is rounded: a log-prob's error
    # acts on the loss through its slope; relative to the loss's own size it stays in proportion.
    for value, allowed in (
        (computed, 1e-6),
        (found.loss, math.inf if loss.discontinuous_at_reference else 10 * tolerance),
    ):
        if not abs(value - expected) <= allowed * max(1.0, abs(expected)):
            raise UserError(
                f"The loss {loss.name} is {value:.6g} before the first update, where its formula gives {expected:.6g} "
                f"for a policy that equals its reference; the run stops because its numbers cannot be right."
            )
    return {"loss": found.loss, "closed_form": expected, "max_token_difference": difference.max().item()}
