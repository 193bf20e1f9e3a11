"""Sets on the Hugging Face hub and on ModelScope, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from alignment.config.data import DataConfig
from alignment.config.places import MODELSCOPE_PREFIX
from alignment.errors import UserError


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
        yield from datasets.load_dataset(source, config.name, split=split, **more)
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
        yield from load(source.removeprefix(MODELSCOPE_PREFIX), use_streaming=config.streaming, **more)
    except Exception as error:  # of several libraries: network, name, split, file
        cause = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"ModelScope data set '{source}' (name {config.name}, split {split}) could not be loaded "
            f"({type(error).__name__}: {cause}): check its name and the network, or give a local copy to data.source."
        ) from error
