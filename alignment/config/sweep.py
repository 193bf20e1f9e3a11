"""A sweep before it runs: its folder, its members, and everything that can be wrong with them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from alignment.config.compose import compose_node, to_run_config
from alignment.config.members import is_sweep, single_values, sweep_members
from alignment.config.overrides import refuse_without_effect
from alignment.config.resume import changes
from alignment.config.schema import RunConfig, Shard
from alignment.config.typed_text import quoted_path, typed_path
from alignment.errors import UserError
from alignment.files import atomic_write_text

_SWEEP_DIR = "hydra.sweep.dir="
_PLUGGED = ("hydra/launcher", "hydra/sweeper")


@dataclass(frozen=True, slots=True)
class SweepMember:
    """A member of a sweep before it runs: its folder, its configuration, and Hydra's own part of that."""

    folder: Path
    node: DictConfig
    hydra: DictConfig
    config: RunConfig

    @property
    def choices(self) -> Mapping[str, str]:
        """The chosen option of every group."""
        return self.hydra.runtime.choices

    def make_folder(self) -> None:
        """Write what Hydra writes when a job begins; without it you could not resume the member by itself."""
        folder = self.folder / ".hydra"
        folder.mkdir(parents=True, exist_ok=True)
        task = OmegaConf.to_yaml(self.hydra.overrides.task)
        parts = {"overrides": task, "hydra": OmegaConf.to_yaml(OmegaConf.create({"hydra": self.hydra}))}
        for name, text in parts.items():
            atomic_write_text(folder / f"{name}.yaml", text)


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep that may start.

    Attributes:
        folder: of the sweep.
        members: empty where the sweeper chooses them as it goes.
        plugin: the setting that chose a launcher or sweeper other than Hydra's own loop; None without one.
        command: continues the sweep.
        tasks: of each job on a machine, where `trainer.devices` asks for several; None leaves it to the launcher.
    """

    folder: Path
    members: list[SweepMember]
    plugin: str | None
    command: str
    tasks: int | None = None


def check_sweep(overrides: list[str], typed: list[str]) -> Sweep:
    """Compose every member, and compare it with what its folder holds.

    Args:
        overrides: settings from the command line.
        typed: the command line as it was typed.

    Raises:
        UserError: a member that cannot run, or a folder that holds another sweep.
    """
    members = sweep_members(overrides)
    tried = members or [single_values(overrides)]
    nodes = [compose_node(member, with_hydra=True) for member in tried]
    HydraConfig.instance().set_config(nodes[0])
    folder, choices = Path(nodes[0].hydra.sweep.dir).expanduser(), nodes[0].hydra.runtime.choices
    plugin = next((f"{group}={choices[group]}" for group in _PLUGGED if choices[group] != "basic"), None)
    if not members:
        _check_search(nodes[0].hydra, folder)
    found = [_checked_member(member, node, folder, plugin) for member, node in zip(tried, nodes, strict=True)]
    words = [word for word in typed if not word.startswith(_SWEEP_DIR)]
    command = f"{shlex.join(['python', '-m', 'alignment.run', *words])} {typed_path('hydra.sweep.dir', folder)}"
    tasks = _tasks([member.config for member in found], found[0].hydra.launcher)
    return Sweep(folder, found if members else [], plugin, command, tasks)


def _checked_member(overrides: list[str], node: DictConfig, folder: Path, plugin: str | None) -> SweepMember:
    hydra_config = node.hydra
    run_dir = folder / hydra_config.sweep.subdir
    with open_dict(node):
        del node["hydra"]
    config = to_run_config(node)
    if config.resumes:
        raise UserError(
            "resume= continues one run. To continue a sweep, give its folder: -m ... hydra.sweep.dir=FOLDER."
        )
    refuse_without_effect(overrides, config)
    if plugin is not None and config.trainer.cohort not in ("auto", 1):
        raise UserError(
            f"trainer.cohort={config.trainer.cohort} trains members in one process, and {plugin} starts each one "
            f"by itself: choose one of them."
        )
    if (run_dir / "config.yaml").exists() and (changed := changes(run_dir, node)):
        raise UserError(f"{folder} holds another sweep: {changed} differs in {run_dir.name}. Choose another folder.")
    return SweepMember(run_dir, node, hydra_config, config)


def _tasks(configs: Sequence[RunConfig], launcher: DictConfig) -> int | None:
    """How many tasks a job is to have on its machine for the ranks of `trainer.devices`; None: as the launcher says.

    Raises:
        UserError: a launcher whose members are one process each, or that is set to another number.
    """
    first, *others = dict.fromkeys(config.trainer.devices for config in configs)
    if others:
        raise UserError(
            f"trainer.devices={first} and trainer.devices={others[0]} in one sweep: its jobs are all of one size, so "
            f"start a sweep for each."
        )
    tasks = launcher.get("nodes", 1) * launcher.get("tasks_per_node", 1)
    if first == 1 == tasks and any(config.trainer.shard is Shard.node for config in configs):
        raise UserError(
            "trainer.shard=node shares a base among the ranks of one run, and a sweep trains each member in one "
            "process: leave it out, start each member without -m, or give each a job of several tasks with "
            "hydra/launcher=submitit_slurm."
        )
    if first == 1:
        return None
    if "tasks_per_node" not in launcher:
        raise UserError(
            f"trainer.devices={first} shares one run among several ranks, and this sweep trains each member in one "
            f"process: set it to 1, start each member without -m, or give each a job with "
            f"hydra/launcher=submitit_slurm."
        )
    if first not in ("auto", tasks) and tasks > 1:
        raise UserError(
            f"trainer.devices={first}, and hydra.launcher starts {tasks} tasks for each member: leave one of them out."
        )
    return first if tasks == 1 and first != "auto" else None


def _check_search(hydra_config: DictConfig, folder: Path) -> None:
    """Check a search, whose sweeper chooses the members as it goes.

    Raises:
        UserError: what is wrong, and what to do.
    """
    recipe, sweeper = (hydra_config.runtime.choices[group] for group in ("recipe", "hydra/sweeper"))
    if sweeper == "basic":
        raise UserError("A range of values needs a sweeper that chooses from it: add hydra/sweeper=optuna.")
    if is_sweep(recipe):
        raise UserError(f"Recipe {recipe} has members of its own, and hydra/sweeper={sweeper} would ignore them.")
    direction = hydra_config.sweeper.get("direction")
    if getattr(direction, "name", direction) != "maximize":
        raise UserError(
            "A run of a search returns the accuracy on the held-out pairs: set hydra.sweeper.direction=maximize."
        )
    if any(folder.glob("*/config.yaml")):
        raise UserError(f"{folder} holds a sweep already, and a search cannot be continued: choose another folder.")


def pinned(overrides: list[str], sweep: Sweep) -> list[str]:
    """Overrides that pin the folder of the sweep, so that every later composition sees the same one, and its tasks."""
    # The members of a search have no names: their folders would lie deeper where a recipe's name has a slash.
    subdir = [] if sweep.members else ["hydra.sweep.subdir=${hydra:job.num}-run"]
    tasks = [] if sweep.tasks is None else [f"hydra.launcher.tasks_per_node={sweep.tasks}"]
    return [
        *(o for o in overrides if not o.startswith(_SWEEP_DIR)),
        f"{_SWEEP_DIR}{quoted_path(sweep.folder)}",
        *subdir,
        *tasks,
    ]
