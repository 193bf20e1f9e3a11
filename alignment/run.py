"""The command: `python -m alignment.run recipe=<name> [key=value ...] [-m] [resume=true] [--config-dir DIR]`."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from alignment.compose import (
    VERSION_BASE,
    as_plain,
    asset_dir,
    compose_node,
    load,
    refuse_without_effect,
    register,
    settle,
    sweep_members,
    to_run_config,
)
from alignment.config import RunConfig
from alignment.errors import UserError
from alignment.preflight import check_machine
from alignment.records import atomic_write_text, redact

log = logging.getLogger(__name__)


_SWITCHES = ("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-r", "--resolve", "-m", "--multirun")
_SHOWN = ("job", "hydra", "all")


@hydra.main(config_path=str(asset_dir("conf")), config_name="config", version_base=VERSION_BASE)
def _job(cfg: DictConfig) -> None:
    """One run, as Hydra starts it: in the current process, or in one of a launcher's."""
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    path = run_dir / "config.yaml"
    is_new = not path.exists()
    try:
        settle(cfg, hydra_config.runtime.choices)
        config = to_run_config(cfg)
        if not _resumes(config):
            _require_new(run_dir)
        check_machine(config)
        _quieten_libraries()
        from alignment.stages import Run  # after all that can be refused: this imports transformers, for seconds

        resolved = redact(as_plain(cfg))
        run = Run(config, run_dir, hydra_config.runtime.choices["recipe"], resolved)
        if is_new:
            atomic_write_text(path, OmegaConf.to_yaml(OmegaConf.create(resolved)))
        run.execute()
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


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict) and value:
        items = [_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
        return {key: v for item in items for key, v in item.items()}
    return {prefix: value}


def _resumed_overrides(overrides: list[str], value: str, recipe: str) -> list[str]:
    """The overrides of the interrupted run, checked to give the configuration that it had.

    Raises:
        UserError: the command line or the code asks for other settings than the run started with.
    """
    folder = _resume_dir(value, recipe)
    saved = [str(o) for o in OmegaConf.load(folder / ".hydra" / "overrides.yaml") if not str(o).startswith("resume=")]
    extra = [o for o in overrides if not o.startswith("resume=") and o not in saved]
    node = compose_node([*saved, *extra])
    with open_dict(node):
        node.resume = None
    before, now = (
        _flat(c) for c in (OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")), redact(as_plain(node)))
    )
    before["resume"] = now["resume"]
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        shown = ", ".join(f"{key} ({before.get(key)} then, {now.get(key)} now)" for key in changed[:3])
        raise UserError(f"A resumed run keeps its settings, and {shown} differs from those of {folder}.")
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


def _checked_arguments(arguments: list[str]) -> list[str]:
    """Arguments for Hydra, after everything that can be wrong with them has been looked for."""
    arguments, config_dir = _take_config_dir(arguments)
    options, overrides = _split(arguments)
    register(config_dir)
    if {"-h", "--help", "--hydra-help", "--version"} & set(options):
        return [*options, *overrides]
    if {"-m", "--multirun"} & set(options):
        for member in sweep_members(overrides):
            if _resumes(load(*member)):
                raise UserError("resume= continues one run; continue the members of a sweep one by one, without -m.")
        return [*options, *overrides]
    node = compose_node(overrides, with_hydra=True)
    if options:
        return [*options, *overrides]
    HydraConfig.instance().set_config(node)
    run_dir, recipe = Path(node.hydra.run.dir), node.hydra.runtime.choices["recipe"]
    with open_dict(node):
        del node["hydra"]
    config = to_run_config(node)
    refuse_without_effect(overrides, config)
    if _resumes(config):
        assert config.resume is not None
        return _resumed_overrides(overrides, config.resume, recipe)
    _require_new(run_dir)
    return overrides


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; leaves the process with status 1 and one sentence where the user can mend something."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach the handlers below as they are
    try:
        sys.argv = [sys.argv[0], *_checked_arguments(list(sys.argv[1:] if arguments is None else arguments))]
        _job()
    except UserError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
