"""What a comparison measures of every run: accuracies, win rates, margins and the distance from the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from alignment.comparison.members import ComparedRun, Variant, rows_by_key
from alignment.evaluation.judges.base import Judgement, compare
from alignment.runs.folder import as_count, dig, eval_pairs, first_and_last, submapping
from alignment.runs.text import is_number


@dataclass(frozen=True, slots=True)
class Measure:
    """A quantity that every run has after training.

    Attributes:
        name: for headings.
        axis: what it is, with its unit.
        value: of a run; None if unknown.
        share: whether it is a share of `count` items, and so has an interval.
        items: its value for each item, of which `value` is the mean; empty if unknown.
        unit: what an item is, in the plural.
        tied: the share of a run's items that count one half.
    """

    name: str
    axis: str
    value: Callable[[ComparedRun], float | None]
    share: bool = False
    count: Callable[[ComparedRun], int] = lambda member: 0
    items: Callable[[ComparedRun], Mapping[str, float]] = lambda member: {}
    unit: str = "items"
    tied: Callable[[ComparedRun], float] = lambda member: 0.0

    def mean(self, variant: Variant) -> float | None:
        """Mean over the variant's runs that have it; None if none has."""
        values = self.values(variant)
        return sum(values) / len(values) if values else None

    def values(self, variant: Variant) -> list[float]:
        """The values of the variant's runs that have it."""
        return [value for member in variant.members if (value := self.value(member)) is not None]

    def by_item(self, variant: Variant) -> dict[str, float]:
        """Mean over the variant's runs of each item that all of them have."""
        return mean_by_item([self.items(member) for member in variant.members if self.value(member) is not None])

    def num_items(self, variant: Variant) -> int:
        """Smallest number of items among the runs. Runs of other seeds see the same items, which adds no new ones."""
        return min((self.count(member) for member in variant.members if self.value(member) is not None), default=0)


