"""What a policy loses on its way from an adapter on NF4 to a merged model, and from there to NF4 again.

An adapter trains on the rounded weights of its base. Merged in 16 bits it keeps them, and only its own rounding is new.
Who then quantises the merged model rounds anew, base and update together, and gets another policy than the one that was
trained: so both steps are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Sequences = Sequence[tuple[Tensor, int]]
"""Token ids (1, length), and the position from which the next tokens count."""

_LIKELY = 10
"""Nats below the best token."""


@torch.no_grad()
def next_logps(model: Any, sequences: Sequences) -> list[Tensor]:
    """(positions, vocabulary) fp32 on the CPU for each sequence: the log-probs of the next tokens."""
    was_training = model.training
    model.eval()
    found = [model(input_ids=ids).logits[0, start:].float().log_softmax(-1).cpu() for ids, start in sequences]
    model.train(was_training)
    return found


def drift(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean absolute difference of the next tokens' log-probs, nats, over tokens as the first of the two draws them."""
    sums = [(a.double().exp() * (a.double() - b.double()).abs()).sum(-1) for a, b in zip(before, after, strict=True)]
    return torch.cat(sums).mean().item()


def largest(before: Tensor, after: Tensor) -> float:
    """Largest absolute difference of two log-probs, nats, over likely next tokens as the first of them has them.

    No decoding reaches the far tail, which is rounding noise. nan where a number is.
    """
    apart = (before - after).abs()
    return apart[(before > before.amax(-1, keepdim=True) - _LIKELY) | apart.isnan()].max().item()


def drift_of_steps(
    policy: Sequence[Tensor], merged: Sequence[Tensor], sequences: Sequences, requantise: Callable[[], nn.Module]
) -> dict[str, float]:
    """The drift of each step, and of both together.

    Args:
        policy: `next_logps` of the adapter on its quantised base.
        merged: the same of the merged model.
        requantise: loads the merged model as the base was loaded.

    Returns:
        {"merged", "requantised", "together": nats, as `drift` gives them}.
    """
    again = next_logps(requantise(), sequences)
    return {"merged": drift(policy, merged), "requantised": drift(merged, again), "together": drift(policy, again)}
