"""Read `data.source` into checked rows: a bundled set, a local file or folder, or a hub set."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.config.schema import DataConfig
from alignment.data.layouts import Layout, Stage, recognise, to_row
from alignment.data.rows import BadRow, Row, count_reasons, fingerprint
from alignment.errors import UserError

BUNDLED = Path(__file__).parent / "bundled"
SPLIT_WORDS = ("train", "test", "eval", "validation", "valid", "dev")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
Numbered = Iterator[tuple[int, Any]]
"""(row number from 1, record); a `BadRow` in place of a record that cannot be read."""


@dataclass(frozen=True, slots=True)
class LoadedData:
    """Training and held-out rows, and how they were read.

    Attributes:
        layout: name of the training rows' layout.
        bad: rows left out of either part.
        fingerprint: SHA-256 of the content of both parts, in order.
        description: one line for logs and reports.
    """

    train: list[Row]
    eval: list[Row]
    layout: str
    bad: list[BadRow]
    fingerprint: str
    description: str


@dataclass(frozen=True, slots=True)
class _Part:
    rows: list[Row]
    layout: Layout
    bad: list[BadRow]
    note: str


def load_rows(config: DataConfig, *, stage: Stage) -> LoadedData:
    """Read and check the rows of `config.source` and its held-out rows.

    Held-out rows come from `eval_source`, from another split of `source`, or from the bundled set's own eval file.
    Without any of these, `eval_size` rows are held out by a hash of their prompts: neither the seed nor the order of
    the file matters, and all rows of a prompt are on one side. For SFT, pairs give their chosen completion, ranked
    lists their best one, and labelled data the desirable rows.

    Raises:
        UserError: a source cannot be read, or has more bad rows than `max_bad_rows`.
    """
    train = _load(config.source, config.split, config, stage)
    evaluation = None
    if config.source.startswith("bundled:") and config.eval_source is None:
        if stage == "preference" and _bundled(config.source, "eval").is_file():
            evaluation = _read_bundled(config.source, "eval", config, stage)
    elif config.eval_source is not None or config.eval_split is not None:
        evaluation = _load_eval(config, stage)
    rows = train.rows
    if evaluation is not None:
        held_out = evaluation.rows
    elif config.eval_size:
        rows, held_out = _hold_out(rows, config.eval_size, config.source)
    else:
        held_out = []
    rows, held_out = rows[: config.limit], held_out[: config.eval_limit]
    parts = [train] if evaluation is None else [train, evaluation]
    bad = [row for part in parts for row in part.bad]
    shared = {_prompt_key(row) for row in rows} & {_prompt_key(row) for row in held_out}
    notes = [f"{config.source}: {len(rows)} training and {len(held_out)} held-out rows, layout {train.layout.name}"]
    notes += [part.note for part in parts if part.note]
    if bad:
        notes.append(
            f"{len(bad)} bad rows left out ({', '.join(f'{n} {reason}' for reason, n in count_reasons(bad).items())})"
        )
    if shared:
        notes.append(f"{len(shared)} held-out prompts are training prompts too")
    return LoadedData(rows, held_out, train.layout.name, bad, fingerprint(rows, held_out), "; ".join(notes))


def _load_eval(config: DataConfig, stage: Stage) -> _Part:
    source, split = config.eval_source or config.source, config.eval_split or config.split
    if source.startswith("bundled:") and stage == "preference":
        return _read_bundled(source, "eval", config, stage)
    if source == config.source and _same_rows(source, split, config.split):
        raise UserError(
            f"The held-out rows would be the training rows ({source}, split {split}): "
            "give another data.eval_source or data.eval_split, or set data.eval_size."
        )
    return _load(source, split, config, stage)


def _same_rows(source: str, split: str, other: str) -> bool:
    path = Path(source).expanduser()
    if path.is_dir():
        return _files_of(path, split) == _files_of(path, other)
    return split == other or path.is_file() or source.startswith("bundled:")


def _load(source: str, split: str, config: DataConfig, stage: Stage) -> _Part:
    if source.startswith("bundled:"):
        return _read_bundled(source, "sft" if stage == "sft" else "train", config, stage)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_part(_files_of(path, split), config, stage)
    if path.exists():
        return _read_part([path], config, stage)
    if path.suffix in READERS or source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
        raise UserError(f"There is no file or folder '{source}', and this is not the name of a hub data set either.")
    name = f"{source}[{split}]"
    return _to_part(
        [(name, i, r) for i, r in enumerate(_read_hub(source, split, config), 1)], config, stage, name, None
    )


def _bundled(source: str, part: str) -> Path:
    return BUNDLED / f"{source.removeprefix('bundled:')}_{part}.jsonl"


def _read_bundled(source: str, part: str, config: DataConfig, stage: Stage) -> _Part:
    file = _bundled(source, part)
    if not file.is_file():
        names = ", ".join(sorted(path.stem.removesuffix(f"_{part}") for path in BUNDLED.glob(f"*_{part}.jsonl")))
        raise UserError(f"There is no file {file.name} behind '{source}'; bundled {part} data are: {names or 'none'}.")
    return _to_part([(file.name, number, record) for number, record in _read_file(file)], config, stage, file.name, 0)


def _files_of(folder: Path, split: str) -> list[Path]:
    """The folder's data files; if they are named after splits (train-00000-of-00002), those of `split`."""
    files = sorted(path for path in folder.iterdir() if path.suffix in READERS and path.is_file())
    suffixes = sorted({path.suffix for path in files})
    if len(suffixes) != 1:
        found = " and ".join(suffixes) or "none"
        raise UserError(f"Folder {folder} must hold data files of one kind ({', '.join(READERS)}), and has {found}.")
    part = re.compile(rf"(.*[-_.])?{re.escape(split)}(-\d+)?(-of-\d+)?")
    of_split = [path for path in files if part.fullmatch(path.stem)]
    if not of_split and any(word in re.split(r"[-_.]", path.stem) for path in files for word in SPLIT_WORDS):
        names = ", ".join(path.name for path in files)
        raise UserError(f"Folder {folder} has files named after splits ({names}) but none for the split '{split}'.")
    return of_split or files