def mean_by_item(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each item that all mappings have."""
    return pd.DataFrame(list(each), dtype=float).dropna(axis=1).mean().to_dict()


def _number_of(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def evaluated(name: str) -> Callable[[ComparedRun], float | None]:
    """A metric of the last evaluation on the held-out preference data."""
    return lambda member: _number_of(dig(member.run.summary, "stages", "preference", "metrics", f"eval/{name}"))


def _answers(key: str) -> Callable[[ComparedRun], float | None]:
    return lambda member: _number_of(dig(member.run.summary, "evaluation", "answers", "final", key))


def _num_answers(member: ComparedRun) -> int:
    return as_count(dig(member.run.summary, "evaluation", "answers", "final", "n"))


def start_model(member: ComparedRun) -> str:
    """Name, in the evaluation, of the model that the preference stage started from: "sft" or "start"."""
    return "sft" if submapping(member.run.summary, "stages", "sft") else "start"


def _won(member: ComparedRun, key: str) -> float | None:
    return _number_of(dig(member.run.summary, "evaluation", "win_rate", f"final_vs_{start_model(member)}", key))


def _tied(member: ComparedRun) -> float:
    """0 if unknown, which gives the widest interval."""
    return (_won(member, "ties") or 0.0) / max(1, _num_answers(member))


def verdict(sample: Mapping[str, Any], model: str) -> Judgement | None:
    """The judge's verdict on a model's answer; None if nobody judged it."""
    kept = submapping(sample, "verdicts", model)
    return Judgement.from_json(kept) if kept else None


def verdicts(member: ComparedRun, model: str = "final") -> dict[str, Judgement]:
    """The verdicts on a model's answers, by prompt."""
    samples = rows_by_key(member.run.samples, "prompt").items()
    return {prompt: found for prompt, sample in samples if (found := verdict(sample, model)) is not None}


def wins(a: Mapping[str, Judgement], b: Mapping[str, Judgement]) -> dict[str, float]:
    """By prompt: 1 if a's answer is better, 0.5 for a tie, 0 if b's answer is better."""
    return {prompt: 0.5 + compare(a[prompt], b[prompt]) / 2 for prompt in a if prompt in b}


def _wins(member: ComparedRun) -> dict[str, float]:
    before = start_model(member)
    compared = {
        prompt: 0.5 + preference["outcome"] / 2
        for prompt, sample in rows_by_key(member.run.samples, "prompt").items()
        if (preference := submapping(sample, "preferences", before))
    }
    return compared or wins(verdicts(member), verdicts(member, before))


def _correct(member: ComparedRun) -> dict[str, float]:
    found = verdicts(member).items()
    return {prompt: float(verdict.correct) for prompt, verdict in found if verdict.correct is not None}


def chosen_drift(member: ComparedRun) -> float | None:
    """Change of the held-out chosen completions' log-prob during the preference stage, nats."""
    found = first_and_last(member.run, "logps/chosen")
    return found[1] - found[0] if found else None


def _of_pairs(name: str, axis: str, metric: str) -> Measure:
    """A share of the held-out pairs, by a metric that is 0 or 1 for each of them."""

    def items(member: ComparedRun) -> dict[str, float]:
        return {key: row[metric] for key, row in member.pairs.items() if is_number(row.get(metric))}

    return Measure(name, axis, evaluated(metric), True, lambda member: eval_pairs(member.run.summary), items, "pairs")


WIN_RATE = Measure(
    "win rate",
    "win rate against the model before the preference stage",
    lambda member: _won(member, "rate"),
    True,
    _num_answers,
    _wins,
    "prompts",
    _tied,
)
CORRECT = Measure(
    "correct answers", "share of correct answers", _answers("correct"), True, _num_answers, _correct, "prompts"
)
ACCURACY = _of_pairs(
    "reward accuracy", "share of held-out pairs with the higher log-ratio on the chosen completion", "nats/accuracies"
)
OWN_ACCURACY = _of_pairs(
    "accuracy of the loss's own reward",
    "share of held-out pairs with the loss's higher reward on the chosen completion",
    "rewards/accuracies",
)
RANKING = _of_pairs(
    "ranking accuracy",
    "share of held-out pairs with the higher log-prob on the chosen completion",
    "ranking/accuracies",
)
RANKING_PER_TOKEN = _of_pairs(
    "ranking accuracy per token",
    "share of held-out pairs with the higher log-prob per token on the chosen completion",
    "ranking/accuracies_per_token",
)
MARGIN = Measure("margin, nats", "margin over the reference, nats", evaluated("nats/margins"))
CALIBRATION = Measure(
    "calibration error",
    "mean difference of a reward model's accuracy and its confidence, over bins of held-out pairs",
    evaluated("rewards/calibration_error"),
)
DRIFT = Measure("drift of chosen, nats", "change of the chosen completions' log-prob, nats", chosen_drift)
WORDS = Measure("answer length, words", "mean length of answers, words", _answers("words"))

CRITERIA = (WIN_RATE, CORRECT, ACCURACY, OWN_ACCURACY, RANKING)
"""The measures that can rank variants, the preferred one first."""


def ranking_measure(found: Sequence[Variant]) -> Measure | None:
    """The first of `CRITERIA` that most variants have; None if no variant has any."""
    if not found:
        return None
    best = max(CRITERIA, key=lambda measure: sum(bool(measure.values(variant)) for variant in found))
    return best if any(best.values(variant) for variant in found) else None


def _sampled_kl(member: ComparedRun) -> float | None:
    return _number_of(dig(member.run.summary, "evaluation", "kl/sampled", "mean"))


def _offline_nats(member: ComparedRun) -> float | None:
    """The mean log-ratio of held-out completions; for runs without that metric, the mean of chosen and rejected."""
    chosen, rejected = (evaluated(f"nats/{side}")(member) for side in ("chosen", "rejected"))
    mean = (chosen + rejected) / 2 if chosen is not None and rejected is not None else None
    return found if (found := evaluated("kl/offline")(member)) is not None else mean


KLS = (
    Measure("sampled KL, nats", "KL to the reference, nats per answer, from answers of the policy", _sampled_kl),
    Measure(
        "offline log-ratio, nats",
        "mean log-ratio to the reference on held-out completions, nats (a biased stand-in for the KL)",
        _offline_nats,
    ),
)
"""Estimates of the KL, the best first."""


def kl_error(member: ComparedRun) -> float:
    """Standard error of the sampled KL; 0 if unknown."""
    return _number_of(dig(member.run.summary, "evaluation", "kl/sampled", "se")) or 0.0


def kl_measure(members: Sequence[ComparedRun]) -> Measure | None:
    """The best KL estimate available for every member that has one. None if no member has any."""
    whole = [member for member in members if not member.is_stopped]
    asked = [member for member in whole if any(measure.value(member) is not None for measure in KLS)]
    return next((measure for measure in KLS if asked and all(measure.value(m) is not None for m in asked)), None)
