"""The rounds of a preference stage: where they are kept, when they come, and what the reference is then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from alignment.config import judging
from alignment.config.rounds import OnPolicyConfig, Reduction, renamed
from alignment.config.schema import RunConfig
from alignment.data.preparation.prepare import PreferenceData
from alignment.errors import UserError, require
from alignment.evaluation.judges.base import Judge
from alignment.evaluation.judges.implicit import ImplicitJudge
from alignment.evaluation.judges.making import make_judge
from alignment.evaluation.sampling.draw import Engine
from alignment.evaluation.sampling.drift import ScoredEngine
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.store import AnswerStore
from alignment.files import damaged
from alignment.onpolicy.drift import departure, kl_start
from alignment.onpolicy.held_out import HeldOutPrompts
from alignment.onpolicy.prompts import Prompts
from alignment.onpolicy.rounds import Round, RoundMaker, Slots, read_round
from alignment.policy.identity import policy_identity
from alignment.reference.base import Reference
from alignment.reference.cached import CachedReference
from alignment.reference.frozen import FrozenPolicy
from alignment.reference.teacher import Teacher
from alignment.scoring.layout import BatchLayout
from alignment.scoring.logps import join_scores, score_groups
from alignment.stages.served import endpoint_of, served
from alignment.stages.stage import Workspace
from alignment.stages.weak import WeakModel
from alignment.training.optimizers import as_policy
from alignment.training.schedule import Schedule
from alignment.types import Group, RaggedLogps

log = logging.getLogger(__name__)

_AT_ONCE = 1024
"""Prompts whose texts are in memory together."""

Score = Callable[[nn.Module, Sequence[Group]], RaggedLogps]
"""Log-probs of groups under a model, without gradient."""

_ANOTHER = 0.2
"""Nats per token by which a server's log-probs are those of another policy, and not of another precision."""


def scorer(layout: BatchLayout, tokens: int, device: torch.device) -> Score:
    """Scores in passes of so many positions."""

    def score(scored: nn.Module, groups: Sequence[Group]) -> RaggedLogps:
        return join_scores(groups, list(score_groups(scored, groups, layout, tokens, device)))

    return score


def answers_of_a_group(config: RunConfig) -> int:
    """How many answers a group of the rounds of this run has at most."""
    own = config.onpolicy
    assert own is not None and config.loss is not None
    return {"row": 1, "pair": 2}.get(config.loss.requirements().unit, own.k if own.pairs.unit == "list" else 2)


