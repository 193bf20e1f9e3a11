"""What two run folders and their caches must have in common, file by file; times, paths and versions do not count."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

VOLATILE = {
    *(
        "time",
        "wall_s",
        "crc32",
        "digest",
        "seconds",
        "tokens_per_second",
        "train_seconds",
        "memory",
        "versions",
        "machine",
        "git_commit",
    ),
    *("created", "last_used", "files", "path", "taken_over", "plan"),
}
"""Keys whose values are other in every run of the same code."""
RENDERED = {".md", ".html", ".png", ".csv", ".log", ".txt"}
"""Files made for reading: their numbers stand in the files that are compared."""

UNCOMPARED = {"plan.json", "multirun.yaml", "checksums.json"}
"""A plan counts the memory that is free; Hydra's own file names the checkout."""


def contents(folder: Path, renamed: Mapping[str, str]) -> dict[str, str]:
    """name -> digest of everything that counts in a folder of runs with their cache.

    Args:
        renamed: configuration keys of the version before -> their names now, as in `reference.stages`.
    """
    found: dict[str, str] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        parts = set(path.relative_to(folder).parts)
        if path.name in UNCOMPARED or path.suffix in RENDERED or path.suffix == ".lock" or parts & {".hydra", "wandb"}:
            continue
        if path.match("cache/stages/*/*") or path.match("cache/stages/*/policy/*"):
            continue  # keyed by the code, which differs: see below
        if path.name == "reference.sqlite":
            found[name] = _digest(list(_stored(path)))
        elif path.suffix in (".json", ".jsonl", ".yaml"):
            found[name] = _digest(_parsed(path, folder, renamed))
        elif path.suffix == ".safetensors" or path.suffix == ".jinja":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    entries = sorted(_digest(_entry(path, folder)) for path in folder.glob("cache/stages/*/entry.json"))
    return found | {f"cache/stages, entry {number}": entry for number, entry in enumerate(entries)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _stored(path: Path) -> Iterator[tuple[str, str, str]]:
    """(identity, key, value) of every reference log-prob, in an order of their own."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        rows = connection.execute(
            "SELECT i.identity, l.key, l.value FROM logps l JOIN identities i ON i.number = l.identity"
        ).fetchall()
    yield from sorted((identity, key.hex(), value.hex()) for identity, key, value in rows)


def _parsed(path: Path, folder: Path, renamed: Mapping[str, str]) -> Any:
    text = re.sub(re.escape(str(folder)), "<folder>", path.read_text("utf-8"))
    if path.suffix == ".jsonl":
        return [_lasting(json.loads(line)) for line in text.splitlines()]
    if path.suffix == ".json":
        return _lasting(json.loads(text))
    value = yaml.safe_load(text)
    for old, new in renamed.items():
        _rename(value, old.split("."), new.split("."))
    return value


def _rename(value: Any, old: list[str], new: list[str]) -> None:
    *above, last = old
    for key in above:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, dict) and last in value:
        value[new[-1]] = value.pop(last)


def _entry(path: Path, folder: Path) -> Any:
    """What a stored stage result holds; its policy's files by their digests."""
    entry = json.loads(re.sub(re.escape(str(folder)), "<folder>", path.read_text("utf-8")))
    weights = [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.parent.glob("policy/*.safetensors"))
    ]
    return [_without_digests(entry["content"]), weights]


def _without_digests(content: dict[str, Any]) -> Any:
    """The digests are those of files beside the weights too, some of which name the folder that the run was in."""
    return _lasting({key: value for key, value in content.items() if key not in ("files", "digests")})


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(inner) for key, inner in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [_lasting(inner) for inner in value]
    return value
