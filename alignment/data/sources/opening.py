"""What a source means: a bundled set, files here or behind an address, or a set on a hub; opened, record by record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from alignment.config.data import DataConfig
from alignment.config.places import BUNDLED_PREFIX, MODELSCOPE_PREFIX, is_on_hub
from alignment.data.layouts.columns import Numbered
from alignment.data.sources.folders import files_of
from alignment.data.sources.formats import read_file
from alignment.data.sources.hub import read_hub, read_modelscope
from alignment.errors import UserError

BUNDLED = Path(__file__).parents[1] / "bundled"


@dataclass(frozen=True, slots=True)
class Opened:
    """A source whose records are about to be read.

    Attributes:
        name: for messages.
        records: a `BadRow` in place of one that cannot be read.
        allowed: the limit on bad rows if `max_bad_rows` is null.
    """

    name: str
    records: Iterator[Numbered]
    allowed: int | None


def open_records(sources: Sequence[str], split: str, part: str, config: DataConfig) -> Opened:
    """All sources, one after the other; `part` is that of a bundled set: train, eval or sft.

    Raises:
        UserError: a source does not exist, or is none. What is wrong with its records shows when they are read.
    """
    opened = [_open_one(source, split, part, config) for source in sources]
    allowed = None if any(one.allowed is None for one in opened) else 0
    return Opened(", ".join(one.name for one in opened), chain.from_iterable(one.records for one in opened), allowed)


def _open_one(source: str, split: str, part: str, config: DataConfig) -> Opened:
    if source.startswith(BUNDLED_PREFIX):
        file = bundled_file(source, part)
        if not file.is_file():
            names = ", ".join(sorted(path.stem.removesuffix(f"_{part}") for path in BUNDLED.glob(f"*_{part}.jsonl")))
            raise UserError(
                f"There is no file {file.name} behind '{source}'; bundled {part} data are: {names or 'none'}."
            )
        return Opened(file.name, ((file.name, number, record) for number, record in read_file(file)), 0)
    if files := files_of(source, split, config.name):
        records = ((str(file), number, record) for file in files for number, record in read_file(file))
        return Opened(str(files[0]) if len(files) == 1 else source, records, 0)
    on_modelscope = source.startswith(MODELSCOPE_PREFIX)
    if not on_modelscope and not is_on_hub(source):
        raise UserError(f"There is no file or folder '{source}', and this is not the name of a hub data set either.")
    name = f"{source}[{split}]"
    rows = (read_modelscope if on_modelscope else read_hub)(source, split, config)
    return Opened(name, ((name, number, row) for number, row in enumerate(rows, 1)), None)


def bundled_file(source: str, part: str) -> Path:
    """The file of a part of a bundled set, whether there is one or not."""
    return BUNDLED / f"{source.removeprefix(BUNDLED_PREFIX)}_{part}.jsonl"


def bundled_files(source: str) -> list[Path]:
    """The files of all parts of a bundled set."""
    return sorted(BUNDLED.glob(f"{source.removeprefix(BUNDLED_PREFIX)}_*.jsonl"))


def same_rows(source: str, split: str, config: DataConfig) -> bool:
    """Whether a split of a source means the same rows as the split of the training data."""
    if split == config.split or source.startswith(BUNDLED_PREFIX):
        return True
    files = files_of(source, split, config.name)
    return bool(files) and files == files_of(source, config.split, config.name)
