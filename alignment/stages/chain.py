"""One run: data, SFT, the preference stage, evaluation, and the files that it leaves."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn
from transformers import set_seed

from alignment.config.schema import RunConfig
from alignment.data.prepare import (
    PreferenceData,
    SFTData,
    fit_preferences,
    load_conversations,
    read_preferences,
    require_same_data,
)
from alignment.data.rows import BadRow, write_rejected
from alignment.files import atomic_write_bytes, cache_dir, to_json
from alignment.kernels.allocator import keep_freed_memory
from alignment.policy.adapter import attach_adapter, load_adapter
from alignment.policy.identity import policy_identity
from alignment.policy.load import load_base, load_tokenizer, model_source, resolve_device, save_policy
from alignment.policy.merge import export_merged
from alignment.runs.folder import status
from alignment.runs.record import RunRecord, git_commit, machine, versions
from alignment.runs.report import print_summary, write_report
from alignment.runs.tracking import Tracker, open_tracker
from alignment.stages.answers import HeldOutAnswers
from alignment.stages.preference import PreferenceStage
from alignment.stages.sft import run_sft
from alignment.stages.sft_reuse import reuse_sft, save_sft, sft_key
from alignment.stages.store import STAGES_FOLDER, StageStore
from alignment.training.callbacks import LogFunction, check_names, last_checkpoint
from alignment.training.cohort import Member
from alignment.training.planning import memory_result, plan_stage

log = logging.getLogger(__name__)

T = TypeVar("T")


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
        self.config = config
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
        self.preference_stage: PreferenceStage | None = None
        self.answers: HeldOutAnswers | None = None
        if config.sft is not None:
            load = partial(load_conversations, config.sft.data, self.tokenizer)
            self.conversations, rows = self._once("conversations", load)
            self.bad += rows
        if config.loss is not None:
            assert config.data is not None
            read = self._once("preferences", partial(read_preferences, config.data, self.tokenizer))
            self.preferences, rows = fit_preferences(read, config.data, config.loss)
            self.bad += rows
            self.answers = self._held_out_answers(self.preferences)
            self.preference_stage = PreferenceStage(
                config,
                self.preferences,
                stops=self.answers.stops,
                place=place,
                run_dir=run_dir,
                folder=self._stage_dir("preference"),
                references=self.cache / "reference.sqlite",
                device=self.device,
            )
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
            require_same_data(self.run_dir / "stages" / "data.json", self._data())
            self._answer("start", model)
            if self.conversations is not None:
                model = self._after_sft(model, tracker)
                if self.preferences is not None:
                    self._answer("sft", model)
            if self.preference_stage is not None:
                self._stage("preference", model, tracker, self.preference_stage.run)
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

    def _held_out_answers(self, data: PreferenceData) -> HeldOutAnswers:
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

    def _stage(
        self, stage: str, model: nn.Module, tracker: Tracker, body: Callable[[nn.Module, LogFunction], dict[str, Any]]
    ) -> None:
        """Run a stage unless it is done; its result counts from the moment `done.json` exists."""
        folder = self._stage_dir(stage)
        done = folder / "done.json"
        if done.exists():
            log.info("Stage %s is done already.", stage)
            self.summary["stages"][stage] = json.loads(done.read_text())
            self._lift_results(stage)
            return
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints = folder / "checkpoints"
        checkpoint, step = last_checkpoint(checkpoints)
        self.record.rewind(stage, step if checkpoint else -1)
        set_seed(self.config.sft.seed if stage == "sft" and self.config.sft is not None else self.config.seed)
        started = time.monotonic()
        result = body(model, partial(self._log, tracker, stage))
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
        self._lift_results(stage)

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
            taken = reuse_sft(self.stage_store, key, folder, model, self._load_trained, self.record, log_metrics)
            if taken is not None:
                taken_model, self.summary["stages"]["sft"] = taken
                return taken_model
            self._stage("sft", model, tracker, self._sft)
            save_sft(self.stage_store, key, folder, model, self.config.model.name, self.record)
        return model

    def _log(self, tracker: Tracker, stage: str, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self.record.log(stage, step, split, metrics)
        tracker.log(stage, step, split, metrics)

    def _lift_results(self, stage: str) -> None:
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

    def _sft(self, model: nn.Module, log_metrics: LogFunction) -> dict[str, Any]:
        config, data, folder = self.config.sft, self.conversations, self._stage_dir("sft")
        assert config is not None and data is not None
        plan = plan_stage(
            model,
            config.trainer,
            optimizer=config.optim.name,
            folder=folder,
            device=self.device,
            longest=max(len(example["input_ids"]) for example in data.train),
            adapter=self.config.adapter,
            supervised=True,
        )
        result = run_sft(
            model,
            self.tokenizer,
            config,
            data.train,
            data.eval,
            plan=plan,
            folder=folder / "checkpoints",
            seed=config.seed,
            device=self.device,
            log_metrics=log_metrics,
        )
        return result | {"memory": memory_result(plan, self.device, plan.tokens_per_batch)}

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
