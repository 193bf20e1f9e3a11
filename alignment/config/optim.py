"""The settings of optimizers and schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from alignment.errors import as_names, not_negative, require


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer and schedule, by the names that transformers uses (`optim`, `lr_scheduler_type`), and `muon`.

    `target_modules` names the linear layers whose gradients GaLore and APOLLO project, or is all-linear; null for all
    other optimizers. With `master_weights`, weights that train in 16 bits have a copy in fp32, which the optimizer
    steps; without, small updates of them are rounded away. Adapters are in fp32 anyway.
    """

    name: str
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    schedule: str
    warmup_ratio: float
    max_grad_norm: float
    target_modules: Any  # names, or one name, or null
    master_weights: bool

    def __post_init__(self) -> None:
        if self.target_modules is not None:
            self.target_modules = as_names("optim.target_modules", self.target_modules)
        require(0 < self.lr < math.inf, f"optim.lr must be a finite number above 0, not {self.lr}.")
        not_negative("optim.weight_decay", self.weight_decay)
        require(0 <= self.warmup_ratio < 1, f"optim.warmup_ratio must be in [0, 1), not {self.warmup_ratio}.")
        require(self.max_grad_norm >= 0, f"optim.max_grad_norm must be at least 0, not {self.max_grad_norm}.")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"optim.{key} must be in [0, 1), not {getattr(self, key)}.")
