"""The data of a run: read, checked for the stage that uses them, and tokenised."""

from __future__ import annotations

import datetime
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from alignment.config.data import DataConfig
from alignment.data.findings import report
from alignment.data.reasons import in_words
from alignment.data.rows import BadRow, Row, count_reasons, left_out, require_pairs, require_scores
from alignment.data.sources import LoadedData, load_rows
from alignment.data.tokens import TokenizedData, TokenizedSFT, tokenize_groups, tokenize_sft
from alignment.data.units import are_lists, as_pairs, as_rows, with_gap
from alignment.errors import UserError
from alignment.types import Group

log = logging.getLogger(__name__)


@dataclass(slots=True)
class PreferenceData:
    """Tokenised preference data of a run. `eval_rows` belong to `eval`, in order; `info` goes into the summary."""

    train: list[Group]
    eval: list[Group]
    eval_rows: list[Row]
    info: dict[str, Any]


@dataclass(slots=True)
class SFTData:
    """Tokenised conversations of a run; `sources` are those of `train`, `info` goes into the summary."""

    train: list[dict[str, list[int]]]
    eval: list[dict[str, list[int]]]
    sources: list[str]
    info: dict[str, Any]


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


def _data_info(title: str, loaded: LoadedData, *parts: TokenizedData | TokenizedSFT) -> dict[str, Any]:
    """What the summary says of the data; the log says it too."""
    drops = [*loaded.dropped, *(row for part in parts for row in part.drops)]
    counts = _sum_counts(*(part.counts for part in parts))
    log.info("%s: %s.", title, loaded.description)
    log.info("  %s", in_words({name: count for name, count in counts.items() if count}))
    missing = left_out([*loaded.bad, *drops])
    for sentence in missing:
        log.warning("  %s", sentence)
    _log_columns(loaded)
    findings, sentences = report(found for part in parts for found in part.findings)
    return {
        "source": loaded.description,
        "layout": loaded.layout,
        "fingerprint": loaded.fingerprint,
        "bad_rows": count_reasons(loaded.bad),
        "dropped": count_reasons(drops),
        "tokens": {name: count for name, count in counts.items() if count},
        "findings": findings,
        "notes": missing + sentences,
    }


def _log_columns(loaded: LoadedData) -> None:
    """Say which columns change the loss, with their range, and which ones the training does not read."""
    rows = [*loaded.train, *loaded.eval]
    for column, values in (
        ("weight", [row.weight for row in rows]),
        ("scores", [score for row in rows for score in row.scores or ()]),
    ):
        if values and (column == "scores" or set(values) != {1.0}):
            use = "multiplies the loss of its row" if column == "weight" else "is read by losses of scores"
            log.info("  The column %s (%g to %g) %s.", column, min(values), max(values), use)
    if any(row.steps is not None for row in rows):
        log.info("  The column of steps begins the answers: its text belongs to the prompt and is not scored.")
    unread = Counter(name for row in rows for name, value in row.meta.items() if value is not None)
    if unread:
        log.info("  Training does not read these columns: %s.", ", ".join(sorted(unread)))


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
    """Preference data, read and tokenised, before a loss is chosen."""

    loaded: LoadedData
    train: TokenizedData
    held_out: TokenizedData


def read_preferences(config: DataConfig, tokenizer: Any, *, day: datetime.date | None = None) -> ReadPreferences:
    """Read, check and tokenise the preference data; `day` is the date that a chat template writes, None for today's.

    Raises:
        UserError: the data cannot be used.
    """
    loaded = load_rows(config, stage="preference")
    train, held_out = (tokenize_groups(rows, tokenizer, config, day=day) for rows in (loaded.train, loaded.eval))
    return ReadPreferences(loaded, train, held_out)


