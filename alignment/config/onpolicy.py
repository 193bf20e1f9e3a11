"""The settings of preference data from the policy's own answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from alignment.errors import not_negative, require


class PairChoice(Enum):
    """Which pairs, rows or lists the answers to a prompt make.

    By scores: `best_vs_worst`: one pair. `best_vs_rest`: the best answer with each other one. `all_pairs`: each with
    each worse one. `best_vs_random`: the best with any other. `mu_minus_2sigma`: the best with the one whose score is
    nearest to the mean less two standard deviations (Xiao et al. 2025, arXiv 2502.16825), of at least 16 answers.
    `list`: all answers as one ranked list. `kto`: each answer as a row, desirable above `threshold` and undesirable
    below it.

    Without a judge: `gold_vs_sample`: the answer of the data is chosen over each sampled one (SPIN, Chen et al. 2024,
    arXiv 2401.01335). `sample_vs_weak`: the policy's answers are chosen over those of a weaker model (delta learning,
    Geng et al. 2025, arXiv 2507.06187). `answers`: each answer as it is, empty or cut too, for a teacher (loss opd).
    """

    best_vs_worst = "best_vs_worst"
    best_vs_rest = "best_vs_rest"
    all_pairs = "all_pairs"
    best_vs_random = "best_vs_random"
    mu_minus_2sigma = "mu_minus_2sigma"
    list = "list"
    kto = "kto"
    gold_vs_sample = "gold_vs_sample"
    sample_vs_weak = "sample_vs_weak"
    answers = "answers"


class DropCut(Enum):
    """Which answers that were cut at the limit of tokens drop their pair: the `chosen` one, or `both`."""

    chosen = "chosen"
    both = "both"


@dataclass(kw_only=True)
class PairsConfig:
    """How answers to a prompt become preference data.

    A tie is never a pair. `min_margin` is the least difference of the two scores, of the best and the worst in a list,
    or of a row and `threshold`. `max_length_gap` is the largest difference of the lengths in tokens, null: any.
    `drop_cut` says which cut answers drop their pair; a list leaves out all cut ones. `threshold` is for `kto` alone.
    """

    choice: PairChoice
    min_margin: float
    max_length_gap: int | None
    drop_cut: DropCut
    threshold: float | None

    def __post_init__(self) -> None:
        name, gap = self.choice.name, self.max_length_gap
        not_negative("onpolicy.pairs.min_margin", self.min_margin)
        require(
            self.min_margin == 0 or self.is_judged,
            f"onpolicy.pairs.min_margin={self.min_margin} needs scores, and onpolicy.pairs.choice={name} has none: "
            f"set onpolicy.pairs.min_margin=0.",
        )
        require(gap is None or gap >= 0, f"onpolicy.pairs.max_length_gap must be null or at least 0, not {gap}.")
        require(
            gap is None or self.unit != "row",
            f"onpolicy.pairs.max_length_gap={gap} compares two answers, and onpolicy.pairs.choice={name} makes rows of "
            f"one: set onpolicy.pairs.max_length_gap=null.",
        )
        require(
            (self.threshold is not None) == (self.choice is PairChoice.kto),
            f"onpolicy.pairs.threshold is for onpolicy.pairs.choice=kto, which needs one, and for no other choice; it "
            f"is {'null' if self.threshold is None else self.threshold} for {name}.",
        )
        require(
            self.threshold is None or math.isfinite(self.threshold),
            f"onpolicy.pairs.threshold must be a finite number, not {self.threshold}.",
        )

    @property
    def unit(self) -> str:
        """What the groups are: pair, row or list, as the requirements of a loss have it."""
        return {PairChoice.list: "list", PairChoice.kto: "row", PairChoice.answers: "row"}.get(self.choice, "pair")

    @property
    def is_judged(self) -> bool:
        """Whether the choice needs a judge's scores."""
        return self.choice not in (PairChoice.gold_vs_sample, PairChoice.sample_vs_weak, PairChoice.answers)

    @property
    def least_answers(self) -> int:
        """How many answers to a prompt the choice needs."""
        if self.choice is PairChoice.mu_minus_2sigma:
            return 16
        return 2 if self.is_judged and self.unit != "row" else 1

    def check_answers(self, answers: int) -> None:
        """Refuse fewer answers to a prompt than the choice needs.

        Raises:
            UserError: how many it needs.
        """
        require(
            answers >= self.least_answers,
            f"onpolicy.pairs.choice={self.choice.name} needs at least {self.least_answers} answers to a prompt, not "
            f"{answers}: draw more, or set another choice such as best_vs_worst.",
        )
