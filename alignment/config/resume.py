"""Runs that began earlier: which one to resume, and whether the settings are still the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from alignment.config.compose import as_plain, compose_node, to_run_config
from alignment.config.messages import sentence
from alignment.config.overrides import parse_overrides
from alignment.config.renamed import FORMER_DEFAULTS, RETIRED, flat, is_retired, refuse_renamed
from alignment.config.schema import RunConfig
from alignment.config.typed_text import quoted_path, typed_path
from alignment.errors import UserError
from alignment.files import damaged, redact

FREE = ("trainer.cohort",)
"""Settings of a sweep that do not touch its results, so they may change when it goes on."""

SHARING = ("trainer.devices", "trainer.shard", "dashboard")
"""Those of a run that may change when it goes on, as they do not touch the result either."""


def require_new(run_dir: Path) -> None:
    """Refuse a folder that holds a run already."""
    if (run_dir / "config.yaml").exists():
        raise UserError(
            f"The folder {run_dir} holds a run already: continue it with {typed_path('resume', run_dir)}, or choose "
            f"another."
        )


def changes(folder: Path, node: DictConfig) -> str:
    """The settings that differ between the run in a folder and a configuration, for people; empty if none does.

    A setting that did not exist when the run began is as it was then: its default changes nothing.

    Raises:
        UserError: the run has settings under names that an earlier version gave them.
    """
    with open_dict(node):
        node.resume = None
    before, now = (flat(c) for c in (_config_of(folder), redact(as_plain(node))))
    refuse_renamed(before, f"{folder} was begun by an earlier version and cannot go on")
    for key in ("resume", *SHARING, *FREE):
        before[key] = now.get(key)
    if new := [key for key in now.keys() - before.keys() if _is_new(key, before, node)]:
        begun = flat(as_plain(compose_node(_begun(folder))))
        before |= {key: begun[key] for key in new if key in begun}
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return ", ".join(f"{key} ({before.get(key)} then, {now.get(key)} now)" for key in changed[:3])


def _is_new(key: str, before: Mapping[str, Any], node: DictConfig) -> bool:
    """Whether a setting that a run lacks is one of a section that it has, and no entry of a mapping of the user's."""
    section = key.rpartition(".")[0]
    if not section or not is_dataclass(OmegaConf.get_type(OmegaConf.select(node, section))):
        return False
    # A section may be new itself, in one that the run has
    return any(known.startswith(f"{section}.") for known in before) or _is_new(section, before, node)


def _begun(folder: Path) -> list[str]:
    """The overrides that a run began with. Nothing in them is resolved: they may name other settings."""
    path = folder / ".hydra" / "overrides.yaml"
    begun: Any = _loaded(path)
    if not isinstance(begun, list) or not all(isinstance(override, str) for override in begun):
        raise damaged(path)
    return [o for o in begun if not o.startswith("resume=") and not is_retired(o.lstrip("+").partition("=")[0])]


def _former_defaults(folder: Path, node: DictConfig) -> list[str]:
    """Overrides for the settings that the run took from defaults of its time, and that have another default now."""
    before, now = flat(_config_of(folder)), flat(as_plain(node))

    def plain(value: Any) -> str:
        return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)

    return [
        f"{key}={former}"
        for key, former in FORMER_DEFAULTS.items()
        if plain(before.get(key)) == former and plain(now.get(key)) in ("auto", "[auto]")
    ]


