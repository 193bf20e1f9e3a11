"""One run: data, SFT, the preference stage, evaluation, and the files that it leaves."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn
from transformers import TrainingArguments, set_seed

from alignment.allocator import keep_freed_memory
from alignment.cohort import Member
from alignment.config import ReferenceMode, RunConfig, SFTConfig
from alignment.data.rows import BadRow, write_rejected
from alignment.density import with_density_weights
from alignment.errors import UserError
from alignment.evaluation import HeldOutAnswers, spread_prompts
from alignment.export import export_merged
from alignment.gate import check_start
from alignment.kl import sampled_kl
from alignment.layout import BatchLayout
from alignment.logps import largest_group
from alignment.losses import Quantity
from alignment.memory import Plan
from alignment.objective import groups_to_reference
from alignment.planning import memory_result, plan_stage
from alignment.policy import (
    FrozenStart,
    attach_adapter,
    disable_dropout,
    is_adapted,
    load_adapter,
    load_base,
    load_tokenizer,
    model_source,
    policy_identity,
    resolve_device,
    save_policy,
)
from alignment.preference import PreferenceTrainer
from alignment.records import (
    RunRecord,
    atomic_write_bytes,
    git_commit,
    machine,
    to_json,
    to_json_lines,
    versions,
)
from alignment.reference import CachedReference, LiveReference, Reference
from alignment.reference_store import ReferenceStore, cache_dir
from alignment.report import print_summary, write_report
from alignment.run_folder import status
from alignment.schedule import FollowPolicy, Schedule
from alignment.sft import run_sft
from alignment.sft_result import keep_sft, sft_key, take_sft
from alignment.shared import choose_layout
from alignment.stage_data import PreferenceData, SFTData, fit_preferences, load_conversations, read_preferences
from alignment.stage_store import STAGES_FOLDER, StageStore
from alignment.stopping import StopEarly
from alignment.tracking import Tracker, open_tracker
from alignment.training import (
    check_names,
    checkpoint_layers,
    last_checkpoint,
    prepare_trainer,
    stage_callbacks,
    training_arguments,
)

log = logging.getLogger(__name__)

T = TypeVar("T")


def _moment(name: str, rows: Sequence[dict[str, Any]]) -> bytes:
    """Lines of held_out.jsonl: the held-out rows as they were at the start or at the end of the preference stage."""
    return to_json_lines({"moment": name, **row} for row in rows)


def with_live_reference(config: RunConfig) -> RunConfig:
    """The configuration with a live reference where the loss compares whole distributions, which no store keeps."""
    if config.loss is None or config.reference.mode is ReferenceMode.live:
        return config
    if Quantity.divergence not in config.loss.requirements().quantities:
        return config
    log.info("Loss %s compares whole distributions with the reference's, which runs beside it.", config.loss.name)
    return replace(config, reference=replace(config.reference, mode=ReferenceMode.live))


class Run:
    """State of one run while it goes through its stages.

    Args:
        place: in the cohort that the run trains in, if it does.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, recipe: str, resolved: dict[str, Any], place: Member | None = None
    ) -> None:
        if config.sft is not None:
            check_names("sft.optim", config.sft.optim)
        if config.loss is not None:
            check_names("optim", config.optim)
        self.config = with_live_reference(config)
        self.run_dir = run_dir
        self.recipe = recipe
        self.resolved = resolved
        self.place = place
        self.device = resolve_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.cache = cache_dir(config.reference.path)
        self.stage_store = StageStore(self.cache / STAGES_FOLDER)
        self.source = model_source(config.model, self.cache)
        self.tokenizer = load_tokenizer(config.model, self.source)
        self.bad: list[BadRow] = []
        self.conversations: SFTData | None = None
        self.preferences: PreferenceData | None = None
        if config.sft is not None:
            load = partial(load_conversations, config.sft.data, self.tokenizer)
            self.conversations, rows = self._once("conversations", load)
            self.bad += rows
        if config.loss is not None:
            assert config.data is not None
            read = self._once("preferences", partial(read_preferences, config.data, self.tokenizer))
            self.preferences, rows = fit_preferences(read, config.data, config.loss)
            self.schedule = Schedule.of(config, self.preferences.train)
            self.bad += rows
        self.stopping: StopEarly | None = None
        if self.preferences is not None and config.stopping is not None:
            num_steps, num_held_out = len(self.schedule.steps), len(self.preferences.eval)
            self.stopping = StopEarly(config.stopping, run_dir, num_steps, num_held_out)
        self.answers = self._held_out_answers()
        self.record = RunRecord(run_dir)
        self.kl: dict[str, Any] | None = None
        self.summary: dict[str, Any] = {"recipe": recipe, "status": "finished", "seed": config.seed, "stages": {}}

    def execute(self) -> dict[str, Any]:
        """Do what is not done yet, and return the summary."""
        if self.bad:
            write_rejected(self.bad, self.run_dir / "rejected_rows.jsonl")
            log.info("%d rows were left out; rejected_rows.jsonl says which and why.", len(self.bad))
        names = [name for name, on in (("sft", self.conversations), ("preference", self.preferences)) if on is not None]
        with open_tracker(
            self.config.tracking,
            run_dir=self.run_dir,
            recipe=self.recipe,
            run_config=self.resolved,
            stages=names,
        ) as tracker:
            model = self._load_policy()
            self._keep_data()
            self._answer("start", model)
            if self.conversations is not None:
                model = self._after_sft(model, tracker)
                if self.preferences is not None:
                    self._answer("sft", model)
            if self.preferences is not None:
                self._stage("preference", model, tracker, self._preference)
            if self.summary["status"] == "finished":
                self._answer("final", model)
            self._finish(model, tracker)
        return self.summary

    def _once(self, name: str, make: Callable[[], T]) -> T:
        """What is the same for all members of a cohort, made by the first."""
        return make() if self.place is None else self.place.once(name, make)

    def _data(self) -> dict[str, dict[str, Any]]:
        parts = (("sft", self.conversations), ("preference", self.preferences))
        return {name: data.info for name, data in parts if data is not None}

    def _keep_data(self) -> None:
        """Note what the data are; a resumed run must find the same.

        Raises:
            UserError: the data have changed since the run began.
        """
        path = self.run_dir / "stages" / "data.json"
        prints = {name: info["fingerprint"] for name, info in self._data().items()}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, to_json(prints))
        elif (before := json.loads(path.read_text())) != prints:
            changed = " and the ".join(f"{name} data" for name in prints if before.get(name) != prints[name])
            raise UserError(
                f"A resumed run keeps its data, and the {changed} are not those that {self.run_dir} began with: bring "
                f"them back, or start a new run."
            )

    def _held_out_answers(self) -> HeldOutAnswers | None:
        data = self.preferences
        if data is None:
            return None
        return HeldOutAnswers(
            self.config.evaluation,
            data.eval,
            data.eval_rows,
            data.train,
            self.tokenizer,
            self.run_dir / "stages",
            self.stage_store,
            self.device,
            self.config.seed,
        )

    def _answer(self, name: str, model: nn.Module) -> None:
        if self.answers is not None:
            self.answers.collect(name, model)

    # Policy

    def _load_policy(self) -> nn.Module:
        """The policy as the last stage that is done left it, or fresh."""
        trained = None
        for stage, folder in (("sft", self._stage_dir("sft") / "policy"), ("preference", self._policy_dir())):
            if (self._stage_dir(stage) / "done.json").exists():
                trained = folder
        return self._load_trained(trained)

    def _load_trained(self, trained: Path | None) -> nn.Module:
        config = self.config
        source = str(trained) if trained is not None and config.adapter is None else self.source
        log.info("Loading %s on %s ...", config.model.name, self.device)
        load = partial(load_base, config.model, config.quantization, source, self.device)
        model: Any = load() if self.place is None else self.place.base(load)
        model.config.name_or_path = self.source  # also where its weights come from the run folder
        if config.adapter is not None and trained is not None:
            return load_adapter(model, trained)
        return attach_adapter(model, config.adapter, config.seed if config.sft is None else config.sft.seed)

    # Stages

    def _stage_dir(self, stage: str) -> Path:
        return self.run_dir / "stages" / stage

    def _stage(self, stage: str, model: nn.Module, tracker: Tracker, body: Any) -> None:
        """Run a stage unless it is done; its result counts from the moment `done.json` exists."""
        folder = self._stage_dir(stage)
        done = folder / "done.json"
        if done.exists():
            log.info("Stage %s is done already.", stage)
            self.summary["stages"][stage] = json.loads(done.read_text())
            self._take_apart(stage)
            return
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints = folder / "checkpoints"
        checkpoint, step = last_checkpoint(checkpoints)
        self.record.rewind(stage, step if checkpoint else -1)
        set_seed(self.config.sft.seed if stage == "sft" and self.config.sft is not None else self.config.seed)
        started = time.monotonic()
        result = body(model, checkpoints, partial(self._log, tracker, stage))
        seconds = time.monotonic() - started
        train_seconds = result.pop("train_seconds", seconds)
        result["seconds"] = seconds
        result["tokens_per_second"] = result.pop("num_tokens") / train_seconds if train_seconds else 0.0
        if stage == "sft":
            # A rename is the last step, so that a folder named `policy` is always whole.
            unfinished = folder / "policy.partial"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(folder / "policy", ignore_errors=True)
            save_policy(model, self.tokenizer, unfinished)
            unfinished.rename(folder / "policy")
        else:
            save_policy(model, self.tokenizer, self._policy_dir())
        atomic_write_bytes(done, to_json(result, indent=2))
        shutil.rmtree(checkpoints, ignore_errors=True)
        self.summary["stages"][stage] = result
        self._take_apart(stage)

    def _after_sft(self, model: nn.Module, tracker: Tracker) -> nn.Module:
        """The policy after SFT: trained here, or taken over from a run that has done the very same stage before."""
        data = self.conversations
        assert data is not None
        folder = self._stage_dir("sft")
        if (folder / "done.json").exists():
            self._stage("sft", model, tracker, self._sft)
            return model
        key = sft_key(model, self.config, data, self.tokenizer.chat_template)
        log_metrics = partial(self._log, tracker, "sft")
        with self.stage_store.locked(key):
            taken = take_sft(self.stage_store, key, folder, self._load_trained, self.record, log_metrics)
            if taken is not None:
                taken_model, self.summary["stages"]["sft"] = taken
                return taken_model
            self._stage("sft", model, tracker, self._sft)
            keep_sft(self.stage_store, key, folder, model, self.config.model.name, self.record)
        return model

    def _log(self, tracker: Tracker, stage: str, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self.record.log(stage, step, split, metrics)
        tracker.log(stage, step, split, metrics)

    def _take_apart(self, stage: str) -> None:
        """Put what a preference stage found of the reference, and of the KL to its start, into their own places."""
        if stage == "preference":
            result = self.summary["stages"][stage]
            self.summary["reference"] = result.pop("reference")
            self.kl = result.pop("kl")
            if (cohort := result.pop("cohort", None)) is not None:
                self.summary["cohort"] = cohort
            if "stopped" in result:
                self.summary["status"] = "stopped"
                log.info("This member was %s.", status(self.summary))

    def _policy_dir(self) -> Path:
        return self.run_dir / ("adapter" if self.config.adapter is not None else "model")

    def _sft(self, model: nn.Module, checkpoints: Path, log_metrics: Any) -> dict[str, Any]:
        config = self.config.sft
        assert config is not None and self.conversations is not None
        plan = self._plan("sft", model, config, max(len(e["input_ids"]) for e in self.conversations.train))
        result = run_sft(
            model,
            self.tokenizer,
            config,
            self.conversations.train,
            self.conversations.eval,
            plan=plan,
            folder=checkpoints,
            seed=config.seed,
            device=self.device,
            log_metrics=log_metrics,
        )
        return result | {"memory": memory_result(plan, self.device, plan.tokens_per_batch)}

    def _plan(self, stage: str, model: nn.Module, part: RunConfig | SFTConfig, longest: int, members: int = 1) -> Plan:
        live = stage == "preference" and self.config.reference.mode is ReferenceMode.live
        return plan_stage(
            model,
            part.trainer,
            optimizer=part.optim.name,
            folder=self._stage_dir(stage),
            device=self.device,
            longest=longest,
            adapter=self.config.adapter,
            supervised=stage == "sft",
            copies=live and self.config.adapter is None,
            members=members,
        )

    def _preference(self, model: nn.Module, checkpoints: Path, log_metrics: Any) -> dict[str, Any]:
        config, data = self.config, self.preferences
        assert data is not None
        loss, loop = config.loss, config.trainer
        disable_dropout(model)
        layout = choose_layout(model, self.device)
        schedule = self.schedule
        place = self._joined(model)
        plan, tokens_per_batch = self._preference_plan(model, largest_group(layout, data.train), place)
        checkpoint_layers(model, plan.checkpoint_every)
        reference = self._reference(model, layout, plan)
        groups = data.train
        if loss.requirements().density_weights:
            groups = with_density_weights(groups, model, plan.reference_tokens, self.device)
        title = loss.name.upper() if place is None else f"{self.run_dir.name} {loss.name.upper()}"
        callbacks = stage_callbacks(title, log_metrics, loop, bool(data.eval))
        if self.stopping is not None:
            callbacks.insert(0, self.stopping)  # before those that ask what is done at the last step
        if reference is not None:
            asked = partial(groups_to_reference, loss, data.train, eval_groups=data.eval)
            reference.prepare(asked(schedule.until_refresh(0)))
            if schedule.refreshes:
                callbacks.insert(0, FollowPolicy(reference, schedule, asked))  # before the checkpoint is called whole
        arguments = training_arguments(
            TrainingArguments,
            folder=checkpoints,
            optim=config.optim,
            trainer=loop,
            num_steps=len(schedule.steps),
            seed=config.seed,
            device=self.device,
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
        start_rows = self._stage_dir("preference") / "held_out_start.jsonl"
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
            atomic_write_bytes(self.run_dir / "held_out.jsonl", both)
        metrics = self._final_metrics(trainer)
        result = {
            "loss": loss.name,
            "settings": asdict(loss),
            "steps": trainer.state.global_step,
            "num_tokens": trainer.num_tokens,
            "kl": None,
            "cohort": None if place is None else {"size": place.width},
            "train_seconds": trainer.train_seconds,
            "memory": memory_result(plan, self.device, trainer.tokens_per_batch),
            "start": start | {"identity": identity},
            "metrics": metrics,
            "reference": reference.summary() if reference is not None else {"mode": "none"},
        }
        if self.stopping is not None and self.stopping.stopped is not None:
            result["stopped"] = self.stopping.stopped
        elif frozen is not None:
            assert self.answers is not None
            picked = spread_prompts(data.eval, config.evaluation.kl_prompts)
            result["kl"] = sampled_kl(
                model,
                frozen,
                [data.eval[i].prompt for i in picked],
                self.answers.stops,
                config.evaluation,
                layout,
                plan.reference_tokens,
                self.device,
                config.seed,
            )
        if reference is not None:
            reference.close()
        return result

    def _joined(self, model: nn.Module) -> Member | None:
        """The place in the cohort, where the policy can train in one."""
        if self.place is not None:
            try:
                self.place.attach(model)
            except ValueError as error:
                log.warning("This member trains while the others wait: %s.", error)
                return None
        return self.place

    def _preference_plan(self, model: nn.Module, largest: int, place: Member | None) -> tuple[Plan, int]:
        """The plan of the preference stage, and the positions of one pass of this run's own."""
        if place is None:
            plan = self._plan("preference", model, self.config, largest)
            return plan, plan.tokens_per_batch
        plan = self._plan("preference", model, self.config, largest, place.width)
        if plan.fits:
            return plan, max(plan.tokens_per_batch // place.width, min(largest, plan.tokens_per_batch))
        (self._stage_dir("preference") / "plan.json").unlink()
        place.separate()
        return self._preference_plan(model, largest, None)

    def _frozen_start(self, model: nn.Module, reference: Reference | None) -> FrozenStart | None:
        """The policy as it is now, to compare with after training; None where nothing asks for it or keeps it."""
        assert self.preferences is not None
        if not (self.config.evaluation.kl_prompts and self.preferences.eval):
            return None
        if is_adapted(model):
            return FrozenStart(model)
        if isinstance(reference, LiveReference) and not self.schedule.refreshes:
            return reference.frozen
        log.info(
            "The KL from samples is left out: it needs the whole model as it is now beside the one that trains, which "
            "reference=live keeps where it is never refreshed."
        )
        return None

    def _reference(self, model: nn.Module, layout: BatchLayout, plan: Plan) -> Reference | None:
        config = self.config
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
            return LiveReference(model, layout, budget, self.device, config.reference.sync_mix)
        store = ReferenceStore(self.cache / "reference.sqlite")
        return CachedReference(
            store,
            model,
            layout,
            plan.reference_tokens,
            self.device,
            config.reference.spot_checks,
            with_entropies=Quantity.entropy in config.loss.requirements().quantities,
        )

    @staticmethod
    def _final_metrics(trainer: PreferenceTrainer) -> dict[str, float]:
        """The last training log and the last evaluation; both belong to the last step."""
        history = list(reversed(trainer.state.log_history))
        train = next(row for row in history if "loss" in row)
        final = {f"train/{k}": v for k, v in train.items() if k not in ("epoch", "step")}
        if trainer.eval_groups:
            evaluation = next(row for row in history if "eval_loss" in row)
            final |= {f"eval/{k[5:]}": v for k, v in evaluation.items() if k.startswith("eval_")}
        return final

    # Files

    def _check_prompts(self) -> list[np.ndarray]:
        """A few prompts that the merged model and the policy must continue alike."""
        if self.preferences is not None:
            return [group.prompt for group in (self.preferences.eval or self.preferences.train)[:4]]
        assert self.conversations is not None
        return [np.array(e["input_ids"][: e["completion_mask"].index(1)]) for e in self.conversations.train[:4]]

    def _finish(self, model: nn.Module, tracker: Tracker) -> None:
        config = self.config
        if self.preferences is None:
            save_policy(model, self.tokenizer, self._policy_dir())
        identity, description = policy_identity(model)
        self.summary["model"] = {"name": config.model.name, "final_identity": identity, **description}
        ended = self.summary["status"] == "finished"
        samples = self.answers.judged(self.record) if self.answers is not None and ended else {}
        self.summary["evaluation"] = samples | ({"kl/sampled": self.kl} if self.kl is not None else {})
        self.summary["data"] = self._data()
        if config.export.merge:
            self.summary["export"] = export_merged(
                model,
                self.tokenizer,
                self.run_dir / "merged",
                config,
                self.source,
                self.device,
                self._check_prompts(),
            )
        self.summary["versions"] = versions()
        self.summary["machine"] = machine() | {"device": str(self.device)}
        self.summary["git_commit"] = git_commit(Path(__file__).parent)
        self.summary["seconds"] = self.record.wall_seconds
        files = {
            "policy": self._policy_dir(),
            "summary": self.run_dir / "summary.json",
            "metrics": self.record.metrics_path,
            "report": self.run_dir / "report.md",
            "config": self.run_dir / "config.yaml",
            "plots": self.run_dir / "plots",
        }
        if (self.run_dir / "held_out.jsonl").exists():
            files["held_out"] = self.run_dir / "held_out.jsonl"
        if samples:
            files["samples"] = self.run_dir / "samples.md"
        if config.export.merge:
            files["merged"] = self.run_dir / "merged"
        self.summary["files"] = {name: str(path) for name, path in files.items()}
        self.record.write_summary(self.summary)
        write_report(self.run_dir)
        tracker.summary(self.summary)
        print_summary(self.summary)
