"""Finished runs opened again: their policies, what these were asked, and what they answer now."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from alignment.config.resume import finished_run
from alignment.config.schema import RunConfig
from alignment.data.conversations.ends import ends_of_turn
from alignment.data.conversations.trajectories import readable
from alignment.data.preparation.prepare import (
    PreferenceData,
    SFTData,
    fit_preferences,
    load_conversations,
    read_preferences,
    sample_sequences,
)
from alignment.data.rows.row import Row
from alignment.data.tokens.tokenization import tokenize_groups
from alignment.data.tokens.units import spread_prompts
from alignment.errors import UserError
from alignment.evaluation.sampling.answer import Sampling, as_text, stop_tokens
from alignment.evaluation.sampling.draw import draw
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.store import AnswerStore
from alignment.files import cache_dir, read_sealed
from alignment.policy.adapter_names import with_token_ids
from alignment.policy.adapter_start import reads_data
from alignment.policy.chat_templates import with_templates
from alignment.policy.load import load_tokenizer, own_stop_tokens, resolve_device
from alignment.policy.model_check import check_model
from alignment.policy.source import model_source
from alignment.runs.folder import MODEL_TITLES, RunFiles, dig, read_run, submapping
from alignment.stages.beginning import first_day, first_templates
from alignment.stages.policy import PolicySource, load_policy

log = logging.getLogger(__name__)

_HOW = ("prompts", "max_new_tokens", "temperature")
"""Settings of the evaluation that decide which prompts are answered, and how."""


class Questions:
    """The held-out prompts of a run, as one model reads them.

    Args:
        config: with the model.
        run_dir: of the run, whose day and templates the prompts have.
        rows: what is asked in place of the held-out rows.

    Attributes:
        given, given_rows: the config and the rows as they were given.
        config: the same with the texts of its templates.
        day: that a template writes: the one on which the run began.
        stops: the tokens that end an answer.

    Raises:
        UserError: the model or the data cannot be used any more.
    """

    def __init__(self, config: RunConfig, run_dir: Path, rows: Sequence[Row] | None = None) -> None:
        self.given = config
        self.given_rows = rows
        beginning = run_dir / "stages" / "beginning.json"
        self.day, kept = first_day(beginning), first_templates(beginning)
        self.cache = cache_dir(config.reference.path)
        self.device = resolve_device(config.device)
        self.source = model_source(config.model, self.cache)
        self.tokenizer = load_tokenizer(config.model, self.source.tokenizer, kept)
        config = with_templates(config, self.tokenizer, kept)
        self.config = config = replace(config, adapter=with_token_ids(config.adapter, self.tokenizer))
        check_model(config, self.source, self.tokenizer)
        ends = ends_of_turn(self.tokenizer, config.last_data), own_stop_tokens(config.model, self.source.base)
        self.stops = stop_tokens(self.tokenizer, *ends)

    @cached_property
    def preferences(self) -> PreferenceData:
        """The preference data of the run."""
        assert self.config.data is not None
        drawn = self.config.onpolicy is not None
        read = read_preferences(self.config.data, self.tokenizer, day=self.day, cache=self.cache, with_prompts=drawn)
        return fit_preferences(read, self.config.data, self.config.loss)[0]

    @cached_property
    def conversations(self) -> SFTData:
        """The SFT data of the run."""
        assert self.config.sft is not None
        return load_conversations(self.config.sft.data, self.tokenizer, day=self.day, cache=self.cache)[0]

    @cached_property
    def _asked(self) -> tuple[list[Row], list[np.ndarray]]:
        """The rows that are asked, and the tokens of their prompts.

        Raises:
            UserError: a prompt that was given cannot be written or tokenised.
        """
        if self.given_rows is None:
            groups = self.preferences.eval
            picked = spread_prompts(groups, self.config.evaluation.prompts)
            return [self.preferences.eval_rows[i] for i in picked], [groups[i].prompt for i in picked]
        assert self.config.data is not None
        made = tokenize_groups(self.given_rows, self.tokenizer, self.config.data, day=self.day)
        if made.drops:
            raise UserError(f"{made.drops[0].file} row {made.drops[0].row}: {made.drops[0].message}.")
        return list(self.given_rows), [group.prompt for group in made.groups]

    @property
    def rows(self) -> list[Row]:
        """The rows that are asked."""
        return self._asked[0]

    @cached_property
    def texts(self) -> list[str]:
        """Their prompts, for people."""
        return [readable(row.prompt) for row in self.rows]

    def answered(self, model: nn.Module, count: int) -> list[list[str]]:
        """`count` answers of a policy to each prompt; those that it has given before are in the store."""
        settings = self.config.evaluation
        how = Sampling(
            stops=tuple(self.stops),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=self.config.seed,
            presets=True,
        )
        engine = LocalEngine(model, self.device, settings.batch_size)
        with AnswerStore(self.cache, engine) as store:
            found = draw(store, self._asked[1], count, how)
            log.info(
                "%d answers of %d tokens were drawn, %d were there before.", store.drawn, store.tokens, store.found
            )
        return [
            [as_text(self.tokenizer, answer.tokens.tolist(), self.stops) for answer in several] for several in found
        ]


@dataclass(frozen=True, slots=True)
class OpenedPolicy:
    """A policy that can be asked again.

    Attributes:
        name: for people.
        questions: what it is asked.
        moment: of its run: start, sft or final; a model that is none of a run has its start alone.
        run: its run; None for such a model.
    """

    name: str
    questions: Questions
    moment: str = "start"
    run: RunFiles | None = None

    @property
    def identity(self) -> str | None:
        """That its run has written; None where it has written none."""
        if self.run is None:
            return None
        if self.moment == "final":
            return dig(self.run.summary, "model", "final_identity")
        if self.moment == starting_moment(self.run):
            return dig(self.run.summary, "stages", "preference", "start", "identity")
        return None

    def is_same(self, other: OpenedPolicy) -> bool:
        """Whether two policies are known to be one: by what their runs have written, or as the same base."""
        if self is other or (self.identity is not None and self.identity == other.identity):
            return True
        bases = [
            (policy.questions.config.model, dig(policy.run.summary, "model", "base"))
            for policy in (self, other)
            if policy.run is not None and policy.moment == "start"
        ]
        return len(bases) == 2 and bases[0] == bases[1] and bases[0][1] is not None

    def at(self, moment: str) -> OpenedPolicy:
        """The policy of the same run at another moment.

        Raises:
            UserError: the run has none.
        """
        assert self.run is not None
        if moment == "sft" and not submapping(self.run.summary, "stages", "sft"):
            raise UserError(f"{self.run.folder} has no SFT stage, and so no policy after it: set against=start.")
        return replace(self, name=f"{self.name} {MODEL_TITLES[moment]}", moment=moment)

    def load(self) -> nn.Module:
        """The model.

        Raises:
            UserError: it is gone, or cannot be loaded.
        """
        asked, trained, folder = self.questions, None, Path()
        config = asked.config
        if self.run is not None:
            folder = self.run.folder
            final = folder / ("adapter" if config.adapter is not None else "model")
            trained = {"start": None, "sft": folder / "stages" / "sft" / "policy", "final": final}[self.moment]
        if trained is not None and not trained.is_dir():
            raise UserError(f"{self.name} cannot be asked, because its policy {trained} is gone.")
        sequences: Sequence[np.ndarray] = ()
        if trained is None and reads_data(config.adapter):
            conversations = None if config.sft is None else asked.conversations
            sequences = sample_sequences(conversations, asked.preferences)
        made = PolicySource(config, asked.source, asked.cache, folder / "spectrum.json", trained, sequences)
        return load_policy(made, asked.device)

    def answers(self, count: int) -> list[list[str]]:
        """`count` answers to each prompt: those that its run has kept if they are what is asked for, else drawn ones.

        Raises:
            UserError: the policy is gone, or the data are no longer those that its run had.
        """
        kept = self._kept() if count == 1 else None
        if kept is not None:
            return [[text] for text in kept]
        log.info("%s answers %d prompts ...", self.name, len(self.questions.texts))
        found = self.questions.answered(self.load(), count)
        gc.collect()  # the next policy needs the room
        return found

    def _kept(self) -> list[str] | None:
        """The answers in the folder of the run."""
        if self.run is None or self.questions.given_rows is not None:
            return None
        path = self.run.folder / "stages" / f"answers_{self.moment}.json"
        now, then = self.questions.config.evaluation, submapping(self.run.config, "evaluation")
        if not path.is_file() or any(getattr(now, key) != then.get(key) for key in _HOW):
            return None
        if not self.run.samples:
            return None
        if [row.get("prompt") for row in self.run.samples] != self.questions.texts:
            raise UserError(
                f"{self.run.folder} has answered other held-out prompts than its data have now: bring back the data "
                f"that it had, or start a new run."
            )
        return list(read_sealed(path))


def starting_moment(run: RunFiles) -> str:
    """The moment of the policy that a run's preference stage has begun with: sft or start."""
    return "sft" if submapping(run.summary, "stages", "sft") else "start"


