"""Before the first update: is the reference the policy, and does the loss start where its formula says?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from alignment.errors import UserError
from alignment.groups import Group
from alignment.preference import PreferenceTrainer
from alignment.reference import comparison_tolerance


@torch.no_grad()
def check_start(trainer: PreferenceTrainer, groups: Sequence[Group]) -> dict[str, float]:
    """Compare policy and reference, and the loss with its closed form, on the groups of the first step.

    Returns:
        {"loss": value of the loss, "closed_form": what it must be, "max_token_difference": nats}.

    Raises:
        UserError: they disagree; training would optimise something else than the objective's name says.
    """
    if trainer.reference is None:
        return {}
    found = trainer.step_values(groups)
    model: nn.Module = trainer.model
    reference = trainer.reference.logps(groups)
    difference = (found.policy.values.cpu().double() - reference.values.double()).abs()
    tolerance = comparison_tolerance(model)
    if not difference.mean().item() <= tolerance:
        raise UserError(
            f"The reference is not the policy that this stage starts from: their log-probs differ by "
            f"{difference.mean():.3g} nats per token on the first step (at most {tolerance:g} is rounding)."
        )
    labels = found.labels.cpu() if found.labels is not None else None
    expected = trainer.loss.at_reference(reference, labels).mean().item()
    value = found.loss
    # Rounding of a log-prob acts on a loss through its slope; relative to the loss's own size it stays in proportion.
    if not abs(value - expected) <= 10 * tolerance * max(1.0, abs(expected)):
        raise UserError(
            f"The loss {trainer.loss.name} is {value:.6g} before the first update, where its formula gives "
            f"{expected:.6g} for a policy that equals its reference; the run stops because its numbers cannot be right."
        )
    return {"loss": value, "closed_form": expected, "max_token_difference": difference.max().item()}
