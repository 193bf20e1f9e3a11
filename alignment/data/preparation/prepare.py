"""The data of a run: read, checked for the stage that uses them, and tokenised."""

from __future__ import annotations

import datetime
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from alignment.config.data import DataConfig
from alignment.data.preparation.digests import groups_digest, sequences_digest
from alignment.data.preparation.making import Use, prepare
from alignment.data.preparation.mixture import source_in_words
from alignment.data.preparation.prepared import prepared
from alignment.data.rows.findings import report
from alignment.data.rows.reasons import in_words
from alignment.data.rows.row import BadRow, Row, count_reasons, left_out, require_pairs, require_scores
from alignment.data.rows.row_facts import RowFacts
from alignment.data.rows.sequences import Picked, StoredRows, as_line
from alignment.data.sources.loading import LoadedData
from alignment.data.tokens.token_store import CONVERSATIONS, GROUPS, Conversation
from alignment.data.tokens.tokenization import TokenizedData, TokenizedSFT, tokenize_groups, tokenize_sft
from alignment.data.tokens.units import are_lists, as_pairs, as_rows, each_prompt, sizes, with_gap
from alignment.errors import UserError
from alignment.losses.base import Loss
from alignment.types import Group

log = logging.getLogger(__name__)


@dataclass(slots=True)
class PreferenceData:
    """Tokenised data, and `info` for the summary.

    Attributes:
        eval_rows: of `eval`, in order.
        train_rows: that `train` was made of; none where they are many, and nobody has asked for their prompts.
    """

    train: Sequence[Group]
    eval: Sequence[Group]
    eval_rows: Sequence[Row]
    info: dict[str, Any]
    train_rows: Sequence[Row] = ()


@dataclass(slots=True)
class SFTData:
    """Tokenised conversations of a run; `sources` are those of `train`, `info` goes into the summary.

    `eval_datasets` names the source in a mixture of each held-out conversation; without a mixture it is empty.
    """

    train: Sequence[Conversation]
    eval: Sequence[Conversation]
    sources: Sequence[str]
    info: dict[str, Any]
    eval_datasets: list[str] = field(default_factory=list)


_SAMPLE_TOKENS = 16384
"""Four times the width of a layer of 4096, so that second moments of its inputs are of full rank."""


def sample_sequences(conversations: SFTData | None, preferences: PreferenceData | None) -> list[np.ndarray]:
    """The first sequences of the first stage's training data, of about 16384 tokens in all."""
    sequences: Iterator[np.ndarray] = iter(())
    if conversations is not None:
        sequences = (np.array(example["input_ids"]) for example in conversations.train)
    elif preferences is not None:
        sequences = (np.concatenate([group.prompt, group.completions[0]]) for group in preferences.train)
    found: list[np.ndarray] = []
    total = 0
    for sequence in sequences:
        found.append(sequence)
        total += len(sequence)
        if total >= _SAMPLE_TOKENS:
            break
    return found


def _data_info(title: str, loaded: LoadedData, facts: RowFacts, *parts: TokenizedData | TokenizedSFT) -> dict[str, Any]:
    """What the summary says of the data; the log says it too."""
    drops = [*loaded.dropped, *(row for part in parts for row in part.drops)]
    counts = _sum_counts(*(part.counts for part in parts))
    log.info("%s: %s.", title, loaded.description)
    log.info("  %s", in_words({name: count for name, count in counts.items() if count}))
    missing = left_out([*loaded.bad, *drops])
    for sentence in missing:
        log.warning("  %s", sentence)
    facts.report()
    for name, numbers in loaded.sources.items():
        log.info("  %s", source_in_words(name, numbers))
    findings, sentences = report(found for part in parts for found in part.findings)
    of_sources = {"sources": loaded.sources} if loaded.sources else {}
    return of_sources | {
        "source": loaded.description,
        "layout": loaded.layout,
        "fingerprint": loaded.fingerprint,
        "bad_rows": count_reasons(loaded.bad),
        "dropped": count_reasons(drops),
        "tokens": {name: count for name, count in counts.items() if count},
        "findings": findings,
        "notes": missing + sentences,
    }


def _warn_of_cuts(cut: int, answers: int, config: DataConfig, prefix: str) -> None:
    if 2 * cut > answers:
        log.warning(
            "%d of %d answers are cut at %sdata.max_length=%d: the policy does not learn how they end, so raise it.",
            cut,
            answers,
            prefix,
            config.max_length,
        )


