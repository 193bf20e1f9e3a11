"""Read `data.source` into checked rows: bundled sets, files here or behind an address, or sets on a hub."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from alignment.config.data import DataConfig, Duplicates, Ties
from alignment.config.places import BUNDLED_PREFIX, is_on_hub
from alignment.data.conversations.messages import found
from alignment.data.layouts.columns import Numbered
from alignment.data.layouts.comparisons import Verdicts
from alignment.data.layouts.recognition import SAMPLE, Layout, Stage, recognise, rows_of
from alignment.data.rows.reasons import UnusableRows, in_words
from alignment.data.rows.row import BadRow, Row, content_key, count_reasons, fingerprint, prompt_key
from alignment.data.rows.sequences import Picked, RowList
from alignment.data.sources.decontamination import Contamination
from alignment.data.sources.folders import files_of
from alignment.data.sources.hub import COMMIT
from alignment.data.sources.opening import Opened, bundled_file, bundled_files, open_records, same_rows
from alignment.data.sources.remote import File
from alignment.errors import UserError, as_names

_SHOWN_VALUES = 20
_KEY_BYTES = 32
_RECOGNISED = 10_000
"""Records by which the layout of a source is recognised, so that no more of them are held at once."""


@dataclass(frozen=True, slots=True)
class LoadedData:
    """Training and held-out rows, and how they were read.

    Attributes:
        layout: name of the training rows' layout.
        family: what they are (`Layout.family`).
        bad: rows left out of either part because something is wrong with them.
        dropped: rows of either part that compare nothing, such as ties; training rows that repeat others, or that an
            evaluation set has.
        fingerprint: SHA-256 of the content of both parts, in order.
        description: one line for logs and reports.
        sources: what each source of a mixture has given, by its name.
    """

    train: Sequence[Row]
    eval: Sequence[Row]
    layout: str
    family: str
    bad: list[BadRow]
    dropped: list[BadRow]
    fingerprint: str
    description: str
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of a source; `keys` are the digests of their prompts, end to end, `contents` their `content_key`s."""

    rows: RowList
    keys: bytearray
    contents: array[int]
    layout: Layout
    bad: list[BadRow]
    dropped: list[BadRow]
    note: str


class Sieve:
    """Leaves out training rows that could be used: those of evaluation sets and repeated ones, as the settings say.

    Sources of a mixture share one, so that a row that another source has too is a repeated one.

    Raises:
        UserError: an evaluation set cannot be read.
    """

    def __init__(self, config: DataConfig) -> None:
        self._evaluation_sets = Contamination(config) if config.decontaminate else None
        self._seen: dict[int, str] | None = {} if config.duplicates is Duplicates.drop else None

    def problem(self, row: Row, content: int) -> BadRow | None:
        """The row, with its `content_key`, as one to leave out; None for one that stays."""
        if self._evaluation_sets is not None and (found := self._evaluation_sets.problem(row)) is not None:
            return found
        if self._seen is not None:
            if content in self._seen:
                return BadRow.of(row, "duplicate", f"{self._seen[content]} is the same row")
            self._seen[content] = row.source
        return None


class Where:
    """Keeps rows whose columns have one of the wanted values."""

    def __init__(self, wanted: Mapping[str, Any]) -> None:
        self._accepted = {
            column: {str(value) for value in (values if isinstance(values, list) else [values])}
            for column, values in wanted.items()
        }
        self._known: dict[str, set[str]] = {column: set() for column in wanted}

    def __bool__(self) -> bool:
        return bool(self._accepted)

    def keeps(self, row: Row) -> bool:
        """Whether the row has wanted values only."""
        for column, accepted in self._accepted.items():
            if column in row.meta:
                self._known[column].add(str(row.meta[column]))
            if str(row.meta.get(column)) not in accepted:
                return False
        return True

    def check(self, key: str) -> None:
        """Refuse a wanted value that no row has had; `key` names the setting."""
        for column, accepted in self._accepted.items():
            known = sorted(self._known[column])
            if lacking := sorted(accepted - set(known)):
                there = f"; it has {', '.join(known[:_SHOWN_VALUES])}" if known else ", which no row has"
                raise UserError(f"{key}: no training row has {lacking[0]} in the column {column}{there}.")


