"""The loss scaler of float16, which keeps small gradients from becoming 0.

float16 has nothing between 0 and 6e-8. So the loss is multiplied before the backward pass, and the gradients are
divided in fp32 before anything reads them (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2). Where they
overflow, the step is left out and the factor halved; after 2000 good steps it is doubled.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from alignment.errors import UserError

log = logging.getLogger(__name__)

FLOOR = 1.0
"""A gradient that overflows at this factor is none of the factor's making."""


class LossScaler(torch.amp.GradScaler):
    """torch's scaler for one optimizer, which counts the steps that it leaves out.

    Attributes:
        skipped: steps left out so far; a checkpoint has the number.
        overflowed: whether the running step is left out.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device.type)
        self.scale(torch.zeros((), device=device))  # torch makes the factor's tensor in the first call
        self.skipped = 0
        self.overflowed = False

    def leave_out(self, step: int) -> bool:
        """Leave the running step out, of which a gradient is not finite; False if the factor is not to blame."""
        factor = self.get_scale()
        self.overflowed = factor > FLOOR
        if self.overflowed:
            self.skipped += 1
            log.info(
                "Step %d changes nothing: its gradient overflows float16. The loss's factor falls from %g to %g.",
                step,
                factor,
                factor * self.get_backoff_factor(),
            )
        return self.overflowed

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Step on gradients that `unscale_` has divided. Fused optimizers are left out here too, not by themselves."""
        if not self.overflowed:
            optimizer.step()
        self.overflowed = False

    def state_dict(self) -> dict[str, Any]:
        """torch's, and the number of steps left out."""
        return super().state_dict() | {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self.skipped = state_dict["skipped"]


def loss_scaler(model: Any, device: torch.device) -> LossScaler | None:
    """The scaler of a model that computes in float16; None for any other.

    Raises:
        UserError: weights train in float16, which rounds their updates away and their gradients to 0.
    """
    if getattr(model, "dtype", None) is not torch.float16:
        return None
    if any(p.dtype is torch.float16 for p in model.parameters() if p.requires_grad):
        raise UserError(
            "model.dtype=float16 is for adapters, which train in float32, and here weights of the model itself train: "
            "set model.dtype=float32, or on a GPU from Ampere on bfloat16."
        )
    return LossScaler(device)