def fit_preferences(read: ReadPreferences, config: DataConfig, loss: Any) -> tuple[PreferenceData, list[BadRow]]:
    """The data as the loss takes them: ranked lists, pairs or labelled rows.

    Lists become pairs unless the loss is one of lists, which takes a pair as a list of two. For a loss of rows each
    pair becomes two labelled rows.

    Returns:
        The data, and the rows that were left out.

    Raises:
        UserError: the data do not fit the loss, or nothing is left to train on.
    """
    loaded, train, held_out = read.loaded, read.train, read.held_out
    needs = loss.requirements()

    # What the rows must have
    if needs.unit != "row":
        require_pairs([*loaded.train, *loaded.eval], loss.name)
    if needs.scores:
        require_scores([*loaded.train, *loaded.eval], loss.name)
    drops = [*loaded.dropped, *train.drops, *held_out.drops]
    info = _data_info("Preferences", loaded, train, held_out)
    answers = sum(len(group.completions) for group in (*train.groups, *held_out.groups))
    _warn_of_cuts(info["tokens"].get("truncated_completions", 0), answers, config, "")

    # Lists to pairs, pairs to rows
    parts = {"training": train.groups, "held-out": held_out.groups}
    if needs.unit != "list":
        for part, groups in parts.items():
            if loaded.family == "lists" or are_lists(groups):
                parts[part] = as_pairs(groups, config.list_pairs)
                log.info("  %s: %d pairs of %d lists", part, len(parts[part]), len(groups))
                if groups and not parts[part]:
                    raise UserError(f"{config.source}: no {part} list has two completions with different scores.")
    if needs.orders_ties:
        _warn_of_ties(parts["training"], loss.name)
    if config.min_score_gap:
        parts = {part: _apart(groups, part, needs.unit, config) for part, groups in parts.items()}
    rows = {row.source: row for row in held_out.rows}
    eval_groups = parts["held-out"]
    eval_rows = [rows[group.source] for group in eval_groups]
    if needs.unit == "row":
        parts = {part: as_rows(groups) for part, groups in parts.items()}

    # What is left must be enough
    for part, items in parts.items():
        if 0 < len(items) < needs.min_items:
            raise UserError(
                f"data.source: loss {loss.name} is defined for at least {needs.min_items} {part} {needs.unit}s, and "
                f"{config.source} has {len(items)}."
            )
    for group in (*parts["training"], *eval_groups):
        if (problem := loss.problem(len(group.completions), group.scores)) is not None:
            raise UserError(f"Row {group.source} {problem}: loss {loss.name} cannot use it.")
    info["train"], info["eval"] = len(parts["training"]), len(eval_groups)
    info["tokens_digest"] = _groups_digest(parts["training"], eval_groups)
    return PreferenceData(parts["training"], eval_groups, eval_rows, info), [*loaded.bad, *drops]


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


def _apart(groups: list[Group], part: str, unit: str, config: DataConfig) -> list[Group]:
    """The pairs whose scores differ enough."""
    gap = config.min_score_gap
    if unit == "list":
        raise UserError(f"data.min_score_gap={gap:g} chooses pairs, and the loss takes whole lists: set it to 0.")
    if any(group.scores is None for group in groups):
        raise UserError(
            f"data.min_score_gap={gap:g} needs scores, and {config.source} has answers without: set it to 0."
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
        raise UserError(f"{config.source}: no {part} pair has scores that differ by data.min_score_gap={gap:g}.")
    return apart


def load_conversations(
    config: DataConfig, tokenizer: Any, *, day: datetime.date | None = None
) -> tuple[SFTData, list[BadRow]]:
    """Read, check and tokenise the SFT data; `day` is the date that a chat template writes, None for today's.

    Raises:
        UserError: the data cannot be used, or nothing is left to train on.
    """
    loaded = load_rows(config, stage="sft")
    train = tokenize_sft(loaded.train, tokenizer, config, day=day)
    held_out = tokenize_sft(loaded.eval, tokenizer, config, day=day)
    drops = [*loaded.dropped, *train.drops, *held_out.drops]
    info = _data_info("SFT data", loaded, train, held_out)
    _warn_of_cuts(info["tokens"].get("truncated", 0), len(train.sequences) + len(held_out.sequences), config, "sft.")
    info["train"], info["eval"] = len(train.sequences), len(held_out.sequences)
    info["tokens_digest"] = sequences_digest(train.sequences, held_out.sequences)
    sources = [row.source for row in train.rows]
    return SFTData(train.sequences, held_out.sequences, sources, info), [*loaded.bad, *drops]


_BESIDE_TOKENS = tuple(f.name for f in fields(Group) if f.name not in ("prompt", "completions", "source", "scored"))


def _groups_digest(*parts: Sequence[Group]) -> str:
    """Digest of groups as they train: tokens, weights, labels and scores, but not where they came from."""
    digest = hashlib.blake2b(digest_size=16)
    for groups in parts:
        digest.update(f"{len(groups)} groups;".encode())
        for group in groups:
            for tokens in (group.prompt, *group.completions):
                digest.update(f"{len(tokens)}:".encode())
                digest.update(np.ascontiguousarray(tokens, dtype="<i4").data)
            digest.update(repr([getattr(group, name) for name in _BESIDE_TOKENS]).encode())
            for mask in group.scored or ():
                digest.update(b"scored" + np.packbits(mask).tobytes())
    return digest.hexdigest()


def sequences_digest(*parts: Sequence[Mapping[str, Sequence[float]]]) -> str:
    """The same for SFT sequences; it names their stage's result too."""
    digest = hashlib.blake2b(digest_size=16)
    for sequences in parts:
        digest.update(f"{len(sequences)} sequences;".encode())
        for sequence in sequences:
            for name, values in sorted(sequence.items()):
                digest.update(f"{name}{len(values)}:".encode())
                digest.update(np.asarray(values, dtype="<f8").data)
    return digest.hexdigest()
