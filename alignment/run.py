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
    register,
    sweep_members,
    to_run_config,
)
from alignment.errors import UserError
from alignment.records import atomic_write_text, redact

log = logging.getLogger(__name__)


@hydra.main(config_path=str(asset_dir("conf")), config_name="config", version_base=VERSION_BASE)
def _job(cfg: DictConfig) -> None:
    """One run, as Hydra starts it: in the current process, or in one of a launcher's."""
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    path = run_dir / "config.yaml"
    try:
        config = to_run_config(cfg)
        _quieten_libraries()
        from alignment.stages import Run  # after the configuration is known to be good: this imports torch

        resolved = redact(as_plain(cfg))
        run = Run(config, run_dir, hydra_config.runtime.choices["recipe"], resolved)
        if not path.exists():
            atomic_write_text(path, OmegaConf.to_yaml(OmegaConf.create(resolved)))
        run.execute()
    except UserError as error:
        if not path.exists():
            _remove_traces(run_dir)
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        if not path.exists():
            _remove_traces(run_dir)
            raise
        sys.exit(f"\nInterrupted; continue with: python -m alignment.run resume={run_dir}")


def _remove_traces(run_dir: Path) -> None:
    """Take away what Hydra wrote for a run that never began."""
    shutil.rmtree(run_dir / ".hydra", ignore_errors=True)
    (run_dir / "run.log").unlink(missing_ok=True)
    for folder in (run_dir, *list(run_dir.parents)[:2]):
        if any(folder.iterdir()):
            break
        folder.rmdir()


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
    return [*saved, f"resume='{quoted}'", f"hydra.run.dir='{quoted}'"]


def _checked_arguments(arguments: list[str]) -> list[str]:
    """Arguments for Hydra, after everything that can be wrong with them has been looked for."""
    arguments, config_dir = _take_config_dir(arguments)
    flags = [a for a in arguments if a.startswith("-") and "=" not in a.partition("=")[0][1:]]
    overrides = [a for a in arguments if a not in flags]
    register(config_dir)
    if {"-h", "--help", "--hydra-help", "--version", "--info", "-i", "--cfg", "-c", "--shell-completion", "-sc"} & set(
        flags
    ):
        return arguments
    if {"-m", "--multirun"} & set(flags):
        for member in sweep_members(overrides):
            load(*member, config_dir=None)
        return arguments
    node = compose_node(overrides, with_hydra=True)
    recipe = node.hydra.runtime.choices["recipe"]
    with open_dict(node):
        del node["hydra"]
    config = to_run_config(node)
    if config.resume is not None and config.resume.lower() not in ("null", "false"):
        overrides = _resumed_overrides(overrides, config.resume, recipe)
    return [*flags, *overrides]


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
