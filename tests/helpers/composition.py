"""Hydra in tests: a process puts each choice of options together once, whatever values it sets then.

A composition takes a quarter of a second. Hundreds of tests compose the same options with other values; a command
composes its run twice, and each member of a sweep. Setting the values, and seeing what is wrong with them, stays
Hydra's. Ranks and commands that start with Python itself compose as they do for you.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hydra._internal import config_loader_impl as loader
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from alignment.files import asset_dir

_CREATE, _COMPOSE = loader.create_defaults_list, loader.ConfigLoaderImpl._compose_config_from_defaults_list
_STORE = ConfigStore.store
_SOURCES = {asset_dir("conf").as_posix(), "hydra.conf", ""}
"""Where options stand that no test changes: the package's files, Hydra's, and the store, which `_store` watches."""

_lists: dict[tuple[Any, ...], DefaultsList] = {}
_nodes: dict[int, DictConfig] = {}
"""What the lists in `_lists` are put together to, by their identity."""

_stored: dict[tuple[str | None, str], str | None] = {}


def _is_value(override: Override) -> bool:
    return "." in override.key_or_group and "/" not in override.key_or_group and override.package is None


def _create(repo, config_name, overrides_list, prepend_hydra, skip_missing) -> DefaultsList:
    settings = {"config_name": config_name, "prepend_hydra": prepend_hydra, "skip_missing": skip_missing}
    if any(source.path.split("://")[-1] not in _SOURCES for source in repo.get_sources()):
        return _CREATE(repo=repo, overrides_list=overrides_list, **settings)
    key = (*settings.values(), *(override.input_line for override in overrides_list if not _is_value(override)))
    if key not in _lists:
        _lists[key] = _CREATE(repo=repo, overrides_list=overrides_list, **settings)
    return replace(_lists[key], config_overrides=Overrides(repo, overrides_list).config_overrides)


def _compose(self, defaults, repo) -> DictConfig:
    if all(defaults is not known.defaults for known in _lists.values()):
        return _COMPOSE(self, defaults, repo)
    if id(defaults) not in _nodes:
        _nodes[id(defaults)] = _COMPOSE(self, defaults, repo)
    return copy.deepcopy(_nodes[id(defaults)])


def _store(self, name, node, group=None, package=None, provider=None) -> None:
    """What is stored anew changes what is composed, unless it is a file that says what it said."""
    content = OmegaConf.structured(node)
    is_file = provider is not None and OmegaConf.get_type(content) is dict
    said = repr((package, provider, OmegaConf.to_container(content))) if is_file else None
    if said is None or _stored.get((group, name)) != said:
        _stored[group, name] = said
        _lists.clear()
        _nodes.clear()
    _STORE(self, name, node, group, package, provider)


def compose_options_once(once: bool = True) -> None:
    """From here on in this process; or, with False, no longer."""
    loader.create_defaults_list = _create if once else _CREATE
    loader.ConfigLoaderImpl._compose_config_from_defaults_list = _compose if once else _COMPOSE
    ConfigStore.store = _store if once else _STORE


@contextlib.contextmanager
def hydra_itself() -> Iterator[None]:
    """Without what this module does."""
    compose_options_once(False)
    try:
        yield
    finally:
        compose_options_once()
