"""The preference stage: its plan, its place in a cohort, its reference, its training, and what it says of them all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from alignment.config.schema import ReferenceMode, RunConfig
from alignment.data.prepare import PreferenceData
from alignment.data.units import spread_prompts
from alignment.evaluation.kl import sampled_kl
from alignment.files import atomic_write_bytes, to_json_lines
from alignment.losses import Quantity
from alignment.policy.adapter import has_adapter
from alignment.policy.identity import policy_identity
from alignment.policy.layers import checkpoint_layers, disable_dropout
from alignment.reference.base import Reference
from alignment.reference.cached import CachedReference
from alignment.reference.frozen import FrozenPolicy
from alignment.reference.live import LiveReference
from alignment.reference.store import ReferenceStore
from alignment.scoring.layout import BatchLayout
from alignment.scoring.logps import largest_group
from alignment.scoring.prompt_sharing import choose_layout
from alignment.training.budget import Plan
from alignment.training.callbacks import (
    LogFunction,
    last_checkpoint,
    prepare_trainer,
    stage_callbacks,
    training_arguments,
)
from alignment.training.cohort import Member
from alignment.training.early_stopping import StopEarly
from alignment.training.objective import groups_to_reference
from alignment.training.planning import memory_result, plan_stage
from alignment.training.prompt_density import with_density_weights
from alignment.training.schedule import FollowPolicy, Schedule
from alignment.training.start_check import check_start
from alignment.training.trainer import PreferenceTrainer
from alignment.types import Group

log = logging.getLogger(__name__)


def _moment(name: str, rows: Sequence[dict[str, Any]]) -> bytes:
    """Lines of held_out.jsonl: the held-out rows as they were at the start or at the end of the preference stage."""
    return to_json_lines({"moment": name, **row} for row in rows)


def _with_live_reference(config: RunConfig) -> RunConfig:
    """The configuration with a live reference where the loss compares whole distributions, which no store keeps."""
    if config.reference.mode is ReferenceMode.live:
        return config
    if Quantity.divergence not in config.loss.requirements().quantities:
        return config
    log.info("Loss %s compares whole distributions with the reference's, which runs beside it.", config.loss.name)
    return replace(config, reference=replace(config.reference, mode=ReferenceMode.live))


def _final_metrics(trainer: PreferenceTrainer) -> dict[str, float]:
    """The last training log and the last evaluation; both belong to the last step."""
    history = list(reversed(trainer.state.log_history))
    train = next(row for row in history if "loss" in row)
    final = {f"train/{k}": v for k, v in train.items() if k not in ("epoch", "step")}
    if trainer.eval_groups:
        evaluation = next(row for row in history if "eval_loss" in row)
        final |= {f"eval/{k[5:]}": v for k, v in evaluation.items() if k.startswith("eval_")}
    return final


class PreferenceStage:
    """The preference stage of a run, ready to start: what it cannot do with its data is refused here.

    Args:
        data: in the form in which the loss takes them.
        stops: the tokens that end an answer.
        place: in the cohort that the run trains in, if it does.
        run_dir: of the run, where held_out.jsonl is written.
        folder: of the stage, for its plan, its checkpoints and what it must find again.
        references: the store of reference log-probs.

    Raises:
        UserError: the data or the steps are too few for the schedule, or for stopping early.
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreferenceData,
        *,
        stops: Sequence[int],
        place: Member | None,
        run_dir: Path,
        folder: Path,
        references: Path,
        device: torch.device,
    ) -> None:
        self._config = _with_live_reference(config)
        self._data = data
        self._stops = stops
        self._place = place
        self._run_dir = run_dir
        self._folder = folder
        self._references = references
        self._device = device
        self._schedule = Schedule.of(config, data.train)
        self._stopping: StopEarly | None = None
        if config.stopping is not None:
            self._stopping = StopEarly(config.stopping, run_dir, len(self._schedule.steps), len(data.eval))

    def run(self, model: nn.Module, log_metrics: LogFunction) -> dict[str, Any]:
        """Train the policy, continuing from the newest checkpoint if there is one.

        Returns:
            What done.json and summary.json say of the stage.
        """
        config, data, schedule = self._config, self._data, self._schedule
        loss, loop = config.loss, config.trainer
        disable_dropout(model)
        layout = choose_layout(model, self._device)
        place = self._joined(model)
        plan, tokens_per_batch = self._planned(model, largest_group(layout, data.train), place)
        checkpoint_layers(model, plan.checkpoint_every)
        reference = self._reference(model, layout, plan)
        groups: Sequence[Group] = data.train
        if loss.requirements().density_weights:
            groups = with_density_weights(groups, model, plan.reference_tokens, self._device)
        title = loss.name.upper() if place is None else f"{self._run_dir.name} {loss.name.upper()}"
        callbacks = stage_callbacks(title, log_metrics, loop, bool(data.eval))
        if self._stopping is not None:
            callbacks.insert(0, self._stopping)  # before those that ask what is done at the last step
        if reference is not None:
            asked = partial(groups_to_reference, loss, data.train, eval_groups=data.eval)
            reference.prepare(asked(schedule.until_refresh(0)))
            if schedule.refreshes:
                callbacks.insert(0, FollowPolicy(reference, schedule, asked))  # before the checkpoint is called whole
        checkpoints = self._folder / "checkpoints"
        arguments = training_arguments(
            TrainingArguments,
            folder=checkpoints,
            optim=config.optim,
            trainer=loop,
            num_steps=len(schedule.steps),
            seed=config.seed,
            device=self._device,
            per_device_train_batch_size=loop.groups_per_step,
        )
        checkpoint, done = last_checkpoint(checkpoints)
        trainer = PreferenceTrainer(
            model=model,
            args=arguments,
            groups=groups,
            eval_groups=data.eval,
            loss=loss,
            reference=reference,
            layout=layout,
            tokens_per_batch=tokens_per_batch,
            sampler=schedule.sampler,
            callbacks=callbacks,
        )
        if place is not None:
            trainer.objective.passes = place
        prepare_trainer(trainer)
        start = check_start(trainer, [groups[i] for i in schedule.steps[0]])
        log.info(
            "Before the first update the loss is %.6g; its formula gives %.6g.", start["loss"], start["closed_form"]
        )
        identity = policy_identity(model)[0] if reference is None else reference.identity
        frozen = self._frozen_start(model, reference)
        start_rows = self._folder / "held_out_start.jsonl"
        if data.eval and checkpoint is None:
            trainer.evaluate_start()
            atomic_write_bytes(start_rows, _moment("start", trainer.held_out))
        if checkpoint is not None:
            trainer.load_state(checkpoint)
            if reference is not None and schedule.refreshes:
                reference.load_state(checkpoint)
            log.info("The preference stage continues from step %d.", done)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if data.eval:
            both = start_rows.read_bytes() + _moment("final", trainer.held_out)
            atomic_write_bytes(self._run_dir / "held_out.jsonl", both)
        result = {
            "loss": loss.name,
            "settings": asdict(loss),
            "steps": trainer.state.global_step,
            "num_tokens": trainer.num_tokens,
            "kl": None,
            "cohort": None if place is None else {"size": place.width},
            "train_seconds": trainer.train_seconds,
            "memory": memory_result(plan, self._device, trainer.tokens_per_batch),
            "start": start | {"identity": identity},
            "metrics": _final_metrics(trainer),
            "reference": reference.summary() if reference is not None else {"mode": "none"},
        }
        if self._stopping is not None and self._stopping.stopped is not None:
            result["stopped"] = self._stopping.stopped
        elif frozen is not None:
            picked = spread_prompts(data.eval, config.evaluation.kl_prompts)
            result["kl"] = sampled_kl(
                model,
                frozen,
                [data.eval[i].prompt for i in picked],
                self._stops,
                config.evaluation,
                layout,
                plan.reference_tokens,
                self._device,
                config.seed,
            )
        if reference is not None:
            reference.close()
        return result

    def _joined(self, model: nn.Module) -> Member | None:
        """The place in the cohort, where the policy can train in one."""
        if self._place is not None:
            try:
                self._place.attach(model)
            except ValueError as error:
                log.warning("This member trains while the others wait: %s.", error)
                return None
        return self._place

    def _planned(self, model: nn.Module, largest: int, place: Member | None) -> tuple[Plan, int]:
        """The plan of the stage, and the positions of one pass of this run's own."""
        config = self._config
        is_joint = place is not None and place.is_joint
        plan = plan_stage(
            model,
            config.trainer,
            optimizer=config.optim.name,
            folder=self._folder,
            device=self._device,
            longest=largest,
            adapter=config.adapter,
            supervised=False,
            copies=config.reference.mode is ReferenceMode.live and config.adapter is None,
            members=1 if place is None else place.width,
            is_joint=is_joint,
        )
        if place is None or not is_joint:
            return plan, plan.tokens_per_batch
        if plan.fits:
            return plan, max(plan.tokens_per_batch // place.width, min(largest, plan.tokens_per_batch))
        (self._folder / "plan.json").unlink()
        place.separate()
        return self._planned(model, largest, place)

    def _frozen_start(self, model: nn.Module, reference: Reference | None) -> FrozenPolicy | None:
        """The policy as it is now, to compare with after training; None where nothing asks for it or keeps it."""
        if not (self._config.evaluation.kl_prompts and self._data.eval):
            return None
        if has_adapter(model):
            return FrozenPolicy(model)
        if isinstance(reference, LiveReference) and not self._schedule.refreshes:
            return reference.frozen
        log.info(
            "The KL from samples is left out: it needs the whole model as it is now beside the one that trains, which "
            "reference=live keeps where it is never refreshed."
        )
        return None

    def _reference(self, model: nn.Module, layout: BatchLayout, plan: Plan) -> Reference | None:
        config = self._config
        if not config.loss.requirements().reference:
            if not config.reference.for_metrics:
                return None
            log.info(
                "Loss %s has no reference: one is read for the metrics alone, and reference.for_metrics=false leaves "
                "it out.",
                config.loss.name,
            )
        if config.reference.mode is ReferenceMode.live:
            budget = plan.tokens_per_batch  # beside what a step keeps
            return LiveReference(model, layout, budget, self._device, config.reference.sync_mix)
        return CachedReference(
            ReferenceStore(self._references),
            model,
            layout,
            plan.reference_tokens,
            self._device,
            config.reference.spot_checks,
            with_entropies=Quantity.entropy in config.loss.requirements().quantities,
        )