def _read_part(files: Sequence[Path], config: DataConfig, stage: Stage) -> _Part:
    records = [(str(path), number, record) for path in files for number, record in _read_file(path)]
    source = str(files[0] if len(files) == 1 else files[0].parent)
    return _to_part(records, config, stage, source, 0)


def _to_part(
    records: list[tuple[str, int, Any]], config: DataConfig, stage: Stage, source: str, allowed: int | None
) -> _Part:
    """`allowed` is the limit on bad rows if `max_bad_rows` is null."""
    good = [record for _, _, record in records if isinstance(record, dict)]
    results: list[Row | BadRow]
    if good:
        layout = recognise(good, config.columns, stage, source)
        results = [
            record if isinstance(record, BadRow) else to_row(record, layout, config.columns, file, number)
            for file, number, record in records
        ]
    else:
        results = [record for _, _, record in records if isinstance(record, BadRow)]
    bad = [result for result in results if isinstance(result, BadRow)]
    rows = [result for result in results if isinstance(result, Row)]
    allowed = config.max_bad_rows if config.max_bad_rows is not None else allowed
    if allowed is not None and len(bad) > allowed:
        first = ", ".join(f"{'' if b.file == source else f'{b.file} '}row {b.row}: {b.reason}" for b in bad[:5])
        raise UserError(
            f"{source} has {len(bad)} bad row(s), and data.max_bad_rows allows {allowed}: {first}"
            f"{', ...' if len(bad) > 5 else ''}."
        )
    if not rows:
        raise UserError(f"{source} has no usable row{f' ({len(bad)} bad rows)' if bad else ''}.")
    note = ""
    if stage == "sft" and layout.family == "labelled":
        desirable = [replace(row, labels=None) for row in rows if row.labels == (True,)]
        if not desirable:
            raise UserError(f"{source} has no row labelled true, and SFT learns from those only.")
        note = f"{len(rows) - len(desirable)} rows labelled undesirable are not used for SFT"
        rows = desirable
    if stage == "sft" and layout.family in ("pairs", "lists"):
        rows = [replace(row, completions=row.completions[:1], scores=None) for row in rows]
        note = f"the {'chosen' if layout.family == 'pairs' else 'best'} completions of {layout.family} serve for SFT"
    if stage == "sft" and any(row.weight != 1 for row in rows):
        rows = [replace(row, weight=1.0) for row in rows]
        note += "; SFT does not use their weights"
    return _Part(rows, layout, bad, note)


