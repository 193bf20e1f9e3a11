"""Sweeps: members of a recipe's own, failures that end nobody else, and going on after an interruption."""

from __future__ import annotations

import json
import os
import shlex
import signal
from functools import partial
from pathlib import Path

import pytest
import yaml

from alignment.config.arguments import check_arguments
from alignment.config.compose import compose_node, load
from alignment.config.members import sweep_members
from alignment.config.registry import register
from alignment.errors import UserError
from alignment.files import asset_dir
from alignment.run import accuracy
from tests.helpers.commands import command, write_project
from tests.helpers.runs import assert_same, contents, failing_second, metric_rows, same_code

SWEEP = """\
# @package _global_
defaults: [tiny]
trainer: {max_steps: 2, save_every: 1, log_every: 1}
sweep:
  seed: [0, 1]
  members:
    - {loss: dpo, loss.beta: [0.05, 0.2]}
    - {loss: simpo, optim.lr: 1.0e-3}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_folder) -> Path:
    folder = write_project(tmp_path_factory.mktemp("project"), tiny_model_folder)
    (folder / "recipe" / "sub").mkdir()
    (folder / "recipe" / "sub" / "many.yaml").write_text(SWEEP)
    return folder


# The members


def members(*overrides: str) -> list[list[str]]:
    """Without their folders, which are numbered."""
    found = sweep_members(overrides)
    folders = [member[-1] for member in found]
    assert all(folder.startswith(f"hydra.sweep.subdir='{number}-") for number, folder in enumerate(folders))
    return [member[:-1] for member in found]


@pytest.mark.slow
def test_the_members_of_a_recipe(project):
    register(project)
    assert members("recipe=sub/many") == [
        ["recipe=sub/many", "loss=dpo", "loss.beta=0.05", "seed=0"],
        ["recipe=sub/many", "loss=dpo", "loss.beta=0.05", "seed=1"],
        ["recipe=sub/many", "loss=dpo", "loss.beta=0.2", "seed=0"],
        ["recipe=sub/many", "loss=dpo", "loss.beta=0.2", "seed=1"],
        ["recipe=sub/many", "loss=simpo", "optim.lr=0.001", "seed=0"],
        ["recipe=sub/many", "loss=simpo", "optim.lr=0.001", "seed=1"],
    ]
    assert sweep_members(["recipe=sub/many"])[3][-1] == "hydra.sweep.subdir='3-many'"
    configs = [load(*member) for member in sweep_members(["recipe=sub/many"])]
    assert [(config.loss.name, config.loss.beta, config.seed) for config in configs[2:5]] == [
        ("dpo", 0.2, 0),
        ("dpo", 0.2, 1),
        ("simpo", 2.0, 0),
    ]


def test_the_command_line_goes_over_a_recipes_members(project):
    register(project)
    assert members("recipe=sub/many", "seed=7", "data.limit=3,4", "loss.beta=1") == [
        ["recipe=sub/many", "seed=7", f"data.limit={limit}", "loss.beta=1", *own]
        for limit in (3, 4)
        for own in (["loss=dpo"], ["loss=simpo", "optim.lr=0.001"])
    ]


def test_recipes_with_and_without_members_in_one_sweep(project):
    register(project)
    found = members("recipe=tiny,sub/many", "loss.beta=1", "seed=0")
    assert [member[0] for member in found] == ["recipe=tiny", "recipe=sub/many", "recipe=sub/many"]


@pytest.mark.parametrize(
    "sweep", ["[1]", "{members: 3}", "{members: [seed]}", "{members: []}", "{seed: []}", "{a: {b: 1}}"]
)
def test_a_block_that_is_no_sweep_is_refused(sweep, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "bad.yaml").write_text(f"sweep: {sweep}\n")
    with pytest.raises(UserError, match=r"bad\.yaml.*sweep") as caught:
        load("recipe=bad", config_dir=tmp_path)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipe=sub/many"], "Recipe sub/many is a sweep of 6 runs: start it with -m."),
        (["-m", "recipe=sub/many", "hydra.sweep.subdir=x"], "hydra.sweep.subdir cannot be chosen"),
        (["-m", "recipe=sub/many", "loss.tau=1"], "tau"),
        (["-m", "recipe=tiny", "seed=0,1", "resume=true"], "hydra.sweep.dir=FOLDER"),
    ],
)
def test_what_is_refused_before_a_sweep(arguments, said, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        check_arguments(["--config-dir", str(project), *arguments])
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_an_agent_of_wandb_runs_composes(monkeypatch):
    """Its parameters are settings of the run, and both ends of their ranges are accepted."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "the-sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "the-run")
    search = yaml.safe_load((asset_dir("conf") / "wandb_sweep.yaml").read_text())
    _, _, _, program, *settings, arguments = search["command"]
    assert (program, search["program"], arguments) == ("${program}", "alignment.run", "${args_no_hyphens}")
    for end in ("min", "max"):
        config = load(*settings, *(f"{key}={value[end]}" for key, value in search["parameters"].items()))
        assert config.loss.beta == search["parameters"]["loss.beta"][end]
        assert config.optim.lr == search["parameters"]["optim.lr"][end]
        assert config.tracking.mode == "online"
    assert compose_node(settings, with_hydra=True).hydra.run.dir == "outputs/sweeps/the-sweep/the-run"


