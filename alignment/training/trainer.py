"""The preference stage's loop: transformers' Trainer with our own step, data order and metrics."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from alignment.data.rows.sequences import Picked
from alignment.errors import UserError
from alignment.evaluation.calibration import calibration_error
from alignment.files import atomic_write_bytes, to_json
from alignment.losses import Loss, LossInputs, LossOutput
from alignment.policy.adapter import check_adapter_gradients
from alignment.policy.layers import checkpoint_layers, decoder_layers
from alignment.policy.sharding import can_try_again
from alignment.ranks.shares import share_groups
from alignment.ranks.team import Team, trained_parameters
from alignment.reference.base import Reference
from alignment.reference.cached import CachedReference
from alignment.scoring.layout import BatchLayout
from alignment.scoring.logps import largest_group, smaller_budget
from alignment.training.callbacks import RecordCallback
from alignment.training.dashboard import Dashboard
from alignment.training.drawn import HeldOutDraws
from alignment.training.metrics import Means, Observed, held_out_rows, means_by_dataset, preference_metrics, read
from alignment.training.objective import Evaluation, Objective, evaluated, step_seeds, step_totals
from alignment.training.optimizers import as_policy, as_stepped
from alignment.training.passes import Asked, Done, StepPart, StepPasses, StepProgress, add_share, used_parameters
from alignment.training.router import RouterLoss
from alignment.training.sampler import StepSampler
from alignment.training.stage_trainer import StageTrainer
from alignment.types import Group, pairs_from_rows

log = logging.getLogger(__name__)

_STATE = "preference_state.json"


class PreferenceTrainer(StageTrainer):
    """Trains a policy on groups with a preference loss.

    The dataloader gives all groups of one optimizer step. `training_step` shares them among the ranks, if there are
    several, and splits them into micro-batches. The split changes neither the gradient (a mean over the step's items)
    nor what a loss computes over the whole step, its `step_statistics`.

    A loss that couples the items of a step needs all log-probs at once. Where they do not fit into one pass, a first
    pass without gradient collects them, the loss is derived by each of them, and a second pass applies the derivatives.
    """

    title = "The preference stage"
    settings = "optim"
    model: nn.Module
    objective: Objective
    held_out: list[dict[str, Any]]
    """The metrics of each held-out group in the last evaluation."""
    undecided: Collection[str] = ()
    """Metrics that count the signs of rounding while the policy is its own reference; `check_start` finds them."""

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
        router_aux_loss_coef: float = 0.0,
        team: Team | None = None,
        held_out_draws: HeldOutDraws | None = None,
    ) -> None:
        self.loss = loss
        self.reference = reference
        self.layout = layout
        self.tokens_per_batch = tokens_per_batch
        self.sampler = sampler
        self.groups = groups
        self.held_out_draws = held_out_draws
        self.eval_groups = eval_groups
        self.held_out = []
        self.num_tokens = 0
        self.train_seconds = 0.0
        self._means = Means()
        self._gradients_checked = False
        self._step_groups: Sequence[Group] = ()
        super().__init__(model=model, args=args, train_dataset=groups, callbacks=callbacks)
        for callback in callbacks:
            if isinstance(callback, RecordCallback):
                callback.held_out = self.held_out
            elif isinstance(callback, Dashboard):
                callback.tokens = lambda: self.num_tokens
        self._team = team
        self.objective = Objective(loss, model, reference, layout, args.device, team)
        router_loss = RouterLoss(model, router_aux_loss_coef, "trainer.router_aux_loss_coef")
        self.passes = StepPasses(model, self.objective, layout, args.device, router_loss)

    def get_train_dataloader(self) -> DataLoader:
        """One item of the loader is one optimizer step. It is asked for ahead, so its groups are read by the step."""
        loader: DataLoader = DataLoader(
            range(len(self.groups)),  # type: ignore[arg-type]
            batch_sampler=self.sampler,
            collate_fn=lambda indices: {"groups": Picked(self.groups, indices)},
        )
        return prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero, because transformers' estimate would count the padding."""
        del inputs
        return 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one optimizer step, micro-batch by micro-batch; returns the step's mean loss.

        If a GPU runs out of memory, the step starts again with half the token budget, and finally with every layer
        checkpointed. Later steps keep these settings.

        Raises:
            UserError: even then the largest group does not fit.
        """
        del num_items_in_batch
        started = time.monotonic()
        as_stepped(self.optimizer)
        if not model.training:  # to set it visits thousands of modules
            model.train()
        groups: list[Group] = list(inputs["groups"])
        self._step_groups = groups
        while (step := self._try_step(model, groups)) is None:
            self._save_memory(model, groups)
        for inputs_and_output in read(step.observed):  # at the step's end: each look makes the host wait for a GPU
            step.means.add(preference_metrics(*inputs_and_output))
        if isinstance(step.router_loss, Tensor):
            step.means.add({"router_loss": step.router_loss[None]})
        is_own_reference = self.reference is not None and self.reference.is_policy(self.state.global_step)
        self._means.join(step.means, without=self.undecided if is_own_reference else ())
        self.objective.state = step.state
        self.num_tokens += step.num_tokens
        if not self._gradients_checked:
            check_adapter_gradients(model)
            self._gradients_checked = True
        self.train_seconds += time.monotonic() - started
        return step.loss

    def _try_step(self, model: nn.Module, groups: Sequence[Group]) -> StepProgress | None:
        """Add the step's gradients. None if a GPU ran out of memory; then only a part of them was added.

        The error is dropped here because its traceback keeps the tensors of the pass alive.
        """
        step = StepProgress(torch.zeros((), device=self.args.device), state=self.objective.state)
        try:
            whole = self._whole_step(groups, step)
            if self._team is None:
                self.passes.add_gradients(whole, self.tokens_per_batch, step)
        except RuntimeError as error:
            if not can_try_again(error, model):
                raise
            return None
        return step if self._team is None or self._shared(self._team, model, whole, step) else None

    def _whole_step(self, groups: Sequence[Group], step: StepProgress) -> StepPart:
        """What holds for the step, however it is split; a coupled loss is derived first if no pass has all of it."""
        objective = self.objective
        seeds = step_seeds(groups, self.args.seed, self.state.global_step)
        statistics = objective.step_statistics(groups, self.tokens_per_batch)
        derivative = None
        if objective.needs.whole_step:
            first_two = islice(self.passes.batches(groups, self.tokens_per_batch), 2)
            if self._team is not None or len(list(first_two)) > 1:
                derivative = self._derivative(groups, statistics, seeds, step)
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        return StepPart(groups, len(groups), step_totals(groups), seeds, statistics, derivative, scale)

    def _shared(self, team: Team, model: nn.Module, whole: StepPart, step: StepProgress) -> bool:
        """Have every rank add the gradients of its share; whether no GPU ran out of memory."""
        objective, budget, trained = self.objective, self.tokens_per_batch, trained_parameters(model)
        layers = decoder_layers(model)
        checkpoint_all = bool(layers) and all(layer.gradient_checkpointing for layer in layers)
        asked = []
        for own in share_groups(whole.groups, team.size):
            part = whole.of(objective, own)
            values = self.reference.rows(part.groups) if isinstance(self.reference, CachedReference) else None
            asked.append(Asked(part, budget, objective.state, values, checkpoint_all))

        def own_share(share: Asked) -> Done | None:
            try:
                self.passes.add_gradients(share.part, budget, step)
            except RuntimeError as error:
                if not can_try_again(error, model):
                    raise
                return None
            return Done(0.0, 0, Means(), 0.0, used_parameters(model))

        replies = team.run(add_share, asked, own_share, trained)
        found = [done for done in replies if done is not None]
        if len(found) < len(replies):
            return False
        team.sum_gradients(trained, [any(used) for used in zip(*(done.used for done in found), strict=True)])
        for done in found:
            step.loss += done.loss
            step.num_tokens += done.num_tokens
            step.router_loss += done.router_loss
            step.means.join(done.means)
        return True

    def _derivative(
        self, groups: Sequence[Group], step_statistics: Tensor | None, seeds: Tensor, step: StepProgress
    ) -> Tensor:
        """(rows, tokens): the derivative of the step's loss by every score of its groups."""
        objective = self.objective
        scores = objective.collect(groups, self.tokens_per_batch)
        scores.values.requires_grad_()
        with torch.enable_grad():
            inputs = objective.inputs(groups, scores, seeds=seeds)
            whole = objective.evaluate(groups, inputs, step_statistics)
            loss = whole.share_of(len(groups))
        (derivative,) = torch.autograd.grad(loss, scores.values)
        step.state = whole.output.state
        step.loss += loss.detach().float()
        step.observed.append(Observed.of(whole.inputs, whole.output))
        return derivative

    def _save_memory(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """After a step that did not fit: drop its gradients and choose settings that need less memory."""
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        if (smaller := smaller_budget(self.layout, groups, self.tokens_per_batch)) is not None:
            self.tokens_per_batch = smaller
        elif decoder_layers(model) and checkpoint_layers(model, 1):
            log.warning("The GPU has too little memory for a single group: continuing with every layer checkpointed.")
        else:
            raise UserError(
                f"The GPU has too little memory for a group of {largest_group(self.layout, groups)} positions, even "
                f"with every layer checkpointed: lower data.max_length, or choose a smaller model or quantization=nf4."
            )

    def step_rows(self) -> Sequence[str]:
        """The sources of the groups with a loss or a log-prob that is not finite; of all of the step if none has."""
        found = self.evaluate_step(self._step_groups)
        sequences = iter(found.inputs.policy.sums().isfinite().tolist())
        sound = [
            all([next(sequences) for _ in group.completions] + [loss])
            for group, loss in zip(self._step_groups, found.losses.isfinite().tolist(), strict=True)
        ]
        return [g.source for g, is_sound in zip(self._step_groups, sound, strict=True) if all(sound) or not is_sound]

    @torch.no_grad()
    def evaluate_step(self, groups: Sequence[Group]) -> Evaluation:
        """The loss of a step of these groups as it would be now, in training mode, without training."""
        self.model.train()
        objective, budget = self.objective, self.tokens_per_batch
        inputs = objective.inputs(groups, objective.collect(groups, budget))
        return objective.evaluate(groups, inputs, objective.step_statistics(groups, budget))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a training log the exact means over the steps since the last one."""
        if "loss" in logs:
            logs = {**logs, **self._means.take()}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Loss and metrics over all held-out groups; how they are batched makes no difference."""
        del eval_dataset, ignore_keys
        return self._log_evaluation(metric_key_prefix)

    def evaluate_start(self) -> dict[str, float]:
        """The evaluation before the first update: the policy still equals the reference, so nothing is scored again."""
        return self._log_evaluation("eval", at_reference=True)

    def _log_evaluation(self, prefix: str, at_reference: bool = False) -> dict[str, float]:
        as_policy(self.optimizer)
        draws = self.held_out_draws
        groups = self.eval_groups if draws is None else draws.draw()
        found, self.held_out[:] = self._evaluated(groups, at_reference and draws is None)
        metrics = {f"{prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.require_finite_evaluation(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_metrics(self, groups: Sequence[Group], at_reference: bool = False) -> dict[str, float]:
        """Exact means over the groups; the loss is computed once over all of them, as if they were one step.

        In a mixture the means over each source are there too, as "<source>/<metric>".

        Nothing is drawn at random, and the loss's running state does not change. Pass `at_reference` while the policy
        still equals its reference: then the reference's log-probs serve for both.
        """
        return self._evaluated(groups, at_reference)[0]

    @torch.no_grad()
    def _evaluated(self, groups: Sequence[Group], at_reference: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """`held_out_metrics`, and the metrics of each group that they are the means of."""
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
        [(inputs, output)] = read([Observed.of(inputs, found.output)])
        if len(evaluated_groups) > len(groups):  # the loss took pairs as rows; the metrics are those of the pairs
            inputs, output = _paired(inputs, output)
        means.add(preference_metrics(inputs, output))
        rows = held_out_rows(groups, inputs, output)
        if objective.needs.rewards:
            margins = [row["rewards/margins"] for row in rows]
            means.add({"rewards/calibration_error": torch.tensor([calibration_error(margins)], dtype=torch.float64)})
        return means.take() | means_by_dataset(rows, found.losses), rows

    def final_metrics(self) -> dict[str, float]:
        """The last training log and the last evaluation; both belong to the last step."""
        history = list(reversed(self.state.log_history))
        train = next((row for row in history if "loss" in row), {})  # none where the final weights were given
        final = {f"train/{k}": v for k, v in train.items() if k not in ("epoch", "step")}
        if self.eval_groups:
            evaluation = next(row for row in history if "eval_loss" in row)
            final |= {f"eval/{k[5:]}": v for k, v in evaluation.items() if k.startswith("eval_")}
        return final

    def save_state(self, folder: Path) -> None:
        """Write the loss's running state into a checkpoint."""
        atomic_write_bytes(folder / _STATE, to_json({"loss": self.objective.state}))

    def load_state(self, folder: Path) -> None:
        """Continue with the state that `save_state` wrote."""
        self.objective.state = json.loads((folder / _STATE).read_text())["loss"]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save:
            self.save_state(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")


def _paired(inputs: LossInputs, output: LossOutput) -> tuple[LossInputs, LossOutput]:
    """Turn rows made by `as_rows` back into their pairs; losses and parts stay per row."""
    order = pairs_from_rows(len(inputs.policy) // 2)
    reference = None if inputs.reference is None else inputs.reference.select(order)
    pairs = LossInputs(inputs.policy.select(order), reference)
    return pairs, replace(output, rewards=output.rewards[order])
