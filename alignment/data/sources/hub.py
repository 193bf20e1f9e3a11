"""Sets on the Hugging Face hub and on ModelScope, row by row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

from alignment.config.data import DataConfig
from alignment.config.places import MODELSCOPE_PREFIX, is_on_hub
from alignment.data.sources.tables import rows_of_table
from alignment.errors import UserError, as_names

COMMIT = re.compile("[0-9a-f]{40}")
_WAITED = 10
"""Seconds for the hub's answer."""


def at_commits(config: DataConfig) -> DataConfig:
    """The settings with the commit that the branch or tag of each hub set is at now.

    They stay as they are where the hub does not answer, and where one revision is that of several sets.
    """
    if config.sources:
        pinned = {name: at_commits(part).revision for name, part in config.parts.items()}
        return replace(config, sources={n: replace(s, revision=pinned[n]) for n, s in config.sources.items()})
    others = [] if config.eval_source is None else as_names("data.eval_source", config.eval_source)
    on_hub = {name for name in [*as_names("data.source", config.source), *others] if is_on_hub(name)}
    if len(on_hub) != 1 or COMMIT.fullmatch(config.revision or ""):
        return config
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(on_hub.pop(), revision=config.revision, timeout=_WAITED).sha
    except Exception:  # of several libraries: offline, no such set; the reading says what is wrong
        return config
    return replace(config, revision=commit or config.revision)


def read_hub(source: str, split: str, config: DataConfig) -> Iterator[dict[str, Any]]:
    """The rows of a split; with `config.streaming` they come over the network as they are asked for.

    Raises:
        UserError: the set cannot be loaded.
    """
    import datasets

    more: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    if config.streaming:
        more["streaming"] = True
    try:
        yield from _written(datasets.load_dataset(source, config.name, split=split, **more))
    except Exception as error:  # of several libraries: network, cache, name, split, file
        cause = " ".join(str(error).split())[:200].rstrip(".")
        of_revision = f", revision {config.revision}" if config.revision else ""
        raise UserError(
            f"Hub data set '{source}' (name {config.name}, split {split}{of_revision}) could not be loaded "
            f"({type(error).__name__}: {cause}): when offline, set data.source to a local file, "
            "HF_HOME to a cache that has it, or HF_ENDPOINT to a mirror."
        ) from error


def read_modelscope(source: str, split: str, config: DataConfig) -> Iterator[dict[str, Any]]:
    """The same for a set on ModelScope, by its own package.

    Raises:
        UserError: the package is not installed, or the set cannot be loaded.
    """
    try:
        load = import_module("modelscope.msdatasets").MsDataset.load
    except ImportError as error:
        raise UserError(
            f"{source} needs the package modelscope, which cannot be imported ({error}): install it, or give a local "
            f"copy to data.source."
        ) from error
    asked = {"subset_name": config.name, "split": split, "version": config.revision}
    more = {key: value for key, value in asked.items() if value is not None}
    try:
        rows = load(source.removeprefix(MODELSCOPE_PREFIX), use_streaming=config.streaming, **more)
        yield from _written(rows)
    except Exception as error:  # of several libraries: network, name, split, file
        cause = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"ModelScope data set '{source}' (name {config.name}, split {split}) could not be loaded "
            f"({type(error).__name__}: {cause}): check its name and the network, or give a local copy to data.source."
        ) from error


def _written(rows: Any) -> Iterator[dict[str, Any]]:
    """The rows of a set as they were written; a set that is streamed may not know its columns."""
    features = getattr(rows, "features", None)
    return rows_of_table(rows, getattr(features, "arrow_schema", None))
