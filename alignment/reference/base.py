"""The reference: the policy as it was when the stage started or at the last refresh."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alignment.policy.identity import policy_identity
from alignment.scoring.layout import BatchLayout
from alignment.scoring.logps import join_scores, score_groups
from alignment.types import Group, RaggedLogps

log = logging.getLogger(__name__)

_STATE = "reference.safetensors"


_NOISE_CEILING = 0.1
"""Nats per token that no rounding explains: another policy is off by more, a short SFT moves tenths of a nat."""


def _is_precise(model: nn.Module) -> bool:
    config: Any = model.config
    quantization = config.to_dict().get("quantization_config") or {}
    return model.dtype in (torch.float32, torch.float64) and (
        quantization.get("bnb_4bit_compute_dtype") in (None, "float32", "float64")
    )


def comparison_tolerance(model: nn.Module, num_tokens: int) -> float:
    """The largest mean difference between two scorings, in nats per token, that batch shapes alone usually cause.

    Measured on 135M parameters and real text, with and without NF4: a mean of 2e-7 in fp32 and of 3e-3 in bfloat16,
    where a single unlikely token is off by 0.3. The rest leaves room for larger models, and for one such token in a
    short text. Short texts, another GPU or another torch may exceed it: see `agreement_limit`.
    """
    return (1e-4 if _is_precise(model) else 3e-2) * (1 + 16 / num_tokens)


def agreement_limit(
    model: nn.Module, groups: Sequence[Group], difference: float, num_tokens: int, layout: BatchLayout
) -> float:
    """The largest mean difference between two scorings of these groups, in nats per token, that rounding explains.

    Where 16 bits exceed the usual tolerance, the noise of this device and dtype is measured: the groups are scored all
    together and one by one. Three times what that changes is allowed, but never more than 0.1. A policy that gives
    other numbers for the same batch, as with dropout, gets no such allowance.

    Args:
        model: the policy, on its device.
        groups: what was scored.
        difference: that was found.
        num_tokens: completion tokens of the groups.
        layout: of the passes.
    """
    usual = comparison_tolerance(model, num_tokens)
    if not usual < difference <= _NOISE_CEILING or _is_precise(model):
        return usual
    device = next(model.parameters()).device
    together, alone, again = (
        join_scores(groups, list(score_groups(model, groups, layout, budget, device))).values
        for budget in (2**14, 1, 1)
    )
    noise, chance = ((together - alone).abs().mean().item(), (again - alone).abs().mean().item())
    log.info(
        "Two scorings differ by %.2g nats per token: other batch shapes change them by %.2g, the same ones by %.2g.",
        difference,
        noise,
        chance,
    )
    return min(_NOISE_CEILING, max(usual, 3 * noise)) if chance <= noise / 10 else usual


class Reference(ABC):
    """Reference log-probs of groups.

    Attributes:
        identity: identity of the policy that the reference is now.
        refreshes: for every refresh {"step": steps done, "identity": the new identity}.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.identity, self._description = policy_identity(model)
        self._start = self.identity
        self.refreshes: list[dict[str, Any]] = []

    @abstractmethod
    def prepare(self, groups: Sequence[Group]) -> None:
        """Get ready before the first update. `groups` are all that will be asked for before the first refresh."""

    @abstractmethod
    def refresh(self, step: int, groups: Sequence[Group]) -> None:
        """Follow the policy after `step` steps. `groups` are all that will be asked for before the next refresh."""

    def is_policy(self, step: int) -> bool:
        """Whether the policy after `step` steps is what the reference became last."""
        return step == (self.refreshes[-1]["step"] if self.refreshes else 0)

    @abstractmethod
    def logps(self, groups: Sequence[Group]) -> RaggedLogps:
        """Log-probs of all completions, in order: on the CPU if they were stored, else on the device."""

    @abstractmethod
    def entropies(self, groups: Sequence[Group]) -> RaggedLogps:
        """Normalised entropy of the reference at every completion token (`Quantity.entropy`), where `logps` are."""

    @abstractmethod
    def close(self) -> None:
        """Free the memory."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """The tensors that a refresh made, for `save_state`."""

    @abstractmethod
    def _restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `_tensors` returned."""

    def _note_refresh(self, step: int, model: nn.Module) -> None:
        self.identity, self._description = policy_identity(model)
        self.refreshes.append({"step": step, "identity": self.identity})
        log.info("Reference after step %d: %s.", step, self.identity[:12])

    def save_state(self, folder: Path) -> None:
        """Save to a checkpoint what refreshes made of the reference, so that a resumed run does not need the store."""
        tensors = self._tensors() if self.refreshes else {}
        save_file(tensors, folder / _STATE, {"refreshes": json.dumps(self.refreshes)})

    def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote, in a reference that was made from the same start."""
        with safe_open(folder / _STATE, "pt") as file:
            self.refreshes = json.loads(file.metadata()["refreshes"])
            if self.refreshes:
                self.identity = self.refreshes[-1]["identity"]
                self._restore({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says about it; `identity` is the one at the start."""
        return {"identity": self._start} | ({"refreshes": self.refreshes} if self.refreshes else {})
