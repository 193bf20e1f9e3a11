"""The settings of training on the policy's own answers, drawn round by round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from alignment.config.judging import AddressConfig, Judge, LLMJudgeConfig
from alignment.config.onpolicy import PairChoice, PairsConfig
from alignment.errors import UserError, not_negative, require, within


class RoundReference(Enum):
    """The reference of a round: `round`: the policy that has drawn its answers; `start`: that of the stage's start."""

    round = "round"
    start = "start"


class Reduction(Enum):
    """What an answer's reward is of the log-ratios of its tokens: their `sum`, DPO's reward, or their `mean`."""

    sum = "sum"
    mean = "mean"


@dataclass(kw_only=True)
class ImplicitConfig:
    """The policy's own implicit reward as judge: log-ratio of the policy that has drawn a round to the stage's start.

    Each token of an answer takes `length_penalty` off its reward; null: as much as makes the best and the worst answer
    to a prompt equally long in the mean of a round (DICE, Chen et al. 2024, arXiv 2406.09760).
    """

    reduction: Reduction
    length_penalty: float | None

    def __post_init__(self) -> None:
        penalty = self.length_penalty
        require(
            penalty is None or 0 <= penalty < math.inf,
            f"onpolicy.implicit.length_penalty must be null or a finite number, at least 0, not {penalty}.",
        )


