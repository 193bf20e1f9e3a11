"""Human labels from a file: what another judge is measured by, and a judge of the pairs that people have seen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

from alignment.errors import UserError
from alignment.evaluation.judges.agreement import Agreement, agreement
from alignment.evaluation.judges.base import Item, Judge, Preference
from alignment.evaluation.judges.store import judgement_key

LABELS = {1: 1, 2: -1, 0: 0, "first": 1, "second": -1, "tie": 0}
"""A label in a file -> the outcome for the first answer."""


class HumanLabels(Judge):
    """The labels of people in a file of JSON Lines, or of one JSON list.

    A row has a `prompt`, two `answers`, and a `label` or, of several annotators, `labels`: 1 or "first", 2 or "second",
    0 or "tie". What more than half of a row's labels say counts; without such a majority the answers tie.

    Attributes:
        items: the rows, in order.
        outcomes: of each row, for the first answer.

    Raises:
        UserError: the file cannot be read, or a row is none of this kind.
    """

    kind: ClassVar[str] = "file"
    pointwise = False

    def __init__(self, path: Path) -> None:
        rows = _rows(path)
        self.items = [Item(row["prompt"], tuple(row["answers"]), source=f"{path}:{n}") for n, row in enumerate(rows, 1)]
        self._labels = [row["labels"] for row in rows]
        self.outcomes = [_majority(labels) for labels in self._labels]
        self._known = dict(zip(map(judgement_key, self.items), self.outcomes, strict=True))

    def description(self) -> dict[str, Any]:
        """The rows themselves."""
        return {"version": 1, "labels": sorted([key.hex(), outcome] for key, outcome in self._known.items())}

    def compare(self, items: Sequence[Item]) -> list[Preference]:
        """The label of each pair, in whichever order it was shown; a pair without label cannot be read."""
        return [self._preference(item) for item in items]

    def _preference(self, item: Item) -> Preference:
        for shown, sign in ((item, 1), (item.swapped(), -1)):
            if (outcome := self._known.get(judgement_key(shown))) is not None:
                share = 0.5 + sign * outcome / 2
                return Preference((share, share))
        return Preference((None, None), reasons=("no label",))

    def among_annotators(self) -> Agreement | None:
        """How far two annotators of a row agree, over all pairs of them; None if no row has two."""
        pairs = [pair for labels in self._labels for pair in combinations(labels, 2)]
        return agreement([a for a, _ in pairs], [b for _, b in pairs], rows=len(self.items)) if pairs else None


def _majority(labels: Sequence[int]) -> int:
    [(most, count)] = Counter(labels).most_common(1)
    return most if 2 * count > len(labels) else 0


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows with their labels as outcomes."""
    try:
        text = path.read_text("utf-8")
        rows = (
            json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(line) for line in text.splitlines() if line]
        )
    except OSError as error:
        raise UserError(f"The human labels {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"The human labels {path} are no JSON Lines, and no JSON list.") from None
    if not rows:
        raise UserError(f"The human labels {path} hold no row.")
    return [_row(row, f"{path} row {number}") for number, row in enumerate(rows, 1)]


def _row(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        row = {}
    prompt, answers = row.get("prompt"), row.get("answers")
    labels = row.get("labels", [row.get("label")])
    texts = [prompt, *answers] if isinstance(answers, list) and len(answers) == 2 else [None]
    known = isinstance(labels, list) and labels and all(isinstance(one, int | str) and one in LABELS for one in labels)
    if not all(isinstance(text, str) for text in texts) or not known or any(isinstance(one, bool) for one in labels):
        raise UserError(
            f"{place} is no human label: it needs a text `prompt`, two texts `answers`, and a `label` (or a list "
            f"`labels`) of 1 or first, 2 or second, 0 or tie."
        )
    return {"prompt": prompt, "answers": answers, "labels": [LABELS[one] for one in labels]}
