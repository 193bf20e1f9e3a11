"""Early stopping of the members of a sweep: each compares itself with the others at the same share of training.

There is no central scheduler. Each member writes its values into its own run folder and reads those of its siblings, so
members can run one after the other, in several processes, or together in one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from alignment.config.schema import STOPPING_METRICS, StoppingConfig
from alignment.errors import UserError
from alignment.files import atomic_write_bytes, to_json

_RUNGS = Path("stages", "preference", "rungs.json")


def rung_steps(num_steps: int, config: StoppingConfig) -> dict[int, str]:
    """The rungs of a stage: step -> the share of the stage that is done there, as a fraction.

    Rungs too close to the end are left out: the decision falls one step later and would save nothing.
    """
    parts = [config.eta**k for k in range(config.rungs, 0, -1)]
    steps = {math.ceil(num_steps / part): f"1/{part}" for part in parts}
    return {step: share for step, share in steps.items() if step + 1 < num_steps}


def rank(value: float, others: Sequence[float]) -> int:
    """1 for the best; equal values share a rank, and NaN ranks last."""
    return 1 + sum(other > value or (math.isnan(value) and not math.isnan(other)) for other in others)


def stops(rank: int, count: int, eta: int) -> bool:
    """Whether a rank is outside the best 1/eta, rounded up, of `count` members; with fewer than eta none stops."""
    return count >= eta and (rank - 1) * eta >= count


class StopEarly(TrainerCallback):
    """Evaluates at every rung and, one step later, ends the training if the rule says so.

    The rule is asynchronous successive halving (Li et al. 2018, arXiv:1810.05934), in the variant that stops members
    that are not good enough instead of promoting the good ones. It is applied one step late because by then all members
    that train in step have been evaluated, so their order makes no difference. Decisions are written to the run folder:
    a resumed member does not decide again.

    Args:
        run_dir: this member's folder, next to those of the others.
        num_held_out: how many items the evaluation has.

    Attributes:
        rungs: the step of each rung, with the share of the stage that is done there.
        stopped: where and why the training ended early; None if it did not.

    Raises:
        UserError: there is nothing to evaluate, or no rung.
    """

    def __init__(self, config: StoppingConfig, run_dir: Path, num_steps: int, num_held_out: int) -> None:
        if not num_held_out:
            raise UserError("stopping compares members on held-out preferences, but none are held out.")
        self.rungs = rung_steps(num_steps, config)
        if not self.rungs:
            raise UserError(f"stopping has no effect: a stage of {num_steps} steps is too short to stop early.")
        self._config = config
        self._run_dir = run_dir
        self._num_steps = num_steps
        self.stopped: dict[str, Any] | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Write the value of a rung, for this member and for the others.

        Raises:
            UserError: the evaluation, the first of which precedes all training, has no such metric.
        """
        metric = self._config.metric
        if f"eval_{metric}" not in metrics:
            known = ", ".join(name for name in STOPPING_METRICS if f"eval_{name}" in metrics)
            raise UserError(
                f"stopping.metric={metric} is not measured with this loss, reference and data; choose one of: "
                f"{known or 'none'}."
            )
        share = self.rungs.get(state.global_step)
        kept = self._kept(self._run_dir)
        if share is not None and "place" not in kept.get(share, {}):
            rung = {"step": state.global_step, "metric": metric, "value": metrics[f"eval_{metric}"]}
            self._keep(kept | {share: rung})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, or decide."""
        step = state.global_step
        if step in self.rungs:
            control.should_evaluate = True
        if (share := self.rungs.get(step - 1)) is None:
            return
        kept = self._kept(self._run_dir)
        rung = kept[share]
        if "place" not in rung:
            rung |= self._compared(share, float(rung["value"]))
            self._keep(kept)
        if rung["stops"]:
            control.should_training_stop = True
            self.stopped = {"step": step, "of_steps": self._num_steps, "rung": rung["step"]}
            self.stopped |= {key: rung[key] for key in ("metric", "place", "of_members")}
            self.stopped["value"] = float(rung["value"])

    def _compared(self, share: str, value: float) -> dict[str, Any]:
        """How a value ranks among those of all members that reached the same rung so far, and the decision."""
        siblings = (path for path in self._run_dir.parent.iterdir() if path.name != self._run_dir.name)
        rungs = [rung for folder in siblings if (rung := self._kept(folder).get(share)) is not None]
        others = [float(rung["value"]) for rung in rungs if rung["metric"] == self._config.metric]
        own, count = rank(value, others), 1 + len(others)
        return {"place": own, "of_members": count, "stops": stops(own, count, self._config.eta)}

    def _keep(self, rungs: dict[str, Any]) -> None:
        atomic_write_bytes(self._run_dir / _RUNGS, to_json(rungs, indent=2))

    @staticmethod
    def _kept(run_dir: Path) -> dict[str, Any]:
        path = run_dir / _RUNGS
        return json.loads(path.read_bytes()) if path.exists() else {}