class Rounds:
    """The rounds of a stage.

    Each is kept in a folder of its own, below that of the stage, before its first step. So a stage that is killed
    while it draws, judges or trains goes on as if it had not been: what was drawn and judged is in the stores, and a
    round that is whole is read again.

    Attributes:
        schedule: of the stage.
        groups: that it trains on; those of rounds to come are not there yet.
        done: the rounds so far.

    Raises:
        UserError: the judge lacks something, cannot judge a prompt, or is the policy itself where there is one round.
    """

    def __init__(
        self, config: RunConfig, data: PreferenceData, work: Workspace, stops: Sequence[int], schedule: Schedule
    ) -> None:
        assert config.onpolicy is not None
        require(
            config.onpolicy.judge is not judging.Judge.implicit or len(schedule.rounds) > 1,
            f"onpolicy.judge=implicit judges from the second round on, and in this training of {len(schedule.steps)} "
            f"steps there is none: set a smaller onpolicy.every.",
        )
        self._config = config
        self._own: OnPolicyConfig = config.onpolicy
        self._work = work
        self._folder = work.folder("preference") / "rounds"
        self.schedule = schedule
        self.groups: Sequence[Group] = Slots(len(schedule.steps) * config.trainer.groups_per_step)
        self.done: list[Round] = []
        self._weak = None if self._own.weak is None else WeakModel(config, work)
        self._endpoint = None if self._own.server.address is None else endpoint_of(self._own.server)
        prompts = Prompts(data.train, data.train_rows)
        self._maker = RoundMaker(
            config=self._own,
            prompts=prompts,
            offline=data.train,
            judge=self._judge(),
            held_out=HeldOutPrompts(row.prompt for row in data.eval_rows),
            tokenizer=work.tokenizer,
            stops=stops,
            seed=config.seed,
            as_rows=config.loss.requirements().unit == "row" and self._own.pairs.unit == "pair",
        )
        if self._maker.judge is not None:
            try:
                for begin in range(0, len(prompts), _AT_ONCE):
                    self._maker.judge.require([prompt.item() for prompt in prompts[begin : begin + _AT_ONCE]])
            except UserError as error:
                raise renamed(error) from None

    def _judge(self) -> Judge | None:
        try:
            return make_judge(self._own, self._work.cache, self._work.device)
        except UserError as error:
            raise renamed(error) from None

    def largest(self) -> list[Group]:
        """Groups as large as those of any round can be, to plan with."""
        count = answers_of_a_group(self._config)
        longest = max((group.prompt for group in self._maker.prompts.groups), key=len)
        answer = np.zeros(self._own.max_new_tokens, dtype=np.int32)
        mixed = self._own.mix_offline or self._own.judge is judging.Judge.implicit
        return [Group(longest, (answer,) * count), *(self._maker.offline if mixed else ())]

    def begin(self, model: nn.Module, done: int, score: Score) -> None:
        """Have the rounds that a stage with `done` steps behind it has begun, the first one in any case.

        Args:
            model: the policy at the start of the stage.
            score: log-probs for answers that a server draws.
        """
        for number, step in enumerate(self.schedule.rounds):
            if number == 0 or step < done:
                self._take(number, model if number == 0 else None, score)

    def draw(self, step: int, model: nn.Module, start: FrozenPolicy | None, score: Score) -> Round:
        """The round that begins after so many steps, drawn by the policy as it is now if it is not there.

        Args:
            start: the policy at the start of the stage, with which one that is its own judge is compared.
            score: log-probs for that, and for answers that a server draws.
        """
        number = self.schedule.rounds.index(step)
        if number == len(self.done):
            self._take(number, model, score, self._own_judge(model, start, score))
        return self.done[number]

    def _own_judge(self, model: nn.Module, start: FrozenPolicy | None, score: Score) -> Judge | None:
        """The policy as it is now, as the judge of its answers; None where another one judges them."""
        if self._own.judge is not judging.Judge.implicit:
            return None
        assert start is not None, "the settings are checked for it"
        now = policy_identity(model)[0]
        with start.active() as before:
            identities = now, policy_identity(before)[0]

        def score_start(groups: Sequence[Group]) -> RaggedLogps:
            with start.active() as before:
                return score(before, groups)

        mean = self._own.implicit.reduction is Reduction.mean
        return ImplicitJudge(partial(score, model), score_start, identities, mean, self._work.cache)

    @property
    def step(self) -> int:
        """How many steps come before the last round that has begun."""
        return self.schedule.rounds[len(self.done) - 1]

    @contextmanager
    def _engine(self, model: nn.Module, score: Score) -> Iterator[tuple[AnswerStore, Engine]]:
        """The store of the policy's answers, and what draws: a server's answers get the policy's own log-probs."""
        work, own = self._work, self._own
        if self._endpoint is None:
            engine = LocalEngine(model, work.device, self._config.evaluation.batch_size, work.team)
            with AnswerStore(work.cache, engine) as store:
                yield store, store
            return
        folder = work.folder("preference") / "served"
        with (
            served(self._endpoint, own.server.concurrency, model, work.tokenizer, folder) as server,
            AnswerStore(work.cache, server) as store,
        ):
            yield store, ScoredEngine(store, partial(score, model))

    def _take(self, number: int, model: nn.Module | None, score: Score, own_judge: Judge | None = None) -> None:
        folder = self._folder / f"{number + 1:04d}"
        found = read_round(folder)
        if found is None:
            if model is None:
                raise damaged(folder)
            steps, size = (
                len(self.schedule.until_refresh(self.schedule.rounds[number])),
                self._config.trainer.groups_per_step,
            )
            before, filled = self.done[-1] if self.done else None, self._own.every is not None
            weaker = nullcontext() if self._weak is None else self._weak.engine()
            with self._engine(model, score) as (store, engine), weaker as weak:
                maker = self._maker if own_judge is None else replace(self._maker, judge=own_judge)
                told = partial(_drift_of, engine)
                found = maker.make(folder, engine, weak, number, steps * size, size, before, filled, told)
                log.info(
                    "%d answers of %d tokens were drawn, %d were there before.", store.drawn, store.tokens, store.found
                )
        if self._config.loss.requirements().draws:
            drawn = [replace(group, drawn=(found.logps[group.key(0)],)) for group in found.groups]
            found = replace(found, groups=drawn)
        self.done.append(found)
        if isinstance(self.groups, Slots) and self._own.every is not None:
            self.groups.take(found.groups)
        else:
            self.groups = found.groups
            self.schedule = self.schedule.on_file(self._config, len(found.groups))


