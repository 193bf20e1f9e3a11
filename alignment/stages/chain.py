"""The chain of a run, from data to report; `Chain.run` is its order."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import set_seed

from alignment.config.schema import RunConfig
from alignment.data.conversations.ends import ends_of_turn
from alignment.errors import NotFinite, UserError
from alignment.evaluation.sampling.answer import stop_tokens
from alignment.files import CacheKind, cache_dir, read_sealed, write_sealed
from alignment.kernels.allocator import keep_freed_memory
from alignment.policy.adapter_names import with_token_ids
from alignment.policy.adapter_start import reads_data
from alignment.policy.chat_templates import with_templates
from alignment.policy.identity import policy_identity
from alignment.policy.load import end_with, load_tokenizer, own_stop_tokens, resolve_device
from alignment.policy.model_check import check_model, damaged_weight
from alignment.policy.reward_model import save_trained
from alignment.policy.source import model_source
from alignment.policy.stored import stored_facts
from alignment.ranks.team import Team
from alignment.runs.folder import status
from alignment.runs.log import RunLog
from alignment.runs.record import RunRecord, git_commit, machine, versions
from alignment.runs.report import print_summary, write_report
from alignment.runs.tracked_tables import send_results
from alignment.runs.tracking import Tracker, open_tracker
from alignment.stages.answers import HeldOutAnswers
from alignment.stages.beginning import begin, first_day, first_templates
from alignment.stages.during import send_samples
from alignment.stages.export import export_whole
from alignment.stages.following import load_everywhere
from alignment.stages.policy import PolicySource, load_policy
from alignment.stages.preference import PreferenceStage
from alignment.stages.reuse import reuse_stage, save_stage
from alignment.stages.run_data import RunData
from alignment.stages.sft import SFTStage
from alignment.stages.sharing import shares_base
from alignment.stages.stage import (
    PreferenceResult,
    Stage,
    StageResult,
    Workspace,
    read_result,
    require_whole,
    write_result,
)
from alignment.stages.store import StageStore
from alignment.training.callbacks import last_checkpoint, last_split, remove_damaged
from alignment.training.cohort import CohortSlot
from alignment.training.optimizers import check_optimizer
from alignment.training.stage_trainer import last_good

log = logging.getLogger(__name__)

_NOT_FINITE = "not_finite.json"
"""In the folder of a stage: why it cannot go on."""
_TOKENS_ASKED = 32


class Chain:
    """One run on its way through its stages.

    Args:
        config: of the run.
        run_dir: where it writes; what is there already is not done again.
        recipe: its name.
        resolved: the whole configuration as plain values, for the tracker.
        slot: in the cohort that the run trains in, if it does.
        given: puts the final weights into the policy, in place of training in the last stage.
        described: what the summary says beside the outcome.
        team: the ranks that share the run; None for one process.

    Raises:
        UserError: a model, data or settings that the run cannot start with.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        recipe: str,
        resolved: dict[str, Any],
        slot: CohortSlot | None = None,
        given: Callable[[nn.Module], None] | None = None,
        described: dict[str, Any] | None = None,
        team: Team | None = None,
    ) -> None:
        device = resolve_device(config.device)
        if team is not None:
            log.info("%d ranks share this run.", team.size)
        if config.sft is not None:
            check_optimizer("sft.optim", config.sft.optim, config.adapter, device.type)
        if config.loss is not None:
            check_optimizer("optim", config.optim, config.adapter, device.type)
        _require_no_stop(run_dir)
        self.run_dir = run_dir
        self._beginning = run_dir / "stages" / "beginning.json"
        self._day, kept = first_day(self._beginning), first_templates(self._beginning)
        self.recipe, self.resolved, self.described = recipe, resolved, described or {}

        # Where and with what it works
        if device.type == "cpu":
            keep_freed_memory()
        cache = cache_dir(config.reference.path)
        self.store = StageStore(CacheKind.stages.under(cache))
        self.source = model_source(config.model, cache)
        self.work = Workspace(
            run_dir=run_dir,
            cache=cache,
            device=device,
            tokenizer=load_tokenizer(config.model, self.source.tokenizer, kept),
            slot=slot,
            final_policy=run_dir / ("adapter" if config.adapter is not None else "model"),
            team=team,
        )
        config = with_templates(config, self.work.tokenizer, kept)
        self.config = config = replace(config, adapter=with_token_ids(config.adapter, self.work.tokenizer))
        check_model(config, self.source, self.work.tokenizer)
        ends = ends_of_turn(self.work.tokenizer, config.last_data), own_stop_tokens(config.model, self.source.base)
        self._stops = stop_tokens(self.work.tokenizer, *ends)

        # Data and stages
        self.data = RunData(config, self.work, self._day)
        self.sft: SFTStage | None = None
        self.preference: PreferenceStage | None = None
        self.answers: HeldOutAnswers | None = None
        if (conversations := self.data.conversations) is not None:
            self.sft = SFTStage(config, conversations, self.work, given if config.loss is None else None)
        if (preferences := self.data.preferences) is not None:
            self.answers = HeldOutAnswers(config, preferences, self.work, self._stops)
            self.preference = PreferenceStage(config, preferences, self.work, self._stops, self.answers, given)
        self.stages: list[Stage] = [stage for stage in (self.sft, self.preference) if stage is not None]
        self._shared = shares_base(config, team, device, conversations, preferences)
        self.record = RunRecord(run_dir)
        self.results: dict[str, StageResult] = {}

    def run(self) -> dict[str, Any]:
        """Do what is not done yet, and return the summary."""
        self.data.write_rejected()
        with open_tracker(
            self.config.tracking,
            run_dir=self.run_dir,
            recipe=self.recipe,
            run_config=self.resolved,
            stages=[stage.name for stage in self.stages],
            team=self.work.team,
        ) as tracker:
            told = RunLog(self.record, tracker)
            model = self._load_policy()
            fresh = not self._finished()
            begin(self._beginning, self._day, self.config, self.work.tokenizer, self.data.infos, model, fresh)
            if fresh and not self._is_finite(model):
                raise UserError(
                    f"model.name={self.config.model.name} gives log-probs that are not finite: its weights are damaged "
                    f"or overflow in this dtype (model.dtype, quantization.compute_dtype)."
                )
            if fresh and (weight := damaged_weight(model)) is not None:
                raise UserError(
                    f"model.name={self.config.model.name} has a weight with numbers that are not finite ({weight}): "
                    f"its files are damaged, so fetch them again."
                )
            self._answer("start", model, told)
            if self.sft is not None:
                model = self._run_stage(self.sft, model, told)
                if self.preference is not None:
                    self._answer("sft", model, told)
            if self.preference is not None:
                model = self._run_stage(self.preference, model, told)
            if not self._stopped:
                self._answer("final", model, told)
            return self._finish(model, tracker)

    # Policy

    def _load_policy(self) -> nn.Module:
        """The policy as the last finished stage left it, or a fresh one."""
        finished = self._finished()
        for stage in finished:
            require_whole(self.work.folder(stage.name), stage.policy)
        return self._load_trained(finished[-1].policy if finished else None)

    def _finished(self) -> list[Stage]:
        return [s for s in self.stages if read_result(self.work.folder(s.name), s.result_type) is not None]

    def _source_of(self, trained: Path | None) -> PolicySource:
        sequences = self.data.sample() if reads_data(self.config.adapter) else ()
        cache, chosen = self.work.cache, self.run_dir / "spectrum.json"
        return PolicySource(self.config, self.source, cache, chosen, trained, sequences, self._shared)

    def _load_trained(self, trained: Path | None) -> nn.Module:
        work, made = self.work, self._source_of(trained)
        model = load_policy(made, work.device, None if work.slot is None else work.slot.base)
        if work.team is not None:
            load_everywhere(work.team, made, model)
        return model

    def _save_policy(self, model: nn.Module, folder: Path) -> None:
        """Save beside the folder and rename, so that a folder of this name always holds a whole policy."""
        unfinished = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        save_trained(model, self.work.tokenizer, unfinished)
        end_with(unfinished, self._stops)
        unfinished.rename(folder)

    @torch.no_grad()
    def _is_finite(self, model: nn.Module) -> bool:
        """Whether the policy computes numbers at all, asked with the beginning of a prompt."""
        prompt = self.data.prompts()[0][:_TOKENS_ASKED]
        was_training = model.training
        logits = model.eval()(input_ids=torch.from_numpy(prompt.astype(np.int64))[None].to(self.work.device)).logits
        model.train(was_training)
        return bool(logits.amax(-1).isfinite().all())  # the largest: a head may rule tokens out with -inf

    # Stages

    def _run_stage(self, stage: Stage, model: nn.Module, told: RunLog) -> nn.Module:
        """The policy after a stage, which is done already, taken over from another run, or trained here."""
        result = read_result(self.work.folder(stage.name), stage.result_type)
        if result is not None:
            log.info("Stage %s is done already.", stage.name)
            split = "eval" if any(name.startswith("eval/") for name in result.metrics) else "train"
            self.record.require(stage.name, result.steps, split)
            shutil.rmtree(self.work.folder(stage.name) / "checkpoints", ignore_errors=True)  # a kill may leave them
            self._keep(stage, result)
            return model
        key = stage.key(model)
        if key is None:
            self._train(stage, model, told)
            return model
        with self.store.locked(key):
            log_metrics = told.of(stage.name)
            reused = reuse_stage(self.store, key, stage, model, self._load_trained, self.record, log_metrics)
            if reused is not None:
                policy, result = reused
                self._keep(stage, result)
                return policy
            result = self._train(stage, model, told)
            save_stage(self.store, key, stage, result, model, self.config.model.name, self.record)
        return model

    def _train(self, stage: Stage, model: nn.Module, told: RunLog) -> StageResult:
        """Train a stage from its newest checkpoint; its result counts from the moment `done.json` exists."""
        folder = self.work.folder(stage.name)
        checkpoints = folder / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        remove_damaged(checkpoints)
        checkpoint, step = last_checkpoint(checkpoints)
        if checkpoint:
            self.record.require(stage.name, step, last_split(checkpoint))
        told.begin(stage.name, step if checkpoint else -1)
        set_seed(stage.seed)
        try:
            result = stage.run(model, told.of(stage.name))
            if not self._is_finite(model):
                raise NotFinite(
                    f"{stage.title} ended with a policy whose log-probs are not finite; {last_good(checkpoints)}: "
                    f"start a new run with a lower learning rate or stricter clipping of gradients."
                )
        except NotFinite as error:
            write_sealed(folder / _NOT_FINITE, {"error": str(error)})
            told.stopped(stage.name, str(error))
            raise
        self._save_policy(model, stage.policy)
        write_result(folder, result, stage.policy)
        shutil.rmtree(checkpoints, ignore_errors=True)
        self._keep(stage, result)
        return result

    def _keep(self, stage: Stage, result: StageResult) -> None:
        self.results[stage.name] = result
        if self._stopped:
            log.info("This member was %s.", status(self._outcome()))

    @property
    def _preference_result(self) -> PreferenceResult | None:
        found = self.results.get("preference")
        assert found is None or isinstance(found, PreferenceResult)
        return found

    @property
    def _stopped(self) -> bool:
        return self._preference_result is not None and self._preference_result.stopped is not None

    def _answer(self, name: str, model: nn.Module, told: RunLog) -> None:
        if self.answers is not None:
            self.answers.collect(name, model)
            told.answers(self.answers.samples)

    # Files

    def _finish(self, model: nn.Module, tracker: Tracker) -> dict[str, Any]:
        """Judge the answers, export the model, and write summary and report."""
        if self.preference is None:
            self._save_policy(model, self.work.final_policy)
        samples = self.answers.judged(self.record) if self.answers is not None and not self._stopped else {}
        summary = self._outcome() | self.described
        identity, description = policy_identity(model)
        facts = description | stored_facts(model)
        summary["model"] = {"name": self.config.model.name, "final_identity": identity, **facts}
        preference = self._preference_result
        kl = {"kl/sampled": preference.kl} if preference is not None and preference.kl is not None else {}
        summary["evaluation"] = samples | kl
        summary["data"] = self.data.infos
        if self.config.export.merge:
            summary["export"] = self._export(model)
        summary["versions"] = versions()
        summary["machine"] = machine() | {"device": str(self.work.device)}
        if self.work.team is not None:
            summary["machine"]["ranks"] = self.work.team.size
        summary["git_commit"] = git_commit(Path(__file__).parent)
        summary["seconds"] = self.record.wall_seconds
        summary["files"] = self._files(bool(samples))
        self.record.write_summary(summary)
        self.record.seal()
        try:
            write_report(self.run_dir)
        except UserError as error:
            again = f"python -m alignment.report {shlex.quote(str(self.run_dir))}"
            raise UserError(f"{error} All results are written; the report is made again by: {again}") from None
        send_samples(self.work, tracker)
        send_results(tracker, self.run_dir, summary)
        print_summary(summary)
        return summary

    def _outcome(self) -> dict[str, Any]:
        """How the run ended and what its stages report: the first part of the summary."""
        outcome: dict[str, Any] = {
            "recipe": self.recipe,
            "status": "stopped" if self._stopped else "finished",
            "seed": self.config.seed,
            "stages": {name: result.summary() for name, result in self.results.items()},
        }
        if (preference := self._preference_result) is not None:
            outcome["reference"] = preference.reference
            if preference.cohort is not None:
                outcome["cohort"] = preference.cohort
        return outcome

    def _export(self, model: nn.Module) -> dict[str, Any]:
        work, made = self.work, self._source_of(self.work.final_policy)
        folder, prompts = self.run_dir / "merged", self.data.prompts()
        return export_whole(model, made, work.tokenizer, folder, work.device, prompts, self._stops)

    def _files(self, has_samples: bool) -> dict[str, str]:
        """The files for people and programs, by what they hold."""
        files = {
            "policy": self.work.final_policy,
            "summary": self.run_dir / "summary.json",
            "metrics": self.record.metrics_path,
            "report": self.run_dir / "report.md",
            "config": self.run_dir / "config.yaml",
            "plots": self.run_dir / "plots",
        }
        files |= {"spectrum": self.run_dir / "spectrum.json"} if self.config.spectrum is not None else {}
        files |= {"held_out": path} if (path := self.run_dir / "held_out.jsonl").exists() else {}
        files |= {"samples": self.run_dir / "samples.md"} if has_samples else {}
        files |= {"merged": self.run_dir / "merged"} if self.config.export.merge else {}
        return {name: str(path) for name, path in files.items()}


def _require_no_stop(run_dir: Path) -> None:
    """Refuse a run of which a stage has met a number that is not finite: it would meet it again."""
    for path in run_dir.glob(f"stages/*/{_NOT_FINITE}"):
        raise UserError(
            f"{run_dir} cannot go on, because it would stop where it stopped: {read_sealed(path)['error']} "
            f"Remove {path} to try all the same."
        )
