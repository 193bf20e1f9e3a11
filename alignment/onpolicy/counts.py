"""What became of the answers of a round: what was kept, what was dropped and why, and what the answers are like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from alignment.types import Group

REASONS = ("contaminated", "unreadable", "identical", "tie", "margin", "empty", "cut", "length", "repeated")
"""Why a pair, row or list is dropped; the first that holds counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Numbers of one or more prompts; those of several prompts are the sum of theirs.

    Attributes:
        drawn: pairs (rows, lists) that the choice makes of the answers if nothing is dropped.
        kept: those that are trained on.
        contaminated: of prompts that are in the held-out set; nothing else of these prompts is counted.
        unreadable: a verdict cannot be read.
        identical: both answers have the same tokens.
        tie: equal scores, or a row whose score is the threshold.
        margin: scores closer than `min_margin`.
        empty: an answer without text.
        cut: an answer that was cut at the limit of tokens.
        length: lengths farther apart than `max_length_gap`.
        repeated: the prompt has made the same pair, or row, before.
        prompts, informative: prompts, and those with something kept.
        answers, distinct, cut_answers, tokens: answers of the policy, those with tokens of their own, those that were
            cut, and their length in tokens.
        scored, score_sum: answers with a score that can be read, and its sum.
        judged, best_sum: prompts with such an answer, and the sum of their best scores.
        chosen, chosen_tokens: completions that are chosen or desirable in what was kept, and their tokens.
        rejected, rejected_tokens: the other completions in what was kept.

    Raises:
        ValueError: `drawn` is not `kept` and all that was dropped.
    """

    drawn: int = 0
    kept: int = 0
    contaminated: int = 0
    unreadable: int = 0
    identical: int = 0
    tie: int = 0
    margin: int = 0
    empty: int = 0
    cut: int = 0
    length: int = 0
    repeated: int = 0
    prompts: int = 0
    informative: int = 0
    answers: int = 0
    distinct: int = 0
    cut_answers: int = 0
    tokens: int = 0
    scored: int = 0
    score_sum: float = 0.0
    judged: int = 0
    best_sum: float = 0.0
    chosen: int = 0
    chosen_tokens: int = 0
    rejected: int = 0
    rejected_tokens: int = 0

    def __post_init__(self) -> None:
        if self.drawn != self.kept + sum(self.dropped.values()):
            raise ValueError(f"Of {self.drawn} drawn, {self.kept} are kept, and the rest is not {self.dropped}.")

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})

    @property
    def dropped(self) -> dict[str, int]:
        """How many were dropped for each reason, in the order of `REASONS`."""
        return {reason: getattr(self, reason) for reason in REASONS}

    def metrics(self) -> dict[str, float]:
        """The metrics of a round; a mean of nothing is left out.

        `informative`: share of prompts with something to train on. `score_mean`: of all answers; `score_best`: of each
        prompt's best. `length_mean`, `length_chosen`, `length_rejected`: tokens. `cut_share`, `distinct_share`: of the
        answers. `dropped/<reason>`: share of what was drawn.
        """
        shares = {
            "informative": (self.informative, self.prompts),
            "score_mean": (self.score_sum, self.scored),
            "score_best": (self.best_sum, self.judged),
            "length_mean": (self.tokens, self.answers),
            "length_chosen": (self.chosen_tokens, self.chosen),
            "length_rejected": (self.rejected_tokens, self.rejected),
            "cut_share": (self.cut_answers, self.answers),
            "distinct_share": (self.distinct, self.answers),
            **{f"dropped/{reason}": (count, self.drawn) for reason, count in self.dropped.items()},
        }
        return {
            "prompts": float(self.prompts),
            "kept": float(self.kept),
            **{name: above / below for name, (above, below) in shares.items() if below},
        }


def sides(groups: Sequence[Group]) -> dict[str, int]:
    """The four counts of what was kept: the first completion is chosen, or those whose label says so."""
    found = {"chosen": 0, "chosen_tokens": 0, "rejected": 0, "rejected_tokens": 0}
    for group in groups:
        for k, tokens in enumerate(group.completions):
            side = "chosen" if (k == 0 if group.labels is None else group.labels[k]) else "rejected"
            found[side] += 1
            found[f"{side}_tokens"] += len(tokens)
    return found
