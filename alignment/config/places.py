"""What a name of data means: a bundled set, a path, or a set on the hub; and how data files end."""

from __future__ import annotations

import re
from pathlib import Path

BUNDLED_PREFIX = "bundled:"
"""A source with this prefix is a set inside the package."""

DATA_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
"""How data files end, in lower or upper case."""

PACKED_ENDINGS = (".gz", ".zst", ".xz", ".bz2")
"""What may follow the ending of a text file that is packed."""

ACCEPTED_FILES = f"{', '.join(DATA_ENDINGS)}, and text files packed as {', '.join(PACKED_ENDINGS)}"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def ending_of(path: Path) -> tuple[str, str]:
    """The ending that names the format and the one that names the packing, in lower case; empty where there is none."""
    first, packed = path.suffix.lower(), ""
    if first in PACKED_ENDINGS:
        first, packed = Path(path.stem).suffix.lower(), first
    return first, packed


def is_on_hub(source: str) -> bool:
    """Whether a source is none of the package, none of this machine, and could be the id of a set on the hub."""
    return not (
        source.startswith((BUNDLED_PREFIX, ".", "/", "~"))
        or ending_of(Path(source))[0] in DATA_ENDINGS
        or Path(source).exists()
        or not _HUB_ID.fullmatch(source)
    )
