"""The settings of the data: of one set, or of a mixture of sources."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from alignment.errors import UserError, as_names, has_password, require

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


class TemplateText(str):
    """The text of a chat template that settings name, once it is read; `name` is what they call it."""

    name: str

    def __new__(cls, text: str, name: str) -> TemplateText:
        """The text under its name."""
        own = super().__new__(cls, text)
        own.name = name
        return own

    def __reduce__(self) -> tuple[type[TemplateText], tuple[str, str]]:  # for copies, and other processes
        return TemplateText, (str(self), self.name)


OUTCOMES = ("first", "second", "tie", "both_bad")
"""What `DataConfig.winner` gives values for."""


class Exhausted(Enum):
    """What ends an epoch of a mixture with weights.

    `stop`: the first source of which all rows are drawn, so that no row is drawn twice. `repeat`: the last one, and
    smaller sources begin again.
    """

    stop = "stop"
    repeat = "repeat"


class Duplicates(Enum):
    """What becomes of training rows that repeat an earlier one: they are counted, or left out."""

    keep = "keep"
    drop = "drop"


@dataclass(kw_only=True)
class SourceConfig:
    """One source of a mixture: where its rows come from, and how many of them are trained on.

    `source` to `template_kwargs` mean what they mean for the data. `where` keeps the rows, training and held out, whose
    columns have these values. An epoch has `count` training rows of the source, or a number in proportion to `weight`,
    or, with neither, all of them.
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
    ignore: list[str]
    winner: dict[str, Any]
    where: dict[str, Any]
    system: str | None
    max_bad_rows: int | None
    limit: int | None
    eval_limit: int | None
    chat_template: str | None
    template_kwargs: dict[str, Any]
    weight: float | None
    count: int | None

    def check(self, key: str) -> None:
        """Refuse a share that is none; `key` names the source in messages."""
        weight, count = self.weight, self.count
        require(weight is None or count is None, f"{key} has a weight and a count: leave one of them out.")
        require(
            weight is None or 0 <= weight < math.inf,
            f"{key}.weight must be null or a finite number, at least 0, not {weight}.",
        )
        require(count is None or count >= 0, f"{key}.count must be null or at least 0, not {count}.")


OF_SOURCES = tuple(f.name for f in fields(SourceConfig) if f.name not in ("where", "weight", "count"))
"""Settings of the data that each source of a mixture has of its own."""

HANDED_DOWN = ("streaming", "system", "eval_size", "eval_limit", "max_bad_rows", "chat_template", "template_kwargs")
"""Those of them that a source takes from the data unless it says otherwise."""

UNSET: dict[str, Any] = {"split": "train", "columns": {}, "ignore": [], "winner": {}, "train_where": {}}
"""What the settings that are not handed down are without a value; all others are null."""

METRICS = ("rewards", "logps", "lengths", "nats", "nats_per_token", "ranking", "kl", "reference_logps")
"""Names of metrics, which no source of a mixture may have: its own are `eval/<source>/...`."""


