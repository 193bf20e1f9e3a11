"""What a careful reader would ask about a run."""

from __future__ import annotations

import math
from typing import NamedTuple

from alignment.evaluation.intervals import wilson_interval
from alignment.runs.folder import MODEL_TITLES, RunFiles, _is_end, dig, eval_pairs, first_and_last, series, submapping
from alignment.runs.record import STAGES
from alignment.runs.text import format_value, is_number, percent


class Caution(NamedTuple):
    """A reason for care: its kind, the same words for every run, and what it is in this run."""

    kind: str
    text: str


def cautions(run: RunFiles) -> list[Caution]:
    """What a careful reader would ask about before trusting the result."""
    found: list[Caution] = []

    def warn(kind: str, text: str) -> None:
        found.append(Caution(kind, text))

    summary = run.summary
    broken = sum(1 for row in run.metrics if any(isinstance(v, float) and not math.isfinite(v) for v in row.values()))
    if broken:
        warn(
            "The run became numerically unstable",
            f"{broken} rows of metrics.jsonl hold NaN or Infinity: the run became numerically unstable.",
        )
    drift = first_and_last(run, "logps/chosen")
    if drift and drift[1] < drift[0] - 1:
        before, after, split = drift
        warn(
            "The log-prob of chosen completions fell",
            f"The log-prob of chosen completions fell by {before - after:.1f} nats ({split}, {before:.1f} to "
            f"{after:.1f}): what margin there is comes from rejected ones falling more.",
        )
    for stage in STAGES:
        steps, values = series(run.metrics, stage, "eval", "loss")
        best = min(values, default=0.0)
        if run.has_gaps and not (steps and _is_end(run, stage, steps[-1])):
            continue
        if values and values[-1] - best > 0.02 * abs(best):
            at = steps[values.index(best)]
            warn(
                "The held-out loss rose again",
                f"The held-out loss of the {'SFT' if stage == 'sft' else stage} stage was lowest at step {at} "
                f"({format_value(best)}) and ended at {format_value(values[-1])}: fewer steps might do better.",
            )
    accuracy, pairs = dig(summary, "stages", "preference", "metrics", "eval/rewards/accuracies"), eval_pairs(summary)
    if is_number(accuracy) and 0 <= accuracy <= 1 and pairs:
        low, high = wilson_interval(accuracy, pairs)
        if low <= 0.5 <= high:
            warn(
                "Reward accuracy cannot be told from chance",
                f"The reward accuracy of {percent(accuracy)} on {pairs} held-out pairs cannot be told from chance "
                f"(95% interval {percent(low)} to {percent(high)}).",
            )
    for name, entry in submapping(summary, "evaluation", "win_rate").items():
        low, high = dig(entry, "low"), dig(entry, "high")
        if is_number(low) and is_number(high) and low <= 0.5 <= high:
            other = MODEL_TITLES.get(name.removeprefix("final_vs_"), name)
            warn(
                "A win rate cannot be told from a draw",
                f"The win rate against the model {other} cannot be told from a draw "
                f"(95% interval {percent(low)} to {percent(high)}).",
            )
    answers = submapping(summary, "evaluation", "answers")
    words, correct = (
        {model: dig(answers, model, key) for model in MODEL_TITLES if is_number(dig(answers, model, key))}
        for key in ("words", "correct")
    )
    earlier = "sft" if "sft" in words else "start"
    if "final" in words and words.get(earlier, 0) > 0 and words["final"] > 1.2 * words[earlier]:
        warn(
            "Answers grew longer",
            f"Answers grew from {words[earlier]:.1f} ({MODEL_TITLES[earlier]}) to {words['final']:.1f} words: judges "
            "often prefer length, so part of a win may be nothing else.",
        )
    ablest = max(correct, key=lambda model: correct[model], default="final")
    if "final" in correct and correct[ablest] > correct["final"]:
        warn(
            "Fewer answers are correct than before",
            f"Fewer answers are correct at the end ({percent(correct['final'])}) than {MODEL_TITLES[ablest]} "
            f"({percent(correct[ablest])}).",
        )
    return found
