"""Compose a run's configuration with Hydra: for the command line, tests and notebooks alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from alignment.config import schema
from alignment.config.data import HANDED_DOWN, UNSET, SourceConfig
from alignment.config.messages import sentence, unknown_key
from alignment.config.overrides import (
    WITH_NONE,
    parse_overrides,
    refuse_groups_without_option,
    refuse_settings_of_none,
    refuse_without_effect,
)
from alignment.config.registry import register
from alignment.config.typed_text import as_text
from alignment.errors import UserError, did_you_mean
from alignment.files import asset_dir
from alignment.losses import LOSSES, Loss, Mixture

VERSION_BASE = "1.3"


def compose_node(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """Compose without starting a job.

    Raises:
        UserError: an unknown option or key, a value of the wrong type, an unreadable file.
    """
    parsed = parse_overrides(overrides)
    refuse_groups_without_option(parsed)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(asset_dir("conf")), version_base=VERSION_BASE):
            node = compose("config", overrides=list(overrides), return_hydra_config=True)
            finish_composition(node, node.hydra.runtime.choices)
            refuse_settings_of_none(parsed, node.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException, YAMLError, AssertionError) as error:
        refuse_settings_of_none(parsed, _choices(parsed))  # what Hydra says of these depends on the group
        if isinstance(error, AssertionError):
            raise
        raise UserError(sentence(error)) from error
    except RecursionError as error:
        raise UserError("A recipe's defaults list leads back to the recipe itself.") from error
    if not with_hydra:
        with open_dict(node):
            del node["hydra"]
    return node


def _choices(parsed: Sequence[Override]) -> Mapping[str, Any]:
    """The chosen options of all groups, composed without the settings; empty if that fails too."""
    groups = [override.input_line or "" for override in parsed if "." not in override.key_or_group]
    try:
        with initialize_config_dir(config_dir=str(asset_dir("conf")), version_base=VERSION_BASE):
            return compose("config", overrides=groups, return_hydra_config=True).hydra.runtime.choices
    except (HydraException, OmegaConfBaseException, YAMLError):
        return {}


def finish_composition(cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    """Do what Hydra cannot, after it has composed and while it is still set up.

    The option `none` of a group wins over values that the recipe gives this group. Every loss of a mixture gets its
    recommended settings, and every source of mixed data those of the data, except for those that you give. The judge
    of rounds gets what the evaluation's adds to a request, unless it has something of its own.

    Raises:
        UserError: a mixture of a loss that does not exist, or with settings that its losses or sources do not have.
    """
    for group in WITH_NONE:
        if choices.get(group) == "none":
            cfg[group] = None
    for key in ("data", "sft.data"):
        if (data := OmegaConf.select(cfg, key)) is not None:
            _complete_sources(data, key)
    if not OmegaConf.select(cfg, "onpolicy.llm.body", default=True):
        cfg.onpolicy.llm.body = cfg.evaluation.llm.body  # a reference to it would be written through
    if _is_mixture(cfg):
        for name in cfg.loss.weights:
            given = cfg.loss.settings.get(name, {})
            if not isinstance(given, Mapping):
                raise UserError(f"loss.settings.{name} must map settings of {name} to values, and is {given}.")
            cfg.loss.settings[name] = _recommended(name)
            try:
                cfg.loss.settings[name].merge_with(given)
            except OmegaConfBaseException as error:
                raise UserError(sentence(error)) from error


def _complete_sources(data: DictConfig, key: str) -> None:
    """Give every source of a mixture all settings: its own, then those of the data, then none."""
    for name, given in (data.get("sources") or {}).items():
        place = f"{key}.sources.{name}"
        given = OmegaConf.create({"source": given}) if isinstance(given, str | ListConfig) else given
        if not isinstance(given, DictConfig) or given.get("source") is None:
            known = [other for other in data.sources if other != name]
            raise UserError(
                f"{place}.source is missing{did_you_mean(str(name), known)}: a source of a mixture names where its "
                f"rows come from."
            )
        source = OmegaConf.structured(SourceConfig)
        for field in fields(SourceConfig):
            handed = data._get_node(field.name) if field.name in HANDED_DOWN else UNSET.get(field.name)
            source[field.name] = {} if field.name == "where" else handed
        data.sources[name] = source
        try:
            data.sources[name].merge_with(given)
        except OmegaConfBaseException as error:
            raise UserError(sentence(error)) from error


def _recommended(name: str) -> DictConfig:
    """The option of that name of the group `loss`."""
    try:
        loss = compose(f"loss/{name}").loss
    except MissingConfigException:
        loss = None
    if loss is None or OmegaConf.get_type(loss) is Mixture:
        single = [known for known in LOSSES if known != Mixture.name]
        hint = did_you_mean(name, single)
        raise UserError(f"loss.weights.{name}: no single loss has this name{hint}; available are {', '.join(single)}.")
    return loss


def to_run_config(cfg: DictConfig) -> schema.RunConfig:
    """The typed configuration of a composed node.

    Raises:
        UserError: missing, ill-typed or out-of-range values.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError(f"No value is given for: {', '.join(missing)}.")
        refuse_unknown(cfg)
        schema.check_seed("seed", cfg.seed)  # first, since the SFT stage has the same unless it is given another
        _check_sft(cfg)
        _check_mixture(cfg)
        return OmegaConf.to_object(cfg)  # type: ignore[return-value]
    except UserError:
        raise
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(sentence(error)) from error


