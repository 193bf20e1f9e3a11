"""Hydra's store of what can be composed: schemas, shipped recipes, and your own configuration folder."""

from __future__ import annotations

import functools
import importlib
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from alignment.config import schema
from alignment.config.members import split_arguments, store_sweep
from alignment.config.messages import sentence
from alignment.config.renamed import flat, refuse_renamed
from alignment.config.strict_values import refuse_other_numbers, take_values_as_written
from alignment.errors import UserError
from alignment.files import asset_dir
from alignment.losses import LOSSES, Loss

SCHEMAS = {
    "model": schema.ModelConfig,
    "quantization": schema.QuantizationConfig,
    "adapter": schema.AdapterConfig,
    "data": schema.DataConfig,
    "sft": schema.SFTConfig,
    "optim": schema.OptimConfig,
    "trainer": schema.TrainerConfig,
    "reference": schema.ReferenceConfig,
    "onpolicy": schema.OnPolicyConfig,
    "distill": schema.DistillConfig,
    "evaluation": schema.EvaluationConfig,
    "stopping": schema.StoppingConfig,
    "tracking": schema.TrackingConfig,
    "export": schema.ExportConfig,
}


def register(config_dir: Path | None = None) -> None:
    """Put schemas, recipes and your own configuration folder into Hydra's store.

    Args:
        config_dir: your folder, laid out like `conf/`, with recipes in its folder `recipe/`.

    Raises:
        UserError: a file that cannot be read, or has the name of a shipped file.
    """
    _register_shipped()
    store = ConfigStore.instance()
    if config_dir is not None:
        config_dir = config_dir.expanduser()
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
                refuse_renamed(flat(OmegaConf.to_container(node), group.replace("/", ".")), str(path))
                if group == "loss" and "_target_" in node:
                    _store_schema(node, path)
                store.store(group=group, name=path.stem, node=node, provider=str(path))


@functools.cache
def _register_shipped() -> None:
    """Schemas and recipes of the package, once: they are the same for every composition of a process."""
    take_values_as_written()
    # Hydra's grid sweeper knows nothing of a recipe's `sweep:` block. We patch it, since Hydra refuses a sweeper of our
    # own outside of the namespace hydra_plugins, which would be a second top-level package.
    grid: Any = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_sweeper.BasicSweeper"]
    grid.split_arguments = staticmethod(split_arguments)
    grid.validate_batch_is_legal = lambda self, batch: None  # `check_sweep` has composed every member already
    # Hydra copies all of its store for each composition, a tenth of its time, and then only reads it: what it takes
    # from there it copies once more.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=schema.RunConfig, package="_global_")
    for name, part in SCHEMAS.items():
        store.store(group="schema", name=name, node=_schema(part), package=name)
    for name, loss in LOSSES.items():
        store.store(group="schema/loss", name=name, node=_schema(loss), package="loss")
    for path in sorted(asset_dir("recipes").rglob("*.yaml")):
        _store_recipe(path, asset_dir("recipes"))


def _schema(of: type) -> DictConfig:
    """A dataclass as a schema. Mappings in it take new keys without the plus that Hydra would ask for."""
    node = OmegaConf.structured(of)
    _open_mappings(node)
    return node


def _open_mappings(node: DictConfig) -> None:
    for key in node:
        field = node._get_node(key)
        if isinstance(field, DictConfig) and not is_dataclass(field._metadata.ref_type):
            OmegaConf.set_struct(field, False)
        elif isinstance(field, DictConfig) and not (field._is_none() or field._is_missing()):
            _open_mappings(field)


def _store_schema(node: DictConfig, path: Path) -> None:
    """Make the class that your loss file names in `_target_` the schema of this file.

    Raises:
        UserError: the class is no loss, or has the name of a shipped one.
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
        raise UserError(f"{path}: {sentence(error)}") from error
    ConfigStore.instance().store(group="schema/loss", name=path.stem, node=fields_of, package="loss")


def _read(path: Path) -> DictConfig:
    try:
        node = OmegaConf.load(path)
        refuse_other_numbers(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {sentence(error)}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{path} must hold a mapping of keys to values.")
    if not isinstance(node.get("defaults", OmegaConf.create([])), ListConfig):
        raise UserError(f"{path}: `defaults` must be a list.")
    return node


def _store_recipe(path: Path, folder: Path) -> None:
    """Serve one recipe file, with its `loss:` block bound to the loss that it was written for.

    The block becomes a hidden option of the group `loss` (`dpo` plus the recipe's values), which the recipe chooses.
    So `loss=simpo` on the command line replaces the whole option, and no value written for DPO survives.
    """
    store = ConfigStore.instance()
    name = path.relative_to(folder).with_suffix("").as_posix()
    group, _, stem = f"recipe/{name}".rpartition("/")
    node = _read(path)
    refuse_renamed(flat(OmegaConf.to_container(node)), str(path))
    with open_dict(node):
        sweep = node.pop("sweep", None)
    if sweep is not None:
        store_sweep(name, sweep, path)
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