def _prompt_key(row: Row) -> str:
    return hashlib.sha256(json.dumps(row.prompt, sort_keys=True).encode("ascii")).hexdigest()


def _hold_out(rows: list[Row], size: int, source: str) -> tuple[list[Row], list[Row]]:
    """Split off at most `size` rows, in the order of their prompts' hashes, all rows of a prompt together."""
    by_prompt: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_prompt.setdefault(_prompt_key(row), []).append(index)
    held: set[int] = set()
    for key in sorted(by_prompt):
        if len(held) + len(by_prompt[key]) <= size:
            held.update(by_prompt[key])
    if not held or len(held) == len(rows):
        raise UserError(
            f"data.eval_size {size} cannot be set aside from {source}, which has {len(rows)} rows "
            f"of {len(by_prompt)} prompts (rows of one prompt stay together)."
        )
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [rows[index] for index in sorted(held)]


def _read_file(path: Path) -> Numbered:
    if path.suffix not in READERS:
        raise UserError(f"{path} is no data file: accepted are {', '.join(READERS)}.")
    return READERS[path.suffix](path)


def _read_jsonl(path: Path) -> Numbered:
    with path.open("rb") as lines:  # split at "\n" only: text may hold U+2028 and its like
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, json.loads(text)
            except UnicodeDecodeError as error:
                yield number, BadRow("not_utf8", f"byte {error.start} of the line", str(path), number)
            except (ValueError, RecursionError) as error:
                yield number, BadRow("broken_json", str(error), str(path), number)


def _read_json(path: Path) -> Numbered:
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if head == b"{":  # JSON Lines under another name
        yield from _read_jsonl(path)
        return
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(records, list):
        raise UserError(f"{path} must hold a JSON array of rows or JSON Lines, not {type(records).__name__}.")
    yield from enumerate(records, 1)


def _read_csv(path: Path) -> Numbered:
    csv.field_size_limit(sys.maxsize)  # the module's 128 KiB are less than a long answer
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for number, record in enumerate(reader, 1):
                yield number, _checked_cells(record, str(path), number)
        except csv.Error as error:
            raise UserError(f"{path} is not valid CSV after line {reader.line_num}: {error}.") from None


def _checked_cells(record: dict[Any, Any], file: str, number: int) -> Any:
    if None in record:
        return BadRow("too_many_cells", f"{len(record[None])} cells more than the header has", file, number)
    for name, cell in record.items():
        try:
            (cell or "").encode("utf-8")
        except UnicodeEncodeError as error:
            return BadRow("not_utf8", f"character {error.start} of column '{name}'", file, number)
    return record


def _read_parquet(path: Path) -> Numbered:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}.") from None


def _read_hub(source: str, split: str, config: DataConfig) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        data = datasets.load_dataset(source, config.name, split=split)
    except Exception as error:  # of several libraries: network, cache, name, split, file
        cause = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"Hub data set '{source}' (name {config.name}, split {split}) could not be loaded "
            f"({type(error).__name__}: {cause}): when offline, set data.source to a local file, "
            "HF_HOME to a cache that has it, or HF_ENDPOINT to a mirror."
        ) from error
    yield from data


READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
