"""Compose a run's configuration: the only module, with `run.py`, that knows Hydra.

`conf/` holds the groups, `recipes/` is served as the group `recipe`, and users' own groups and recipes come from a
folder named on the command line. All composition goes through here, for the command line, tests and notebooks alike.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from alignment.config import schema as schema
from alignment.config.renamed import flat, refuse_renamed
from alignment.errors import UserError
from alignment.files import asset_dir
from alignment.losses import LOSSES, Loss, Mixture

_SCHEMAS = {
    "model": schema.ModelConfig,
    "quantization": schema.QuantizationConfig,
    "adapter": schema.AdapterConfig,
    "data": schema.DataConfig,
    "sft": schema.SFTConfig,
    "optim": schema.OptimConfig,
    "trainer": schema.TrainerConfig,
    "reference": schema.ReferenceConfig,
    "evaluation": schema.EvaluationConfig,
    "stopping": schema.StoppingConfig,
    "tracking": schema.TrackingConfig,
    "export": schema.ExportConfig,
}

VERSION_BASE = "1.3"

_SWEEPS = "schema/sweep"
"""Where the store keeps the `sweep:` blocks of recipes, which no run reads."""


def register(config_dir: Path | None = None) -> None:
    """Put schemas, recipes and a user's own configuration folder into Hydra's store.

    Args:
        config_dir: folder of a user, laid out like `conf/`, with recipes in its folder `recipe/`.

    Raises:
        UserError: a file that cannot be read, or one whose name a shipped file has already.
    """
    # A sweeper of our own would have to live in the namespace hydra_plugins, a second top-level package.
    grid: Any = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_sweeper.BasicSweeper"]
    grid.split_arguments = staticmethod(_split_arguments)
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=schema.RunConfig, package="_global_")
    for name, part in _SCHEMAS.items():
        store.store(group="schema", name=name, node=_schema(part), package=name)
    for name, loss in LOSSES.items():
        store.store(group="schema/loss", name=name, node=_schema(loss), package="loss")
    for path in sorted(asset_dir("recipes").rglob("*.yaml")):
        _store_recipe(path, asset_dir("recipes"))
    if config_dir is not None:
        if not config_dir.is_dir():
            raise UserError(f"--config-dir: the folder {config_dir} does not exist.")
        for path in sorted(config_dir.rglob("*.yaml")):
            relative = path.relative_to(config_dir)
            is_recipe = relative.parts[0] == "recipe"
            shipped = (
                asset_dir("recipes") / relative.relative_to("recipe") if is_recipe else asset_dir("conf") / relative
            )
            if shipped.exists():
                raise UserError(f"{path}: a shipped configuration has this name, so give the file another one.")
            if is_recipe:
                _store_recipe(path, config_dir / "recipe")
            elif path.parent != config_dir:
                group, node = relative.parent.as_posix(), _read(path)
                refuse_renamed(flat(_plain(node), group.replace("/", ".")), str(path))
                if group == "loss" and "_target_" in node:
                    _store_schema(node, path)
                store.store(group=group, name=path.stem, node=node, provider=str(path))


def _schema(of: type) -> DictConfig:
    """A dataclass as a schema; mappings in it take new keys, which Hydra would ask to be written with a plus."""
    node = OmegaConf.structured(of)
    for key in node:
        field = node._get_node(key)
        if isinstance(field, DictConfig) and OmegaConf.get_type(field) in (dict, None):
            OmegaConf.set_struct(field, False)
    return node


def _store_schema(node: DictConfig, path: Path) -> None:
    """Make the class that a user's loss file names in `_target_` the schema of that file.

    Raises:
        UserError: what it names is no loss, or calls itself by the name of a shipped one.
    """
    with open_dict(node):
        target, defaults = node.pop("_target_"), node.pop("defaults", ["_self_"])
        node.defaults = [f"/schema/loss/{path.stem}", *defaults]
    module, _, name = str(target).rpartition(".")
    try:
        loss = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's own code raises, the file that names it is the place to look
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"{path}: _target_ {target} cannot be imported ({why}); it names module.Class, and the module is "
            f"looked for in the folder that the command is run in."
        ) from error
    if not (isinstance(loss, type) and issubclass(loss, Loss) and "__dataclass_fields__" in vars(loss)):
        raise UserError(f"{path}: _target_ {target} is not a dataclass derived from alignment.losses.Loss.")
    if not isinstance(getattr(loss, "name", None), str) or LOSSES.get(loss.name, loss) is not loss:
        raise UserError(f"{path}: _target_ {target} needs a `name` that no shipped loss has.")
    try:
        fields_of = _schema(loss)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_sentence(error)}") from error
    ConfigStore.instance().store(group="schema/loss", name=path.stem, node=fields_of, package="loss")


def _read(path: Path) -> DictConfig:
    try:
        node = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {_sentence(error)}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{path} must hold a mapping of keys to values.")
    if not isinstance(node.get("defaults", OmegaConf.create([])), ListConfig):
        raise UserError(f"{path}: `defaults` must be a list.")
    return node


def _plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node)


def _store_recipe(path: Path, folder: Path) -> None:
    """Serve one recipe file, its `loss:` block bound to the loss that it was written for.

    The block becomes an option of the group `loss` of its own (`dpo` plus the recipe's values), which the recipe
    chooses. So `loss=simpo` on the command line replaces the option whole, and no value written for DPO survives.
    """
    store = ConfigStore.instance()
    name = path.relative_to(folder).with_suffix("").as_posix()
    group, _, stem = f"recipe/{name}".rpartition("/")
    node = _read(path)
    refuse_renamed(flat(_plain(node)), str(path))
    with open_dict(node):
        sweep = node.pop("sweep", None)
    if sweep is not None:
        entries = _sweep_entries(sweep, path)
        refuse_renamed((setting.partition("=")[0] for entry in entries for setting in entry), str(path))
        store.store(group=_SWEEPS, name=name.replace("/", "."), node={"members": entries})
    if isinstance(node.get("loss"), DictConfig):
        defaults = node.get("defaults", [])
        chosen = [i for i, d in enumerate(defaults) if isinstance(d, DictConfig) and "override /loss" in d]
        if not chosen:
            raise UserError(
                f"{path}: a recipe with a `loss:` block must choose the loss with `override /loss: <name>`."
            )
        base = defaults[chosen[0]]["override /loss"]
        option = f"{base}@{name.replace('/', '.')}"
        with open_dict(node):
            values = node.pop("loss")
            defaults[chosen[0]]["override /loss"] = option
        bound = OmegaConf.merge({"defaults": [base, "_self_"]}, values)
        store.store(group="loss", name=option, node=bound, package="loss", provider=str(path))
    store.store(group=group, name=stem, node=node, package="_global_", provider=str(path))


def _sweep_entries(sweep: Any, path: Path) -> list[list[str]]:
    """The overrides of each entry of a recipe's `sweep:` block, with those that all entries have in common.

    Raises:
        UserError: a block that does not map settings to values.
    """
    common = OmegaConf.to_container(sweep) if isinstance(sweep, DictConfig) else None
    members = common.pop("members", [{}]) if isinstance(common, dict) else None
    if not isinstance(members, list) or not members or not all(isinstance(member, dict) for member in members):
        raise UserError(f"{path}: `sweep` must map settings to values, and `members` in it be a list of such mappings.")
    assert isinstance(common, dict)
    entries = []
    for member in members:
        settings = {**member, **common}
        for key, value in settings.items():
            if value == [] or isinstance(value, dict):
                raise UserError(f"{path}: sweep: {key} must be a value or a list of values, one for each member.")
        entries.append([f"{key}={_as_typed(value)}" for key, value in settings.items()])
    return entries


def _as_typed(value: Any) -> str:
    """A value of YAML as a user would write it behind a key on the command line."""
    if isinstance(value, list):
        return ",".join(map(_as_typed, value))
    return value if isinstance(value, str) else json.dumps(value)


def _sentence(error: Exception) -> str:
    """An exception of Hydra, OmegaConf or YAML as one line that names the file, if a file is at fault."""
    place = re.match(r"In '([^']+)': ", str(error))
    cause: BaseException = error
    while isinstance(_deeper(cause), HydraException | OmegaConfBaseException | UserError):
        cause = _deeper(cause)  # type: ignore[assignment]
    text = re.sub(r"^In '[^']+': ", "", str(cause)).split("Config search path:")[0]
    text, _, options = text.partition("Available options in ")
    lines = [line.strip() for line in text.splitlines()]
    message = " ".join(line for line in lines if line and not line.startswith(("object_type=", "reference_type=")))
    message = re.sub(r"\.? full_key:", ", at key", message).rstrip(".")
    if options:  # those with an @ are recipes' own settings of a loss, which only the recipe chooses
        message += f"; available are {', '.join(name for name in options.split()[1:] if '@' not in name)}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and is_dataclass(cause.object_type):
        message += f"; accepted are {', '.join(field.name for field in fields(cause.object_type))}"
    if re.search(r"'hydra/(launcher|sweeper)/", message):
        message += "; others come with the extras sweep-joblib, sweep-slurm and sweep-optuna of this package"
    if place and place[1] != "config":
        message = f"{_file_of(place[1])}: {message}"
    return message + "."


def _deeper(error: BaseException) -> BaseException | None:
    return error.__cause__ or (error.__context__ if isinstance(error, HydraException) else None)


def _file_of(name: str) -> str:
    """The file behind a name in Hydra's store, or the name where it is a file of `conf/`."""
    store = ConfigStore.instance()
    stored = store.get_type(f"{name}.yaml") is ObjectType.CONFIG
    return (store.load(f"{name}.yaml").provider if stored else None) or name


def to_run_config(cfg: DictConfig) -> schema.RunConfig:
    """The typed configuration of a composed node.

    Raises:
        UserError: missing, ill-typed or out-of-range values.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError(f"No value is given for: {', '.join(missing)}.")
        _check_sft(cfg)
        _check_mixture(cfg)
        return OmegaConf.to_object(cfg)  # type: ignore[return-value]
    except UserError:
        raise
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(_sentence(error)) from error


def _check_sft(cfg: DictConfig) -> None:
    """The SFT stage has parts of the same types as the run: name them as the user wrote them."""
    for part in ("data", "optim", "trainer") if cfg.get("sft") is not None else ():
        try:
            OmegaConf.to_object(cfg.sft[part])
        except UserError as error:
            raise UserError(f"sft.{error}") from error


def _check_mixture(cfg: DictConfig) -> None:
    """A mixture's losses do not know that they are parts: name their settings as the user wrote them."""
    for name, part in cfg.loss.settings.items() if _is_mixture(cfg) else ():
        try:
            OmegaConf.to_object(part)
        except UserError as error:
            raise UserError(re.sub(r"\bloss\.", f"loss.settings.{name}.", str(error))) from error


def _is_mixture(cfg: DictConfig) -> bool:
    return OmegaConf.get_type(cfg.get("loss")) is Mixture


def _parsed(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for text in overrides:
        try:
            [override] = parser.parse_overrides([text])
        except HydraException as error:
            raise UserError(f"'{text}' is no setting of the form key=value.") from error
        if not override.key_or_group:
            raise UserError(f"'{text}' is no setting of the form key=value: it has no key.")
        parsed.append(override)
    refuse_renamed(override.key_or_group for override in parsed)
    return parsed


def compose_node(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """Compose without starting a job.

    Raises:
        UserError: an unknown option or key, a value of the wrong type, an unreadable file.
    """
    parsed = _parsed(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(asset_dir("conf")), version_base=VERSION_BASE):
            node = compose("config", overrides=list(overrides), return_hydra_config=True)
            settle(node, node.hydra.runtime.choices)
            _refuse_settings_of_none(parsed, node.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException, YAMLError, AssertionError) as error:
        _refuse_settings_of_none(parsed, _choices(parsed))  # what Hydra says of these depends on the group
        if isinstance(error, AssertionError):
            raise
        raise UserError(_sentence(error)) from error
    except RecursionError as error:
        raise UserError("A recipe's defaults list leads back to the recipe itself.") from error
    if not with_hydra:
        with open_dict(node):
            del node["hydra"]
    return node


_WITH_NONE = ("quantization", "adapter", "sft", "loss", "stopping", "tracking")
"""Groups whose option `none` sets the whole group to null."""


def _choices(parsed: Sequence[Override]) -> Mapping[str, Any]:
    """The options that are chosen, whatever the settings are; nothing where they cannot be composed either."""
    groups = [override.input_line or "" for override in parsed if "." not in override.key_or_group]
    try:
        with initialize_config_dir(config_dir=str(asset_dir("conf")), version_base=VERSION_BASE):
            return compose("config", overrides=groups, return_hydra_config=True).hydra.runtime.choices
    except (HydraException, OmegaConfBaseException, YAMLError):
        return {}


def _refuse_settings_of_none(parsed: Sequence[Override], choices: Mapping[str, Any]) -> None:
    for override in parsed:
        group, dot, _ = override.key_or_group.partition(".")
        if dot and group in _WITH_NONE and choices.get(group) == "none":
            raise UserError(
                f"{override.key_or_group} has no effect with {group}=none: leave it out, or choose another {group}."
            )


def settle(cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    """What is left to do once Hydra, which must be set up still, has composed.

    An option `none` wins over the values that the recipe gives the same group, which Hydra merges last; and every loss
    of a mixture gets its recommended settings, but for those that are given.

    Raises:
        UserError: a mixture of a loss that does not exist, or with settings that its losses do not have.
    """
    for group in _WITH_NONE:
        if choices.get(group) == "none":
            cfg[group] = None
    if _is_mixture(cfg):
        for name in cfg.loss.weights:
            given = cfg.loss.settings.get(name, {})
            if not isinstance(given, Mapping):
                raise UserError(f"loss.settings.{name} must map settings of {name} to values, and is {given}.")
            cfg.loss.settings[name] = _recommended(name)
            try:
                cfg.loss.settings[name].merge_with(given)
            except OmegaConfBaseException as error:
                raise UserError(_sentence(error)) from error


def _recommended(name: str) -> DictConfig:
    """The option of that name of the group `loss`."""
    try:
        loss = compose(f"loss/{name}").loss
    except MissingConfigException:
        loss = None
    if loss is None or OmegaConf.get_type(loss) is Mixture:
        single = ", ".join(known for known in LOSSES if known != Mixture.name)
        raise UserError(f"loss.weights.{name}: there is no single loss of this name; available are {single}.")
    return loss


def load(*overrides: str, config_dir: Path | None = None) -> schema.RunConfig:
    """The run that `python -m alignment.run <overrides>` would do, composed and checked."""
    register(config_dir)
    config = to_run_config(compose_node(overrides))
    refuse_without_effect(overrides, config)
    return config


def refuse_without_effect(overrides: Sequence[str], config: schema.RunConfig) -> None:
    """Refuse what the command line sets and this run would never read. What recipes and files say is left alone.

    Raises:
        UserError: the setting, and why it has no effect.
    """
    for override in _parsed(overrides):
        key = override.key_or_group
        reason = _why_without_effect(key, config)
        if reason is not None:
            raise UserError(f"{key} has no effect: {reason}.")


def _why_without_effect(key: str, config: schema.RunConfig) -> str | None:
    section, _, name = key.rpartition(".") if "." in key else (key, "", "")
    if config.loss is None:
        if section in ("data", "optim", "trainer", "reference"):
            sft = f"; the SFT stage has sft.{key}" if section != "reference" else ""
            return f"with loss=none there is no preference stage{sft}"
    elif section == "reference":
        live = config.reference.mode is schema.ReferenceMode.live
        unused = not config.loss.requirements().reference and not config.reference.for_metrics
        if unused and (name == "spot_checks" or (live and name in ("", "mode"))):
            return f"loss {config.loss.name} has no reference, and reference.for_metrics=false asks for none"
        if live and name == "spot_checks":
            return "a live reference is computed anew, so that there is nothing stored to check"
    stage = config.sft if section.startswith("sft.") else config
    if name == "epochs" and section.endswith("trainer") and stage is not None and stage.trainer.max_steps is not None:
        return f"{section}.max_steps={stage.trainer.max_steps} decides; set it to null to train for epochs"
    if key in ("sft.trainer.cohort", "sft.trainer.joint_passes"):
        return "the SFT stage is done once for all members of a sweep that have the same"
    if key == "evaluation.kl_prompts" and config.loss is None:
        return "with loss=none there is no preference stage"
    if key in ("evaluation.max_new_tokens", "evaluation.temperature", "evaluation.batch_size"):
        # The answers for the KL have a temperature of their own.
        others = 0 if name == "temperature" else config.evaluation.kl_prompts
        return "evaluation.prompts=0 samples no answers" if config.evaluation.prompts == others == 0 else None
    if key == "export.dtype" and not config.export.merge:
        return "it is the dtype of the merged model, and export.merge is false"
    return None


def is_sweep(recipe: str) -> bool:
    """Whether the recipe has members of its own."""
    return ConfigStore.instance().get_type(_sweep_file(recipe)) is ObjectType.CONFIG


def _sweep_file(recipe: str) -> str:
    return f"{_SWEEPS}/{recipe.replace('/', '.')}.yaml"


def sweep_members(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every member of a sweep, its folder among them; the same for the same overrides.

    A recipe's own members come in the order of its `sweep:` block; what the command line gives goes over them. Empty
    for an optimising sweeper, and where a range is given: such values are known only as the sweep goes.

    Raises:
        UserError: what is no setting, or names the members' folders.
    """
    parsed = _parsed(overrides)
    given = {override.key_or_group for override in parsed}
    if "hydra.sweep.subdir" in given:
        raise UserError("hydra.sweep.subdir cannot be chosen: a sweep names its members' folders, to find them again.")
    searched = any(o.key_or_group == "hydra/sweeper" and o.value() != "basic" for o in parsed)
    if searched or any(o.is_sweep_override() and not o.is_discrete_sweep() for o in parsed):
        return []
    members: list[list[str]] = []
    for member in _combinations(parsed):
        recipe = next((o.partition("=")[2] for o in reversed(member) if o.startswith("recipe=")), "")
        entries = ConfigStore.instance().load(_sweep_file(recipe)).node.members if is_sweep(recipe) else [[]]
        for entry in entries:
            own = [override for override in _parsed(entry) if override.key_or_group not in given]
            for combination in _combinations(own):
                name = f"{len(members)}-{Path(recipe).name or 'run'}"
                members.append([*member, *combination, f"hydra.sweep.subdir='{name}'"])
    return members


def single_values(overrides: Sequence[str]) -> list[str]:
    """The overrides that are the same for every member of a sweep."""
    return [override.input_line or "" for override in _parsed(overrides) if not override.is_sweep_override()]


def _combinations(parsed: Sequence[Override]) -> Iterator[list[str]]:
    choices = []
    for override in parsed:
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line or ""])
    yield from map(list, itertools.product(*choices))


def as_plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain containers, enums by name."""
    return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[return-value]


def _split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
    """What Hydra's grid sweeper launches: all members as one batch, since launchers have limits of their own."""
    del max_batch_size
    return [sweep_members([override.input_line or "" for override in overrides])]
