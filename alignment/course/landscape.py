"""What a loss and its gradient are over the log-ratios of one pair, for looking at a loss before training with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.errors import UserError
from alignment.losses import TPO, TPOL, Loss, LossInputs, Requirements
from alignment.types import RaggedLogps


@dataclass(frozen=True, slots=True)
class PairUnderReference:
    """A chosen and a rejected answer: their tokens, and what the reference thinks of each token in nats.

    A reference that gives the rejected answer the higher log-prob has the pair wrong.
    """

    chosen_tokens: int
    rejected_tokens: int
    chosen_logp: float
    rejected_logp: float


@dataclass(frozen=True, slots=True)
class Landscape:
    """A loss at points (u, v): u and v are log pi - log pi_ref of the chosen and the rejected answer, summed, in nats.

    Attributes:
        chosen, rejected: (points,) u and v.
        losses: (points,) of the pair; a loss of rows is the sum of its two rows.
        push_up: (points,) -dL/du, how strongly a step raises the chosen answer's log-prob; negative: it lowers it.
        push_down: (points,) dL/dv, how strongly a step lowers the rejected answer's log-prob; negative: it raises it.
    """

    chosen: Tensor
    rejected: Tensor
    losses: Tensor
    push_up: Tensor
    push_down: Tensor


def landscape(loss: Loss, chosen: Tensor, rejected: Tensor, pair: PairUnderReference) -> Landscape:
    """The loss at every point, each the only pair of its step, with log-ratios spread evenly over the tokens.

    KTO's baseline is 0, and scores prefer the chosen answer by one. A point where the policy's log-probs would be
    above 0 is not a number.

    Raises:
        UserError: the loss reads more of a pair than its log-probs, or needs a third answer.
    """
    needs = loss.requirements()
    if needs.quantities or needs.prompts or isinstance(loss, TPO | TPOL):
        raise UserError(f"Loss {loss.name} reads more than the log-probs of two answers, so it has no such landscape.")
    u, v = (values.detach().double().requires_grad_() for values in (chosen, rejected))
    # A step of one pair where the pairs of a step have to do with each other; as often as the loss wants it.
    copies = needs.min_items if needs.whole_step else 1
    size = 1 if needs.whole_step else len(u)
    losses = torch.cat(
        [_losses(loss, needs, u[i : i + size], v[i : i + size], pair, copies) for i in range(0, len(u), size)]
    )
    up, down = torch.autograd.grad(losses.sum(), (u, v))
    impossible = (pair.chosen_logp * pair.chosen_tokens + u > 0) | (pair.rejected_logp * pair.rejected_tokens + v > 0)
    shown = [torch.where(impossible, torch.nan, values).detach() for values in (losses, -up, down)]
    return Landscape(u.detach(), v.detach(), *shown)


def _losses(loss: Loss, needs: Requirements, u: Tensor, v: Tensor, pair: PairUnderReference, copies: int) -> Tensor:
    """(points,) of a step that holds every point so many times."""
    u, v = u.repeat_interleave(copies), v.repeat_interleave(copies)
    count = len(u)
    tokens = torch.tensor([pair.chosen_tokens, pair.rejected_tokens]).repeat(count)
    per_token = torch.tensor([pair.chosen_logp, pair.rejected_logp], dtype=torch.float64).repeat(count)
    reference = per_token.repeat_interleave(tokens)
    ratios = torch.stack([u, v], 1).flatten()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), tokens.cumsum(0)])
    policy = reference + (ratios / tokens).repeat_interleave(tokens)
    rows = needs.unit == "row"
    step = LossInputs(
        RaggedLogps(policy, offsets),
        RaggedLogps(reference, offsets),
        labels=torch.tensor([True, False]).repeat(count) if rows else None,
        sizes=torch.full((count,), 2) if needs.unit == "list" else None,
        scores=torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(count),
        state=loss.initial_state(),
        seeds=torch.zeros(2 * count if rows else count, dtype=torch.int64),
    )
    assert step.reference is not None
    losses = loss(step, loss.step_statistics(LossInputs(step.reference, step.reference))).losses
    return losses.view(-1, copies, 2 if rows else 1).mean(1).sum(1)


def along_margin(loss: Loss, margins: Tensor, pair: PairUnderReference) -> Landscape:
    """The landscape where the chosen answer has gained half of each margin, and the rejected one has lost the other."""
    return landscape(loss, margins / 2, -margins / 2, pair)


def plane(loss: Loss, chosen: Tensor, rejected: Tensor, pair: PairUnderReference) -> Landscape:
    """The landscape of all chosen log-ratios with each of the rejected ones in turn."""
    return landscape(loss, chosen.repeat(len(rejected)), rejected.repeat_interleave(len(chosen)), pair)
