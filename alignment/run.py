"""`python -m alignment.run recipe=<name> [key=value ...] [-m] [resume=true]`: trains a policy and reports on it."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from alignment import spinning  # noqa: F401 - first, because what follows imports torch
from alignment.config.arguments import check_arguments
from alignment.config.compose import VERSION_BASE, as_plain, finish_composition, to_run_config
from alignment.config.preflight import check_machine
from alignment.config.resume import require_new
from alignment.config.schema import Device, RunConfig
from alignment.config.sweep import Sweep
from alignment.config.typed_text import typed_path
from alignment.errors import UserError, disk_problem
from alignment.files import asset_dir, atomic_write_text, redact
from alignment.kernels.allocator import begin_tensors_on_pages, grow_gpu_segments
from alignment.ranks.jobs import share_job
from alignment.ranks.launch import idle_gpus, launch, rank_count
from alignment.ranks.place import LOGS, LOST, take_place
from alignment.ranks.team import RankLost, Team, join
from alignment.stages.cohorts import SweepCohort, cohorts
from alignment.stages.sweep import attempt, member_folders, members_without_result

if TYPE_CHECKING:
    from alignment.training.cohort import CohortSlot

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run, as Hydra starts it: in this process, or in one of a launcher's, which gets a copy.

    Attributes:
        config_dir: your configuration folder, if you named one.
        cohorts: by the folder of a member, the cohort in which this process trains it.
        team: the ranks that share the run.
    """

    config_dir: Path | None
    cohorts: Mapping[Path, SweepCohort]
    team: Team | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Ranks stay where they are: a job that is sent elsewhere finds its own."""
        return {**self.__dict__, "team": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In the process of a launcher's job, before it does anything."""
        self.__dict__.update(state)
        share_job()

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run, or go on.

        Returns:
            The number that an optimising sweeper maximises: the share of held-out pairs that the policy ranks right
            against its reference. It can be compared over losses and their settings. None where there is none.
        """
        hydra_config = HydraConfig.get()
        run_dir, choices = Path(hydra_config.runtime.output_dir), hydra_config.runtime.choices
        if hydra_config.mode is not RunMode.MULTIRUN:
            self._single(cfg, choices, run_dir)
            return None
        _stop_like_ctrl_c()
        cohort = self.cohorts.get(run_dir.resolve())
        if cohort is None:
            attempt(run_dir, lambda: run_chain(cfg, choices, run_dir, team=self.team))
        elif cohort.has_run:
            log.info("%s has trained together with others.", run_dir.name)
        else:
            cohort.run(
                lambda member, slot: attempt(
                    member.folder, lambda: run_chain(member.node, member.choices, member.folder, slot)
                )
            )
        return accuracy(run_dir / "summary.json")

    def _single(self, cfg: DictConfig, choices: Mapping[str, str], run_dir: Path) -> None:
        path = run_dir / "config.yaml"
        is_new = not path.exists()
        try:
            if not is_new and cfg.resume is None:
                require_new(run_dir)
            if self.team is None and (hint := idle_gpus(_gpus(cfg.device))):
                log.info(hint)
            run_chain(cfg, choices, run_dir, team=self.team)
        except UserError as error:
            if is_new and not (run_dir / "stages").exists():
                _remove_traces(run_dir)
            sys.exit(_last_word(error))
        except KeyboardInterrupt:
            if not path.exists():
                _remove_traces(run_dir)
                raise
            sys.exit(f"\nInterrupted; continue with: {self._again(run_dir)}")
        except Exception as error:
            if (problem := disk_problem(error)) is None:
                raise
            again = f", then continue with: {self._again(run_dir)}" if path.exists() else "."
            sys.exit(f"Error: {problem}{again}")

    def _again(self, run_dir: Path) -> str:
        """The command that continues the run."""
        option = f"--config-dir {shlex.quote(str(self.config_dir))} " if self.config_dir is not None else ""
        return f"python -m alignment.run {option}{typed_path('resume', run_dir)}"


def _last_word(error: UserError) -> str | int:
    """What this process ends with: the sentence, or the code that leaves it to our launcher, which knows more."""
    return LOST if isinstance(error, RankLost) and LOGS in os.environ else f"Error: {error}"


def run_chain(
    cfg: DictConfig,
    choices: Mapping[str, str],
    run_dir: Path,
    slot: CohortSlot | None = None,
    team: Team | None = None,
) -> None:
    """Check the configuration and the machine, then go through the stages."""
    path = run_dir / "config.yaml"
    finish_composition(cfg, choices)
    config = to_run_config(cfg)
    check_machine(config)
    from alignment.stages.quiet import quieten_libraries

    quieten_libraries()  # before those are imported that speak while they load
    from alignment.stages.chain import Chain

    resolved = redact(as_plain(cfg))
    chain = Chain(config, run_dir, choices["recipe"], resolved, slot, team=team)
    if not path.exists():
        atomic_write_text(path, OmegaConf.to_yaml(OmegaConf.create(resolved)))
    chain.run()


def accuracy(summary: Path) -> float | None:
    """Share of held-out pairs that the policy of a finished run ranks right; None where that is not known."""
    if not summary.exists():
        return None
    stages = json.loads(summary.read_bytes())["stages"]
    return stages.get("preference", {}).get("metrics", {}).get("eval/nats/accuracies")


def _remove_traces(run_dir: Path) -> None:
    """Remove what was written for a run that never began, and the folders that were made for it alone."""
    shutil.rmtree(run_dir / ".hydra", ignore_errors=True)
    for name in ("run.log", "config.yaml"):  # the rows that were refused stay, for you to read
        (run_dir / name).unlink(missing_ok=True)
    for folder in (run_dir, *(parent for parent in run_dir.parents if Path.cwd() in parent.parents)):
        if {path.name for path in folder.iterdir()} - {"multirun.yaml"}:
            break
        shutil.rmtree(folder)


def end_sweep(sweep: Sweep, gave_up: str | None) -> None:
    """Compare the members, and exit with a sentence for each one that has no result.

    Args:
        gave_up: why the launcher gave up, if it did.
    """
    folders = member_folders(sweep)
    problems = members_without_result(folders)
    begun = [folder for folder in folders if (folder / "config.yaml").exists()]
    if begun:
        from alignment.comparison import write_comparison

        write_comparison(begun, sweep.folder, track=True)
    lines = [f"Error: {problem}" for problem in ([gave_up] if gave_up is not None else []) + problems]
    if problems:
        again = f"; try them again with: {sweep.command}" if sweep.members else "."
        lines.append(f"{len(problems)} of {len(folders)} members have no result{again}")
    if lines:
        sys.exit("\n".join(lines))


def _stop_like_ctrl_c() -> None:
    """Let SIGTERM, a cluster's stop, be Ctrl-C: files are closed and locks released. A launcher's own handler stays."""
    is_main = threading.current_thread() is threading.main_thread()  # no other may set a handler
    if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _start(job: Job, arguments: list[str]) -> None:
    # hydra.main reads sys.argv and nothing else; the function behind it that takes arguments is private to Hydra.
    sys.argv = [sys.argv[0], *arguments]
    # Hydra would compose the whole configuration once more to look for a mode, and we accept none but -m.
    Hydra.get_mode = lambda self, config_name, overrides: None  # type: ignore[method-assign]
    hydra.main(config_path=str(asset_dir("conf")), config_name="config", version_base=VERSION_BASE)(job)()


def _ranks(config: RunConfig | None) -> int:
    """How many ranks this machine is to start for a run."""
    if config is None or config.trainer.devices == 1:
        return 1
    gpus = _gpus(config.device)
    return rank_count(config.trainer.devices, gpus, gpus > 0)


def _gpus(device: Device) -> int:
    """How many GPUs this machine shows to a run on that device."""
    import torch

    return 0 if device is Device.cpu else torch.cuda.device_count()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; leaves the process with status 1 and one sentence where you can mend something."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach the handlers below as they are
    begin_tensors_on_pages()
    grow_gpu_segments()
    _stop_like_ctrl_c()
    logging.raiseExceptions = False  # a log on a full disk is no second error, with a traceback for every line
    try:
        place = take_place()
        team = None if place is None else join(place)
    except UserError as error:
        sys.exit(f"Error: {error}")
    if team is not None and team.place.rank:
        team.follow()
        return
    try:
        _command(list(sys.argv[1:] if arguments is None else arguments), team)
    finally:
        if team is not None:
            team.end()


def _command(arguments: list[str], team: Team | None) -> None:
    sweep = None
    try:
        checked = check_arguments(arguments)
        if checked.help is not None:
            sys.stdout.write(checked.help)
            return
        sweep = checked.sweep
        if sweep is None:
            if team is not None:
                require_team(checked.config, team)
            elif (count := _ranks(checked.config)) > 1:
                launch(count, "alignment.run", arguments)
            _start(Job(checked.config_dir, {}, team), checked.for_hydra)
            return
        if team is not None:
            raise UserError("A sweep has no work for several ranks: start it without torchrun, or one member alone.")
        together = cohorts(sweep.members)
        by_folder = {member.folder.resolve(): cohort for cohort in together for member in cohort.members}
        gave_up = None
        try:
            _start(Job(checked.config_dir, by_folder), checked.for_hydra)
        except Exception as error:
            if sweep.plugin is None:
                raise
            # A failing member keeps its error to itself, so a job was killed, or it could not be started.
            gave_up = textwrap.shorten(f"{sweep.plugin} gave up: {type(error).__name__}: {error}", 300)
        end_sweep(sweep, gave_up)
    except UserError as error:
        sys.exit(f"Error: {error}")
    except Exception as error:
        if (problem := disk_problem(error)) is None:
            raise
        sys.exit(f"Error: {problem}.")
    except KeyboardInterrupt:
        if sweep is not None and sweep.folder.exists():
            sys.exit(f"\nInterrupted; continue with: {sweep.command}")
        sys.exit(130)


def require_team(config: RunConfig | None, team: Team) -> None:
    """Refuse a number of ranks that the launcher has not started.

    Raises:
        UserError: both numbers, and what to do.
    """
    if config is not None and config.trainer.devices not in ("auto", 1, team.size):
        raise UserError(
            f"trainer.devices={config.trainer.devices}, and the launcher has started {team.size} ranks: leave it out, "
            f"since the launcher decides."
        )


if __name__ == "__main__":
    # Launchers send the job to other processes, which find it under the name of the module.
    importlib.import_module("alignment.run").main()
