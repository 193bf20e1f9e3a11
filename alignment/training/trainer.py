"""The preference stage's loop: transformers' Trainer, with the step, the data and the metrics of our own."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from alignment.errors import UserError
from alignment.files import atomic_write_bytes, to_json
from alignment.losses import Loss, LossInputs, LossOutput
from alignment.policy.adapter import check_adapter_gradients
from alignment.policy.layers import checkpoint_layers, decoder_layers
from alignment.reference.base import Reference
from alignment.scoring.layout import BatchLayout
from alignment.scoring.logps import largest_group, smaller_budget
from alignment.training.metrics import Means, held_out_rows, preference_metrics
from alignment.training.objective import Evaluation, Objective, Processes, evaluated, step_seeds, step_totals
from alignment.training.sampler import StepSampler
from alignment.types import Group, pairs_from_rows

log = logging.getLogger(__name__)

_STATE = "preference_state.json"


@dataclass(slots=True)
class _Step:
    """What a step that is being computed has come to: its loss so far, its tokens, metrics of each pass, the state."""

    loss: Tensor
    num_tokens: int = 0
    metrics: list[dict[str, Tensor]] = field(default_factory=list)
    state: dict[str, float] = field(default_factory=dict)


class PreferenceTrainer(Trainer):
    """Trains a policy on groups with a preference loss.

    The dataloader yields all groups of one optimizer step at once, to every process; `training_step` shares them out
    and splits them into micro-batches. How they are split changes neither the gradient (a mean over the step's items)
    nor what a loss computes over the step: its `step_statistics`, or all of it where the items of a step are coupled.
    Then one pass without gradient collects the log-probs, the loss gives its derivative by each of them, and a second
    pass applies it; one pass does where everything fits into it.
    """

    model: nn.Module
    objective: Objective
    held_out: list[dict[str, Any]]
    """The held-out groups one by one, as the last evaluation found them."""

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
        self.held_out = []
        self.num_tokens = 0
        self.train_seconds = 0.0
        self._means = Means()
        self._gradients_checked = False
        super().__init__(model=model, args=args, train_dataset=list(groups), callbacks=callbacks)
        self._processes = Processes(self.accelerator)
        self.objective = Objective(loss, model, reference, layout, args.device, self._processes)

    def get_train_dataloader(self) -> DataLoader:
        """One item of the loader is one optimizer step."""
        loader: DataLoader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.sampler,
            collate_fn=lambda items: {"groups": items},
        )
        return prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: transformers' estimate would count the padding."""
        del inputs
        return 0

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
        self.objective.state = step.state
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
        step = _Step(torch.zeros((), device=self.args.device), state=self.objective.state)
        try:
            with self.accelerator.no_sync(model):  # processes may have different numbers of passes
                self._add_gradients(model, groups, step)
        except torch.cuda.OutOfMemoryError as error:
            if self.accelerator.num_processes > 1:  # the others would wait for this one
                raise UserError(
                    "The memory of a GPU does not suffice: lower trainer.tokens_per_batch, or set "
                    "trainer.checkpoint_every=1."
                ) from error
            return None
        self._sum_gradients(model)
        step.loss = self._processes.sum(step.loss)
        return step

    def _add_gradients(self, model: nn.Module, groups: Sequence[Group], step: _Step) -> None:
        objective = self.objective
        totals, seeds = step_totals(groups), step_seeds(groups, self.args.seed, self.state.global_step)
        step_statistics = objective.step_statistics(groups, self.tokens_per_batch)
        own = self._processes.own(groups)
        batches = list(self.layout.batches([groups[i] for i in own], self.tokens_per_batch, objective.needs.prompts))
        derivative, plan = None, objective.plan(groups)
        if objective.needs.whole_step and (len(batches) > 1 or len(own) < len(groups)):
            derivative = self._derivative(groups, step_statistics, seeds, step)
        for batch in batches:
            indices = [own[i] for i in batch.indices]
            scores = objective.score(model, batch.to(self.args.device))
            step.num_tokens += batch.num_tokens
            if derivative is not None:
                columns = plan.columns(indices).to(derivative.device)
                self.accelerator.backward((scores.values * derivative[:, columns]).sum())
                continue
            members = [groups[i] for i in indices]
            inputs = objective.inputs(members, scores, totals=totals, seeds=seeds[indices])
            part = objective.evaluate(members, inputs, step_statistics)
            loss = part.share_of(len(groups))
            self.accelerator.backward(loss)
            step.loss += loss.detach().float()
            step.metrics.append(preference_metrics(part.inputs, part.output))
            if objective.needs.whole_step:
                step.state = part.output.state
        objective.passes.finish()

    def _derivative(
        self, groups: Sequence[Group], step_statistics: Tensor | None, seeds: Tensor, step: _Step
    ) -> Tensor:
        """(rows, tokens): the step's loss derived by every number that its groups' passes give."""
        objective = self.objective
        scores = objective.collect(groups, self.tokens_per_batch)
        scores.values.requires_grad_()
        with torch.enable_grad():
            inputs = objective.inputs(groups, scores, seeds=seeds)
            whole = objective.evaluate(groups, inputs, step_statistics)
            loss = whole.share_of(len(groups))
        (derivative,) = torch.autograd.grad(loss, scores.values)
        step.state = whole.output.state
        if self.accelerator.is_main_process:  # the others see the same: it is counted once
            step.loss += loss.detach().float()
            step.metrics.append(preference_metrics(whole.inputs, whole.output))
        return derivative

    def _sum_gradients(self, model: nn.Module) -> None:
        """Each process has the gradients of its own groups: add them up."""
        if self.accelerator.num_processes == 1:
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        vector_to_parameters(self._processes.sum(parameters_to_vector(gradients)), gradients)

    def _save_memory(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """After a step that did not fit: forget its gradients, and take less for the next try."""
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        if (smaller := smaller_budget(self.layout, groups, self.tokens_per_batch)) is not None:
            self.tokens_per_batch = smaller
        elif self.objective.passes.separate():
            pass
        elif decoder_layers(model) and checkpoint_layers(model, 1):
            log.warning("The GPU's memory does not suffice for a single group: going on with every layer checkpointed.")
        else:
            raise UserError(
                f"The GPU's memory does not suffice for a group of {largest_group(self.layout, groups)} positions even "
                f"with every layer checkpointed: lower data.max_length, or choose a smaller model or quantization=nf4."
            )

    @torch.no_grad()
    def evaluate_step(self, groups: Sequence[Group]) -> Evaluation:
        """The loss of a step of these groups as it would be now, in training mode, without training."""
        self.model.train()
        objective, budget = self.objective, self.tokens_per_batch
        inputs = objective.inputs(groups, objective.collect(groups, budget))
        return objective.evaluate(groups, inputs, objective.step_statistics(groups, budget))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the exact means of the steps since the last log to a training log."""
        if "loss" in logs:
            if self.accelerator.num_processes > 1:
                self._means = Means.joined(gather_object([self._means]))
            logs = {**logs, **self._means.take()}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Loss and metrics over all held-out groups at once, whatever the batches they were scored in."""
        del eval_dataset, ignore_keys
        return self._log_evaluation(metric_key_prefix)

    def evaluate_start(self) -> dict[str, float]:
        """The evaluation before the first update: there the policy is the reference, so nothing is scored again."""
        return self._log_evaluation("eval", at_reference=True)

    def _log_evaluation(self, prefix: str, at_reference: bool = False) -> dict[str, float]:
        found, self.held_out = self._evaluated(self.eval_groups, at_reference)
        metrics = {f"{prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_metrics(self, groups: Sequence[Group], at_reference: bool = False) -> dict[str, float]:
        """Exact means over the groups; the loss is computed once over all of them, as if they were one step.

        Nothing is drawn, and the loss's running state stays as training left it. `at_reference` says that the policy
        is still its reference, whose log-probs then serve for both.
        """
        return self._evaluated(groups, at_reference)[0]

    @torch.no_grad()
    def _evaluated(self, groups: Sequence[Group], at_reference: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """`held_out_metrics`, and what they are the means of."""
        objective = self.objective
        evaluated_groups = evaluated(self.loss, groups)
        scores = objective.scores_at_reference(evaluated_groups) if at_reference else None
        known = scores is not None
        if scores is None:
            scores = objective.collect(evaluated_groups, self.tokens_per_batch)
        inputs = objective.inputs(evaluated_groups, scores)
        budget = None if known else self.tokens_per_batch
        found = objective.evaluate(evaluated_groups, inputs, objective.step_statistics(evaluated_groups, budget))
        means = Means()
        means.add({"loss": found.losses})
        output = found.output
        if len(evaluated_groups) > len(groups):  # the loss took pairs as rows; the metrics are those of the pairs
            inputs, output = _paired(inputs, output)
        means.add(preference_metrics(inputs, output))
        return means.take(), held_out_rows(groups, inputs, output)

    def save_state(self, folder: Path) -> None:
        """Keep in a checkpoint what the loss and the reference carry from step to step."""
        atomic_write_bytes(folder / _STATE, to_json({"loss": self.objective.state}))

    def load_state(self, folder: Path) -> None:
        """Go on with what `save_state` kept."""
        self.objective.state = json.loads((folder / _STATE).read_text())["loss"]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save:
            self.save_state(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")


def _paired(inputs: LossInputs, output: LossOutput) -> tuple[LossInputs, LossOutput]:
    """Rows in the order of `as_rows` as the pairs that they came from; losses and parts stay per row."""
    order = pairs_from_rows(len(inputs.policy) // 2)
    reference = None if inputs.reference is None else inputs.reference.select(order)
    pairs = LossInputs(inputs.policy.select(order), reference)
    return pairs, replace(output, rewards=output.rewards[order])
