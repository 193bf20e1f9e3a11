"""Training steps of a tiny policy on the pretended GPU, and the same on the CPU."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainingArguments

from alignment.losses import Loss, Quantity
from alignment.policy.reward_model import attach_reward_head
from alignment.reference.base import Reference
from alignment.reference.cached import CachedReference
from alignment.reference.live import LiveReference
from alignment.reference.store import ReferenceStore
from alignment.scoring.ends import EndsLayout
from alignment.scoring.layout import BatchLayout
from alignment.scoring.prompt_sharing import choose_layout
from alignment.training.objective import groups_to_reference
from alignment.training.sampler import StepSampler
from alignment.training.start_check import check_start
from alignment.training.trainer import PreferenceTrainer
from tests.conftest import random_groups
from tests.helpers.steps import groups_for
from tests.pretended_gpu.device import WAITS, to_host
from tests.pretended_gpu.passes import policy_on


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step gave.

    Attributes:
        loss: of the step.
        gradient: in float64 on the CPU.
        metrics: of the step.
        held_out: metrics of held-out groups after it.
        waits: kind and file of the waits in the step.
        tokens_per_batch: the budget that the step ended with.
    """

    loss: float
    gradient: Tensor
    metrics: dict[str, float]
    held_out: dict[str, float]
    waits: dict[tuple[str, str], int]
    tokens_per_batch: int


class Side:
    """A policy on one device, and its reference log-probs; with `rewards` a reward model, which has none."""

    def __init__(
        self, device: torch.device, folder: Path, dtype: torch.dtype = torch.float32, rewards: bool = False
    ) -> None:
        self.device = device
        self._folder = folder
        self.model = policy_on(device, dtype)
        self._layout: BatchLayout = choose_layout(self.model, device)
        if rewards:
            attach_reward_head(self.model, seed=0)
            self._layout = EndsLayout(self._layout)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._start = [p.detach().clone() for p in self._trained]

    def reference(self, loss: Loss, live: bool) -> Reference | None:
        """The reference that the loss needs; None for a reward model."""
        if loss.requirements().rewards:
            return None
        quantities = loss.requirements().quantities
        if live or Quantity.divergence in quantities:
            return LiveReference(self.model, self._layout, 10_000, self.device)
        store = ReferenceStore(self._folder / "reference.sqlite")
        entropies = Quantity.entropy in quantities
        return CachedReference(store, self.model, self._layout, 10_000, self.device, 1, with_entropies=entropies)

    def trainer(self, loss: Loss, *, live: bool = False, num_groups: int = 4) -> PreferenceTrainer:
        """A trainer of groups for this loss, with its reference prepared."""
        groups = groups_for(loss, num=num_groups)
        lists = loss.requirements().unit == "list"
        held_out = [
            replace(group, scores=(3.0, 2.0, 1.0)[: len(group.completions)])
            for group in random_groups(2, k=3 if lists else 2, seed=11)
        ]
        arguments = TrainingArguments(
            output_dir=str(self._folder), max_steps=1, use_cpu=self.device.type == "cpu", report_to="none",
            disable_tqdm=True, max_grad_norm=0.0, remove_unused_columns=False,
        )  # fmt: skip
        reference = self.reference(loss, live)
        if reference is not None:
            reference.prepare(groups_to_reference(loss, groups, [range(len(groups))], held_out))
        return PreferenceTrainer(
            model=self.model, args=arguments, groups=groups, eval_groups=held_out, loss=loss, reference=reference,
            layout=self._layout, tokens_per_batch=10_000,
            sampler=StepSampler(len(groups), len(groups), 0), callbacks=[],
        )  # fmt: skip

    def step(self, trainer: PreferenceTrainer) -> Outcome:
        """Check the start, move the policy, do one step, evaluate; the policy is then where it was."""
        check_start(trainer, trainer.groups)
        with ExitStack() as stack:
            stack.callback(self._restore)
            self._move()
            self.model.zero_grad()
            WAITS.clear()
            loss = trainer.training_step(self.model, {"groups": trainer.groups})
            waits: dict[tuple[str, str], int] = {}
            for (kind, line), number in WAITS.items():
                key = kind, line.rpartition(":")[0]
                waits[key] = waits.get(key, 0) + number
            gradient = torch.cat([to_host(p.grad).double().flatten() for p in self._trained])
            return Outcome(
                loss=loss.item(),
                gradient=gradient,
                metrics=trainer._means.take(),
                held_out=trainer.held_out_metrics(trainer.eval_groups),
                waits=waits,
                tokens_per_batch=trainer.tokens_per_batch,
            )

    @torch.no_grad()
    def _move(self) -> None:
        generator = torch.Generator().manual_seed(9)
        for parameter in self._trained:
            parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(self.device))

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter, start in zip(self._trained, self._start, strict=True):
            parameter.copy_(start)
