"""What a name of data means: a bundled set, a path, an address, or a set on a hub; and how data files end."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

BUNDLED_PREFIX = "bundled:"
"""A source with this prefix is a set inside the package."""

MODELSCOPE_PREFIX = "modelscope:"
"""A source with this prefix is a set on ModelScope."""

MAGIC = re.compile(r"[*?\[]")
"""A sign of a pattern that stands for several files."""

DATA_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
"""How data files end, in lower or upper case."""

PACKED_ENDINGS = (".gz", ".zst", ".xz", ".bz2")
"""What may follow the ending of a text file that is packed."""

ACCEPTED_FILES = f"{', '.join(DATA_ENDINGS)}, and text files packed as {', '.join(PACKED_ENDINGS)}"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def ending_of(name: str) -> tuple[str, str]:
    """The ending that names the format and the one that names the packing, in lower case; empty where there is none."""
    path = PurePath(name)
    first, packed = path.suffix.lower(), ""
    if first in PACKED_ENDINGS:
        first, packed = PurePath(path.stem).suffix.lower(), first
    return first, packed


def is_data_name(name: str) -> bool:
    """Whether the name of a file says that it holds rows: not what libraries write beside them."""
    beside = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
    return ending_of(name)[0] in DATA_ENDINGS and name not in beside


def is_remote(source: str) -> bool:
    """Whether a source is an address of a file system: s3://, gs://, https://, hf:// and so on."""
    return "://" in source


def is_on_hub(source: str) -> bool:
    """Whether a source is none of the package, none of this machine, and could be the id of a set on the hub."""
    return not (
        source.startswith((BUNDLED_PREFIX, MODELSCOPE_PREFIX, ".", "/", "~"))
        or ending_of(source)[0] in DATA_ENDINGS
        or Path(source).exists()
        or not _HUB_ID.fullmatch(source)
    )
