"""From hidden states to the log-probs of target tokens: the LM head, in chunks, with nothing of its width kept."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from alignment.products import matmul

LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**26}
"""Logits that exist at one time, by device: 32 or 256 MiB in fp32. Small enough on a CPU for memory that the process
has to be reused, wide enough on a GPU for a matrix product that fills it."""

# exp of less is a denormal number in fp32: no gradient, and a hundred times slower to compute with.
_SMALLEST_LOG = -80.0


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What some architectures do to the head's output: logits * scale, or cap * tanh(logits / cap).

    `logps.check_scoring` proves that nothing else happens.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """That of a model, by its configuration."""
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            return cls(cap=cap)
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            return cls(scale=1 / divisor)
        if factor := getattr(config, "logit_scale", None):  # Cohere
            return cls(scale=factor)
        return cls()

    def __call__(self, logits: Tensor) -> Tensor:
        """Differentiable; fp32 of 16-bit logits."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.cap is not None:
            return self.cap * torch.tanh(logits / self.cap)
        return logits * self.scale if self.scale != 1.0 else logits

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Derivative of the transform, from its result."""
        return 1 - (transformed / self.cap) ** 2 if self.cap is not None else self.scale


class _ScoreOnce(torch.autograd.Function):
    """Log-probs and, from the same logits, their derivatives: the backward pass does not run the head again.

    A log-prob depends on its own hidden state alone: d logp / d h = W[y] - sum over v of p_v W[v], times the slope of
    the transform. So one row of H numbers per position is all that is kept. The head's weights get no gradient: this
    is for a frozen head.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Linear, targets: Tensor, transform: LogitTransform) -> Tensor:
        values = []
        derivatives = torch.empty_like(hidden, dtype=head.weight.dtype)
        size = _chunk_size(head, hidden.device)
        for h, y, derivative in zip(hidden.split(size), targets.split(size), derivatives.split(size), strict=True):
            logits = transform(head(h))
            slope = transform.slope(logits)
            log_probs = torch.log_softmax(logits, dim=-1)
            del logits
            values.append(log_probs.gather(1, y[:, None]).squeeze(1))
            weights = log_probs.clamp_(min=_SMALLEST_LOG).exp_().neg_()
            weights.scatter_add_(1, y[:, None], torch.ones_like(weights[:, :1]))
            if isinstance(slope, Tensor) or slope != 1.0:
                weights.mul_(slope)
            derivative.copy_(matmul(weights.to(head.weight.dtype), head.weight))
        ctx.save_for_backward(derivatives)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (derivatives,) = ctx.saved_tensors
        return (gradient[:, None] * derivatives).to(derivatives.dtype), None, None, None


def _chunk_size(head: Any, device: torch.device) -> int:
    return max(1, LOGITS_PER_CHUNK[device.type] // head.out_features)


def score_hidden(head: Any, hidden: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
    """Log-probs of target tokens.

    A frozen linear head is run once, with the derivatives taken from the same logits; any other head is run again in
    the backward pass, which also serves where its own weights train.

    Args:
        head: module from (tokens, H) to (tokens, V), with `out_features`.
        hidden: (tokens, H).
        targets: (tokens,) int64.
        transform: what the model does to the head's output.

    Returns:
        (tokens,) fp32 (fp64 for an fp64 head), natural logarithms.
    """

    def score_one(h: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(transform(head(h)), y, reduction="none")

    frozen = isinstance(head, nn.Linear) and head.weight.is_floating_point() and not head.weight.requires_grad
    if torch.is_grad_enabled() and frozen:
        return _ScoreOnce.apply(hidden, head, targets, transform)
    score = functools.partial(checkpoint, score_one, use_reentrant=False) if torch.is_grad_enabled() else score_one
    size = _chunk_size(head, hidden.device)
    return torch.cat([score(h, y) for h, y in zip(hidden.split(size), targets.split(size), strict=True)])
