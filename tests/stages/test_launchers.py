"""Plugins that start the members of a sweep: launchers with processes of their own, and a sweeper that searches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from alignment.config.arguments import check_arguments
from alignment.config.members import sweep_members
from alignment.config.registry import register
from alignment.config.sweep import Sweep
from alignment.errors import UserError
from alignment.files import file_lock
from alignment.run import end_sweep
from alignment.runs.record import RunRecord
from tests.helpers.commands import command, write_project
from tests.helpers.hazard import finding_modules_in, hazardous_project
from tests.helpers.patience import patience


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_folder) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), tiny_model_folder)


def needs(plugin: str) -> None:
    pytest.importorskip(f"hydra_plugins.{plugin}", reason=f"PLUGIN ABSENT: {plugin} is not installed: this did not run")


QUICK = ("recipe=tiny", "trainer.max_steps=4", "sft.trainer.epochs=1", "evaluation.prompts=0", "hydra.sweep.dir=sweep")
HAZARDOUS = (*(setting for setting in QUICK if not setting.startswith("sft.")), "sft=none", "loss=hazard")


def sweep(project: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process as a user starts it: launchers look at how it was started to start others."""
    return subprocess.run(
        [sys.executable, "-m", "alignment.run", "--config-dir", str(project), "-m", *QUICK, *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "ALIGNMENT_CACHE": str(cwd / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        timeout=patience(300),
        check=False,
    )


def summary(member: Path) -> dict:
    return json.loads((member / "summary.json").read_text())


@pytest.mark.matrix
def test_joblib_shares_what_members_have_in_common(project, tmp_path):
    needs("hydra_joblib_launcher")
    ended = sweep(project, tmp_path, "loss.beta=0.1,0.2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert ended.returncode == 0, ended.stderr
    folders = [tmp_path / "sweep" / f"{number}-tiny" for number in range(2)]
    # Both began at once: who came second to the SFT stage, and to the reference, waited for the first.
    assert sum("SFT was done before" in (folder / "run.log").read_text() for folder in folders) == 1
    assert sorted(summary(folder)["reference"]["misses"] for folder in folders) == [0, 28]
    assert [summary(folder)["stages"]["preference"]["steps"] for folder in folders] == [4, 4]
    assert (tmp_path / "sweep" / "comparison.html").exists()


@pytest.mark.matrix
def test_a_job_that_is_told_to_stop_stops_like_ctrl_c(tiny_model_folder, tmp_path):
    """SIGTERM in a launcher's process: one line says how to go on, and nothing is left half-written.

    Joblib kills the other job at once. What that one was writing has a temporary name, and goes when its run goes on.
    """
    needs("hydra_joblib_launcher")
    project = hazardous_project(tmp_path, tiny_model_folder)
    ended = command(
        *("--config-dir", str(project), "-m", *HAZARDOUS, "loss.fault=stopped,none"),
        *("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        cwd=tmp_path,
        cache=tmp_path / "cache",
        patch=partial(finding_modules_in, tmp_path),
        timeout=300,
    )
    assert ended.code == 1 and "Interrupted; continue with: python -m alignment.run" in ended.err, ended.err
    stopped, killed = (tmp_path / "sweep" / f"{number}-tiny" for number in range(2))
    assert not list(stopped.rglob("*.tmp"))
    RunRecord(killed)
    assert not list(killed.rglob("*.tmp"))


@pytest.mark.matrix
def test_a_job_that_is_killed_ends_no_other(tiny_model_folder, tmp_path):
    needs("hydra_submitit_launcher")
    project = hazardous_project(tmp_path, tiny_model_folder)
    ended = command(
        *("--config-dir", str(project), "-m", *HAZARDOUS, "loss.fault=killed,none", "hydra/launcher=submitit_local"),
        cwd=tmp_path,
        cache=tmp_path / "cache",
        patch=partial(finding_modules_in, tmp_path),
        timeout=300,
    )
    assert ended.code == 1 and "Traceback" not in ended.err
    gave_up, failed, again = ended.err.splitlines()[-3:]
    assert gave_up.startswith("Error: hydra/launcher=submitit_local gave up: UncompletedJobError: ")
    assert failed == "Error: 0-tiny did not end."
    assert again.startswith("1 of 2 members have no result; try them again with: python -m alignment.run --config-dir ")
    assert summary(tmp_path / "sweep" / "1-tiny")["stages"]["preference"]["steps"] == 4
    assert "1-tiny" in (tmp_path / "sweep" / "comparison.csv").read_text()


def test_members_that_still_run_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("alignment.comparison.write_comparison", lambda *arguments, **named: None)
    for number in range(2):
        (tmp_path / f"{number}-tiny" / ".hydra").mkdir(parents=True)
        (tmp_path / f"{number}-tiny" / "config.yaml").touch()
    (tmp_path / "0-tiny" / "summary.json").touch()

    def end() -> None:
        time.sleep(0.3)
        (tmp_path / "1-tiny" / "summary.json").touch()
        held.close()

    with ExitStack() as stack, ThreadPoolExecutor(1) as other:
        other.submit(stack.enter_context, file_lock(tmp_path / "1-tiny" / ".lock", "")).result()
        held = stack.pop_all()
        ended = other.submit(end)
        end_sweep(Sweep(tmp_path, [], "hydra/launcher=submitit_slurm", "again"), None)
        ended.result()


@pytest.mark.slow
def test_a_search(project, tmp_path, monkeypatch):
    needs("hydra_optuna_sweeper")
    search = ("-m", *QUICK, "loss.beta=interval(0.1,1)", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2")
    arguments = ("--config-dir", str(project), *search, "hydra.sweeper.direction=maximize")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="=maximize"):
        check_arguments(list(arguments[:-1]))
    with pytest.raises(UserError, match="hydra/sweeper=optuna starts each one by itself"):
        check_arguments([*arguments, "trainer.cohort=2"])
    ended = command(*arguments, cwd=tmp_path, cache=tmp_path / "cache")
    assert ended.code == 0, ended.err
    found = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    best = max(
        summary(folder.parent)["stages"]["preference"]["metrics"]["eval/nats/accuracies"]
        for folder in (tmp_path / "sweep").glob("?-run/summary.json")
    )
    assert f"best_value: {best}\n" in found
    assert len((tmp_path / "sweep" / "comparison.csv").read_text().splitlines()) >= 3
    with pytest.raises(UserError, match="a search cannot go on"):
        check_arguments(list(arguments))


def test_a_search_has_no_members_beforehand(project):
    register(project)
    assert sweep_members(["recipe=tiny", "seed=0,1", "hydra/sweeper=optuna"]) == []
    assert sweep_members(["recipe=tiny", "loss.beta=interval(0.1,1)"]) == []
    assert len(sweep_members(["recipe=tiny", "seed=0,1", "hydra/sweeper=basic"])) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("loss.beta=interval(0.1,1)", "add hydra/sweeper=optuna"),
        ("hydra/launcher=absent", "the extras sweep-joblib, sweep-slurm and sweep-optuna"),
    ],
)
def test_what_needs_a_plugin_names_it(setting, said, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        check_arguments(["--config-dir", str(project), "-m", "recipe=tiny", setting])
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_cohort_has_one_process(project, tmp_path, monkeypatch):
    needs("hydra_joblib_launcher")
    monkeypatch.chdir(tmp_path)
    arguments = ["--config-dir", str(project), "-m", "recipe=tiny", "seed=0,1", "hydra/launcher=joblib"]
    with pytest.raises(UserError, match="hydra/launcher=joblib starts each one by itself"):
        check_arguments([*arguments, "trainer.cohort=2"])
