"""Log-probs of target tokens from logits, and their derivatives by the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from alignment.kernels.base import normal_values
from alignment.kernels.fused import Fused


def _target_log_probs(
    logits: Tensor, targets: Tensor, scale: float, cap: float | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets, and the derivative of each by the logits of its row.

    Args:
        logits: (tokens, V) fp32, rows contiguous.
        targets: (tokens,) int64.
        scale: the distribution is the softmax of `logits * scale`,
        cap: or of `cap * tanh(logits / cap)`, if there is a cap.
        dtype: of the derivatives; None if they are not needed.

    Returns:
        (tokens,) fp32 and (tokens, V) or None.
    """
    transformed = logits * scale if cap is None else cap * torch.tanh(logits / cap)
    log_probs = torch.log_softmax(transformed, dim=-1)
    at_target = targets[:, None]
    logps = log_probs.gather(1, at_target).squeeze(1)
    if dtype is None:
        return logps, None
    derivatives = log_probs.exp_().neg_()
    derivatives.scatter_add_(1, at_target, torch.ones_like(derivatives[:, :1]))
    derivatives *= scale if cap is None else 1 - (transformed / cap) ** 2
    return logps, derivatives.to(dtype)


def _examples(
    logits: Tensor, targets: Tensor, scale: float, cap: float | None, dtype: torch.dtype | None
) -> list[tuple[Tensor, Tensor, float, float | None, torch.dtype | None]]:
    """Rows as long as these and an odd number long, from flat to peaked, with targets at both ends."""
    found = []
    for count, vocabulary in ((5, logits.shape[1]), (3, 97)):
        values = 8 * normal_values((count, vocabulary), logits.device, logits.dtype)
        values[0] *= 4
        at = torch.arange(count, device=logits.device) * 7919 % vocabulary
        at[-1] = vocabulary - 1
        found.append((values, at, scale, cap, dtype))
    return found


target_log_probs = Fused(
    _target_log_probs,
    "target_log_probs",
    fits=lambda logits, targets, scale, cap, dtype: logits.stride(1) == 1 and targets.is_contiguous(),
    examples=_examples,
)
