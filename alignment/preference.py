"""The preference stage's loop: transformers' Trainer, with the step, the data and the metrics of our own."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from alignment.errors import UserError
from alignment.groups import Group
from alignment.layout import BatchLayout
from alignment.logps import join_scores, largest_group, score, score_groups, smaller_budget
from alignment.losses import Loss, LossInputs, LossOutput
from alignment.memory import decoder_layers
from alignment.metrics import Means, preference_metrics
from alignment.policy import check_adapter_gradients
from alignment.ragged import RaggedLogps
from alignment.reference import Reference
from alignment.steps import StepSampler
from alignment.training import checkpoint_layers

log = logging.getLogger(__name__)


def as_rows(groups: Sequence[Group]) -> list[Group]:
    """One labelled row per completion: all chosen ones, then all rejected ones. Labelled rows stay as they are.

    In this order the neighbour of a row answers another prompt, which a mismatched baseline (KTO) relies on.
    """
    if any(group.labels is not None for group in groups):
        return list(groups)
    return [
        Group(group.prompt, (group.completions[k],), labels=(k == 0,), source=group.source)
        for k in range(2)
        for group in groups
    ]


def companion_groups(loss: Loss, rows: Sequence[Group]) -> list[Group]:
    """The extra sequences that the loss wants scored for a step of these rows."""
    pairs = loss.companions(len(rows))
    return [Group(rows[i].prompt, (rows[j].completions[0],)) for i, j in pairs]


def groups_to_reference(
    loss: Loss, groups: Sequence[Group], steps: Sequence[Sequence[int]], eval_groups: Sequence[Group]
) -> list[Group]:
    """Every group that these steps and the evaluation will ask the reference for."""
    used = {index for step in steps for index in step}
    wanted = [groups[index] for index in sorted(used)] + list(eval_groups)
    for step in steps:
        wanted += companion_groups(loss, [groups[index] for index in step])
    if eval_groups and loss.unit == "row":
        wanted += companion_groups(loss, as_rows(eval_groups))
    return wanted


def group_labels(groups: Sequence[Group], device: torch.device) -> Tensor | None:
    """(S,) bool, the labels of all completions; None for pairs."""
    if any(group.labels is None for group in groups):
        return None
    return torch.tensor([label for group in groups for label in group.labels or ()], device=device)


Scores = Callable[[Sequence[Group]], RaggedLogps]
"""Log-probs of all completions of the groups, in order."""


@dataclass(frozen=True, slots=True)
class StepValues:
    """Log-probs and mean loss of one step."""

    policy: RaggedLogps
    loss: float


@dataclass(slots=True)
class _Step:
    """What a step that is being computed has come to: its loss so far, its tokens, the metrics of each pass."""

    loss: Tensor
    num_tokens: int = 0
    metrics: list[dict[str, Tensor]] = field(default_factory=list)


class PreferenceTrainer(Trainer):
    """Trains a policy on groups with a preference loss.

    The dataloader yields all groups of one optimizer step at once; `training_step` splits them into micro-batches.
    How they are split changes neither the gradient (a mean over the step's items) nor what a loss computes over the
    step (its `statistics`).
    """

    model: nn.Module

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        groups: Sequence[Group],
        eval_groups: Sequence[Group],
        loss: Loss,
        reference: Reference | None,
        layout: BatchLayout,
        tokens_per_batch: int,
        sampler: StepSampler,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.loss = loss
        self.reference = reference
        self.layout = layout
        self.tokens_per_batch = tokens_per_batch
        self.sampler = sampler
        self.groups = groups
        self.eval_groups = list(eval_groups)
        self.num_tokens = 0
        self.train_seconds = 0.0
        self._means = Means()
        self._gradients_checked = False
        super().__init__(model=model, args=args, train_dataset=list(groups), callbacks=callbacks)

    def get_train_dataloader(self) -> DataLoader:
        """One item of the loader is one optimizer step."""
        loader: DataLoader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.sampler,
            collate_fn=lambda items: {"groups": items},
        )
        return self.accelerator.prepare(loader)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: transformers' estimate would count the padding."""
        del inputs
        return 0

    def _inputs(self, groups: Sequence[Group], policy: Any) -> LossInputs:
        reference = None
        if self.reference is not None:
            reference = self.reference.logps(groups).to(policy.values.device)
        return LossInputs(policy, reference, group_labels(groups, policy.values.device))

    def _scores(self, groups: Sequence[Group]) -> RaggedLogps:
        scored = list(score_groups(self.model, groups, self.layout, self.tokens_per_batch, self.args.device))
        return join_scores(groups, scored)

    def _statistics(self, rows: Sequence[Group], scores: Scores) -> Tensor | None:
        companions = companion_groups(self.loss, rows)
        if not companions:
            return None
        return self.loss.statistics(self._inputs(companions, scores(companions)))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one optimizer step, micro-batch by micro-batch; returns the step's mean loss.

        Where a GPU's memory does not suffice, the step is begun again with half the token budget, and at last with
        every layer checkpointed; the steps after it keep that.

        Raises:
            UserError: the largest group does not fit even so.
        """
        del num_items_in_batch
        started = time.monotonic()
        model.train()
        groups: list[Group] = inputs["groups"]
        while (step := self._try_step(model, groups)) is None:
            self._save_memory(model, groups)
        for metrics in step.metrics:
            self._means.add(metrics)
        self.num_tokens += step.num_tokens
        if not self._gradients_checked:
            check_adapter_gradients(model)
            self._gradients_checked = True
        self.train_seconds += time.monotonic() - started
        return step.loss

    def _try_step(self, model: nn.Module, groups: Sequence[Group]) -> _Step | None:
        """Add the step's gradients; None, and a part of them, where a GPU's memory did not suffice.

        The error ends here, since its traceback holds the tensors of the pass.
        """
        step = _Step(torch.zeros((), device=self.args.device))
        try:
            statistics = self._statistics(groups, self._scores)
            for batch in self.layout.batches(groups, self.tokens_per_batch):
                members = [groups[index] for index in batch.indices]
                loss_inputs = self._inputs(members, score(model, batch.to(self.args.device)))
                output = self.loss(loss_inputs, statistics)
                loss = output.losses.sum() / len(groups)
                self.accelerator.backward(loss)
                step.loss += loss.detach().float()
                step.num_tokens += batch.num_tokens
                step.metrics.append(preference_metrics(loss_inputs, output))
        except torch.cuda.OutOfMemoryError as error:
            if self.accelerator.num_processes > 1:  # the others would wait for this one
                raise UserError(
                    "The memory of a GPU does not suffice: lower trainer.tokens_per_batch, or set "
                    "trainer.checkpoint_every=1."
                ) from error
            return None
        return step

    def _save_memory(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """After a step that did not fit: forget its gradients, and take less for the next try."""
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        if (smaller := smaller_budget(self.layout, groups, self.tokens_per_batch)) is not None:
            self.tokens_per_batch = smaller
        elif decoder_layers(model) and checkpoint_layers(model, 1):
            log.warning("The GPU's memory does not suffice for a single group: going on with every layer checkpointed.")
        else:
            raise UserError(
                f"The GPU's memory does not suffice for a group of {largest_group(self.layout, groups)} positions even "
                f"with every layer checkpointed: lower data.max_length, or choose a smaller model or quantization=nf4."
            )

    @torch.no_grad()
    def step_values(self, groups: Sequence[Group]) -> StepValues:
        """What a step of these groups would compute now, without training, in the mode that it trains in."""
        self.model.train()
        inputs = self._inputs(groups, self._scores(groups))
        output = self.loss(inputs, self._statistics(groups, self._scores))
        return StepValues(inputs.policy, output.losses.double().mean().item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the exact means of the steps since the last log to a training log."""
        if "loss" in logs:
            logs = {**logs, **self._means.take()}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Loss and metrics over all held-out groups at once, whatever the batches they were scored in."""
        del eval_dataset, ignore_keys
        return self._log_evaluation(self._scores, metric_key_prefix)

    def evaluate_start(self) -> dict[str, float]:
        """The evaluation before the first update: there the policy is the reference, so nothing is scored again."""
        return self._log_evaluation(self.reference.logps if self.reference is not None else self._scores)

    def _log_evaluation(self, scores: Scores, prefix: str = "eval") -> dict[str, float]:
        metrics = {f"{prefix}_{k}": v for k, v in self.held_out_metrics(self.eval_groups, scores).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def held_out_metrics(self, groups: Sequence[Group], scores: Scores | None = None) -> dict[str, float]:
        """Exact means over the groups; the loss is computed once over all of them, as if they were one step.

        `scores` gives the policy's log-probs of groups; by default they are computed.
        """
        scores = scores or self._scores
        policy = scores(groups)
        if self.loss.unit == "pair":
            inputs = self._inputs(groups, policy)
            output = self.loss(inputs)
        else:
            inputs, output = self._evaluate_rows(groups, policy, scores)
        means = Means()
        means.add({"loss": output.losses, **preference_metrics(inputs, output)})
        return means.take()

    def _evaluate_rows(
        self, groups: Sequence[Group], policy: RaggedLogps, scores: Scores
    ) -> tuple[LossInputs, LossOutput]:
        """A row-wise loss on held-out pairs: its loss over the rows, its metrics over the pairs."""
        rows = as_rows(groups)
        statistics = self._statistics(rows, scores)
        if groups[0].labels is not None:
            inputs = self._inputs(rows, policy)
            return inputs, self.loss(inputs, statistics)
        num_pairs = len(groups)
        by_row = [2 * i + k for k in range(2) for i in range(num_pairs)]
        row_output = self.loss(self._inputs(rows, policy.select(by_row)), statistics)
        by_pair = [k * num_pairs + i for i in range(num_pairs) for k in range(2)]
        output = LossOutput(row_output.losses, row_output.rewards[by_pair], row_output.parts)
        return self._inputs(groups, policy), output
