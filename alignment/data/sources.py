"""Read `data.source` into checked rows: bundled sets, files here or behind an address, or sets on a hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from alignment.config.data import DataConfig, Ties
from alignment.config.places import BUNDLED_PREFIX, MODELSCOPE_PREFIX, is_on_hub
from alignment.data.columns import Numbered
from alignment.data.comparisons import Verdicts
from alignment.data.folders import files_of
from alignment.data.formats import read_file
from alignment.data.hub import read_hub, read_modelscope
from alignment.data.layouts import SAMPLE, Layout, Stage, recognise, rows_of
from alignment.data.reasons import UnusableRows, in_words
from alignment.data.rows import BadRow, Row, count_reasons, fingerprint
from alignment.data.sequences import Picked, RowList
from alignment.errors import UserError, as_names

BUNDLED = Path(__file__).parent / "bundled"
_SHOWN_VALUES = 20
_KEY_BYTES = 32
_ABSENT = object()
_RECOGNISED = 10_000
"""Records by which the layout of a source is recognised, so that no more of them are held at once."""


@dataclass(frozen=True, slots=True)
class LoadedData:
    """Training and held-out rows, and how they were read.

    Attributes:
        layout: name of the training rows' layout.
        family: what they are (`Layout.family`).
        bad: rows left out of either part because something is wrong with them.
        dropped: rows of either part that compare nothing, such as ties.
        fingerprint: SHA-256 of the content of both parts, in order.
        description: one line for logs and reports.
    """

    train: Sequence[Row]
    eval: Sequence[Row]
    layout: str
    family: str
    bad: list[BadRow]
    dropped: list[BadRow]
    fingerprint: str
    description: str


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of a source; `keys` are the digests of their prompts, end to end."""

    rows: RowList
    keys: bytearray
    layout: Layout
    bad: list[BadRow]
    dropped: list[BadRow]
    note: str


@dataclass(frozen=True, slots=True)
class _Opened:
    """A source whose records are about to be read.

    Attributes:
        name: for messages.
        allowed: the limit on bad rows if `max_bad_rows` is null.
    """

    name: str
    records: Iterator[Numbered]
    allowed: int | None


def load_rows(config: DataConfig, *, stage: Stage, folder: Path | None = None) -> LoadedData:
    """Read and check the rows of `config.source` and its held-out rows.

    Held-out rows come from `eval_source`, from another split of `source`, or from the bundled set's own eval file.
    Without any of these, `eval_size` rows are held out by a hash of their prompts: neither the seed nor the order of
    the file matters, and all rows of a prompt are on one side. For SFT, pairs give their chosen completion, ranked
    lists their best one, and labelled data the desirable rows.

    No more rows are read than `limit` asks for, unless the held-out rows, or `train_where`, need all of them.

    Args:
        folder: for the rows, where they are too many for memory; None: they stay in memory.

    Raises:
        UserError: a source cannot be read, or has more bad rows than `max_bad_rows`.
    """
    sources = as_names("data.source", config.source)
    evaluation = _open_eval(config, stage)
    aside = evaluation is None and config.eval_size
    limit = None if aside or config.train_where else config.limit
    opened = _open(sources, config.split, "sft" if stage == "sft" else "train", config)
    train = _read(opened, config, stage, limit, folder)
    parts = [train]
    kept, held = np.arange(len(train.rows)), np.arange(0)
    if evaluation is not None:
        parts.append(_read(evaluation, config, stage, config.eval_limit, folder))
        held = np.arange(len(parts[1].rows))
    elif config.eval_size:
        kept, held = _hold_out(train.keys, config.eval_size, ", ".join(sources))
    kept = _where(train.rows, kept, config.train_where)[: config.limit]
    held = held[: config.eval_limit]
    rows, held_out = _picked(train.rows, kept), _picked(parts[-1].rows, held)
    bad = [row for part in parts for row in part.bad]
    dropped = [row for part in parts for row in part.dropped]
    held_keys = {_key(parts[-1].keys, index) for index in held.tolist()}
    shared = held_keys and {key for key in (_key(train.keys, index) for index in kept.tolist()) if key in held_keys}
    counts = f"{len(rows)} training and {len(held_out)} held-out rows"
    notes = [f"{', '.join(sources)}: {counts}, layout {train.layout.name}"]
    notes += [part.note for part in parts if part.note]
    if bad:
        notes.append(f"{len(bad)} bad rows left out: {in_words(count_reasons(bad))}")
    if shared:
        notes.append(f"{len(shared)} held-out prompts are training prompts too")
    digest = fingerprint(rows, held_out)
    layout = train.layout
    return LoadedData(rows, held_out, layout.name, layout.family, bad, dropped, digest, "; ".join(notes))


