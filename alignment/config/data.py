"""The settings of one data set."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from alignment.errors import as_names, require

ONE_OR_MORE = "one text, or a list of texts"
"""The kind of a setting whose type says no more than Any: configurations cannot be merged with unions of types."""


class Keep(Enum):
    """Which end of a too long prompt survives truncation."""

    start = "start"
    end = "end"


class ListPairs(Enum):
    """Which pairs a pairwise loss takes from a ranked list; completions with equal scores make no pair.

    `best_vs_worst`: one pair. `best_vs_rest`: the best with each other one. `all_pairs`: each with each worse one.
    """

    best_vs_worst = "best_vs_worst"
    best_vs_rest = "best_vs_rest"
    all_pairs = "all_pairs"


class ScoredTurns(Enum):
    """Which of the assistant's turns are scored. Users' and tools' turns never are.

    `all`: in a preference row, all turns of a completion, from the first that chosen and rejected do not share; in SFT,
    all of a conversation. `last`: the last one alone.
    """

    all = "all"
    last = "last"


class Ties(Enum):
    """What becomes of two answers of which neither won.

    `drop`: the row is left out, and counted. `both_ways`: two pairs, one for each order, with half the weight each.
    """

    drop = "drop"
    both_ways = "both_ways"


class Strengths(Enum):
    """What becomes of how strongly an answer was preferred: the difference of the pair's scores, or its weight."""

    scores = "scores"
    weights = "weights"


OUTCOMES = ("first", "second", "tie", "both_bad")
"""What `DataConfig.winner` gives values for."""


@dataclass(kw_only=True)
class DataConfig:
    """One data set and how it becomes tokens.

    `source` is `bundled:<name>`, a file, folder or pattern of this machine or at an address (`places.DATA_ENDINGS`),
    a hub id, or a list of these, which are read one after another. `revision` is that of a hub set, and `streaming`
    reads its rows over the network as they are needed. Held-out rows come from `eval_source` (its split `eval_split`),
    or else `eval_size` rows are set aside from the training rows.
    `columns` maps our column names to the file's own, e.g. {prompt: question, chosen: best}. `train_where` keeps the
    training rows whose columns have these values, e.g. {kind: [add, subtract]}; held-out rows all stay.
    `max_bad_rows` null means 0 for local files and no limit for hub sets. `allow` names findings in the text that do
    not stop the run (see `alignment.data.findings`).

    `winner` lists the values that a verdict on two answers has, e.g. {first: [0], second: [1], tie: [2]}; {} where they
    speak for themselves. Pairs whose scores differ by less than `min_score_gap` are left out.
    """

    source: Any = field(metadata={"kind": ONE_OR_MORE})
    name: str | None
    revision: str | None
    streaming: bool
    split: str
    eval_source: Any = field(metadata={"kind": ONE_OR_MORE})
    eval_split: str | None
    eval_size: int
    columns: dict[str, str]
    train_where: dict[str, Any]
    system: str | None
    max_length: int
    max_prompt_length: int
    truncate_prompt: Keep
    max_bad_rows: int | None
    allow: list[str]
    limit: int | None
    eval_limit: int | None
    template_kwargs: dict[str, Any]
    list_pairs: ListPairs
    score: ScoredTurns
    min_score_gap: float
    winner: dict[str, Any]
    ties: Ties
    strengths: Strengths

    @property
    def named(self) -> list[str]:
        """All sources that the settings name."""
        others = [] if self.eval_source is None else as_names("data.eval_source", self.eval_source)
        return [*as_names("data.source", self.source), *others]

    def __post_init__(self) -> None:
        require(bool(as_names("data.source", self.source)), "data.source=[] names nothing to read.")
        if self.eval_source is not None:
            as_names("data.eval_source", self.eval_source)
        require(self.max_length >= 2, f"data.max_length must be at least 2, not {self.max_length}.")
        require(
            1 <= self.max_prompt_length < self.max_length,
            f"data.max_prompt_length must be in [1, max_length), not {self.max_prompt_length} "
            f"with max_length {self.max_length}.",
        )
        require(self.eval_size >= 0, f"data.eval_size must be at least 0, not {self.eval_size}.")
        for key in ("limit", "eval_limit", "max_bad_rows"):
            value = getattr(self, key)
            least = 0 if key == "max_bad_rows" else 1
            require(value is None or value >= least, f"data.{key} must be null or at least {least}, not {value}.")
        require(
            0 <= self.min_score_gap < math.inf,
            f"data.min_score_gap must be a finite number, at least 0, not {self.min_score_gap}.",
        )
        self._check_winner()

    def _check_winner(self) -> None:
        self.winner = {key: value if isinstance(value, list) else [value] for key, value in self.winner.items()}
        unknown = sorted(self.winner.keys() - set(OUTCOMES))
        require(
            not unknown, f"data.winner has the key '{' '.join(unknown[:1])}', and the keys are {', '.join(OUTCOMES)}."
        )
        given = not self.winner or all(self.winner.get(key) for key in OUTCOMES[:2])
        require(given, "data.winner must list values for first and for second.")
        listed = [str(value) for values in self.winner.values() for value in values]
        twice = sorted(value for value in set(listed) if listed.count(value) > 1)
        require(not twice, f"data.winner lists the value {' '.join(twice[:1])} twice.")