@dataclass(kw_only=True)
class DataConfig:
    """One data set, or a mixture of them, and how it becomes tokens.

    `source` is `bundled:<name>`, a file, folder or pattern of this machine or at an address (`places.DATA_ENDINGS`),
    a hub id, or a list of these, which are read one after another. `revision` is that of a hub set, and `streaming`
    reads its rows over the network as they are needed. Held-out rows come from `eval_source` (its split `eval_split`),
    or else `eval_size` rows are set aside from the training rows.
    `columns` maps our column names to the file's own, e.g. {prompt: question, chosen: best}. `ignore` names columns of
    the file that mean something else than they mean here, and are read as if they were not there. `train_where` keeps
    the training rows whose columns have these values, e.g. {kind: [add, subtract]}; held-out rows all stay.
    `max_bad_rows` null means 0 for local files and no limit for hub sets. `allow` names findings in the text that do
    not stop the run (see `alignment.data.rows.findings`). `chat_template` writes the rows in place of the model's, and
    has the same kinds of names; once it is read, a `TemplateText` is here instead.

    `winner` lists the values that a verdict on two answers has, e.g. {first: [0], second: [1], tie: [2]}; {} where they
    speak for themselves. Pairs whose scores differ by less than `min_score_gap` are left out.

    `sources` makes a mixture: each name maps to a `SourceConfig`, and `source` is null. `exhausted` says what ends its
    epoch, and `seed` draws its rows and their order. `duplicates` says what becomes of training rows that repeat an
    earlier one. `decontaminate` names evaluation sets: a training row whose prompt shares words with one of them is
    left out (see `alignment.data.sources.decontamination`), with `decontaminate_answers` also one whose answers do.
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
    ignore: list[str]
    train_where: dict[str, Any]
    system: str | None
    max_length: int
    max_prompt_length: int
    truncate_prompt: Keep
    max_bad_rows: int | None
    allow: list[str]
    limit: int | None
    eval_limit: int | None
    chat_template: str | None
    template_kwargs: dict[str, Any]
    list_pairs: ListPairs
    score: ScoredTurns
    min_score_gap: float
    winner: dict[str, Any]
    ties: Ties
    strengths: Strengths
    sources: dict[str, Any]
    exhausted: Exhausted
    seed: int
    duplicates: Duplicates
    decontaminate: list[str]
    decontaminate_answers: bool

    @property
    def named(self) -> list[str]:
        """All sources that the settings name."""
        if self.sources:
            return [name for part in self.parts.values() for name in part.named]
        others = [] if self.eval_source is None else as_names("data.eval_source", self.eval_source)
        return [*as_names("data.source", self.source), *others, *self.decontaminate]

    @property
    def title(self) -> str:
        """The data in messages."""
        return f"the mixture of {', '.join(self.sources)}" if self.sources else ", ".join(as_names("", self.source))

    @property
    def parts(self) -> dict[str, DataConfig]:
        """The settings of each source of a mixture, as of a set of its own."""
        return {
            name: replace(self, sources={}, **{key: getattr(source, key) for key in OF_SOURCES})
            for name, source in self.sources.items()
        }

    def _check_sources(self) -> Iterator[str]:
        """What is wrong with the sources of a mixture."""
        for key in (
            "source",
            "name",
            "revision",
            "split",
            "eval_source",
            "eval_split",
            "columns",
            "ignore",
            "winner",
            "train_where",
        ):
            if getattr(self, key) != UNSET.get(key):
                now = "null" if UNSET.get(key) is None else str(UNSET[key])
                yield f"data.{key} has no effect with data.sources: set data.{key}={now}, and give it to a source."
        for name, source in self.sources.items():
            if not re.fullmatch(r"[\w-]+", name):
                yield f"data.sources: the name '{name}' of a source may have letters, digits, _ and - only."
            from alignment.losses import LOSSES  # with torch, which commands that only look at settings do without

            if name in METRICS or name in LOSSES:
                yield f"data.sources.{name}: a metric has this name already, so give the source another one."
            source.check(f"data.sources.{name}")
        shares = [source.weight for source in self.sources.values() if source.weight is not None]
        others = any(source.weight is None and source.count != 0 for source in self.sources.values())
        if not sum(shares) and not others:
            yield "data.sources: no source has a weight or a count above 0, so there is nothing to train on."

    def __post_init__(self) -> None:
        if self.sources:
            for problem in self._check_sources():
                raise UserError(problem)
        else:
            given = self.source is not None and as_names("data.source", self.source)
            now = "null" if self.source is None else self.source
            require(bool(given), f"data.source={now} names nothing to read: give it a source, or data.sources.")
        if self.eval_source is not None:
            as_names("data.eval_source", self.eval_source)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"data.seed must be in [0, {2**32}), not {self.seed}.")
        require(
            not self.decontaminate_answers or bool(self.decontaminate),
            "data.decontaminate_answers has no effect without data.decontaminate, which names the evaluation sets.",
        )
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
        mapped = sorted(set(self.ignore) & set(self.columns.values()))
        require(
            not mapped, f"data.ignore leaves out '{' '.join(mapped[:1])}', which data.columns reads: take one away."
        )
        self._check_winner()
        require(
            not any(map(has_password, self.named)),
            "data.source: an address has a password in it, which would stand in the files of the run: leave it out, "
            "and give it to fsspec in the environment or in its configuration.",
        )

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