def open_run(folder: Path, name: str, settings: Sequence[str], rows: Sequence[Row] | None = None) -> OpenedPolicy:
    """The final policy of a run.

    Args:
        name: for people.
        settings: overrides of the settings that the run had, such as evaluation.prompts=32.
        rows: what is asked in place of the held-out rows.

    Raises:
        UserError: the run is not finished, has no answers to give, or cannot be opened.
    """
    run = read_run(folder)
    if run.summary.get("status") != "finished":
        how = "was stopped early" if run.summary.get("status") == "stopped" else "is not finished"
        raise UserError(f"{folder} cannot be evaluated, because it {how}.")
    if submapping(run.summary, "merge"):
        raise UserError(
            f"{folder} is a merged policy, and no run of a recipe: give its parents as runs, and against={folder}."
        )
    config, _ = finished_run(folder, settings)
    if config.loss is None:
        raise UserError(f"{folder} has trained SFT alone, so no prompts were held out: it cannot be evaluated.")
    if config.loss.requirements().rewards:
        raise UserError(f"{folder} has trained a reward model, which writes no answers: it cannot be evaluated.")
    return OpenedPolicy(name, Questions(config, folder, rows), "final", run)


def open_model(name: str, like: OpenedPolicy) -> OpenedPolicy:
    """Any model, asked what the policy of a run is asked.

    Args:
        name: a hub id, a folder of a model or of an adapter, or `wheel:<package>`.

    Raises:
        UserError: there is no such model, or it cannot be used.
    """
    assert like.run is not None
    config = like.questions.given
    config = replace(
        config,
        model=replace(config.model, name=name, revision=None, chat_template=None, eos_token=None),
        quantization=None,
        adapter=None,
        spectrum=None,
        onpolicy=None,
        export=replace(config.export, merge=False),
    )
    return OpenedPolicy(name, Questions(config, like.run.folder, like.questions.given_rows))