def load_rows(
    config: DataConfig,
    *,
    stage: Stage,
    folder: Path | None = None,
    where: Mapping[str, Any] | None = None,
    sieve: Sieve | None = None,
) -> LoadedData:
    """Read and check the rows of `config.source` and its held-out rows.

    Held-out rows come from `eval_source`, from another split of `source`, or from the bundled set's own eval file.
    Without any of these, `eval_size` rows are held out by a hash of their prompts: neither the seed nor the order of
    the file matters, and all rows of a prompt are on one side. For SFT, pairs give their chosen completion, ranked
    lists their best one, and labelled data the desirable rows.

    No more rows are read than `limit` asks for, unless the held-out rows, or `train_where`, need all of them.

    Args:
        folder: for the rows, where they are too many for memory; None: they stay in memory.
        where: values of columns that the rows of both parts must have.
        sieve: that of the settings if it is None.

    Raises:
        UserError: a source cannot be read, or has more bad rows than `max_bad_rows`.
    """
    # What is read
    sources = as_names("data.source", config.source)
    evaluation = _open_eval(config, stage)
    aside = evaluation is None and config.eval_size
    own = Where(where or {})
    limit = None if aside or own or config.train_where else config.limit
    opened = open_records(sources, config.split, "sft" if stage == "sft" else "train", config)
    train = _read(opened, config, stage, limit, folder, own, Sieve(config) if sieve is None else sieve)
    own.check("where")
    parts = [train]
    kept, held = np.arange(len(train.rows)), np.arange(0)

    # What is held out
    if evaluation is not None:
        parts.append(_read(evaluation, config, stage, config.eval_limit, folder, own))
        held = np.arange(len(parts[1].rows))
    elif config.eval_size:
        kept, held = _hold_out(train.keys, config.eval_size, ", ".join(sources))
    if trained := Where(config.train_where):
        kept = kept[[trained.keeps(row) for row in Picked(train.rows, kept)]]
        trained.check("data.train_where")
    kept, held = kept[: config.limit], held[: config.eval_limit]
    rows, held_out = _picked(train.rows, kept), _picked(parts[-1].rows, held)

    # What is said of it
    bad = [row for part in parts for row in part.bad]
    dropped = [row for part in parts for row in part.dropped]
    counts = f"{len(rows)} training and {len(held_out)} held-out rows"
    notes = [f"{', '.join(sources)}: {counts}, layout {train.layout.name}"]
    notes += [part.note for part in parts if part.note]
    if bad:
        notes.append(f"{len(bad)} bad rows left out: {in_words(count_reasons(bad))}")
    prompts = [np.frombuffer(part.keys, dtype=f"S{_KEY_BYTES}") for part in parts]
    notes += overlaps(np.array(train.contents, dtype=np.uint64)[kept], prompts[0][kept], prompts[-1][held])
    digest = fingerprint(rows, held_out)
    layout = train.layout
    return LoadedData(rows, held_out, layout.name, layout.family, bad, dropped, digest, "; ".join(notes))


def overlaps(contents: np.ndarray, prompts: np.ndarray, held_out: np.ndarray) -> list[str]:
    """What is worth a word: training rows that repeat others, held-out prompts that are trained on.

    Args:
        contents: (rows,) the `content_key` of each training row.
        prompts, held_out: (rows,) the `prompt_key` of each training and of each held-out row.
    """
    repeated, shared = len(contents) - len(np.unique(contents)), len(np.intersect1d(prompts, held_out))
    notes = [f"{repeated} training rows repeat an earlier one"] if repeated else []
    return notes + ([f"{shared} held-out prompts are training prompts too"] if shared else [])


