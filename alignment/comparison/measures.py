"""What was measured of every member after training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.comparison.members import ComparedRun, Variant, rows_by_key
from alignment.evaluation.judge import Verdict, compare
from alignment.runs.folder import as_count, dig, eval_pairs, first_and_last, submapping
from alignment.runs.text import is_number


@dataclass(frozen=True, slots=True)
class Measure:
    """Something that was measured of every member after training.

    Attributes:
        axis: what it is, with its unit, for tables and axes.
        value: of a member; None where it is not known.
        share: it is a share of items, of which `count` says how many, so that it has an interval.
        items: the same by item, of which it is the mean; empty where those are not known.
        unit: what an item is, in the plural.
        tied: share of items of a member that count one half.
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
        """Over the members that have it."""
        values = self.values(variant)
        return sum(values) / len(values) if values else None

    def values(self, variant: Variant) -> list[float]:
        """Of the members that have it."""
        return [value for member in variant.members if (value := self.value(member)) is not None]

    def by_item(self, variant: Variant) -> dict[str, float]:
        """Means over the members of the items that all of them have."""
        each = [self.items(member) for member in variant.members if self.value(member) is not None]
        shared = set.intersection(*(set(items) for items in each)) if each else set()
        return {item: sum(items[item] for items in each) / len(each) for item in shared}

    def num_items(self, variant: Variant) -> int:
        """The least of the members': another seed asks the same items once more, which gives no new ones."""
        return min((self.count(member) for member in variant.members if self.value(member) is not None), default=0)


