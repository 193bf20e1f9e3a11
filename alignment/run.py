"""The command: `python -m alignment.run recipe=<name> [key=value ...] [-m] [resume=true] [--config-dir DIR]`."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from alignment.config.compose import (
    VERSION_BASE,
    as_plain,
    compose_node,
    is_sweep,
    refuse_without_effect,
    register,
    settle,
    single_values,
    sweep_members,
    to_run_config,
)
from alignment.config.preflight import check_machine
from alignment.config.renamed import flat, refuse_renamed
from alignment.config.schema import RunConfig
from alignment.errors import UserError
from alignment.files import asset_dir, atomic_write_bytes, atomic_write_text, redact, to_json
from alignment.kernels.allocator import begin_tensors_on_pages
from alignment.stages.cohorts import SweepCohort, SweepMember, cohorts

if TYPE_CHECKING:
    from alignment.training.cohort import Member

log = logging.getLogger(__name__)


_SWITCHES = ("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-r", "--resolve", "-m", "--multirun")
_SHOWN = ("job", "hydra", "all")
_SWEEP_DIR = "hydra.sweep.dir="
_TOGETHER = ("trainer.cohort", "trainer.joint_passes")
_PLUGGED = ("hydra/launcher", "hydra/sweeper")

FAILED = "failed.json"
"""In the folder of a member of a sweep: why it has no result."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep's folder, its members (none where only the sweeper knows them), and how to go on with it.

    `plugin` is the setting that chose what starts the members, where that is not Hydra's own loop over them.
    """

    folder: Path
    members: list[SweepMember]
    plugin: str | None
    command: str


_together: dict[Path, SweepCohort] = {}
"""By the folder of a member of the sweep that this process runs, those it trains with."""


@hydra.main(config_path=str(asset_dir("conf")), config_name="config", version_base=VERSION_BASE)
def _job(cfg: DictConfig) -> float | None:
    """One run, as Hydra starts it: in the current process, or in one of a launcher's.

    Returns:
        What an optimising sweeper makes large: of the held-out pairs the share that the policy ranks right against its
        reference, a number that can be compared over losses and their settings. None where there is none.
    """
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode is RunMode.MULTIRUN:
        _member(cfg, hydra_config.runtime.choices, run_dir)
        return _accuracy(run_dir / "summary.json")
    _single(cfg, hydra_config.runtime.choices, run_dir)
    return None


def _accuracy(summary: Path) -> float | None:
    if not summary.exists():
        return None
    stages = json.loads(summary.read_bytes())["stages"]
    return stages.get("preference", {}).get("metrics", {}).get("eval/nats/accuracies")


def _single(cfg: DictConfig, choices: Mapping[str, str], run_dir: Path) -> None:
    path = run_dir / "config.yaml"
    is_new = not path.exists()
    try:
        if not is_new and cfg.resume is None:
            _require_new(run_dir)
        _run(cfg, choices, run_dir)
    except UserError as error:
        if is_new and not (run_dir / "stages").exists():
            _remove_traces(run_dir)
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        if not path.exists():
            _remove_traces(run_dir)
            raise
        _, config_dir = _take_config_dir(sys.orig_argv)
        option = f"--config-dir {config_dir} " if config_dir is not None else ""
        sys.exit(f"\nInterrupted; continue with: python -m alignment.run {option}resume={run_dir}")


def _member(cfg: DictConfig, choices: Mapping[str, str], run_dir: Path) -> None:
    """One run of a sweep: what is finished stays, what was begun goes on, and what fails ends no other member."""
    together = _together.get(run_dir.resolve())
    if together is None:
        _attempt(cfg, choices, run_dir)
    elif together.has_run:
        log.info("%s has trained together with others.", run_dir.name)
    else:
        together.run(lambda member, place: _attempt(member.node, member.choices, member.folder, place))


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Have a member's folder alone: jobs may outlive the command that started them, and that may start them again."""
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("Another process runs %s; waiting for its end ...", run_dir.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _attempt(cfg: DictConfig, choices: Mapping[str, str], run_dir: Path, place: Member | None = None) -> None:
    with _alone(run_dir):
        _attempt_alone(cfg, choices, run_dir, place)


def _attempt_alone(cfg: DictConfig, choices: Mapping[str, str], run_dir: Path, place: Member | None) -> None:
    failed = run_dir / FAILED
    failed.unlink(missing_ok=True)
    if (run_dir / "summary.json").exists():
        log.info("%s is finished already.", run_dir.name)
        return
    try:
        _run(cfg, choices, run_dir, place)
    except Exception as error:
        if isinstance(error, UserError):
            sentence = str(error)
            log.error("Error: %s", sentence)
        else:
            sentence = f"{type(error).__name__}: {' '.join(str(error).split())}"
            log.exception("%s failed", run_dir.name)
        atomic_write_bytes(failed, to_json({"error": sentence}))
    finally:
        gc.collect()  # the next member of this process finds the memory free


def _run(cfg: DictConfig, choices: Mapping[str, str], run_dir: Path, place: Member | None = None) -> None:
    path = run_dir / "config.yaml"
    settle(cfg, choices)
    config = to_run_config(cfg)
    check_machine(config)
    _quieten_libraries()
    from alignment.stages.chain import Chain

    resolved = redact(as_plain(cfg))
    run = Chain(config, run_dir, choices["recipe"], resolved, place)
    if not path.exists():
        atomic_write_text(path, OmegaConf.to_yaml(OmegaConf.create(resolved)))
    run.run()


def _resumes(config: RunConfig) -> bool:
    return config.resume is not None and config.resume.lower() not in ("null", "false")


def _require_new(run_dir: Path) -> None:
    if (run_dir / "config.yaml").exists():
        raise UserError(
            f"The folder {run_dir} holds a run already: continue it with resume={run_dir}, or choose another folder."
        )


def _remove_traces(run_dir: Path) -> None:
    """Take away what was written for a run that never began, and the folders that were made for it alone."""
    shutil.rmtree(run_dir / ".hydra", ignore_errors=True)
    for name in ("run.log", "config.yaml", "rejected_rows.jsonl"):
        (run_dir / name).unlink(missing_ok=True)
    for folder in (run_dir, *(parent for parent in run_dir.parents if Path.cwd() in parent.parents)):
        if {path.name for path in folder.iterdir()} - {"multirun.yaml"}:
            break
        shutil.rmtree(folder)


def _quieten_libraries() -> None:
    """What libraries say about themselves would bury what the run says."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("bitsandbytes", "peft", "trl", "accelerate", "httpx", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|peft|bitsandbytes)\b")


def _take_config_dir(arguments: list[str]) -> tuple[list[str], Path | None]:
    """Take a user's configuration folder out of the arguments: `compose.register` reads it, with the same care."""
    rest: list[str] = []
    folder = None
    names = iter(arguments)
    for argument in names:
        if argument in ("--config-dir", "-cd"):
            value = next(names, None)
            if value is None:
                raise UserError("--config-dir needs the path of a folder.")
            folder = Path(value)
        elif argument.startswith("--config-dir="):
            folder = Path(argument.partition("=")[2])
        else:
            rest.append(argument)
    return rest, folder


def _unfinished(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and not (folder / "summary.json").is_file()


def _resume_dir(value: str, recipe: str) -> Path:
    """The run folder that `resume=` means."""
    if value.lower() != "true":
        folder = Path(value)
        if not (folder / "config.yaml").is_file():
            raise UserError(f"resume={value}: this is no run folder (it holds no config.yaml).")
        if not _unfinished(folder):
            raise UserError(f"resume={value}: this run is finished; its results are in {folder / 'summary.json'}.")
        return folder
    runs = sorted(path for path in (Path("outputs") / recipe).glob("*") if _unfinished(path))
    if not runs:
        raise UserError(f"resume=true: there is no unfinished run of recipe {recipe} under outputs/{recipe}.")
    return runs[-1]


def _changes(folder: Path, node: DictConfig) -> str:
    """What a configuration changes of the run in a folder, for people; empty where it is the same."""
    with open_dict(node):
        node.resume = None
    before, now = (
        flat(c) for c in (OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")), redact(as_plain(node)))
    )
    refuse_renamed(before, f"{folder} was begun by an earlier version and cannot go on")
    for key in ("resume", *_TOGETHER):  # no matter of the result
        before[key] = now.get(key)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return ", ".join(f"{key} ({before.get(key)} then, {now.get(key)} now)" for key in changed[:3])


def _resumed_overrides(overrides: list[str], value: str, recipe: str) -> list[str]:
    """The overrides of the interrupted run, checked to give the configuration that it had.

    Raises:
        UserError: the command line or the code asks for other settings than the run started with.
    """
    folder = _resume_dir(value, recipe)
    saved = [str(o) for o in OmegaConf.load(folder / ".hydra" / "overrides.yaml") if not str(o).startswith("resume=")]
    extra = [o for o in overrides if not o.startswith("resume=") and o not in saved]
    changed = _changes(folder, compose_node([*saved, *extra]))
    if changed:
        raise UserError(f"A resumed run keeps its settings, and {changed} differs from those of {folder}.")
    quoted = str(folder).replace("'", "\\'")
    # Without an output folder of its own Hydra leaves the first start's overrides as they are.
    return [*saved, f"resume='{quoted}'", f"hydra.run.dir='{quoted}'", "hydra.output_subdir=null"]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options and overrides.

    Raises:
        UserError: an option that Hydra does not have, or that would lead past the checks.
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
        elif argument in _SWITCHES:
            options.append(argument)
        else:
            raise UserError(
                f"There is no option {argument}; there are {', '.join(_SWITCHES)} and --config-dir, and settings are "
                f"given as key=value."
            )
    return options, overrides


def _checked_arguments(arguments: list[str]) -> tuple[list[str], Sweep | None]:
    """Arguments for Hydra, and the sweep they mean, after everything that can be wrong with them was looked for."""
    typed = arguments
    arguments, config_dir = _take_config_dir(arguments)
    options, overrides = _split(arguments)
    register(config_dir)
    if {"-h", "--help", "--hydra-help", "--version"} & set(options):
        return [*options, *overrides], None
    if {"-m", "--multirun"} & set(options):
        if set(options) - {"-m", "--multirun"}:
            return [*options, *overrides], None
        sweep = _checked_sweep(overrides, typed)
        return [*options, *_pin_folder(overrides, sweep)], sweep
    node = compose_node(overrides, with_hydra=True)
    if options:
        return [*options, *overrides], None
    HydraConfig.instance().set_config(node)
    run_dir, recipe = Path(node.hydra.run.dir), node.hydra.runtime.choices["recipe"]
    with open_dict(node):
        del node["hydra"]
    config = to_run_config(node)
    refuse_without_effect(overrides, config)
    for key in _TOGETHER:
        if any(override.startswith(f"{key}=") for override in overrides):
            raise UserError(f"{key} has no effect: it is for the members of a sweep, which is started with -m.")
    if _resumes(config):
        assert config.resume is not None
        return _resumed_overrides(overrides, config.resume, recipe), None
    if config.stopping is not None:
        raise UserError("stopping compares the members of a sweep, which -m starts: for a run alone set stopping=none.")
    if is_sweep(recipe):
        raise UserError(f"Recipe {recipe} is a sweep of {len(sweep_members(overrides))} runs: start it with -m.")
    _require_new(run_dir)
    return overrides, None


def _pin_folder(overrides: list[str], sweep: Sweep) -> list[str]:
    """The overrides with the folder of their sweep, which so is the same wherever it is asked for."""
    quoted = str(sweep.folder).replace("'", "\\'")
    # The members of a search have no names: their folders would lie deeper where a recipe's name has a slash.
    subdir = [] if sweep.members else ["hydra.sweep.subdir=${hydra:job.num}-run"]
    return [*(o for o in overrides if not o.startswith(_SWEEP_DIR)), f"{_SWEEP_DIR}'{quoted}'", *subdir]


def _checked_sweep(overrides: list[str], typed: list[str]) -> Sweep:
    """The sweep that is asked for, every member of it composed and compared with what its folder holds.

    Raises:
        UserError: a member that cannot run, or a folder that holds another run.
    """
    members = sweep_members(overrides)
    tried = members or [single_values(overrides)]
    nodes = [compose_node(member, with_hydra=True) for member in tried]
    HydraConfig.instance().set_config(nodes[0])
    folder, choices = Path(nodes[0].hydra.sweep.dir), nodes[0].hydra.runtime.choices
    plugin = next((f"{group}={choices[group]}" for group in _PLUGGED if choices[group] != "basic"), None)
    if not members:
        _check_search(nodes[0].hydra, folder)
    found = []
    for member, node in zip(tried, nodes, strict=True):
        hydra_config = node.hydra
        run_dir = folder / hydra_config.sweep.subdir
        with open_dict(node):
            del node["hydra"]
        config = to_run_config(node)
        if _resumes(config):
            raise UserError(
                "resume= continues one run; a sweep goes on where it stopped when its folder is given: "
                "-m ... hydra.sweep.dir=FOLDER."
            )
        refuse_without_effect(member, config)
        if plugin is not None and config.trainer.cohort not in ("auto", 1):
            raise UserError(
                f"trainer.cohort={config.trainer.cohort} trains members in one process, and {plugin} starts each one "
                f"by itself: choose one of them."
            )
        if (run_dir / "config.yaml").exists() and (changed := _changes(run_dir, node)):
            raise UserError(
                f"{folder} holds another sweep: in {run_dir.name} {changed} differs, so choose another one."
            )
        found.append(SweepMember(run_dir, node, hydra_config, config))
    words = [word for word in typed if not word.startswith(_SWEEP_DIR)]
    command = shlex.join(["python", "-m", "alignment.run", *words, f"{_SWEEP_DIR}{folder}"])
    return Sweep(folder, found if members else [], plugin, command)


def _check_search(hydra_config: DictConfig, folder: Path) -> None:
    """Refuse a search, whose members its sweeper chooses as it goes, where it would not find what it is for.

    Raises:
        UserError: what is wrong, and what to do.
    """
    recipe, sweeper = (hydra_config.runtime.choices[group] for group in ("recipe", "hydra/sweeper"))
    if sweeper == "basic":
        raise UserError("Ranges are searched by a sweeper that chooses values in them: add hydra/sweeper=optuna.")
    if is_sweep(recipe):
        raise UserError(f"Recipe {recipe} has members of its own, and hydra/sweeper={sweeper} would leave them out.")
    direction = hydra_config.sweeper.get("direction")
    if getattr(direction, "name", direction) != "maximize":
        raise UserError(
            "A run of a search returns the accuracy on the held-out pairs: set hydra.sweeper.direction=maximize."
        )
    if any(folder.glob("*/config.yaml")):
        raise UserError(f"{folder} holds a sweep already, and a search cannot go on: choose another folder.")


def _end_sweep(sweep: Sweep, gave_up: str | None) -> None:
    """Compare the members, and say which of them have no result, and why what started them gave up, if it did."""
    folders = [m.folder for m in sweep.members] or sorted(path.parent for path in sweep.folder.glob("*/.hydra"))
    for folder in folders:
        if folder.exists():
            with _alone(folder):
                pass  # a launcher that gives up for one job may leave others running
    begun = [folder for folder in folders if (folder / "config.yaml").exists()]
    if begun:
        from alignment.comparison import write_comparison

        write_comparison(begun, sweep.folder, track=True)
    problems = []
    for folder in folders:
        if (folder / FAILED).exists():
            problems.append(f"{folder.name} failed: {json.loads((folder / FAILED).read_bytes())['error']}")
        elif not (folder / "summary.json").exists():
            problems.append(f"{folder.name} did not end.")
    lines = [f"Error: {problem}" for problem in ([gave_up] if gave_up is not None else []) + problems]
    if problems:
        again = f"; try them again with: {sweep.command}" if sweep.members else "."
        lines.append(f"{len(problems)} of {len(folders)} members have no result{again}")
    if lines:
        sys.exit("\n".join(lines))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; leaves the process with status 1 and one sentence where the user can mend something."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach the handlers below as they are
    begin_tensors_on_pages()
    sweep = None
    try:
        checked, sweep = _checked_arguments(list(sys.argv[1:] if arguments is None else arguments))
        sys.argv = [sys.argv[0], *checked]
        for together in cohorts(sweep.members) if sweep is not None else ():
            _together.update((member.folder.resolve(), together) for member in together.members)
        gave_up = None
        try:
            _job()
        except Exception as error:
            if sweep is None or sweep.plugin is None:
                raise
            # What a member raises ends there, so this is a job that was killed, or that could not be started.
            gave_up = textwrap.shorten(f"{sweep.plugin} gave up: {type(error).__name__}: {error}", 300)
        if sweep is not None:
            _end_sweep(sweep, gave_up)
    except UserError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        if sweep is not None and sweep.folder.exists():
            sys.exit(f"\nInterrupted; continue with: {sweep.command}")
        sys.exit(130)


if __name__ == "__main__":
    # Launchers send the job to other processes, which find it under the name of the module.
    importlib.import_module("alignment.run").main()
