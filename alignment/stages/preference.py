"""The preference stage: its plan, its slot in a cohort, its reference, its training, and its result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from alignment.config.rounds import RoundReference
from alignment.config.schema import ReferenceMode, RunConfig
from alignment.data.conversations.ends import turn_end
from alignment.data.preparation.prepare import PreferenceData
from alignment.data.tokens.units import spread_prompts
from alignment.evaluation.judges.making import beside_training
from alignment.evaluation.kl import sampled_kl
from alignment.evaluation.sampling.local import LocalEngine
from alignment.files import atomic_write_bytes, read_sealed, to_json_lines, write_sealed
from alignment.losses import title as loss_title
from alignment.policy.adapter import has_adapter
from alignment.policy.identity import policy_identity
from alignment.policy.layers import as_found, checkpoint_layers, disable_dropout
from alignment.ranks.team import Team, trained_parameters
from alignment.reference.base import Reference
from alignment.reference.cached import CachedReference
from alignment.reference.frozen import FrozenPolicy
from alignment.reference.teacher import Teacher
from alignment.scoring.layout import BatchLayout, keys_per_position
from alignment.scoring.logps import largest_pass
from alignment.stages.answers import HeldOutAnswers
from alignment.stages.distillation import held_out_draws, loaded_teacher
from alignment.stages.during import AnswersDuring, looks
from alignment.stages.following import (
    PreferenceBegun,
    begin_preference,
    choose_together,
    followed,
    frozen_start,
    give_reward_head,
)
from alignment.stages.references import has_reference, make_reference, with_live_reference
from alignment.stages.rounds import Rounds, Score, TakeRounds, scorer
from alignment.stages.stage import PreferenceResult, StageResult, Workspace
from alignment.training.budget import Plan
from alignment.training.callbacks import (
    LogFunction,
    last_checkpoint,
    prepare_trainer,
    stage_callbacks,
    training_arguments,
)
from alignment.training.cohort import CohortSlot
from alignment.training.early_stopping import StopEarly
from alignment.training.elastic import elastic
from alignment.training.objective import groups_to_reference
from alignment.training.planning import memory_result, plan_stage
from alignment.training.prompt_density import with_density_weights
from alignment.training.schedule import FollowPolicy, Schedule
from alignment.training.start_check import check_start
from alignment.training.trainer import PreferenceTrainer
from alignment.types import Group

log = logging.getLogger(__name__)


def _moment(name: str, rows: Sequence[dict[str, Any]]) -> bytes:
    """Lines of held_out.jsonl: the held-out rows at the start or at the end of the preference stage."""
    return to_json_lines({"moment": name, **row} for row in rows)


class PreferenceStage:
    """The preference stage of a run, ready to start.

    Args:
        data: in the form in which the loss takes them.
        stops: the tokens that end an answer.
        answers: of the run, to the held-out prompts.
        given: puts the final weights into the policy, in place of training.

    Raises:
        UserError: the data or the steps are too few for the schedule, or for stopping early.
    """

    name = "preference"
    title = "The preference stage"
    result_type: type[StageResult] = PreferenceResult

    def __init__(
        self,
        config: RunConfig,
        data: PreferenceData,
        work: Workspace,
        stops: Sequence[int],
        answers: HeldOutAnswers,
        given: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self._config = with_live_reference(config)
        self._data = data
        self._work = work
        self._stops = stops
        self._answers = answers
        self._given = given
        self._device = work.device
        self._folder = work.folder(self.name)
        self.seed, self.policy = config.seed, work.final_policy
        self._draws = config.loss.requirements().draws
        self._schedule = Schedule.of(config, data.train)
        self._rounds: Rounds | None = None
        if config.onpolicy is not None:
            self._rounds = Rounds(self._config, data, work, stops, self._schedule)
        self._stopping: StopEarly | None = None
        if config.stopping is not None:
            self._stopping = StopEarly(config.stopping, work.run_dir, len(self._schedule.steps), len(data.eval))

    def key(self, model: nn.Module) -> None:
        """None: a preference stage is what runs differ in, so it is not kept for others."""

    def run(self, model: nn.Module, log_metrics: LogFunction) -> PreferenceResult:
        """Train the policy, from the newest checkpoint if there is one."""
        with as_found(model), elastic(model, self._config.adapter), followed(self._work.team, self._config):
            return self._trained(model, log_metrics)

    def _trained(self, model: nn.Module, log_metrics: LogFunction) -> PreferenceResult:
        started = time.monotonic()

        # How the passes run
        disable_dropout(model)
        layout = choose_together(self._work.team, model, self._device)
        if self._config.loss.requirements().rewards:
            assert self._config.data is not None
            ends = turn_end(self._work.tokenizer, self._config.data)
            layout = give_reward_head(self._work.team, model, layout, self._config.seed, ends)
        slot = self._joined(model)
        teacher = loaded_teacher(self._config, self._work) if self._draws else None
        plan = self._planned(model, layout, slot)
        checkpoint_layers(model, plan.checkpoint_every)
        if self._work.team is not None:
            self._begin_on(self._work.team, model, plan)

        # The reference, and the trainer with it
        score = scorer(layout, plan.reference_tokens, self._device)
        groups = self._groups(model, score)
        reference = make_reference(self._config, self._work, model, layout, plan, teacher, self._held_fixed)
        if self._config.loss.requirements().density_weights:
            groups = with_density_weights(groups, model, plan.reference_tokens, self._device)
        callbacks = self._callbacks(model, groups, reference, score, log_metrics, slot)
        trainer = self._trainer(model, groups, reference, layout, plan.tokens_per_batch, callbacks)
        if slot is not None:
            trainer.objective.passes = slot
        prepare_trainer(trainer, self._config.optim)

        # Before the first update
        start = check_start(trainer, [groups[i] for i in self._schedule.steps[0]])
        log.info(
            "Before the first update the loss is %.6g; its formula gives %.6g.", start["loss"], start["closed_form"]
        )
        identity = policy_identity(model)[0] if reference is None or self._draws else reference.identity
        frozen = self._frozen_start(model, reference)

        # Training, and what came of it
        self._train(trainer, reference)
        result = PreferenceResult(
            loss=self._config.loss.name,
            settings=asdict(self._config.loss),
            steps=trainer.state.global_step,
            cohort=None if slot is None else {"size": slot.width},
            memory=memory_result(plan, self._device, trainer.tokens_per_batch),
            start=start | {"identity": identity},
            metrics=trainer.final_metrics(),
            reference=reference.summary() if reference is not None else {"mode": "none"},
            kl=None,
            stopped=None if self._stopping is None else self._stopping.stopped,
            rounds=None if self._rounds is None else [made.metrics for made in self._rounds.done],
            answers=[{"step": look["step"], **look["metrics"]} for look in looks(self._work)] or None,
            seconds=0.0,
            tokens_per_second=trainer.num_tokens / trainer.train_seconds if trainer.train_seconds else 0.0,
        )
        if result.stopped is None and frozen is not None:
            result.kl = self._kl(model, frozen, layout, plan)
        if reference is not None:
            reference.close()
        result.seconds = time.monotonic() - started
        return result

    # The parts of `run`, in its order

    def _begin_on(self, team: Team, model: nn.Module, plan: Plan) -> None:
        """Make the other ranks ready for their shares, with a reference that is the policy as it is now."""
        config, reference = self._config, self._config.reference
        compares = has_reference(config)
        is_live = compares and reference.mode is ReferenceMode.live
        begun = PreferenceBegun(
            config.loss,
            plan.checkpoint_every,
            compares,
            (plan.tokens_per_batch, reference.sync_mix) if is_live else None,
            self._asks_for_kl or self._compares_with_start,
            config.trainer.router_aux_loss_coef,
        )
        team.tell(begin_preference, begun, trained_parameters(model))

    def _joined(self, model: nn.Module) -> CohortSlot | None:
        """The slot in the cohort; None outside of one, and for a policy whose routers have a loss of their own."""
        slot = self._work.slot
        if slot is not None and self._config.trainer.router_aux_loss_coef:
            log.warning("The other members wait while this one trains: its routers have a loss of their own.")
            return None
        return slot

    def _planned(self, model: nn.Module, layout: BatchLayout, slot: CohortSlot | None) -> Plan:
        sized = self._data.train if self._rounds is None else self._rounds.largest()
        widest = largest_pass(layout, sized)
        return plan_stage(
            model,
            self._config,
            supervised=False,
            folder=self._folder,
            device=self._device,
            longest=widest.positions,
            widest=widest,
            keys_per_position=keys_per_position(layout, sized),
            slot=slot,
            refreshes=len(self._schedule.refreshes),
            team=self._work.team,
            beside=sum(size or 0 for size in beside_training(self._config).values()),
        )

    def _groups(self, model: nn.Module, score: Score) -> Sequence[Group]:
        """What the stage trains on: the data, or what the policy draws in rounds, of which the first is there then."""
        if self._rounds is None:
            return self._data.train
        _, done = last_checkpoint(self._folder / "checkpoints")
        self._rounds.begin(model, done, score)
        self._schedule = self._rounds.schedule
        return self._rounds.groups

    def _callbacks(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        reference: Reference | None,
        score: Score,
        log_metrics: LogFunction,
        slot: CohortSlot | None,
    ) -> list[Any]:
        """In the order in which they act; prepares the reference for the steps up to its first refresh."""
        config, data = self._config, self._data
        name = loss_title(config.loss.name)
        title = name if slot is None else f"{self._work.run_dir.name} {name}"
        alone, view = self._work.slot is None, config.dashboard
        callbacks = stage_callbacks(title, log_metrics, config.trainer, bool(data.eval), alone, view)
        if config.evaluation.every is not None and self._given is None:
            asks = config.stopping is not None and config.stopping.metric.startswith("answers/")
            rungs = self._stopping.rungs if self._stopping is not None and asks else ()
            callbacks.insert(0, AnswersDuring(self._answers, self._work, config.evaluation.every, rungs))
        if self._stopping is not None:
            callbacks.insert(0, self._stopping)  # before those that ask what is done at the last step
        held_out = () if self._draws else data.eval  # to which answers are drawn, when they are needed
        asked = partial(groups_to_reference, config.loss, groups, eval_groups=held_out)
        if reference is not None:
            if self._rounds is not None and isinstance(reference, CachedReference) and not self._draws:
                reference.learn(self._rounds.done[0].logps)
            reference.prepare(asked(self._schedule.until_refresh(0)))
            if self._schedule.refreshes:
                # before the checkpoint is called whole
                callbacks.insert(0, FollowPolicy(reference, self._schedule, asked))
        if self._rounds is not None:
            callbacks.insert(0, self._take_rounds(self._rounds, model, reference, score, asked))
        return callbacks

    def _take_rounds(
        self,
        rounds: Rounds,
        model: nn.Module,
        reference: Reference | None,
        score: Score,
        asked: Callable[[Sequence[Sequence[int]]], Sequence[Group]],
    ) -> TakeRounds:
        onpolicy = self._config.onpolicy
        assert onpolicy is not None, "there are rounds"
        start = frozen_start(model, reference) if len(self._schedule.rounds) > 1 else None
        plain = onpolicy.is_plain and not self._draws
        return TakeRounds(rounds, reference, start, self._compares_with_start, score, plain, asked)

    def _trainer(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        reference: Reference | None,
        layout: BatchLayout,
        tokens_per_batch: int,
        callbacks: list[Any],
    ) -> PreferenceTrainer:
        config = self._config
        arguments = training_arguments(
            TrainingArguments,
            folder=self._folder / "checkpoints",
            optim=config.optim,
            trainer=config.trainer,
            num_steps=len(self._schedule.steps),
            seed=config.seed,
            device=self._device,
            per_device_train_batch_size=config.trainer.groups_per_step,
        )
        draws = None
        if self._rounds is not None and isinstance(reference, Teacher):
            parts = self._data.eval, self._work, self._stops, self._rounds
            draws = held_out_draws(model, reference, config, *parts)
        trainer = PreferenceTrainer(
            model=model,
            args=arguments,
            groups=groups,
            eval_groups=self._data.eval,
            loss=config.loss,
            reference=reference,
            layout=layout,
            tokens_per_batch=tokens_per_batch,
            sampler=self._schedule.sampler,
            callbacks=callbacks,
            router_aux_loss_coef=config.trainer.router_aux_loss_coef,
            team=self._work.team,
            held_out_draws=draws,
        )
        if config.adapter is not None:
            trainer.lr_ratio = config.adapter.lr_ratio
        return trainer

    def _frozen_start(self, model: nn.Module, reference: Reference | None) -> FrozenPolicy | None:
        """A frozen copy of the policy as it is now, for the KL after training; None without that, or without room."""
        if not self._asks_for_kl:
            return None
        is_fixed = has_adapter(model) or not self._schedule.refreshes
        if is_fixed and (start := frozen_start(model, reference)) is not None:
            return start
        log.info(
            "The KL from samples is left out: it needs a second copy of the whole model. Set reference=live, without "
            "refreshes, to keep one."
        )
        return None

    @property
    def _asks_for_kl(self) -> bool:
        return bool(self._config.evaluation.kl_prompts and self._data.eval)

    @property
    def _held_fixed(self) -> Sequence[Group]:
        """What is held out is compared with one policy throughout, however far the rounds move the reference."""
        if self._rounds is None or self._draws:
            return ()
        return list(groups_to_reference(self._config.loss, (), (), self._data.eval))

    @property
    def _compares_with_start(self) -> bool:
        return self._config.onpolicy is not None and self._config.onpolicy.reference is RoundReference.start

    def _train(self, trainer: PreferenceTrainer, reference: Reference | None) -> None:
        """Train to the end, and write how the held-out rows were before and after."""
        checkpoint, done = last_checkpoint(self._folder / "checkpoints")
        start_rows = self._folder / "held_out_start.json"
        if self._data.eval and checkpoint is None:
            trainer.evaluate_start()
            write_sealed(start_rows, trainer.held_out)
        if self._given is not None:
            self._given(trainer.model)
            if self._data.eval:
                trainer.evaluate()
        else:
            self._train_on(trainer, reference, checkpoint, done)
        trainer.require_finite_weights()
        if self._data.eval:
            both = _moment("start", read_sealed(start_rows)) + _moment("final", trainer.held_out)
            atomic_write_bytes(self._work.run_dir / "held_out.jsonl", both)

    def _train_on(
        self, trainer: PreferenceTrainer, reference: Reference | None, checkpoint: Path | None, done: int
    ) -> None:
        """Train from a checkpoint after `done` steps, or from the start."""
        if checkpoint is not None:
            trainer.load_state(checkpoint)
            if reference is not None and self._schedule.refreshes:
                reference.load_state(checkpoint)
            log.info("The preference stage continues from step %d.", done)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _kl(self, model: nn.Module, start: FrozenPolicy, layout: BatchLayout, plan: Plan) -> dict[str, Any]:
        held_out, config = self._data.eval, self._config
        return sampled_kl(
            model,
            start,
            [held_out[i].prompt for i in spread_prompts(held_out, config.evaluation.kl_prompts)],
            self._stops,
            LocalEngine(model, self._device, config.evaluation.batch_size, self._work.team),
            config.evaluation.max_new_tokens,
            layout,
            plan.reference_tokens,
            self._device,
            config.seed,
            self._work.team,
        )
