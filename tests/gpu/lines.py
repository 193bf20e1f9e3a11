"""What the parts of the check share: where their lines go, where the models lie, whether it is a dry run."""

from __future__ import annotations

import json
import os
from pathlib import Path


def note(out: Path, part: str, **values: object) -> None:
    """Print a line and add it to the results."""
    line = json.dumps({"part": part, **values}, default=str)
    print(line, flush=True)
    with (out / "results.jsonl").open("a") as file:
        file.write(line + "\n")


def out_folder() -> Path:
    """The folder of the results, as `check` set it for its parts."""
    folder = Path(os.environ.get("CHECK_OUT", "check-out")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_dry() -> bool:
    """Whether a tiny model on a CPU stands in."""
    return os.environ.get("CHECK_DRY") == "1"
