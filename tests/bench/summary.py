"""From what the runs measured to numbers per pair, ratios and goals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from tests.bench.floor import Shape
from tests.bench.job import PAIRS_OF_RUNS

START_TOLERANCE = {"exact": 1e-3, "rounded": 2e-2}
LOSS_TOLERANCE = {"exact": 1e-3, "rounded": 3e-2}
"""By arithmetic: float32 throughout, or with bfloat16 in it (on a GPU; TRL's adapter on a quantised base)."""

ROWS = {
    "ours, cold": ("ours_cold", 1.0),
    "ours, warm": ("ours_warm", 0.0),
    "ours, two epochs": ("ours_cold", 0.5),
    "TRL, default": ("trl_default", 0.0),
    "TRL, precomputed": ("trl_precomputed", 1.0),
    "TRL, precomputed, two epochs": ("trl_precomputed", 0.5),
}
"""Row of the table -> (run, share of its reference pass in the time of a pair: one over the epochs it serves)."""

COMPARISONS = (
    ("ours, cold", "TRL, default"),
    ("ours, warm", "TRL, default"),
    ("ours, cold", "TRL, precomputed"),
    ("ours, two epochs", "TRL, precomputed, two epochs"),
)

_BESIDE = {trl: ours for ours, trl in PAIRS_OF_RUNS}


AT_MOST = ("memory", "loss_difference")
"""Quantities that are to be small."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A number to reach.

    Attributes:
        case: row of the comparison.
        ours: row of ours.
        against: row that it is held against; None for a number of ours alone.
        quantity: "times_faster", "of_peak", or one of `AT_MOST`: "memory" (ours / the other's), "loss_difference".
        value: the goal.
    """

    case: str
    ours: str
    against: str | None
    quantity: str
    value: float

    def judge(self, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The goal with what was found and whether it is met."""
        case = cases[self.case]
        numbers = case["rows"][self.ours] if self.against is None else case["ratios"][f"{self.ours} : {self.against}"]
        found = numbers[self.quantity]
        return {
            "case": self.case,
            "ours": self.ours,
            "against": self.against,
            "quantity": self.quantity,
            "goal": self.value,
            "found": found,
            "met": found <= self.value if self.quantity in AT_MOST else found >= self.value,
        }


_DEFAULT, _TWO_EPOCHS = "TRL, default", "TRL, precomputed, two epochs"

GOALS = (
    Goal("long", "ours, cold", _DEFAULT, "times_faster", 2.6),
    Goal("long", "ours, warm", _DEFAULT, "times_faster", 4.0),
    Goal("long", "ours, two epochs", _TWO_EPOCHS, "times_faster", 2.7),
    Goal("long", "ours, cold", _DEFAULT, "memory", 0.25),
    Goal("long", "ours, warm", _DEFAULT, "memory", 0.25),
    Goal("long", "ours, warm", None, "of_peak", 0.65),
    Goal("short", "ours, cold", _DEFAULT, "times_faster", 3.0),
    Goal("short", "ours, warm", _DEFAULT, "times_faster", 4.5),
    Goal("short", "ours, two epochs", _TWO_EPOCHS, "times_faster", 3.0),
    Goal("prompts", "ours, cold", _DEFAULT, "times_faster", 3.7),
    Goal("prompts", "ours, warm", _DEFAULT, "times_faster", 5.5),
    Goal("prompts", "ours, two epochs", _TWO_EPOCHS, "times_faster", 4.0),
    Goal("nf4", "ours, cold", _DEFAULT, "times_faster", 2.5),
    Goal("nf4", "ours, warm", _DEFAULT, "times_faster", 3.0),
)


def judge_goals(cases: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All goals of the cases that were measured."""
    return [goal.judge(cases) for goal in GOALS if goal.case in cases]


def check_losses(losses: Mapping[str, list[float]], arithmetic: str) -> float:
    """Every run starts at log 2 and all follow one trajectory; returns their largest difference.

    Raises:
        AssertionError: they compute different things, so their times must not be compared.
    """
    for run, values in losses.items():
        if not abs(values[0] - math.log(2)) <= START_TOLERANCE[arithmetic]:
            raise AssertionError(f"{run} starts at a loss of {values[0]:.6f} and not at log 2")
    worst = max(max(step) - min(step) for step in zip(*losses.values(), strict=True))
    if not worst <= LOSS_TOLERANCE[arithmetic]:
        raise AssertionError(f"the losses of the runs differ by up to {worst:.4f}: {dict(losses)}")
    return worst


def summarise(
    results: Mapping[str, Mapping[str, Any]],
    lengths: Sequence[Sequence[int]],
    pairs_per_step: int,
    shape: Shape,
    arithmetic: str,
) -> dict[str, Any]:
    """Numbers per pair of every row, and their ratios, from the runs of one case.

    Seconds per pair are medians over the steps, which one disturbed step does not move. Rates are work over time, sums
    over all counted steps, since the work of the steps differs.

    A ratio compares steps that took turns: against each run of TRL's the steps of the run of ours beside it. They are
    the same in a cold and in a warm run, which differ before the first one.

    Args:
        results: by run, as `one_run.run` returns them, with what `one_run.peak_rates` found in the same turns; the
            first step of each is the warm-up and is not counted.
        lengths: (prompt, chosen, rejected) tokens of every pair, in the order of training.
        pairs_per_step: pairs of one optimizer step.
        shape: of the model.
        arithmetic: "exact" or "rounded", see `LOSS_TOLERANCE`.
    """
    counted = lengths[pairs_per_step:]
    tokens_per_pair = sum(2 * p + c + r for p, c, r in counted) / len(counted)
    floor_per_pair = sum(shape.floor(*pair) for pair in counted) / len(counted)

    def times(run: str, share: float, typical: Callable[[Sequence[float]], float] = median) -> dict[str, float]:
        """Seconds of a pair by kind: a typical step of the run, and a share of its side's reference pass."""
        reference = results["ours_cold" if run.startswith("ours") else run]["reference_seconds"]
        return {
            kind: typical(values[1:]) / pairs_per_step + share * reference[kind] / len(lengths)
            for kind, values in results[run]["seconds"].items()
        }

    rows = {}
    for name, (run, share) in ROWS.items():
        result, pair = results[run], times(run, share)
        mean_seconds = times(run, share, mean)["wall"]
        rows[name] = {
            "seconds_per_pair": pair["wall"],
            "reference_seconds_per_pair": share * result["reference_seconds"]["wall"] / len(lengths),
            "tokens_per_second": tokens_per_pair / mean_seconds,
            "of_peak": floor_per_pair / (mean_seconds * median(result["torch_rates"])),
            "of_our_peak": floor_per_pair / (mean_seconds * median(result["our_rates"])),
            "user_seconds_per_pair": pair["user"],
            "kernel_seconds_per_pair": pair["system"],
            "kernel_share": pair["system"] / (pair["user"] + pair["system"]),
            "setup_seconds": result["setup_seconds"],
            "peak_gib": result["peak_bytes"] / 2**30,
            "loss_at_start": result["losses"][0],
        }
    ratios = {}
    for ours, trl in COMPARISONS:
        run, share = ROWS[trl]
        a, b = times(_BESIDE[run], ROWS[ours][1]), times(run, share)
        ratios[f"{ours} : {trl}"] = {
            "times_faster": b["wall"] / a["wall"],
            "times_less_cpu": (b["user"] + b["system"]) / (a["user"] + a["system"]),
            "memory": rows[ours]["peak_gib"] / rows[trl]["peak_gib"],
        }
    return {
        "pairs": len(lengths),
        "pairs_per_step": pairs_per_step,
        "steps": len(lengths) // pairs_per_step - 1,
        "mean_lengths": [mean(column) for column in zip(*lengths, strict=True)],
        "tokens_per_pair": tokens_per_pair,
        "floor_per_pair": floor_per_pair,
        "torch_rate": median(rate for result in results.values() for rate in result["torch_rates"]),
        "our_rate": median(rate for result in results.values() for rate in result["our_rates"]),
        "max_loss_difference": check_losses({run: r["losses"] for run, r in results.items()}, arithmetic),
        "rows": rows,
        "ratios": ratios,
    }
