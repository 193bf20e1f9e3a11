"""What is said of all rows, and asked of them once a loss is known, so that they need not be read again for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from alignment.data.rows.row import Row
from alignment.data.rows.sequences import as_line, from_line
from alignment.errors import UserError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class RowFacts:
    """Facts of rows.

    Attributes:
        examples: the first row with a single completion, and the first without scores, where there are such.
        weights: the smallest and the largest; None where all are 1.
        scores: the smallest and the largest; None where there are none.
        steps: whether some row has a beginning of its answer.
        unread: columns with values that training does not read.
    """

    examples: list[Row] = field(default_factory=list)
    weights: list[float] | None = None
    scores: list[float] | None = None
    steps: bool = False
    unread: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> RowFacts:
        """The facts of these rows."""
        facts = cls()
        unread: set[str] = set()
        single = unscored = None
        weights: list[float] | None = None
        for row in rows:
            single = single or (row if len(row.completions) < 2 else None)
            unscored = unscored or (row if row.scores is None else None)
            weights = _wider(weights, (row.weight,))
            facts.scores = _wider(facts.scores, row.scores or ())
            facts.steps = facts.steps or row.steps is not None
            unread.update(name for name, value in row.meta.items() if value is not None)
        facts.examples = [row for row in (single, unscored) if row is not None]
        facts.weights = None if weights == [1.0, 1.0] else weights
        facts.unread = sorted(unread)
        return facts

    def report(self) -> None:
        """Say which columns change the loss, with their range, and which ones the training does not read.

        Raises:
            UserError: the weights leave nothing to learn.
        """
        if self.weights is not None and self.weights[1] == 0:
            raise UserError(
                "The column weight is 0 in every row, so that nothing would be learnt: leave it out, or give weights "
                "above 0."
            )
        if self.weights is not None:
            log.info("  The column weight (%g to %g) multiplies the loss of its row.", *self.weights)
        if self.scores is not None:
            log.info("  The column scores (%g to %g) is read by losses of scores.", *self.scores)
        if self.steps:
            log.info("  The column of steps begins the answers: its text belongs to the prompt and is not scored.")
        if self.unread:
            log.info(
                "  Training does not read these columns: %s.", ", ".join(name or "(no name)" for name in self.unread)
            )

    def as_json(self) -> dict[str, Any]:
        """The facts as JSON holds them."""
        return {
            "examples": [as_line(row).decode() for row in self.examples],
            **{name: getattr(self, name) for name in ("weights", "scores", "steps", "unread")},
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> RowFacts:
        """The facts that `as_json` gave."""
        return cls(**found | {"examples": [from_line(line) for line in found["examples"]]})


def _wider(span: list[float] | None, values: tuple[float, ...]) -> list[float] | None:
    if not values:
        return span
    low, high = min(values), max(values)
    return [low, high] if span is None else [min(span[0], low), max(span[1], high)]