def origins(config: DataConfig) -> list[File | str] | None:
    """All files that the rows come from, in order, and the names of sets on the hub at a commit.

    None where some rows come from what may change and does not say so, such as another set on a hub.

    Raises:
        UserError: there is no such file, or none of a split.
    """
    if config.sources:
        parts = [origins(part) for part in config.parts.values()]
        return None if None in parts else list(dict.fromkeys(one for part in parts for one in part or []))
    asked = [(source, config.split) for source in as_names("data.source", config.source)]
    if config.eval_source is not None or config.eval_split is not None:
        others = config.source if config.eval_source is None else config.eval_source
        split = config.eval_split or config.split
        asked += [(source, split) for source in as_names("data.eval_source", others)]
    known: list[File | str] = []
    for source, split in [*asked, *((name, "test") for name in config.decontaminate)]:
        bundled = source.startswith(BUNDLED_PREFIX)
        files = bundled_files(source) if bundled else files_of(source, split, config.name)
        if files:
            known += files
        elif is_on_hub(source) and COMMIT.fullmatch(config.revision or "") and (source, split) in asked:
            known.append(f"{source}@{config.revision}, {config.name}, {split}")
        else:
            return None
    return known


def _picked(rows: RowList, indices: np.ndarray) -> Sequence[Row]:
    """These rows, in order: in memory as a list, like all of them."""
    if not rows.in_file:
        return [rows[index] for index in indices]
    return rows if len(indices) == len(rows) else Picked(rows, indices)


def _open_eval(config: DataConfig, stage: Stage) -> Opened | None:
    """The source of the held-out rows; None where they are rows of the training source, or there are none."""
    sources = as_names("data.source", config.source)
    if config.eval_source is None and all(source.startswith(BUNDLED_PREFIX) for source in sources):
        there = stage == "preference" and all(bundled_file(source, "eval").is_file() for source in sources)
        return open_records(sources, config.split, "eval", config) if there else None
    if config.eval_source is None and config.eval_split is None:
        return None
    split = config.eval_split or config.split
    others = sources if config.eval_source is None else as_names("data.eval_source", config.eval_source)
    for source in others:
        own_part = source.startswith(BUNDLED_PREFIX) and stage == "preference"
        if source in sources and not own_part and same_rows(source, split, config):
            raise UserError(
                f"The held-out rows would be the training rows ({source}, split {split}): "
                "give another data.eval_source or data.eval_split, or set data.eval_size."
            )
    return open_records(others, split, "eval" if stage == "preference" else "sft", config)


def _read(
    opened: Opened,
    config: DataConfig,
    stage: Stage,
    limit: int | None,
    folder: Path | None,
    where: Where,
    sieve: Sieve | None = None,
) -> _Part:
    """The rows of a source with the wanted values, if the sieve lets them through, at most `limit` of them.

    Many of them go into a file in the folder.

    Raises:
        UserError: the layout is not known or not for this stage, or too many rows are bad.
    """
    # One row after another, until the limit
    source = opened.name
    layout, records = _recognised(opened, config, stage, limit, sieve is not None)
    bad: list[BadRow] = []
    dropped: list[BadRow] = []
    rows, keys, contents = RowList(folder), bytearray(), array("Q")
    others = weighted = elsewhere = both_ways = 0
    before = ""
    for row in rows_of(records, layout, config.columns, folder) if layout is not None else map(_no_object, records):
        if isinstance(row, BadRow):
            (bad if row.fault else dropped).append(row)
            continue
        if stage == "sft":
            if row.labels == (False,):
                others += 1
                continue
            weighted += row.weight != 1
            row = replace(row, completions=row.completions[:1], labels=None, scores=None, weight=1.0)
        if not where.keeps(row):
            elsewhere += 1
            continue
        content = content_key(row)
        if sieve is not None and (problem := sieve.problem(row, content)) is not None:
            dropped.append(problem)
            continue
        rows.append(row)
        both_ways, before = both_ways + (row.source == before), row.source  # only a tie gives two rows
        keys += prompt_key(row)
        contents.append(content)
        if len(rows) == limit:
            break

    # What is left must be enough
    allowed = config.max_bad_rows if config.max_bad_rows is not None else opened.allowed
    if allowed is not None and len(bad) > allowed:
        count = f"{len(bad)} bad row{'s' if len(bad) > 1 else ''}"
        raise UnusableRows(f"{source} has {count}, and data.max_bad_rows allows {allowed}", bad, source)
    if not rows and others:
        raise UserError(f"{source} has no row labelled true, and SFT learns from those only.")
    if not rows and elsewhere:
        where.check("where")
        raise UserError(f"{source} has no row with the values that `where` asks for.")
    if not rows and dropped:
        raise UnusableRows(f"{source} has no usable row, and {in_words(count_reasons(dropped))}", dropped, source)
    if not rows and bad:
        raise UnusableRows(f"{source} has no usable row, and {len(bad)} bad ones", bad, source)
    if not rows or layout is None:
        raise UserError(f"{source} has no usable row.")

    # What to say of it
    notes = [layout.reading.note] if layout.reading is not None and layout.reading.note else []
    if both_ways:
        notes.append(f"{both_ways} ties are two pairs each, one for each order, with half the weight")
    if stage == "sft" and layout.family == "labelled":
        notes.append(f"{others} rows labelled undesirable are not used for SFT")
    if stage == "sft" and layout.family in ("pairs", "lists"):
        best = "chosen" if layout.family == "pairs" else "best"
        notes.append(f"the {best} completions of {layout.family} serve for SFT")
    if weighted:
        notes.append("SFT does not use their weights")
    return _Part(rows, keys, contents, layout, bad, dropped, "; ".join(notes))