# The runs


def ended_in(member, how):
    """In the last training row but one of this member; those before it are finished."""
    from alignment.runs.record import RunRecord

    same_code()
    log = RunRecord.log

    def patched(self, stage, step, split, metrics):
        if self.run_dir.name == member and (stage, step, split) == ("preference", 6, "train"):
            os.kill(os.getpid(), how)
        log(self, stage, step, split, metrics)

    RunRecord.log = patched


GRID = ("-m", "recipe=tiny", "loss.beta=0.1,0.2,0.3", "hydra.sweep.dir=sweep")


@pytest.fixture(scope="module")
def uninterrupted(project, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("uninterrupted")
    ended = command("--config-dir", str(project), *GRID, cwd=cwd, cache=cwd / "cache", patch=same_code)
    assert ended.code == 0, ended.err
    assert ended.out.count("SFT was done before") == 2
    assert (cwd / "sweep" / "comparison.html").exists()
    summary = json.loads((cwd / "sweep" / "0-tiny" / "summary.json").read_text())
    wanted = summary["stages"]["preference"]["metrics"]["eval/nats/accuracies"]
    assert accuracy(cwd / "sweep" / "0-tiny" / "summary.json") == wanted
    return cwd / "sweep"


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(project, uninterrupted, tmp_path):
    """Interrupted in the second member, killed in the third, and started once more than there is anything to do."""
    sweep = tmp_path / "sweep"

    def sweep_again(*arguments, patch=same_code):
        return command(*arguments, cwd=tmp_path, cache=tmp_path / "cache", patch=patch)

    ended = sweep_again("--config-dir", str(project), *GRID, patch=partial(ended_in, "1-tiny", signal.SIGINT))
    assert ended.code == 1 and "Traceback" not in ended.err
    assert (sweep / "0-tiny" / "summary.json").exists()
    assert not (sweep / "1-tiny" / "summary.json").exists() and not (sweep / "2-tiny").exists()
    first = {path: data for path, data in contents(sweep / "0-tiny").items() if ".hydra" not in path.parts}
    [line] = (line for line in ended.err.splitlines() if line.startswith("Interrupted"))
    printed = shlex.split(line.removeprefix("Interrupted; continue with: "))[3:]

    ended = sweep_again(*printed, patch=partial(ended_in, "2-tiny", signal.SIGKILL))
    assert ended.code == -signal.SIGKILL, ended.err
    assert "0-tiny is finished already." in ended.out
    assert "The preference stage continues from step 4." in ended.out
    assert (sweep / "1-tiny" / "summary.json").exists() and not (sweep / "2-tiny" / "summary.json").exists()

    ended = sweep_again("--config-dir", str(project), *GRID)
    assert ended.code == 0, ended.err
    assert ended.out.count("is finished already.") == 2
    assert "The preference stage continues from step 4." in ended.out
    for number in range(3):
        assert_same(sweep / f"{number}-tiny", uninterrupted / f"{number}-tiny")
    after = contents(sweep / "0-tiny")
    assert all(after[path] == data for path, data in first.items() if path.name != "run.log")

    # Once more there is nothing to do but for a report that a kill kept back.
    report = sweep / "1-tiny" / "report.md"
    written = report.read_bytes()
    report.unlink()
    before = {path: path.stat().st_mtime_ns for path in sweep.rglob("*.jsonl")}
    ended = sweep_again(*printed)
    assert ended.code == 0 and ended.out.count("is finished already.") == 3
    assert {path: path.stat().st_mtime_ns for path in sweep.rglob("*.jsonl")} == before
    assert report.read_bytes() == written


@pytest.mark.slow
def test_another_sweep_in_the_same_folder_is_refused(project, uninterrupted, tmp_path):
    before = contents(uninterrupted)
    ended = command(
        *("--config-dir", str(project), "-m", "recipe=tiny", "loss.beta=0.1,0.4", f"hydra.sweep.dir={uninterrupted}"),
        cwd=tmp_path,
        cache=tmp_path / "cache",
    )
    assert ended.code == 1
    [line] = ended.err.splitlines()
    assert "holds another sweep" in line and "1-tiny" in line and "loss.beta (0.2 then, 0.4 now)" in line
    assert contents(uninterrupted) == before


@pytest.mark.matrix
def test_a_failed_member_ends_no_other(project, uninterrupted, tmp_path):
    sweep = tmp_path / "sweep"
    arguments = ("--config-dir", str(project), *GRID)
    ended = command(*arguments, cwd=tmp_path, cache=tmp_path / "cache", patch=failing_second)
    assert ended.code == 1
    lines = ended.err.splitlines()
    assert lines[-2] == "Error: 1-tiny failed: RuntimeError: out of memory"
    assert lines[-1].startswith("1 of 3 members have no result; try them again with: python -m alignment.run ")
    assert json.loads((sweep / "1-tiny" / "failed.json").read_text()) == {"error": "RuntimeError: out of memory"}
    log = (sweep / "1-tiny" / "run.log").read_text()
    assert "Traceback" in log and "in patched" in log
    for number in (0, 2):
        assert_same(sweep / f"{number}-tiny", uninterrupted / f"{number}-tiny")
    typed = shlex.split(lines[-1].split("again with: ")[1])[3:]
    ended = command(*typed, cwd=tmp_path, cache=tmp_path / "cache", patch=same_code)
    assert ended.code == 0, ended.err
    assert not (sweep / "1-tiny" / "failed.json").exists()
    assert_same(sweep / "1-tiny", uninterrupted / "1-tiny")


@pytest.mark.slow
def test_members_that_cannot_begin(project, tmp_path):
    ended = command(
        *("--config-dir", str(project), *GRID, "model.name=./absent"), cwd=tmp_path, cache=tmp_path / "cache"
    )
    assert ended.code == 1 and "Traceback" not in ended.out + ended.err
    *errors, last = ended.err.splitlines()
    assert [line.split(" failed: ")[0] for line in errors] == [f"Error: {number}-tiny" for number in range(3)]
    assert all("model.name" in line and "./absent" in line for line in errors)
    assert last.startswith("3 of 3 members have no result")
    assert not (tmp_path / "sweep" / "comparison.html").exists()


FEW = ("loss.beta=0.5", "evaluation.prompts=0", "sft.trainer.epochs=1")
"""The given beta leaves the recipe four members."""


@pytest.mark.matrix
def test_a_recipe_with_members_runs_and_each_is_as_if_alone(project, tmp_path):
    arguments = ("--config-dir", str(project), "recipe=sub/many", "-m", *FEW, "hydra.sweep.dir=sweep")
    ended = command(*arguments, cwd=tmp_path, cache=tmp_path / "cache", patch=same_code)
    assert ended.code == 0, ended.err
    sweep = tmp_path / "sweep"
    assert sorted(path.name for path in sweep.glob("*-*")) == [f"{number}-many" for number in range(4)]
    # Of the four SFT stages two are different: those of the two seeds.
    assert ended.out.count("SFT was done before") == 2
    alone = (
        "recipe=tiny",
        "trainer.max_steps=2",
        "trainer.save_every=1",
        "trainer.log_every=1",
        *FEW,
    )
    ended = command(
        *("--config-dir", str(project), *alone, "loss=simpo", "optim.lr=1e-3", "seed=1", "hydra.run.dir=alone"),
        cwd=tmp_path,
        cache=tmp_path / "other",
    )
    assert ended.code == 0, ended.err
    assert metric_rows(sweep / "3-many") == metric_rows(tmp_path / "alone")