def refuse_unknown(node: DictConfig, prefix: str = "") -> None:
    """Refuse keys that no section has, which `+key=value` adds and nothing would read.

    Raises:
        UserError: the first such key, and what is accepted there.
    """
    section = OmegaConf.get_type(node)
    known = {field.name for field in fields(section)} if is_dataclass(section) else None
    for key in map(str, node):
        if known is not None and key not in known:
            raise UserError(f"{unknown_key(f'{prefix}{key}', section)}.")
        inner = node._get_node(key)
        if isinstance(inner, DictConfig) and not (inner._is_none() or inner._is_interpolation()):
            refuse_unknown(inner, f"{prefix}{key}.")


def _check_sft(cfg: DictConfig) -> None:
    """Check the sections of the SFT stage; the run has sections of the same types, so name these with `sft.`."""
    for part in ("data", "optim", "trainer") if cfg.get("sft") is not None else ():
        try:
            OmegaConf.to_object(cfg.sft[part])
        except UserError as error:
            raise UserError(f"sft.{error}") from error


def _check_mixture(cfg: DictConfig) -> None:
    """Check the losses of a mixture, and name their settings as you wrote them: a loss by itself says `loss.`."""
    for name, part in cfg.loss.settings.items() if _is_mixture(cfg) else ():
        try:
            OmegaConf.to_object(part)
        except UserError as error:
            raise UserError(re.sub(r"\bloss\.", f"loss.settings.{name}.", str(error))) from error


def _is_mixture(cfg: DictConfig) -> bool:
    return OmegaConf.get_type(cfg.get("loss")) is Mixture


def load(*overrides: str, config_dir: Path | None = None) -> schema.RunConfig:
    """The run that `python -m alignment.run <overrides>` would do, composed and checked."""
    register(config_dir)
    overrides = tuple(as_text(overrides, sweeps=False))
    config = to_run_config(compose_node(overrides))
    refuse_without_effect(overrides, config)
    return config


def load_loss(name: str, *settings: str) -> Loss:
    """The loss that `loss=<name> loss.<setting>` gives to a run, without the rest of the run.

    Raises:
        UserError: an unknown loss or setting, or a value that it does not take.
    """
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(asset_dir("conf")), version_base=VERSION_BASE):
            node = compose(f"loss/{name}", overrides=[f"loss.{setting}" for setting in settings])
            finish_composition(node, {})
    except MissingConfigException as error:
        hint = did_you_mean(name, list(LOSSES))
        raise UserError(f"There is no loss {name}{hint}; python -m alignment.losses lists them.") from error
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(sentence(error)) from error
    _check_mixture(node)
    return OmegaConf.to_object(node.loss)  # type: ignore[return-value]


def defaults(*options: str, resolve: bool = True) -> dict[str, Any]:
    """The settings that `conf/` gives a run, with these options of groups and no recipe.

    Args:
        resolve: give settings that are another one's their value, and not its name in ${}.

    Raises:
        UserError: there is no such option.
    """
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(asset_dir("conf")), version_base=VERSION_BASE):
            return as_plain(compose("config", overrides=["~recipe", *options]), resolve=resolve)
    except HydraException as error:
        raise UserError(sentence(error)) from error


def recipe_settings(recipe: str, loss: str | None = None) -> tuple[dict[str, Any], str]:
    """The settings of a recipe as it is, or with another loss and its defaults; and the name of its loss.

    Raises:
        UserError: there is no such recipe or loss.
    """
    register()
    node = compose_node([f"recipe={recipe}", *([f"loss={loss}"] if loss else [])], with_hydra=True)
    chosen = str(node.hydra.runtime.choices.loss)
    with open_dict(node):
        del node["hydra"]
    return as_plain(node), chosen


def as_plain(cfg: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """The configuration, resolved or not, as plain containers, enums by name."""
    return OmegaConf.to_container(cfg, resolve=resolve, enum_to_str=True)  # type: ignore[return-value]