def local_files(config: DataConfig) -> list[Path] | None:
    """All files that the rows come from, in order; None where some come from elsewhere.

    Raises:
        UserError: there is no such file, or none of a split.
    """
    asked = [(source, config.split) for source in as_names("data.source", config.source)]
    if config.eval_source is not None or config.eval_split is not None:
        others = config.source if config.eval_source is None else config.eval_source
        split = config.eval_split or config.split
        asked += [(source, split) for source in as_names("data.eval_source", others)]
    found: list[Path] = []
    for source, split in asked:
        files = [] if source.startswith(BUNDLED_PREFIX) else files_of(source, split, config.name)
        own = [file for file in files if isinstance(file, Path)]
        if not own or len(own) < len(files):
            return None
        found += own
    return found


def _picked(rows: RowList, indices: np.ndarray) -> Sequence[Row]:
    """These rows, in order: in memory as a list, like all of them."""
    if not rows.in_file:
        return [rows[index] for index in indices]
    return rows if len(indices) == len(rows) else Picked(rows, indices)


def _where(rows: RowList, kept: np.ndarray, wanted: Mapping[str, Any]) -> np.ndarray:
    """Those of the kept indices whose rows' columns have one of the wanted values.

    Raises:
        UserError: no row has the column, or a wanted value.
    """
    for column, values in wanted.items():
        found = [row.meta.get(column, _ABSENT) for row in Picked(rows, kept)]
        known = sorted({str(value) for value in found if value is not _ABSENT})
        accepted = {str(value) for value in (values if isinstance(values, list) else [values])}
        if lacking := sorted(accepted - set(known)):
            there = f"; it has {', '.join(known[:_SHOWN_VALUES])}" if known else ", which no row has"
            raise UserError(f"data.train_where: no training row has {lacking[0]} in the column {column}{there}.")
        kept = kept[[str(None if value is _ABSENT else value) in accepted for value in found]]
    return kept


def _open_eval(config: DataConfig, stage: Stage) -> _Opened | None:
    """The source of the held-out rows; None where they are rows of the training source, or there are none."""
    sources = as_names("data.source", config.source)
    if config.eval_source is None and all(source.startswith(BUNDLED_PREFIX) for source in sources):
        there = stage == "preference" and all(_bundled(source, "eval").is_file() for source in sources)
        return _open(sources, config.split, "eval", config) if there else None
    if config.eval_source is None and config.eval_split is None:
        return None
    split = config.eval_split or config.split
    others = sources if config.eval_source is None else as_names("data.eval_source", config.eval_source)
    for source in others:
        own_part = source.startswith(BUNDLED_PREFIX) and stage == "preference"
        if source in sources and not own_part and _same_rows(source, split, config):
            raise UserError(
                f"The held-out rows would be the training rows ({source}, split {split}): "
                "give another data.eval_source or data.eval_split, or set data.eval_size."
            )
    return _open(others, split, "eval" if stage == "preference" else "sft", config)


def _same_rows(source: str, split: str, config: DataConfig) -> bool:
    if split == config.split or source.startswith(BUNDLED_PREFIX):
        return True
    files = files_of(source, split, config.name)
    return bool(files) and files == files_of(source, config.split, config.name)


def _open(sources: Sequence[str], split: str, part: str, config: DataConfig) -> _Opened:
    """All sources, one after the other; `part` is that of a bundled set."""
    opened = [_open_one(source, split, part, config) for source in sources]
    allowed = None if any(one.allowed is None for one in opened) else 0
    return _Opened(", ".join(one.name for one in opened), chain.from_iterable(one.records for one in opened), allowed)


