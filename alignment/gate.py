"""Before the first update: is the reference the policy, and does the loss start where its formula says?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignment.errors import UserError
from alignment.groups import Group
from alignment.losses import LossInputs
from alignment.preference import PreferenceTrainer, companion_groups, group_labels
from alignment.ragged import RaggedLogps
from alignment.reference import comparison_tolerance


def _at_reference(trainer: PreferenceTrainer, groups: Sequence[Group], reference: RaggedLogps) -> float:
    """The loss itself, in float64 and without a model, where the policy's log-probs are the reference's."""

    def equal(logps: RaggedLogps, labels: Tensor | None) -> LossInputs:
        exact = RaggedLogps(logps.values.double(), logps.offsets)
        return LossInputs(exact, exact, labels)

    statistics = None
    companions = companion_groups(trainer.loss, groups)
    if companions and trainer.reference is not None:
        statistics = trainer.loss.statistics(equal(trainer.reference.logps(companions), None))
    labels = group_labels(groups, reference.values.device)
    return trainer.loss(equal(reference, labels), statistics).losses.mean().item()


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
    policy = found.policy.detach().to("cpu")
    reference = policy if trainer.reference is None else trainer.reference.logps(groups)
    difference = (policy.values.double() - reference.values.double()).abs()
    tolerance = comparison_tolerance(trainer.model, len(difference))
    if not difference.mean().item() <= tolerance:
        raise UserError(
            f"The reference of loss {loss.name} is not the policy that this stage starts from: their log-probs differ "
            f"by {difference.mean():.3g} nats per token on the first step (at most {tolerance:g} is rounding)."
        )
    exact = RaggedLogps(reference.values.double(), reference.offsets)
    labels = group_labels(groups, reference.values.device)
    expected = loss.at_reference(LossInputs(exact, exact, labels)).mean().item()
    # On equal log-probs only the arithmetic of float64 is left. What the model computes is rounded: a log-prob's error
    # acts on the loss through its slope; relative to the loss's own size it stays in proportion.
    for value, allowed in ((_at_reference(trainer, groups, reference), 1e-6), (found.loss, 10 * tolerance)):
        if not abs(value - expected) <= allowed * max(1.0, abs(expected)):
            raise UserError(
                f"The loss {loss.name} is {value:.6g} before the first update, where its formula gives {expected:.6g} "
                f"for a policy that equals its reference; the run stops because its numbers cannot be right."
            )
    return {"loss": found.loss, "closed_form": expected, "max_token_difference": difference.max().item()}
