"""The judge that a configuration names."""

from __future__ import annotations

from pathlib import Path

import torch

from alignment.config import judging
from alignment.config.schema import EvaluationConfig, OnPolicyConfig, RunConfig
from alignment.errors import UserError
from alignment.evaluation.judges.base import Judge
from alignment.evaluation.judges.ifeval import InstructionJudge
from alignment.evaluation.judges.llm import LLMJudge
from alignment.evaluation.judges.math_answers import MathJudge
from alignment.evaluation.judges.reward_model import RewardModelJudge, stored_bytes
from alignment.evaluation.judges.rules import RuleJudge


def make_judge(config: EvaluationConfig | OnPolicyConfig, cache: Path, device: torch.device) -> Judge | None:
    """The judge of the evaluation, or of the rounds; None if there is none, and for one that is the policy itself.

    Args:
        cache: the folder in which judgements are kept.
        device: of a reward model.

    Raises:
        UserError: what the judge needs of this machine is missing: a package, a key, a model.
    """
    match config.judge:
        case judging.Judge.none | judging.Judge.implicit:
            return None
        case judging.Judge.rules:
            return RuleJudge()
        case judging.Judge.ifeval:
            return InstructionJudge()
        case judging.Judge.llm:
            return LLMJudge(config.llm, cache)
        case judging.Judge.math:
            return MathJudge()
        case judging.Judge.reward_model:
            return RewardModelJudge(config.reward_model or "", cache, device)


def beside_training(config: RunConfig) -> dict[str, int | None]:
    """Bytes of each reward model that is in memory while the policy trains, by the key that names it.

    It is that of rounds, and that of the evaluation if held-out answers are judged on the way. None: it is not on this
    machine yet, so that its size is not known.
    """
    found: dict[str, int | None] = {}
    looks = config.evaluation if config.evaluation.every is not None else None
    for place, part in (("onpolicy", config.onpolicy), ("evaluation", looks)):
        if part is not None and part.judge is judging.Judge.reward_model:
            try:
                found[f"{place}.reward_model"] = stored_bytes(part.reward_model or "")
            except UserError:
                found[f"{place}.reward_model"] = None
    return found