def _open_one(source: str, split: str, part: str, config: DataConfig) -> _Opened:
    if source.startswith(BUNDLED_PREFIX):
        file = _bundled(source, part)
        if not file.is_file():
            names = ", ".join(sorted(path.stem.removesuffix(f"_{part}") for path in BUNDLED.glob(f"*_{part}.jsonl")))
            raise UserError(
                f"There is no file {file.name} behind '{source}'; bundled {part} data are: {names or 'none'}."
            )
        return _Opened(file.name, ((file.name, number, record) for number, record in read_file(file)), 0)
    if files := files_of(source, split, config.name):
        records = ((str(file), number, record) for file in files for number, record in read_file(file))
        return _Opened(str(files[0]) if len(files) == 1 else source, records, 0)
    on_modelscope = source.startswith(MODELSCOPE_PREFIX)
    if not on_modelscope and not is_on_hub(source):
        raise UserError(f"There is no file or folder '{source}', and this is not the name of a hub data set either.")
    name = f"{source}[{split}]"
    rows = (read_modelscope if on_modelscope else read_hub)(source, split, config)
    return _Opened(name, ((name, number, row) for number, row in enumerate(rows, 1)), None)


def _bundled(source: str, part: str) -> Path:
    return BUNDLED / f"{source.removeprefix(BUNDLED_PREFIX)}_{part}.jsonl"


def _read(opened: _Opened, config: DataConfig, stage: Stage, limit: int | None, folder: Path | None) -> _Part:
    """The rows of a source, at most `limit` of them; in a file in the folder where they are many.

    Raises:
        UserError: the layout is not known or not for this stage, or too many rows are bad.
    """
    source = opened.name
    layout, records = _recognised(opened, config, stage, limit)
    bad: list[BadRow] = []
    dropped: list[BadRow] = []
    rows, keys = RowList(folder), bytearray()
    others = weighted = 0
    for row in rows_of(records, layout, config.columns) if layout is not None else (record for *_, record in records):
        if isinstance(row, BadRow):
            (bad if row.fault else dropped).append(row)
            continue
        if stage == "sft":
            if row.labels == (False,):
                others += 1
                continue
            weighted += row.weight != 1
            row = replace(row, completions=row.completions[:1], labels=None, scores=None, weight=1.0)
        rows.append(row)
        keys += _prompt_key(row)
        if len(rows) == limit:
            break

    # What is left must be enough
    allowed = config.max_bad_rows if config.max_bad_rows is not None else opened.allowed
    if allowed is not None and len(bad) > allowed:
        count = f"{len(bad)} bad row{'s' if len(bad) > 1 else ''}"
        raise UnusableRows(f"{source} has {count}, and data.max_bad_rows allows {allowed}", bad, source)
    if not rows and others:
        raise UserError(f"{source} has no row labelled true, and SFT learns from those only.")
    if not rows and bad:
        raise UnusableRows(f"{source} has no usable row, and {len(bad)} bad ones", bad, source)
    if not rows and dropped:
        raise UnusableRows(f"{source} has no usable row, and {len(dropped)} that compare nothing", dropped, source)
    if not rows or layout is None:
        raise UserError(f"{source} has no usable row.")
    notes = [layout.reading.note] if layout.reading is not None and layout.reading.note else []
    if stage == "sft" and layout.family == "labelled":
        notes.append(f"{others} rows labelled undesirable are not used for SFT")
    if stage == "sft" and layout.family in ("pairs", "lists"):
        best = "chosen" if layout.family == "pairs" else "best"
        notes.append(f"the {best} completions of {layout.family} serve for SFT")
    if weighted:
        notes.append("SFT does not use their weights")
    return _Part(rows, keys, layout, bad, dropped, "; ".join(notes))


def _recognised(
    opened: _Opened, config: DataConfig, stage: Stage, limit: int | None
) -> tuple[Layout | None, Iterator[Numbered]]:
    """The layout of the first records, and all records; None where none is an object."""
    wanted = _RECOGNISED if limit is None else min(_RECOGNISED, max(limit, SAMPLE))
    first = []
    good = []
    for item in opened.records:
        first.append(item)
        if isinstance(item[2], dict):
            good.append(item[2])
            if len(good) == wanted:
                break
    verdicts = Verdicts(config.winner, config.ties if stage == "preference" else Ties.drop, config.strengths)
    layout = recognise(good, config.columns, stage, opened.name, verdicts) if good else None
    return layout, chain(first, opened.records)


def _prompt_key(row: Row) -> bytes:
    return hashlib.sha256(json.dumps(row.prompt, sort_keys=True).encode("ascii")).digest()


def _key(keys: bytearray, index: int) -> bytes:
    return bytes(keys[index * _KEY_BYTES : (index + 1) * _KEY_BYTES])


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
