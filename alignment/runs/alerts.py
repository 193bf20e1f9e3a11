"""What you should be told while a run still goes on: numbers that are not finite, chosen completions that collapse.

Alerts are derived from the rows of metrics.jsonl alone, so that a resumed run, its report and every tracker find the
same ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

UNSTABLE = "The run became numerically unstable"
COLLAPSE = "The chosen completions collapse"

FALL = 0.1
"""Nats per token by which the chosen completions become less likely until it is an alert: each token by a tenth."""
_WINDOW = 10
"""Training rows of which the mean counts."""
_SURE = 4.0
"""Standard errors by which that mean must be beyond the limit: rows of other completions differ by chance."""


@dataclass(frozen=True, slots=True)
class Alert:
    """A sentence for the one who watches a run.

    Attributes:
        kind: the same for every run.
        text: with the numbers of this run.
        stage, step, split: of the row that it was found in.
        is_over: whether it says that an earlier alert of this kind holds no more.
    """

    kind: str
    text: str
    stage: str
    step: int
    split: str
    is_over: bool = False


class Watch:
    """Looks at one row after the other. Each kind of alert comes once in a run, and once that it is over.

    The chosen completions collapse where they become less likely, by at least `FALL` nats per token, while the margin
    between chosen and rejected rises. Held-out rows are compared with the first one, which has the same completions.
    Training rows have other completions each time, so their log-ratio to the reference counts, as a mean of ten rows
    that is beyond the limit by four standard errors. It is over when both have fallen by less than half of that.

    Attributes:
        step: of the last row.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """`rows` of metrics.jsonl were seen before: what they told is not told again."""
        self.step = 0
        self._is_unstable = False
        self._collapsed = False
        self._is_over = False
        self._first: Mapping[str, Any] = {}
        self._held_out = math.nan
        self._falls: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        for _ in alerts_in(rows, self):
            pass

    def see(self, stage: str, step: int, split: str, metrics: Mapping[str, Any]) -> list[Alert]:
        """What this row tells that no row before it did."""
        found, self.step = [], step
        broken = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken and not self._is_unstable:
            self._is_unstable = True
            text = f"{UNSTABLE}: at step {step} {', '.join(broken[:3])} ({split}) {'are' if broken[1:] else 'is'} not "
            found.append(Alert(UNSTABLE, f"{text}finite.", stage, step, split))
        if stage == "preference" and not broken:
            fall = self._of_held_out(metrics) if split == "eval" else self._of_training(metrics)
            if fall is not None and not self._collapsed:
                self._collapsed = True
                found.append(Alert(COLLAPSE, _collapse(fall, step, split), stage, step, split))
            elif self._collapsed and not self._is_over and self._has_recovered():
                self._is_over = True
                text = f"The chosen completions are no longer collapsed: at step {step} the held-out ones are "
                text += f"{self._held_out:.2f} nats per token less likely than before the first update."
                found.append(Alert(COLLAPSE, text, stage, step, split, is_over=True))
        return found

    def _of_held_out(self, metrics: Mapping[str, Any]) -> float | None:
        """By how many nats per token a collapse made them less likely since the first evaluation; None: no collapse."""
        if not {"logps/chosen", "logps/rejected", "lengths/chosen"} <= metrics.keys():
            return None
        self._first = first = self._first or metrics
        self._held_out = (first["logps/chosen"] - metrics["logps/chosen"]) / metrics["lengths/chosen"]
        rise = _gap(metrics) - _gap(first)
        return self._held_out if self._held_out >= FALL and rise > 0 else None

    def _of_training(self, metrics: Mapping[str, Any]) -> float | None:
        """As `_of_held_out`, for the mean of the last rows, relative to the reference."""
        if not {"nats/chosen", "nats/margins", "lengths/chosen"} <= metrics.keys():
            return None
        self._falls.append((-metrics["nats/chosen"] / metrics["lengths/chosen"], metrics["nats/margins"]))
        if len(self._falls) < _WINDOW:
            return None
        falls, margins = zip(*self._falls, strict=True)
        return fmean(falls) if _at_least(falls) >= FALL and _at_least(margins) > 0 else None

    def _has_recovered(self) -> bool:
        return self._held_out < FALL / 2 and (not self._falls or fmean(fall for fall, _ in self._falls) < FALL / 2)


def _gap(metrics: Mapping[str, Any]) -> float:
    return metrics["logps/chosen"] - metrics["logps/rejected"]


def _at_least(values: Sequence[float]) -> float:
    """What their mean is at least, beyond doubt."""
    return fmean(values) - _SURE * stdev(values) / math.sqrt(len(values))


def _collapse(fall: float, step: int, split: str) -> str:
    than = "before the first update" if split == "eval" else "under the reference"
    which = "held-out" if split == "eval" else "training"
    return (
        f"{COLLAPSE}: at step {step} those of the {which} data are {fall:.2f} nats per token less likely than {than}, "
        f"while the margin rises. The policy learns to avoid answers more than to give them: a lower optim.lr, fewer "
        f"steps, or a loss that holds the chosen ones (dpop, rpo, cal_dpo) may do better."
    )


def alerts_in(rows: Iterable[Mapping[str, Any]], watch: Watch | None = None) -> Iterator[Alert]:
    """The alerts of rows of metrics.jsonl, in their order."""
    watch = watch or Watch()
    for row in rows:
        yield from watch.see(row["stage"], row["step"], row["split"], row)