def _no_object(item: Numbered) -> BadRow:
    """A record of a source that has no object at all."""
    file, number, record = item
    if isinstance(record, BadRow):
        return record
    return BadRow("wrong_type", f"the row is {found(record)}, not an object", file, number)


def _recognised(
    opened: Opened, config: DataConfig, stage: Stage, limit: int | None, is_training: bool
) -> tuple[Layout | None, Iterator[Numbered]]:
    """The layout of the first records, and all records; None where none is an object."""
    wanted = _RECOGNISED if limit is None else min(_RECOGNISED, max(limit, SAMPLE))
    first = []
    good = []
    columns: set[str] = set()
    records = _without(opened.records, config.ignore, columns)
    for item in records:
        first.append(item)
        if isinstance(item[2], dict):
            good.append(item[2])
            if len(good) == wanted:
                break
    if is_training and good and (unknown := sorted(set(config.ignore) - columns)):
        raise UserError(
            f"data.ignore has '{unknown[0]}', but the columns of {opened.name} are {', '.join(sorted(columns))}."
        )
    verdicts = Verdicts(config.winner, config.ties if stage == "preference" else Ties.drop, config.strengths)
    layout = recognise(good, config.columns, stage, opened.name, verdicts) if good else None
    return layout, chain(first, records)


def _without(records: Iterator[Numbered], ignored: Sequence[str], columns: set[str]) -> Iterator[Numbered]:
    """The records without some columns; adds the names of all that they had to `columns`."""
    if not ignored:
        yield from records
        return
    for file, number, record in records:
        if isinstance(record, dict):
            columns.update(record)
            record = {name: value for name, value in record.items() if name not in ignored}
        yield file, number, record


def _hold_out(keys: bytearray, size: int, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training rows and of at most `size` held-out rows, both in the order of the rows.

    Prompts are held out in the order of their digests, all rows of a prompt together.
    """
    words = np.frombuffer(keys, dtype=">u8").reshape(-1, _KEY_BYTES // 8)
    order = np.lexsort(words.T[::-1])
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    starts = np.flatnonzero(is_first)
    held: list[int] = []
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
        if len(held) + end - start <= size:
            held += order[start:end].tolist()
        if len(held) == size:
            break
    if not held or len(held) == len(order):
        raise UserError(
            f"data.eval_size {size} cannot be set aside from {source}, which has {len(order)} rows "
            f"of {len(starts)} prompts (rows of one prompt stay together)."
        )
    is_held = np.zeros(len(order), dtype=bool)
    is_held[held] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)
