"""The reference: the policy as it was when the stage started or at the last refresh."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alignment.policy.identity import policy_identity
from alignment.types import Group, RaggedLogps

log = logging.getLogger(__name__)

_STATE = "reference.safetensors"


def comparison_tolerance(model: nn.Module, num_tokens: int) -> float:
    """The largest mean difference between two scorings, in nats per token, that batch shapes alone may cause.

    Measured on 135M parameters and real text, with and without NF4: a mean of 2e-7 in fp32 and of 3e-3 in bfloat16,
    where a single unlikely token is off by 0.3. The rest leaves room for larger models, and for one such token in a
    short text. Another policy is off by more: a short SFT moves tenths of a nat.
    """
    config: Any = model.config
    quantization = config.to_dict().get("quantization_config") or {}
    precise = model.dtype in (torch.float32, torch.float64) and (
        quantization.get("bnb_4bit_compute_dtype") in (None, "float32", "float64")
    )
    return (1e-4 if precise else 3e-2) * (1 + 16 / num_tokens)


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
    def prepare(self, groups: Iterable[Group]) -> None:
        """Get ready before the first update. `groups` are all that will be asked for before the first refresh."""

    @abstractmethod
    def refresh(self, step: int, groups: Iterable[Group]) -> None:
        """Follow the policy after `step` steps. `groups` are all that will be asked for before the next refresh."""

    @abstractmethod
    def logps(self, groups: Sequence[Group]) -> RaggedLogps:
        """Log-probs of all completions, in order, on the CPU."""

    @abstractmethod
    def entropies(self, groups: Sequence[Group]) -> RaggedLogps:
        """Normalised entropy of the reference at every completion token (`Quantity.entropy`), on the CPU."""

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
