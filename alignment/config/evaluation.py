"""The settings of the answers to held-out prompts, and of who judges them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.config.judging import LOOKING_UP, Judge, LLMJudgeConfig
from alignment.errors import not_negative, require


@dataclass(kw_only=True)
class EvaluationConfig:
    """Sampled answers to held-out prompts, before and after training; 0 prompts switch sampling off.

    With `every`, `every_prompts` of them are answered and judged after every so many steps of the preference stage,
    too; null: only before and after. After it `kl_prompts` are answered at temperature 1, for the KL to its start.
    `judge` judges the sampled answers. `reward_model` is a hub id or a folder, for the judge of that name.
    `human_labels` is a file of pairs that people have judged: the judge judges them too, and its card says how far it
    agrees.
    """

    prompts: int
    every: int | None
    every_prompts: int
    kl_prompts: int
    max_new_tokens: int
    temperature: float
    batch_size: int
    judge: Judge
    reward_model: str | None
    human_labels: str | None
    llm: LLMJudgeConfig

    def __post_init__(self) -> None:
        require(
            self.judge is not Judge.implicit,
            "evaluation.judge=implicit is of rounds alone (onpolicy.judge): how far a policy has moved towards an "
            "answer says nothing of the answer's worth, so choose another judge.",
        )
        if self.judge is Judge.llm:
            self.llm.check()
        require(
            self.judge is not Judge.reward_model or bool(self.reward_model),
            "evaluation.judge=reward_model needs evaluation.reward_model, a hub id or the folder of a reward model.",
        )
        require(
            self.human_labels is None or self.judge.name not in ("none", *LOOKING_UP),
            f"evaluation.human_labels is for judges of any answer (llm, reward_model): evaluation.judge="
            f"{self.judge.name} has nothing to say of these pairs.",
        )
        for key in ("prompts", "kl_prompts"):
            require(getattr(self, key) >= 0, f"evaluation.{key} must be at least 0, not {getattr(self, key)}.")
        not_negative("evaluation.temperature", self.temperature)
        require(
            self.every is None or self.every >= 1, f"evaluation.every must be null or at least 1, not {self.every}."
        )
        for key in ("every_prompts", "max_new_tokens", "batch_size"):
            require(getattr(self, key) >= 1, f"evaluation.{key} must be at least 1, not {getattr(self, key)}.")

    def check(self, run: Any) -> None:
        """Refuse a run, a `RunConfig`, that has no answers to look at on the way.

        Raises:
            UserError: why not, and what to do.
        """
        metric = "" if run.stopping is None else run.stopping.metric
        require(
            not metric.startswith("answers/") or (self.every is not None and self.judge is not Judge.none),
            f"stopping.metric={metric} is of answers that are judged on the way: set evaluation.every and "
            f"evaluation.judge.",
        )
        if self.every is None:
            return
        key = f"evaluation.every={self.every}"
        require(
            run.loss is not None,
            f"{key} is of preference stages, and with loss=none there is none: set evaluation.every=null.",
        )
        require(
            self.prompts > 0,
            f"{key} asks held-out prompts, and evaluation.prompts=0 asks none: raise it, or set evaluation.every=null.",
        )