@dataclass(kw_only=True)
class OnPolicyConfig:
    """Training on the policy's own answers; the group's option `none` sets the whole node to null.

    Every `every` steps the policy as it is then answers prompts of the training data, `k` times each, and the steps up
    to the next round train on what `pairs` makes of these answers; null: once, before the first step. A round takes as
    many prompts as its steps need, and `prompts` at most (null: all). The share `mix_offline` of its groups are those
    of the data as they are.

    `judge` scores the answers, with `reward_model` and `llm` as in the evaluation; with `implicit` the policy does it
    itself, and the first round trains on the data as they are. `weak` is the weaker model of
    `pairs.choice=sample_vs_weak`, as in `model.name`; it has the dtype and the quantisation of the policy. `server` is
    a vLLM that draws the policy's answers, with the adapter as it is then; without an address this process does.
    """

    every: int | None
    k: int
    temperature: float
    top_p: float
    max_new_tokens: int
    prompts: int | None
    mix_offline: float
    reference: RoundReference
    pairs: PairsConfig
    judge: Judge
    reward_model: str | None
    llm: LLMJudgeConfig
    implicit: ImplicitConfig
    weak: str | None
    server: AddressConfig

    def __post_init__(self) -> None:
        for key in ("every", "prompts"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"onpolicy.{key} must be null or at least 1, not {value}.")
        require(self.k >= 1, f"onpolicy.k must be at least 1, not {self.k}.")
        not_negative("onpolicy.temperature", self.temperature)
        within("onpolicy.top_p", self.top_p, "(0, 1]")
        within("onpolicy.mix_offline", self.mix_offline, "[0, 1)")
        self.pairs.check_answers(self.k)
        require(
            self.temperature > 0 or self.k == 1,
            f"onpolicy.temperature=0 draws the same answer {self.k} times: raise it, or set onpolicy.k=1.",
        )
        choice = self.pairs.choice.name
        require(
            not self.pairs.is_judged or self.judge is not Judge.none,
            f"onpolicy.pairs.choice={choice} needs scores: choose a judge with onpolicy.judge=...",
        )
        require(
            self.pairs.is_judged or self.judge is Judge.none,
            f"onpolicy.judge={self.judge.name} has no effect: onpolicy.pairs.choice={choice} asks no judge, so set "
            f"onpolicy.judge=none.",
        )
        require(
            (self.weak is not None) == (self.pairs.choice is PairChoice.sample_vs_weak),
            f"onpolicy.weak names the model of onpolicy.pairs.choice=sample_vs_weak, which needs one, and of no other "
            f"choice; it is {'null' if self.weak is None else self.weak} for {choice}.",
        )
        require(
            self.judge is not Judge.reward_model or bool(self.reward_model),
            "onpolicy.judge=reward_model needs onpolicy.reward_model, a hub id or the folder of a reward model.",
        )
        require(
            self.judge is not Judge.implicit or self.every is not None,
            "onpolicy.judge=implicit is the policy that has moved since the start of the stage, and with "
            "onpolicy.every=null it draws before it moves: set onpolicy.every.",
        )
        if self.judge is Judge.llm:
            try:
                self.llm.check()
            except UserError as error:
                raise renamed(error) from None

    @property
    def is_plain(self) -> bool:
        """Whether answers are drawn from the policy's own distribution."""
        return self.temperature == 1 and self.top_p == 1 and self.server.address is None

    def check(self, run: Any) -> None:
        """Refuse a run, a `RunConfig`, that cannot train in rounds.

        Raises:
            UserError: why not, and what to do.
        """
        require(run.loss is not None, "onpolicy is of preference stages, and with loss=none there is none.")
        loss, needs = run.loss.name, run.loss.requirements()
        # Here, as it may be the evaluation's, whose own key is checked before
        require(self.max_new_tokens >= 1, f"onpolicy.max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        require(
            not needs.rewards, f"onpolicy=none is what loss {loss} needs: it trains a reward model, which writes none."
        )
        require(
            not needs.density_weights,
            "loss.density_weights=true weighs all rows before training, and with onpolicy they come in rounds: set it "
            "to false.",
        )
        require(
            not run.reference.follows,
            "reference.sync_every and reference.parts move the reference, and so do rounds: leave them out, and let "
            "onpolicy.reference say what each round is compared with.",
        )

        if self.server.address is not None:
            require(
                run.adapter is not None and not run.adapter.moves_the_start and not needs.draws,
                "onpolicy.server.address draws with a base that the server has and the adapter of the run: that needs "
                "an adapter which leaves the base as it is, such as adapter=lora, and a loss without a teacher.",
            )
        if needs.draws or self.pairs.choice is PairChoice.answers:
            self._check_teacher(loss, needs.draws)
            return

        # Pairs, lists and rows
        unit, choice = self.pairs.unit, self.pairs.choice.name
        require(
            unit in {"pair": ("pair",), "list": ("list", "pair"), "row": ("row", "pair")}[needs.unit],
            f"onpolicy.pairs.choice={choice} makes {unit}s, and loss {loss} takes {needs.unit}s: choose another of "
            f"the two.",
        )
        require(
            needs.unit != "list" or run.loss.problem(2, (1.0, 0.0)) is None,
            f"Loss {loss} reads lists of three answers, and those of rounds have 2 to onpolicy.k: choose another loss.",
        )
        require(
            not needs.scores or (self.pairs.is_judged and unit != "row"),
            f"Loss {loss} reads scores, and onpolicy.pairs.choice={choice} gives none: choose another of the two.",
        )

        # The start, as the policy's own judge
        live, compares = run.reference.mode.name == "live", needs.reference or run.reference.for_metrics
        require(
            self.judge is not Judge.implicit
            or run.adapter is not None
            or (live and compares and self.reference is RoundReference.start),
            "onpolicy.judge=implicit compares the policy with its start, which without an adapter is a second model: "
            "set reference=live, reference.for_metrics=true and onpolicy.reference=start.",
        )

        # The reference
        if not compares or self.every is None:
            return
        from alignment.losses import Quantity  # with torch, which a command that composes alone does without

        live = live or Quantity.divergence in needs.quantities
        require(
            not live or self.reference is RoundReference.start,
            "A reference beside the policy cannot read what the sampler has said: set onpolicy.reference=start for "
            "reference.mode=live and for losses that compare whole distributions.",
        )
        require(
            live or run.adapter is not None or self.reference is RoundReference.round,
            "onpolicy.reference=start without an adapter needs a second model for the start: set reference=live, or "
            "onpolicy.reference=round.",
        )

    def _check_teacher(self, loss: str, draws: bool) -> None:
        """Refuse rounds that are not those of a teacher, for a loss that has one, and the other way round."""
        choice, plain = self.pairs.choice, {"temperature": 1, "top_p": 1, "mix_offline": 0}
        other = next((key for key, value in plain.items() if getattr(self, key) != value), "")
        require(
            draws and choice is PairChoice.answers,
            f"onpolicy.pairs.choice={choice.name} and loss {loss} do not fit: choice answers is for losses with a "
            f"teacher, such as opd, and these take no other; set onpolicy=distill for them.",
        )
        require(
            not other,
            f"onpolicy.{other} must be {plain.get(other)} for loss {loss}: only what the policy itself draws, at "
            f"temperature 1 and from all tokens, tells how far it is from its teacher.",
        )


def renamed(error: UserError) -> UserError:
    """What a judge says, with the keys that the judge of the rounds has."""
    return UserError(str(error).replace("evaluation.", "onpolicy."))