def resumed_overrides(overrides: list[str], value: str, recipe: str) -> list[str]:
    """The overrides of the interrupted run, checked to give the configuration that it had.

    Args:
        overrides: from the command line.
        value: of `resume`: a run folder, or true for the newest unfinished run of the recipe.
        recipe: its name.

    Raises:
        UserError: nothing to resume, or the command line or the code asks for other settings than the run began with.
    """
    folder = _resume_dir(value, recipe)
    path = folder / ".hydra" / "overrides.yaml"
    saved = _begun(folder)
    extra = [o for o in overrides if not o.startswith("resume=") and o not in saved]
    try:
        node = compose_node(saved)
    except UserError as error:
        raise UserError(f"{path} holds settings that are refused: {error}") from None
    saved += _former_defaults(folder, node)
    sharing = {o.partition("=")[0]: o for o in extra if o.partition("=")[0] in SHARING}
    saved = [*(o for o in saved if o.partition("=")[0] not in sharing), *sharing.values()]
    extra = [o for o in extra if o not in sharing.values()]
    changed = changes(folder, compose_node([*saved, *extra]))
    if changed:
        why = "" if extra else f": {path} is damaged, or the configuration behind it has changed"
        raise UserError(f"A resumed run keeps its settings, and {changed} differs from those of {folder}{why}.")
    quoted = quoted_path(folder)
    # Without an output folder of its own Hydra leaves the first start's overrides as they are.
    return [*saved, f"resume={quoted}", f"hydra.run.dir={quoted}", "hydra.output_subdir=null"]


def finished_run(folder: Path, settings: Sequence[str] = ()) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration that a run had, and the same as the plain values in its folder.

    Its overrides say which loss and which groups it had; its values are those of its time, whatever recipes say now.

    Args:
        settings: overrides of single settings, which go over those that the run had.

    Raises:
        UserError: a file is damaged, or has settings that this version does not take, or so do the overrides.
    """
    path = folder / "config.yaml"
    saved = _config_of(folder)
    refuse_renamed(flat(saved), f"{folder} was run by an earlier version and cannot be read")
    try:
        begun = _begun(folder)
        node = compose_node(begun)
    except UserError as error:
        raise UserError(
            f"The settings of {folder} cannot be composed again: {str(error).rstrip('.')}; if its recipe is your own, "
            f"say where it is with --config-dir."
        ) from error
    changed = compose_node([*begun, *settings]) if settings else node
    try:
        merged = OmegaConf.merge(node, saved)
        _unmask(merged, node, saved)
        for key in (override.key_or_group for override in parse_overrides(settings)):
            OmegaConf.update(merged, key, OmegaConf.select(changed, key))
        return to_run_config(merged), saved  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise UserError(f"{path} holds settings that this version does not take: {sentence(error)}") from error


def _unmask(merged: Any, node: DictConfig, saved: Mapping[str, Any]) -> None:
    """Put back what the file of a run hides of its settings, from what its overrides say."""
    typed = as_plain(node)
    hidden, before = flat(redact(typed)), flat(saved)
    for key, value in flat(typed).items():
        if hidden[key] != value and before.get(key) == hidden[key]:
            OmegaConf.update(merged, key, value)


def _config_of(folder: Path) -> Any:
    """The settings that a run had, without those that are gone; see `_loaded` for errors."""
    saved = _loaded(folder / "config.yaml")
    for key in RETIRED:
        section, _, name = key.partition(".")
        for stage in (saved, saved.get("sft")):
            if isinstance(stage, dict) and isinstance(stage.get(section), dict):
                stage[section].pop(name, None)
    return saved


def _loaded(path: Path) -> Any:
    """A file of a run.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        if not path.read_bytes().endswith(b"\n"):  # half of a YAML file is a YAML file too
            raise damaged(path)
        return OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException):
        raise damaged(path) from None


def _unfinished(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and not (folder / "summary.json").is_file()


def _resume_dir(value: str, recipe: str) -> Path:
    """The run folder that `resume=` means."""
    if value.lower() != "true":
        folder = Path(value).expanduser()
        if not (folder / "config.yaml").is_file():
            raise UserError(f"resume={value}: this is no run folder (it holds no config.yaml).")
        if not _unfinished(folder):
            report = (
                "" if (folder / "report.md").exists() else f"; python -m alignment.report {folder} writes its report"
            )
            raise UserError(
                f"resume={value}: this run is finished; its results are in {folder / 'summary.json'}{report}."
            )
        return folder
    runs = sorted(path for path in (Path("outputs") / recipe).glob("*") if _unfinished(path))
    if not runs:
        raise UserError(f"resume=true: there is no unfinished run of recipe {recipe} under outputs/{recipe}.")
    return runs[-1]
