"""A loss and its gradient over the log-ratios of one pair, so that you can look at a loss before you train with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.errors import UserError
from alignment.losses import TPO, TPOL, Loss, LossInputs, Requirements
from alignment.types import RaggedLogps


@dataclass(frozen=True, slots=True)
class PairUnderReference:
    """A chosen and a rejected answer: their numbers of tokens, and the reference's mean log-prob per token, nats.

    If the rejected answer has the higher log-prob, the reference ranks the pair wrongly.
    """

    chosen_tokens: int
    rejected_tokens: int
    chosen_logp: float
    rejected_logp: float


@dataclass(frozen=True, slots=True)
class Landscape:
    """A loss at points (u, v), the log-ratios log pi - log pi_ref of the chosen and the rejected answer, in nats.

    Attributes:
        chosen, rejected: (points,) u and v, summed over the tokens of the answer.
        losses: (points,) loss of the pair; for a loss of rows, the sum of both rows.
        push_up: (points,) -dL/du: how strongly a step raises the chosen answer's log-prob (negative: lowers it).
        push_down: (points,) dL/dv: how strongly a step lowers the rejected answer's log-prob (negative: raises it).
    """

    chosen: Tensor
    rejected: Tensor
    losses: Tensor
    push_up: Tensor
    push_down: Tensor


def landscape(loss: Loss, chosen: Tensor, rejected: Tensor, pair: PairUnderReference) -> Landscape:
    """The loss at every point. Each point is the only pair of its step, with log-ratios spread evenly over the tokens.

    KTO's baseline is 0, and the score of the chosen answer is higher by one. Points where a log-prob of the policy
    would exceed 0 are NaN.

    Raises:
        UserError: the loss reads more of a pair than its log-probs, or needs a third answer.
    """
    needs = loss.requirements()
    if needs.quantities or needs.prompts or needs.draws or isinstance(loss, TPO | TPOL):
        raise UserError(f"Loss {loss.name} reads more than the log-probs of two answers, so it has no such landscape.")
    u, v = (values.detach().double().requires_grad_() for values in (chosen, rejected))
    # If the pairs of a step interact, a step is one pair, repeated until the loss has its minimum of pairs.
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
    """(points,) losses of a step that holds `copies` of every point."""
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
    """The landscape along margins: the chosen answer gains half of each margin, the rejected one loses half."""
    return landscape(loss, margins / 2, -margins / 2, pair)


def plane(loss: Loss, chosen: Tensor, rejected: Tensor, pair: PairUnderReference) -> Landscape:
    """The landscape over the grid of chosen and rejected log-ratios, row by row of the rejected ones."""
    return landscape(loss, chosen.repeat(len(rejected)), rejected.repeat_interleave(len(chosen)), pair)
