"""Early stopping of the members of a sweep: each looks at how far the others had come where it is now.

Nobody directs them: each keeps its values in its own run folder, and reads those of its siblings. So it does not matter
whether members run one after the other, in several processes, or together in one.
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
    """The rungs of a stage by their step, each named by the share of the stage that is done there.

    Without those that come too late: the decision falls a step after the rung, and would save nothing.
    """
    parts = [config.eta**k for k in range(config.rungs, 0, -1)]
    steps = {math.ceil(num_steps / part): f"1/{part}" for part in parts}
    return {step: share for step, share in steps.items() if step + 1 < num_steps}


def place(value: float, others: Sequence[float]) -> int:
    """1 for the best; equal values share a place, and what is no number comes last."""
    return 1 + sum(other > value or (math.isnan(value) and not math.isnan(other)) for other in others)


def stops(place: int, count: int, eta: int) -> bool:
    """Whether a place is not among the best 1/eta, rounded up, of so many; of fewer than eta none stops."""
    return count >= eta and (place - 1) * eta >= count


class StopEarly(TrainerCallback):
    """Evaluates at every rung, and at the end of the step after it ends the training if the rule says so.

    The rule is that of asynchronous successive halving (Li et al. 2018, arXiv:1810.05934), in the form that stops what
    is not good enough instead of promoting what is. It is asked a step late since members that train in step have all
    been evaluated by then, so that it does not matter which of them came first. What it said is kept: a resumed member
    does not ask again.

    Args:
        run_dir: the member's, beside those of the others.
        num_held_out: how many items the evaluation has.

    Attributes:
        stopped: where and why the training was ended; None where it was not.

    Raises:
        UserError: there is nothing to evaluate, or no rung.
    """

    def __init__(self, config: StoppingConfig, run_dir: Path, num_steps: int, num_held_out: int) -> None:
        if not num_held_out:
            raise UserError("stopping compares members on held-out preferences, and none are held out.")
        self._rungs = rung_steps(num_steps, config)
        if not self._rungs:
            raise UserError(f"stopping has no effect: a stage of {num_steps} steps is too short to be ended early.")
        self._config = config
        self._run_dir = run_dir
        self._num_steps = num_steps
        self.stopped: dict[str, Any] | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Keep the value of a rung, for this member and for the others.

        Raises:
            UserError: the evaluation, the first of which precedes all training, has no such metric.
        """
        metric = self._config.metric
        if f"eval_{metric}" not in metrics:
            known = ", ".join(name for name in STOPPING_METRICS if f"eval_{name}" in metrics)
            raise UserError(
                f"stopping.metric={metric} is not measured with this loss, reference and data; those to choose from "
                f"are: {known or 'none'}."
            )
        share = self._rungs.get(state.global_step)
        kept = self._kept(self._run_dir)
        if share is not None and "place" not in kept.get(share, {}):
            rung = {"step": state.global_step, "metric": metric, "value": metrics[f"eval_{metric}"]}
            self._keep(kept | {share: rung})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, or decide."""
        step = state.global_step
        if step in self._rungs:
            control.should_evaluate = True
        if (share := self._rungs.get(step - 1)) is None:
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
        """The place of a value among those that members have had at the same rung up to now, and what follows."""
        siblings = (path for path in self._run_dir.parent.iterdir() if path.name != self._run_dir.name)
        rungs = [rung for folder in siblings if (rung := self._kept(folder).get(share)) is not None]
        others = [float(rung["value"]) for rung in rungs if rung["metric"] == self._config.metric]
        found, count = place(value, others), 1 + len(others)
        return {"place": found, "of_members": count, "stops": stops(found, count, self._config.eta)}

    def _keep(self, rungs: dict[str, Any]) -> None:
        atomic_write_bytes(self._run_dir / _RUNGS, to_json(rungs, indent=2))

    @staticmethod
    def _kept(run_dir: Path) -> dict[str, Any]:
        path = run_dir / _RUNGS
        return json.loads(path.read_bytes()) if path.exists() else {}
