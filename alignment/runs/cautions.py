"""What a careful reader should ask about one run before trusting its result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from alignment.config.judging import LOOKING_UP
from alignment.evaluation.intervals import wilson_interval
from alignment.runs.alerts import COLLAPSE, UNSTABLE, alerts_in
from alignment.runs.folder import MODEL_TITLES, RunFiles, dig, eval_pairs, first_and_last, series, submapping
from alignment.runs.record import STAGES
from alignment.runs.text import format_value, is_number, percent


class Caution(NamedTuple):
    """A reason for care.

    Attributes:
        kind: a title that is the same for every run, so that a comparison can group runs by it.
        text: the reason with the numbers of this run.
    """

    kind: str
    text: str


def cautions(run: RunFiles) -> list[Caution]:
    """All reasons for care in this run."""
    return [*_of_data(run), *_of_model(run), *_of_metrics(run), *_of_chance(run), *_of_answers(run), *_of_judge(run)]


def _of_data(run: RunFiles) -> Iterator[Caution]:
    for stage in STAGES:
        notes = submapping(run.summary, "data", stage).get("notes")
        for note in notes if isinstance(notes, list) else []:
            yield Caution(f"Something stood in the {'SFT' if stage == 'sft' else stage} data", str(note))


def _of_model(run: RunFiles) -> Iterator[Caution]:
    notes = submapping(run.summary, "model").get("notes")
    for note in notes if isinstance(notes, list) else []:
        yield Caution("The base is hardly quantised", str(note))


def _of_metrics(run: RunFiles) -> Iterator[Caution]:
    broken = sum(1 for row in run.metrics if any(isinstance(v, float) and not math.isfinite(v) for v in row.values()))
    if broken:
        yield Caution(
            UNSTABLE,
            f"{broken} rows of metrics.jsonl hold NaN or Infinity: the run became numerically unstable.",
        )
    collapse = [alert.text for alert in alerts_in(run.metrics) if alert.kind == COLLAPSE]
    drift = first_and_last(run, "logps/chosen")
    if collapse:
        yield Caution(COLLAPSE, " ".join(collapse))
    elif drift and drift[1] < drift[0] - 1:
        before, after, split = drift
        yield Caution(
            "The log-prob of chosen completions fell",
            f"The log-prob of chosen completions fell by {before - after:.1f} nats ({split}, {before:.1f} to "
            f"{after:.1f}): any margin comes from rejected completions falling further.",
        )
    for stage in STAGES:
        steps, values = series(run.metrics, stage, "eval", "loss")
        best = min(values, default=0.0)
        if values and values[-1] - best > 0.02 * abs(best):
            yield Caution(
                "The held-out loss rose again",
                f"The held-out loss of the {'SFT' if stage == 'sft' else stage} stage was lowest at step "
                f"{steps[values.index(best)]} ({format_value(best)}) and ended at {format_value(values[-1])}: fewer "
                "steps might do better.",
            )


def _of_chance(run: RunFiles) -> Iterator[Caution]:
    accuracy = dig(run.summary, "stages", "preference", "metrics", "eval/rewards/accuracies")
    pairs = eval_pairs(run.summary)
    if is_number(accuracy) and pairs:
        low, high = wilson_interval(accuracy, pairs)
        if low <= 0.5 <= high:
            yield Caution(
                "Reward accuracy could be chance",
                f"The reward accuracy of {percent(accuracy)} on {pairs} held-out pairs could be chance (95% interval "
                f"{percent(low)} to {percent(high)}).",
            )
    for name, entry in submapping(run.summary, "evaluation", "win_rate").items():
        low, high = dig(entry, "low"), dig(entry, "high")
        if is_number(low) and is_number(high) and low <= 0.5 <= high:
            other = MODEL_TITLES.get(name.removeprefix("final_vs_"), name)
            yield Caution(
                "A win rate could be a draw",
                f"The win rate against the model {other} could be a draw (95% interval {percent(low)} to "
                f"{percent(high)}).",
            )


def _of_answers(run: RunFiles) -> Iterator[Caution]:
    answers = submapping(run.summary, "evaluation", "answers")
    words, correct = (
        {model: dig(answers, model, key) for model in MODEL_TITLES if is_number(dig(answers, model, key))}
        for key in ("words", "correct")
    )
    earlier = "sft" if "sft" in words else "start"
    if "final" in words and words.get(earlier, 0) > 0 and words["final"] > 1.2 * words[earlier]:
        yield Caution(
            "Answers grew longer",
            f"Answers grew from {words[earlier]:.1f} ({MODEL_TITLES[earlier]}) to {words['final']:.1f} words: judges "
            "often prefer longer answers, so length may explain part of a win.",
        )
    ablest = max(correct, key=lambda model: correct[model], default="final")
    if "final" in correct and correct[ablest] > correct["final"]:
        yield Caution(
            "Fewer answers are correct than before",
            f"Fewer answers are correct at the end ({percent(correct['final'])}) than {MODEL_TITLES[ablest]} "
            f"({percent(correct[ablest])}).",
        )


_WHICH = {"reward_model": ("reward_model",), "llm": ("llm", "model")}
"""Where the settings of a judge name the model that it is."""


def _of_judge(run: RunFiles) -> Iterator[Caution]:
    """Of a judge that has learnt what it judges by, and that scores the rounds and the evaluation alike."""
    rounds, evaluation = submapping(run.config, "onpolicy"), submapping(run.config, "evaluation")
    kind = rounds.get("judge")
    if kind in (None, "none", *LOOKING_UP) or evaluation.get("judge") != kind:
        return
    name, other = (dig(part, *_WHICH.get(str(kind), ("judge",))) for part in (rounds, evaluation))
    if name == other:
        yield Caution(
            "The judge of the rounds judges the result, too",
            f"The judge of the held-out answers ({kind}, {format_value(name)}) is the one that has judged the answers "
            f"that the policy was trained on: a policy learns what its judge likes, so judge it with another one, by "
            f"python -m alignment.evaluate.",
        )
