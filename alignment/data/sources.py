"""Read `data.source` into checked rows: a bundled set, a local file or folder, or a hub set."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.config.data import DataConfig
from alignment.config.places import ACCEPTED_FILES, BUNDLED_PREFIX, ending_of, is_on_hub
from alignment.data.formats import is_data_file, read_file
from alignment.data.layouts import Layout, Stage, recognise, to_row
from alignment.data.reasons import UnusableRows, in_words
from alignment.data.rows import BadRow, Row, count_reasons, fingerprint
from alignment.errors import UserError

BUNDLED = Path(__file__).parent / "bundled"
_SHOWN_VALUES = 20
SPLIT_WORDS = ("train", "test", "eval", "validation", "valid", "dev")


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
    if config.source.startswith(BUNDLED_PREFIX) and config.eval_source is None:
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
    rows = _where(rows, config.train_where)
    rows, held_out = rows[: config.limit], held_out[: config.eval_limit]
    parts = [train] if evaluation is None else [train, evaluation]
    bad = [row for part in parts for row in part.bad]
    shared = {_prompt_key(row) for row in rows} & {_prompt_key(row) for row in held_out}
    notes = [f"{config.source}: {len(rows)} training and {len(held_out)} held-out rows, layout {train.layout.name}"]
    notes += [part.note for part in parts if part.note]
    if bad:
        notes.append(f"{len(bad)} bad rows left out: {in_words(count_reasons(bad))}")
    if shared:
        notes.append(f"{len(shared)} held-out prompts are training prompts too")
    return LoadedData(rows, held_out, train.layout.name, bad, fingerprint(rows, held_out), "; ".join(notes))


def _where(rows: list[Row], wanted: Mapping[str, Any]) -> list[Row]:
    """The rows whose columns have one of the wanted values.

    Raises:
        UserError: no row has the column, or a wanted value.
    """
    for column, values in wanted.items():
        known = sorted({str(row.meta[column]) for row in rows if column in row.meta})
        accepted = {str(value) for value in (values if isinstance(values, list) else [values])}
        if lacking := sorted(accepted - set(known)):
            there = f"; it has {', '.join(known[:_SHOWN_VALUES])}" if known else ", which no row has"
            raise UserError(f"data.train_where: no training row has {lacking[0]} in the column {column}{there}.")
        rows = [row for row in rows if str(row.meta.get(column)) in accepted]
    return rows


def _load_eval(config: DataConfig, stage: Stage) -> _Part:
    source, split = config.eval_source or config.source, config.eval_split or config.split
    if source.startswith(BUNDLED_PREFIX) and stage == "preference":
        return _read_bundled(source, "eval", config, stage)
    if source == config.source and _same_rows(source, split, config):
        raise UserError(
            f"The held-out rows would be the training rows ({source}, split {split}): "
            "give another data.eval_source or data.eval_split, or set data.eval_size."
        )
    return _load(source, split, config, stage)


def _same_rows(source: str, split: str, config: DataConfig) -> bool:
    path = Path(source).expanduser()
    if path.is_dir():
        return _files_of(path, split, config.name) == _files_of(path, config.split, config.name)
    return split == config.split or path.is_file() or source.startswith(BUNDLED_PREFIX)


def _load(source: str, split: str, config: DataConfig, stage: Stage) -> _Part:
    if source.startswith(BUNDLED_PREFIX):
        return _read_bundled(source, "sft" if stage == "sft" else "train", config, stage)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_part(_files_of(path, split, config.name), config, stage)
    if path.exists():
        return _read_part([path], config, stage)
    if not is_on_hub(source):
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
    return _to_part([(file.name, number, record) for number, record in read_file(file)], config, stage, file.name, 0)


def _files_of(folder: Path, split: str, name: str | None) -> list[Path]:
    """The folder's data files; if the folder or its files are divided into splits, those of `split`.

    The folder may be what the datasets library saves, or the clone of a hub set, whose files lie deeper: in a folder
    named after the configuration `name`, after the split, or `data`, or in the only one that holds any.
    """
    # Saved by the datasets library: a folder for each split, or the files of one
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if split not in splits:
            raise UserError(f"Folder {folder} holds the splits {', '.join(splits)} and none named '{split}'.")
        return _files_of(folder / split, split, None)
    if all((folder / file).is_file() for file in ("state.json", "dataset_info.json")):
        try:
            saved = json.loads((folder / "state.json").read_bytes())
            return [folder / entry["filename"] for entry in saved["_data_files"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{folder / 'state.json'} does not name the data files: save the set again.") from None

    # Deeper in a clone
    files = sorted(path for path in folder.iterdir() if is_data_file(path))
    if not files:
        below = sorted({path.relative_to(folder).parts[0] for path in folder.glob("[!.]*/**/*") if is_data_file(path)})
        found = next((part for part in (name, split, "data") if part in below), below[0] if len(below) == 1 else None)
        if found is not None:
            return _files_of(folder / found, split, None if found == name else name)
        if below:
            raise UserError(
                f"Folder {folder} has data files in {', '.join(below)}, and none of these is named after the split "
                f"'{split}': choose one by data.split or data.name, or give its path to data.source."
            )

    # Files side by side
    kinds = sorted({"".join(ending_of(path)[:1]) for path in files})
    if len(kinds) != 1:
        found_kinds = " and ".join(kinds) or "none"
        raise UserError(f"Folder {folder} must hold data files of one kind ({ACCEPTED_FILES}), and has {found_kinds}.")
    stems = {path: path.name[: -len("".join(ending_of(path)))] for path in files}
    part = re.compile(rf"(.*[-_.])?{re.escape(split)}(-\d+)?(-of-\d+)?")
    of_split = [path for path in files if part.fullmatch(stems[path])]
    if not of_split and any(word in re.split(r"[-_.]", stem) for stem in stems.values() for word in SPLIT_WORDS):
        names_found = ", ".join(path.name for path in files)
        raise UserError(
            f"Folder {folder} has files named after splits ({names_found}) but none for the split '{split}'."
        )
    return of_split or files


def _read_part(files: Sequence[Path], config: DataConfig, stage: Stage) -> _Part:
    records = [(str(path), number, record) for path in files for number, record in read_file(path)]
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
        count = f"{len(bad)} bad row{'s' if len(bad) > 1 else ''}"
        raise UnusableRows(f"{source} has {count}, and data.max_bad_rows allows {allowed}", bad, source)
    if not rows and bad:
        raise UnusableRows(f"{source} has no usable row, and {len(bad)} bad ones", bad, source)
    if not rows:
        raise UserError(f"{source} has no usable row.")
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