class TakeRounds(TrainerCallback):
    """Has a round drawn before its first step, and the reference know its answers.

    It acts before the reference is refreshed, and before a training log is recorded, to which it adds what the round
    is like: to the first one of each round, and to the first one after its last step how far the policy has moved.

    Args:
        rounds: of the stage.
        reference: of its loss.
        start: the policy at the start of the stage; None where it is not at hand.
        compares: whether every round is compared with the start.
        score: log-probs, for what a policy that is its own judge rewards and for how far it moves.
        plain: whether answers are drawn from the policy itself, so that they tell how far it moves.
        asked: all groups whose reference some steps, and the evaluations between them, need.
    """

    def __init__(
        self,
        rounds: Rounds,
        reference: Reference | None,
        start: FrozenPolicy | None,
        compares: bool,
        score: Score,
        plain: bool,
        asked: Callable[[Sequence[Sequence[int]]], Sequence[Group]],
    ) -> None:
        self._rounds = rounds
        self._reference = reference
        self._start = start
        self._compares = compares
        self._score = score
        self._plain = plain
        self._asked = asked
        self._news: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the training goes on within a round, prepare the reference for the rest of it."""
        if self._rounds.step:
            self._compare(self._rounds.step)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin a round where one is due."""
        step = state.global_step
        if step not in self._rounds.schedule.rounds:
            return
        as_policy(kwargs.get("optimizer"))
        made = self._rounds.draw(step, model, self._start, self._score)
        self._news |= made.metrics
        if step == 0:
            return
        if self._compares:
            self._compare(step)
        elif isinstance(self._reference, CachedReference):
            self._reference.learn(made.logps)
        if self._plain and self._start is not None:
            with self._start.active() as start:
                self._news["onpolicy/kl_start"] = kl_start(_told(made), self._score(start, made.sample))

    def _compare(self, step: int) -> None:
        """Prepare the log-probs of the start, or of a teacher, for the round that begins after so many steps."""
        if isinstance(self._reference, Teacher):
            self._reference.prepare(self._asked(self._rounds.schedule.until_refresh(step)))
        elif self._compares and self._start is not None and isinstance(self._reference, CachedReference):
            self._reference.prepare_at(self._start, self._asked(self._rounds.schedule.until_refresh(step)))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After the last step of a round, measure how far the policy is from the one that has drawn it.

        The step is logged, however rarely others are: or a row would have the end of a round and the next one's start.
        """
        schedule = self._rounds.schedule
        made = self._rounds.done[-1]
        if state.global_step not in (*schedule.rounds, len(schedule.steps)):
            return
        control.should_log = control.should_log or not isinstance(self._reference, Teacher)
        if not self._plain or not made.sample:
            return
        as_policy(kwargs.get("optimizer"))
        moved = departure(_told(made), self._score(model, made.sample))
        self._news |= {f"onpolicy/{name}": value for name, value in moved.items()}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add what the round is like."""
        if logs is not None and "loss" in logs:
            logs.update(self._news)
            self._news = {}


def _drift_of(engine: Engine) -> dict[str, float]:
    """How far a server's log-probs are from the policy's, in nats per token; empty where the policy itself draws."""
    if not isinstance(engine, ScoredEngine):
        return {}
    found = engine.drift
    log.info(
        "The server's log-probs are %.2g nats per token from the policy's on average, %.2g at most.",
        found.mean,
        found.largest,
    )
    if found.mean > _ANOTHER:
        log.warning(
            "The server draws from another policy (%.2g nats per token): see that it has the run's base, and that it "
            "has loaded the adapter.",
            found.mean,
        )
    return {"server_drift": found.mean, "server_drift_max": found.largest}


def _told(made: Round) -> RaggedLogps:
    """What the sampler has said of a round's sample."""
    return RaggedLogps.from_sequences([torch.from_numpy(made.logps[group.key(0)]) for group in made.sample])
