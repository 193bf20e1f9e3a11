"""The settings of one data set."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from alignment.errors import require


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


@dataclass(kw_only=True)
class DataConfig:
    """One data set and how it becomes tokens.

    `source` is `bundled:<name>`, a local file or folder (`places.DATA_ENDINGS`), or a hub id. Held-out rows come
    from `eval_source` (its split `eval_split`), or else `eval_size` rows are set aside from the training rows.
    `columns` maps our column names to the file's own, e.g. {prompt: question, chosen: best}. `train_where` keeps the
    training rows whose columns have these values, e.g. {kind: [add, subtract]}; held-out rows all stay.
    `max_bad_rows` null means 0 for local files and no limit for hub sets. `allow` names findings in the text that do
    not stop the run (see `alignment.data.findings`).
    """

    source: str
    name: str | None
    split: str
    eval_source: str | None
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

    def __post_init__(self) -> None:
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