def _number_of(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _share(value: Callable[[ComparedRun], float | None]) -> Callable[[ComparedRun], float | None]:
    """The same, where it is a share at all."""
    return lambda member: found if (found := value(member)) is not None and 0 <= found <= 1 else None


def evaluated(name: str) -> Callable[[ComparedRun], float | None]:
    """A metric of the last evaluation on the held-out preference data."""
    return lambda member: _number_of(dig(member.run.summary, "stages", "preference", "metrics", f"eval/{name}"))


def _pair_items(name: str) -> Callable[[ComparedRun], dict[str, float]]:
    def shares(member: ComparedRun) -> dict[str, float]:
        values = {key: _number_of(row.get(name)) for key, row in member.pairs.items()}
        return {key: value for key, value in values.items() if value is not None and 0 <= value <= 1}

    return shares


def _answers(key: str) -> Callable[[ComparedRun], float | None]:
    return lambda member: _number_of(dig(member.run.summary, "evaluation", "answers", "final", key))


def _num_answers(member: ComparedRun) -> int:
    return as_count(dig(member.run.summary, "evaluation", "answers", "final", "n"))


def _num_pairs(member: ComparedRun) -> int:
    return eval_pairs(member.run.summary)


def start_model(member: ComparedRun) -> str:
    """The model that a preference stage started from, under its name in the evaluation."""
    return "sft" if submapping(member.run.summary, "stages", "sft") else "start"


def _won(member: ComparedRun, key: str) -> float | None:
    return _number_of(dig(member.run.summary, "evaluation", "win_rate", f"final_vs_{start_model(member)}", key))


def _win_rate(member: ComparedRun) -> float | None:
    return _won(member, "rate")


def _tied(member: ComparedRun) -> float:
    """Where it is not known, none, with which an interval is the widest."""
    rate, ties, count = _win_rate(member), _won(member, "ties"), _num_answers(member)
    known = rate is not None and ties is not None and count > 0 and 0 <= ties <= 2 * count * min(rate, 1 - rate)
    return ties / count if known and ties else 0.0


def verdict(sample: Mapping[str, Any], model: str) -> Verdict | None:
    """What the judge thought of a model's answer; None where that was not kept whole."""
    kept = submapping(sample, "verdicts", model)
    score, reasons = _number_of(kept.get("score")), kept.get("reasons")
    if score is None:
        return None
    why = tuple(map(str, reasons)) if isinstance(reasons, list) else ()
    return Verdict(score, kept.get("correct") is True, kept.get("direct") is True, as_count(kept.get("words")), why)


def verdicts(member: ComparedRun, model: str = "final") -> dict[str, Verdict]:
    """By prompt."""
    samples = rows_by_key(member.run.samples, "prompt").items()
    return {prompt: found for prompt, sample in samples if (found := verdict(sample, model)) is not None}


def wins(a: Mapping[str, Verdict], b: Mapping[str, Verdict]) -> dict[str, float]:
    """1 for each prompt on which a's answer is the better one, one half for a tie, 0 else."""
    return {prompt: 0.5 + compare(a[prompt], b[prompt]) / 2 for prompt in a if prompt in b}


def _wins(member: ComparedRun) -> dict[str, float]:
    return wins(verdicts(member), verdicts(member, start_model(member)))


def _correct(member: ComparedRun) -> dict[str, float]:
    return {prompt: float(found.correct) for prompt, found in verdicts(member).items()}


def chosen_drift(member: ComparedRun) -> float | None:
    """By how much the log-prob of held-out chosen completions changed."""
    found = first_and_last(member.run, "logps/chosen")
    return found[1] - found[0] if found else None


WIN_RATE = Measure(
    "win rate",
    "win rate against the model before the preference stage",
    _share(_win_rate),
    True,
    _num_answers,
    _wins,
    "prompts",
    _tied,
)
CORRECT = Measure(
    "correct answers",
    "share of correct answers",
    _share(_answers("correct")),
    True,
    _num_answers,
    _correct,
    "prompts",
)
ACCURACY = Measure(
    "reward accuracy",
    "share of held-out pairs with the higher log-ratio on the chosen completion",
    _share(evaluated("nats/accuracies")),
    True,
    _num_pairs,
    _pair_items("nats/accuracies"),
    "pairs",
)
OWN_ACCURACY = Measure(
    "accuracy of the loss's own reward",
    "share of held-out pairs with the higher reward of the loss on the chosen completion",
    _share(evaluated("rewards/accuracies")),
    True,
    _num_pairs,
    _pair_items("rewards/accuracies"),
    "pairs",
)
RANKING = Measure(
    "ranking accuracy",
    "share of held-out pairs with the higher log-prob on the chosen completion",
    _share(evaluated("ranking/accuracies")),
    True,
    _num_pairs,
    _pair_items("ranking/accuracies"),
    "pairs",
)
RANKING_PER_TOKEN = Measure(
    "ranking accuracy per token",
    "share of held-out pairs with the higher log-prob per token on the chosen completion",
    _share(evaluated("ranking/accuracies_per_token")),
    True,
    _num_pairs,
    _pair_items("ranking/accuracies_per_token"),
    "pairs",
)
MARGIN = Measure("margin, nats", "margin against the reference, nats", evaluated("nats/margins"))
DRIFT = Measure("drift of chosen, nats", "change of the chosen completions' log-prob, nats", chosen_drift)
WORDS = Measure("answer length, words", "mean length of answers, words", _answers("words"))

CRITERIA = (WIN_RATE, CORRECT, ACCURACY, OWN_ACCURACY, RANKING)
"""What variants may be ranked by: the first that every one of them has."""


def ranking_measure(found: Sequence[Variant]) -> Measure | None:
    """What to rank by; where none is known of all variants, the one that most have."""
    if not found:
        return None
    best = max(CRITERIA, key=lambda measure: sum(bool(measure.values(variant)) for variant in found))
    return best if any(best.values(variant) for variant in found) else None


def _sampled_kl(member: ComparedRun) -> float | None:
    return _number_of(dig(member.run.summary, "evaluation", "kl/sampled", "mean"))


def _offline_nats(member: ComparedRun) -> float | None:
    """The mean log-ratio of held-out completions; of runs without that metric, of as many chosen as rejected ones."""
    chosen, rejected = (evaluated(f"nats/{side}")(member) for side in ("chosen", "rejected"))
    mean = (chosen + rejected) / 2 if chosen is not None and rejected is not None else None
    return found if (found := evaluated("kl/offline")(member)) is not None else mean


KLS = (
    Measure(
        "sampled KL, nats", "KL to the reference, nats per answer, from answers sampled of the policy", _sampled_kl
    ),
    Measure(
        "offline log-ratio, nats",
        "mean log-ratio to the reference on held-out completions, nats (a biased stand-in for the KL)",
        _offline_nats,
    ),
)


def kl_error(member: ComparedRun) -> float:
    """The standard error of the KL from samples; 0 where it is not known."""
    return _number_of(dig(member.run.summary, "evaluation", "kl/sampled", "se")) or 0.0


def kl_measure(members: Sequence[ComparedRun]) -> Measure | None:
    """How far policies are from their reference, by the best estimate that all have which have any."""
    whole = [member for member in members if not member.is_stopped]
    asked = [member for member in whole if any(measure.value(member) is not None for measure in KLS)]
    return next((measure for measure in KLS if asked and all(measure.value(m) is not None for m in asked)), None)
