"""Which files a source means: one file, a pattern, a folder, or the part of a folder that is a split."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from alignment.config.places import ACCEPTED_FILES, MAGIC, ending_of, is_data_name, is_remote
from alignment.data.sources.remote import File, remote_files
from alignment.errors import UserError

SPLIT_WORDS = ("train", "test", "eval", "validation", "valid", "dev")

Tree = dict[str, File]
"""The files of a folder by their paths below it, in order; without hidden ones."""


def files_of(source: str, split: str, name: str | None) -> list[File]:
    """The files that a source means, in the order of their names; empty where it means none.

    Args:
        source: a file, a folder, a pattern, or an address of these.
        split: of a folder that is divided into splits.
        name: of the configuration, in the clone of a hub set that has several.

    Raises:
        UserError: nothing matches a pattern or is at an address, or a folder has no file of the split.
    """
    if is_remote(source):
        tree = remote_files(source)
        if len(tree) == 1 or MAGIC.search(source.partition("?")[0]):
            return _matched(list(tree.values()), source)
        return chosen(tree, source.rstrip("/"), split, name)
    path = Path(source).expanduser()
    if path.is_dir():
        return chosen(dict(_tree(path)), str(path), split, name)
    if path.exists():
        return [path]
    if MAGIC.search(source):
        return _matched([Path(found) for found in sorted(glob.glob(str(path), recursive=True))], source)
    return []


def _matched(found: list[File], source: str) -> list[File]:
    files = [file for file in found if is_data_name(file.name) and not (isinstance(file, Path) and file.is_dir())]
    if not files:
        raise UserError(f"No data file matches '{source}' ({ACCEPTED_FILES}).")
    return files


def _tree(folder: Path) -> Iterator[tuple[str, File]]:
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(here)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(names):
            if not name.startswith("."):
                path = Path(here, name)
                yield path.relative_to(folder).as_posix(), path


def chosen(tree: Tree, folder: str, split: str, name: str | None) -> list[File]:
    """The data files of a folder; if it or its files are divided into splits, those of `split`.

    The folder may be what the datasets library saves, or the clone of a hub set, whose files lie deeper: in a folder
    named after the configuration `name`, after the split, or `data`, or in the only one that holds any.
    """
    # Saved by the datasets library: a folder for each split, or the files of one
    if "dataset_dict.json" in tree:
        splits = sorted(path.split("/")[0] for path in tree if re.fullmatch(r"[^/]+/state\.json", path))
        if split not in splits:
            raise UserError(f"Folder {folder} holds the splits {', '.join(splits)} and none named '{split}'.")
        return chosen(_below(tree, split), f"{folder}/{split}", split, None)
    if "state.json" in tree and "dataset_info.json" in tree:
        try:
            with tree["state.json"].open("rb") as file:
                saved = json.load(file)
            return [tree[entry["filename"]] for entry in saved["_data_files"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{tree['state.json']} does not name the data files: save the set again.") from None

    # Deeper in a clone
    data = {path: file for path, file in tree.items() if is_data_name(PurePosixPath(path).name)}
    files = [file for path, file in data.items() if "/" not in path]
    if not files:
        below = sorted({path.split("/")[0] for path in data})
        found = next((part for part in (name, split, "data") if part in below), below[0] if len(below) == 1 else None)
        if found is not None:
            rest = None if found == name else name
            return chosen(_below(tree, found), f"{folder}/{found}", split, rest)
        if below:
            raise UserError(
                f"Folder {folder} has data files in {', '.join(below)}, and none of these is named after the split "
                f"'{split}': choose one by data.split or data.name, or give its path to data.source."
            )
        raise UserError(f"Folder {folder} has no data file ({ACCEPTED_FILES}).")

    # Files side by side
    stems = [file.name[: len(file.name) - len("".join(ending_of(file.name)))] for file in files]
    part = re.compile(rf"(.*[-_.])?{re.escape(split)}(-\d+)?(-of-\d+)?")
    of_split = [file for file, stem in zip(files, stems, strict=True) if part.fullmatch(stem)]
    if not of_split and any(word in re.split(r"[-_.]", stem) for stem in stems for word in SPLIT_WORDS):
        names_found = ", ".join(file.name for file in files)
        named = dict.fromkeys(re.sub(r"(-\d+)+(-of-\d+)?$", "", stem) for stem in stems)
        raise UserError(
            f"Folder {folder} has files named after splits ({names_found}) but none for the split '{split}': set the "
            f"split to one of {', '.join(named)}."
        )
    return of_split or files


def _below(tree: Tree, folder: str) -> Tree:
    return {path[len(folder) + 1 :]: file for path, file in tree.items() if path.startswith(f"{folder}/")}