def _sum_counts(*parts: dict[str, int]) -> dict[str, int]:
    return dict(sum((Counter(part) for part in parts), Counter()))


@dataclass(frozen=True, slots=True)
class ReadPreferences:
    """Preference data, read and tokenised, before a loss is chosen.

    Attributes:
        digest: of the groups of both parts as they are, where it is known.
    """

    loaded: LoadedData
    facts: RowFacts
    train: TokenizedData
    held_out: TokenizedData
    digest: str | None = None


def read_preferences(
    config: DataConfig,
    tokenizer: Any,
    *,
    day: datetime.date | None = None,
    cache: Path | None = None,
    with_prompts: bool = False,
) -> ReadPreferences:
    """Read, check and tokenise the preference data, or find them in the cache.

    Args:
        day: the date that a chat template writes; None for today's.
        cache: the folder in which large sets are prepared and kept; None: everything stays in memory.
        with_prompts: keep the training rows of large sets, too, without their completions.

    Raises:
        UserError: the data cannot be used.
    """
    make = partial(tokenize_groups, tokenizer=tokenizer, day=day)
    use = replace(_PREFERENCES, texts=_with_prompts) if with_prompts else _PREFERENCES
    with prepared(config, "preference", tokenizer, day, cache, "prompts" if with_prompts else "") as (pinned, place):
        made = prepare(pinned, place, make, use)
    train, held_out = made.train, made.held_out
    if made.texts is not None:  # of large data, the rows of which are gone
        rows, count = StoredRows(made.texts), len(held_out.groups)
        held_out = replace(held_out, rows=Picked(rows, np.arange(count)))
        train = replace(train, rows=Picked(rows, np.arange(count, len(rows))))
    return ReadPreferences(made.loaded, made.facts, train, held_out, made.digest)


def fit_preferences(read: ReadPreferences, config: DataConfig, loss: Any) -> tuple[PreferenceData, list[BadRow]]:
    """The data as the loss takes them: ranked lists, pairs or labelled rows.

    Lists become pairs unless the loss is one of lists, which takes a pair as a list of two. For a loss of rows each
    pair becomes two labelled rows, and for one that draws answers each prompt is there once.

    Returns:
        The data, and the rows that were left out.

    Raises:
        UserError: the data do not fit the loss, or nothing is left to train on.
    """
    loaded, train, held_out = read.loaded, read.train, read.held_out
    needs = loss.requirements()

    # What the rows must have
    if needs.unit != "row":
        require_pairs(read.facts.examples, loss.name)
    if needs.scores:
        require_scores(read.facts.examples, loss.name)
    drops = [*loaded.dropped, *train.drops, *held_out.drops]
    info = _data_info("Preferences", loaded, read.facts, train, held_out)
    answers = int(sum(sizes(groups).sum() for groups in (train.groups, held_out.groups)))
    _warn_of_cuts(info["tokens"].get("truncated_completions", 0), answers, config, "")

    # Lists to pairs, pairs to rows
    each = [each_prompt(part.groups) if needs.draws else part.groups for part in (train, held_out)]
    parts = dict(zip(("training", "held-out"), each, strict=True))
    if needs.unit != "list" and not needs.draws:
        for part, groups in parts.items():
            if loaded.family == "lists" or are_lists(groups):
                parts[part] = as_pairs(groups, config.list_pairs)
                log.info("  %s: %d pairs of %d lists", part, len(parts[part]), len(groups))
                if groups and not parts[part]:
                    raise UserError(f"{config.title}: no {part} list has two completions with different scores.")
    if needs.orders_ties:
        _warn_of_ties(parts["training"], loss.name)
    if config.min_score_gap:
        parts = {part: _apart(groups, part, needs.unit, config) for part, groups in parts.items()}
    if any(group.labels is not None for group in parts["held-out"]):  # beside labelled rows pairs are rows too
        parts["held-out"] = as_rows(parts["held-out"])
    places = {row.source: index for index, row in enumerate(held_out.rows)}
    eval_groups = parts["held-out"]
    eval_rows = Picked(held_out.rows, [places[group.source] for group in eval_groups])
    if needs.unit == "row":
        parts = {part: as_rows(groups) for part, groups in parts.items()}

    # What is left must be enough
    for part, items in parts.items():
        if 0 < len(items) < needs.min_items:
            raise UserError(
                f"data.source: loss {loss.name} is defined for at least {needs.min_items} {part} {needs.unit}s, and "
                f"{config.title} has {len(items)}."
            )
    if type(loss).problem is not Loss.problem:  # which reads nothing
        for group in chain(parts["training"], eval_groups):
            if (problem := loss.problem(len(group.completions), group.scores)) is not None:
                raise UserError(f"Row {group.source} {problem}: loss {loss.name} cannot use it.")
    info["train"], info["eval"] = len(parts["training"]), len(eval_groups)
    known = read.digest if parts["training"] is train.groups and eval_groups is held_out.groups else None
    info["tokens_digest"] = known or groups_digest(parts["training"], eval_groups)
    return PreferenceData(parts["training"], eval_groups, eval_rows, info, train.rows), [*loaded.bad, *drops]


