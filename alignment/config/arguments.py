"""The command line of `python -m alignment.run`: checked as a whole before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import open_dict

from alignment.config.compose import compose_node, to_run_config
from alignment.config.help import help_text
from alignment.config.members import is_sweep, sweep_members
from alignment.config.overrides import refuse_without_effect
from alignment.config.registry import register
from alignment.config.resume import FREE, require_new, resumed_overrides
from alignment.config.schema import RunConfig
from alignment.config.sweep import Sweep, check_sweep, pinned
from alignment.config.typed_text import as_text, quoted_path
from alignment.errors import UserError, did_you_mean

_HELP = ("-h", "--help")
_MULTIRUN = ("-m", "--multirun")
_SWITCHES = (*_HELP, "--hydra-help", "--version", "-c", "--cfg", "-r", "--resolve", *_MULTIRUN)
_RUN_DIR = "hydra.run.dir="
_SHOWN = ("job", "hydra", "all")


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A command line that was checked.

    Attributes:
        for_hydra: the arguments that Hydra gets.
        config_dir: your configuration folder, if you named one.
        sweep: the sweep to start, if it is one.
        help: a text to show instead of a run.
        config: of the run, if it is one.
    """

    for_hydra: list[str]
    config_dir: Path | None = None
    sweep: Sweep | None = None
    help: str | None = None
    config: RunConfig | None = None


def check_arguments(arguments: list[str]) -> CommandLine:
    """Look for everything that can be wrong with the arguments.

    Raises:
        UserError: what is wrong, and what is accepted.
    """
    rest, config_dir = _take_config_dir(arguments)
    options, typed = _split(rest)
    overrides = as_text(typed, sweeps=not set(_MULTIRUN).isdisjoint(options))
    register(config_dir)
    if set(_HELP) & set(options):
        return CommandLine([], config_dir, help=help_text())
    passed_on = CommandLine([*options, *overrides], config_dir)
    if {"--hydra-help", "--version"} & set(options):
        return passed_on
    if {"-r", "--resolve"} & set(options) and not {"-c", "--cfg"} & set(options):
        raise UserError("--resolve belongs to --cfg, which shows the configuration: add --cfg job.")
    if set(_MULTIRUN) & set(options):
        if set(options) - set(_MULTIRUN):
            raise UserError("--cfg shows the configuration of one run: leave -m out and give each setting one value.")
        sweep = check_sweep(overrides, arguments)
        return CommandLine([*options, *pinned(overrides, sweep)], config_dir, sweep)
    node = compose_node(overrides, with_hydra=True)
    if options:
        return passed_on

    # A single run
    if node.hydra.mode is RunMode.MULTIRUN:
        raise UserError("hydra.mode=MULTIRUN would start a sweep unchecked: leave it out and start the sweep with -m.")
    if (launcher := node.hydra.runtime.choices["hydra/launcher"]) != "basic":
        raise UserError(f"hydra/launcher={launcher} starts the jobs of a sweep: add -m, which takes a single run too.")
    HydraConfig.instance().set_config(node)
    run_dir, recipe = Path(node.hydra.run.dir), node.hydra.runtime.choices["recipe"]
    if run_dir != run_dir.expanduser():
        run_dir = run_dir.expanduser()
        overrides = [*(o for o in overrides if not o.startswith(_RUN_DIR)), f"{_RUN_DIR}{quoted_path(run_dir)}"]
    with open_dict(node):
        del node["hydra"]
    config = to_run_config(node)
    refuse_without_effect(overrides, config)
    for key in FREE:
        if any(override.startswith(f"{key}=") for override in overrides):
            raise UserError(f"{key} has no effect: it is for the members of a sweep, which is started with -m.")
    if config.resumes:
        assert config.resume is not None
        saved = resumed_overrides(overrides, config.resume, recipe)
        return CommandLine(saved, config_dir, config=to_run_config(compose_node(saved)))
    if config.stopping is not None:
        raise UserError("stopping compares the members of a sweep, which -m starts: for a run alone set stopping=none.")
    if is_sweep(recipe):
        raise UserError(f"Recipe {recipe} is a sweep of {len(sweep_members(overrides))} runs: start it with -m.")
    require_new(run_dir)
    return CommandLine(overrides, config_dir, config=config)


def _take_config_dir(arguments: list[str]) -> tuple[list[str], Path | None]:
    """Take your configuration folder out of the arguments: `register` reads it, and checks more than Hydra would."""
    rest: list[str] = []
    folder = None
    names = iter(arguments)
    for argument in names:
        if argument in ("--config-dir", "-cd"):
            value = next(names, None)
            if value is None:
                raise UserError("--config-dir needs the path of a folder.")
            folder = Path(value).expanduser()
        elif argument.startswith("--config-dir="):
            folder = Path(argument.partition("=")[2]).expanduser()
        else:
            rest.append(argument)
    return rest, folder


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options and overrides.

    Raises:
        UserError: an option that there is not, or that would lead past the checks.
    """
    options: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
        elif argument in ("-c", "--cfg"):
            value = next(rest, None)
            if value not in _SHOWN:
                raise UserError(f"{argument} needs one of {', '.join(_SHOWN)}, not {value}.")
            options += [argument, value]
        elif argument in ("-sc", "--shell-completion"):
            raise UserError(
                'Completion is for the installed command, in front of run: eval "$(alignment -sc install=bash)".'
            )
        elif argument in _SWITCHES:
            options.append(argument)
        else:
            known = [*_SWITCHES, "--config-dir"]
            hint = did_you_mean(argument, known)
            raise UserError(
                f"There is no option {argument}{hint}; there are {', '.join(known)}, and settings are given as "
                f"key=value."
            )
    return options, overrides
