"""Before the first update: is the reference the policy, and does the loss start where its formula says?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from alignment.errors import UserError
from alignment.losses import LossInputs, Quantity
from alignment.reference.base import agreement_limit
from alignment.training.metrics import undecided_metrics
from alignment.training.objective import weighted
from alignment.training.trainer import PreferenceTrainer
from alignment.types import Group, RaggedLogps


def _exact(logps: RaggedLogps) -> RaggedLogps:
    return RaggedLogps(logps.values.double(), logps.offsets)


def _at_reference(inputs: LossInputs) -> LossInputs:
    """The inputs, in float64, of a policy whose log-probs are exactly those of the reference, or of its own draw."""
    reference = _exact(inputs.policy if inputs.reference is None else inputs.reference)
    if inputs.drawn is not None:  # the reference is a teacher, and the policy is who has drawn
        drawn = _exact(inputs.drawn)
        return replace(inputs, policy=drawn, reference=reference, drawn=drawn)
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

    Without a reference the policy stands in for it: a reference-free loss has a closed form in log-probs.

    Returns:
        {"loss": value of the loss, "closed_form": what it must be, "max_token_difference": nats}.

    Raises:
        UserError: they disagree, so training would optimise something else than the loss's name says.
    """
    loss, objective = trainer.loss, trainer.objective
    found = trainer.evaluate_step(groups)
    exact = _at_reference(found.inputs)

    # Is the reference the policy that training starts from?
    difference = (found.inputs.policy.values.double() - exact.policy.values).abs()
    mean = difference.mean().item()
    tolerance = agreement_limit(trainer.model, groups, mean, len(difference), trainer.layout)
    if not mean <= tolerance:
        if found.inputs.drawn is not None:
            raise UserError(
                f"The answers of loss {loss.name} are not those of the policy that this stage starts from: its "
                f"log-probs differ from those of the sampler by {mean:.3g} nats per token on the first step (up to "
                f"{tolerance:g} is rounding)."
            )
        raise UserError(
            f"The reference of loss {loss.name} is not the policy that this stage starts from: their log-probs differ "
            f"by {mean:.3g} nats per token on the first step (up to {tolerance:g} is rounding)."
        )

    # Does the loss start where its formula says? In float64 on equal log-probs it must be exact. What the model
    # computes is rounded, and a log-prob's error acts on the loss through its slope: in proportion to the loss's size.
    expected = weighted(groups, loss.at_reference(exact).double()).mean().item()
    step_statistics = objective.step_statistics(groups, tokens_per_batch=None)
    if step_statistics is not None:
        step_statistics = step_statistics.double()
    started = objective.evaluate(groups, exact, step_statistics)
    trainer.undecided = undecided_metrics(started.inputs, started.output)
    computed = started.mean()
    rounding = math.inf if loss.discontinuous_at_reference else 10 * tolerance
    for value, allowed in ((computed, 1e-6), (found.mean(), rounding)):
        if not abs(value - expected) <= allowed * max(1.0, abs(expected)):
            raise UserError(
                f"The loss {loss.name} is {value:.6g} before the first update, but its formula gives {expected:.6g} "
                f"for a policy that equals its reference. The run stops because its numbers cannot be right."
            )
    return {"loss": found.mean(), "closed_form": expected, "max_token_difference": difference.max().item()}