def _warn_of_ties(lists: Sequence[Group], loss: str) -> None:
    tied = sum(len(set(group.scores)) < len(group.scores) for group in lists if group.scores is not None)
    if tied:
        log.warning(
            "  %d of %d lists have equal scores, and loss %s ranks these answers in the order of the file: all_pairs "
            "and lipo make no pair of them.",
            tied,
            len(lists),
            loss,
        )


def _apart(groups: Sequence[Group], part: str, unit: str, config: DataConfig) -> Sequence[Group]:
    """The pairs whose scores differ enough."""
    gap = config.min_score_gap
    if unit == "list":
        raise UserError(f"data.min_score_gap={gap:g} chooses pairs, and the loss takes whole lists: set it to 0.")
    if any(group.scores is None for group in groups):
        raise UserError(
            f"data.min_score_gap={gap:g} needs scores, and {config.title} has answers without: set it to 0."
        )
    apart = with_gap(groups, gap)
    log.info(
        "  %s: %d of %d pairs are left out, their scores differ by less than %g",
        part,
        len(groups) - len(apart),
        len(groups),
        gap,
    )
    if groups and not apart:
        raise UserError(f"{config.title}: no {part} pair has scores that differ by data.min_score_gap={gap:g}.")
    return apart


def load_conversations(
    config: DataConfig, tokenizer: Any, *, day: datetime.date | None = None, cache: Path | None = None
) -> tuple[SFTData, list[BadRow]]:
    """Read, check and tokenise the SFT data, or find them in the cache; arguments as of `read_preferences`.

    Raises:
        UserError: the data cannot be used, or nothing is left to train on.
    """
    make = partial(tokenize_sft, tokenizer=tokenizer, day=day)
    with prepared(config, "sft", tokenizer, day, cache) as (pinned, place):
        made = prepare(pinned, place, make, _SFT)
    loaded, train, held_out = made.loaded, made.train, made.held_out
    drops = [*loaded.dropped, *train.drops, *held_out.drops]
    info = _data_info("SFT data", loaded, made.facts, train, held_out)
    _warn_of_cuts(info["tokens"].get("truncated", 0), len(train.sequences) + len(held_out.sequences), config, "sft.")
    info["train"], info["eval"] = len(train.sequences), len(held_out.sequences)
    info["tokens_digest"] = made.digest or sequences_digest(train.sequences, held_out.sequences)
    sources = [row.source for row in train.rows] if made.texts is None else made.texts
    names = [name for name, numbers in loaded.sources.items() for _ in range(numbers["eval"])]
    return SFTData(train.sequences, held_out.sequences, sources, info, names), [*loaded.bad, *drops]


def _of_held_out(_: TokenizedData, held_out: TokenizedData) -> Iterator[str]:
    return (as_line(row).decode() for row in held_out.rows)


def _with_prompts(train: TokenizedData, held_out: TokenizedData) -> Iterator[str]:
    prompts = (as_line(replace(row, completions=())).decode() for row in train.rows)
    return chain(_of_held_out(train, held_out), prompts)


_PREFERENCES = Use(
    stage="preference",
    kind=GROUPS,
    part_type=TokenizedData,
    items=lambda part: part.groups,
    texts=_of_held_out,
    digest=groups_digest,
)
_SFT = Use(
    stage="sft",
    kind=CONVERSATIONS,
    part_type=TokenizedSFT,
    items=lambda part: part.sequences,
    texts=lambda train, held_out: (row.source for row in train.rows),
    digest=sequences_digest,
)
