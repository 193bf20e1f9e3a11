"""Members of a sweep that train together, against the same sweep one by one."""

from __future__ import annotations

import json
import os
import shlex
import signal
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from alignment.config.arguments import check_arguments
from alignment.config.compose import compose_node, load, to_run_config
from alignment.config.members import sweep_members
from alignment.config.registry import register
from alignment.config.resume import changes
from alignment.config.sweep import SweepMember
from alignment.errors import UserError
from alignment.stages import cohorts as sweep_cohorts
from alignment.stages.cohorts import cohorts
from tests.helpers.commands import command, write_project
from tests.helpers.runs import failing_second, metric_rows, same_code
from tests.helpers.wandb_files import history, read_wandb

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_folder) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), tiny_model_folder)


# Who trains with whom


def grouped(folder: Path, *overrides: str, launcher: str = "basic") -> list[tuple[list[int], int]]:
    """The numbers of the members of each cohort, and how many train at once."""
    hydra = OmegaConf.create({"runtime": {"choices": {"hydra/launcher": launcher}}})
    members = []
    for number, member in enumerate(sweep_members(["recipe=tiny", *overrides])):
        node = compose_node([override for override in member if not override.startswith("hydra.")])
        members.append(SweepMember(folder / str(number), node, hydra, to_run_config(node)))
    return [([int(m.folder.name) for m in found.members], found.width) for found in cohorts(members)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["loss.beta=0.1,0.2,0.3", "trainer.cohort=2"], [([0, 1, 2], 2)]),
        (["loss.beta=0.1,0.2", "trainer.cohort=4"], [([0, 1], 2)]),
        (["loss.beta=0.1,0.2", "trainer.cohort=1"], []),
        (["loss.beta=0.1,0.2"], []),
        (["loss.beta=0.1,0.2", "quantization=nf4"], []),
        (["loss.beta=0.1,0.2", "quantization=nf4", "trainer.cohort=2"], [([0, 1], 2)]),
        (["loss=dpo,simpo,kto,orpo", "trainer.cohort=3"], [([0, 1, 2, 3], 3)]),
        (["optim.lr=1e-3,1e-4", "adapter.r=2,4", "trainer.cohort=4"], [([0, 1, 2, 3], 4)]),
        (["trainer.groups_per_step=2,4", "trainer.max_steps=3,4", "trainer.cohort=4"], [([0, 1, 2, 3], 4)]),
        (["data.max_length=300,301", "seed=0,1", "trainer.cohort=4"], [([0, 1], 2), ([2, 3], 2)]),
        (["trainer.tokens_per_batch=64,72", "trainer.cohort=4"], []),
        (["trainer.cohort=2,4"], []),
        (["quantization=none,nf4", "trainer.cohort=2"], []),
        (["loss=dpo,tdpo1,ipo", "trainer.cohort=4"], [([0, 2], 2)]),
        (["adapter=none", "seed=0,1", "trainer.cohort=4"], []),
        (["loss=none", "sft.seed=0,1"], []),
    ],
)
def test_members_that_share_their_passes(overrides, expected, project, tmp_path):
    register(project)
    assert grouped(tmp_path, *overrides) == expected


def test_a_gpu_lets_several_train_at_once(project, tmp_path, monkeypatch):
    register(project)
    monkeypatch.setattr(sweep_cohorts.torch.cuda, "is_available", lambda: True)
    assert grouped(tmp_path, "seed=0,1") == [([0, 1], 2)]
    assert grouped(tmp_path, "seed=0,1", "device=cpu") == []


def test_finished_members_and_other_launchers_are_left_out(project, tmp_path):
    register(project)
    sweep = ("seed=0,1,2", "trainer.cohort=4")
    assert grouped(tmp_path, *sweep, launcher="joblib") == []
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "summary.json").touch()
    assert grouped(tmp_path, *sweep) == [([0, 2], 2)]
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "summary.json").touch()
    assert grouped(tmp_path, *sweep) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipe=tiny", "sft.trainer.cohort=2"], "sft.trainer.cohort has no effect: the SFT stage is done once"),
        (["recipe=tiny", "trainer.cohort=2"], "trainer.cohort has no effect: it is for the members of a sweep"),
        (["-m", "recipe=tiny", "seed=0,1", "trainer.cohort=0"], "trainer.cohort must be auto or at least 1, not 0."),
        (["-m", "recipe=tiny", "seed=0,1", "trainer.cohort=all"], "trainer.cohort must be auto or at least 1, not all"),
        (["-m", "recipe=tiny", "seed=0,1", "trainer.cohort=true"], "trainer.cohort must be auto or at least 1"),
    ],
)
def test_what_is_refused(arguments, said, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        check_arguments(["--config-dir", str(project), *arguments])
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_how_many_train_together_may_change(project, tmp_path):
    """Of a sweep that goes on, since it is no matter of the result."""
    register(project)
    load("recipe=tiny")
    node = compose_node(["recipe=tiny", "trainer.cohort=3"])
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(compose_node(["recipe=tiny"]), resolve=True))
    assert changes(tmp_path, node) == ""


# The runs

NAMES = ("dpo", "simpo", "kto", "ipo", "orpo")
SWEEP = (
    *("-m", "recipe=tiny", "hydra.sweep.dir=sweep"),
    *(
        "adapter.r=4",
        "seed=1",
        "sft.seed=0",
        "reference.for_metrics=true",
        "evaluation.kl_prompts=2",
        "evaluation.every=4",
    ),
)
THREE = "trainer.cohort=3"


def sweep_in(folder: Path, project: Path, names, *overrides: str, patch=same_code, code=0):
    """The sweep over these losses: if they are the first of `NAMES`, so are its members those of the whole sweep."""
    arguments = ("--config-dir", str(project), *SWEEP, f"loss={','.join(names)}", *overrides)
    ended = command(*arguments, cwd=folder, cache=folder / "cache", patch=patch)
    assert ended.code == code, ended.err
    return ended


@pytest.fixture(scope="module")
def one_by_one(project, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_by_one")
    sweep_in(folder, project, NAMES)
    return folder / "sweep"


@pytest.fixture(scope="module")
def first_two(project, tmp_path_factory) -> Path:
    """The first two of them, where no other is asked for."""
    folder = tmp_path_factory.mktemp("first_two")
    sweep_in(folder, project, NAMES[:2])
    return folder / "sweep"


def assert_close(run: Path, other: Path) -> None:
    """The same steps on the same data; weights and metrics equal but for rounding; the same files."""
    for row, wanted in zip(metric_rows(run), metric_rows(other), strict=True):
        for key in ("stage", "split"):
            assert row.pop(key) == wanted.pop(key)
        # In the first step the policy is its reference but for rounding, which decides the signs of margins.
        signs = [key for key in row if row["step"] <= 3 and key.endswith(("accuracies", "ties"))]
        assert row | dict.fromkeys(signs, 0) == pytest.approx(wanted | dict.fromkeys(signs, 0), rel=1e-4, abs=1e-5)
    name = "adapter/adapter_model.safetensors"
    found, wanted = load_file(run / name), load_file(other / name)
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert (tensor - wanted[key]).abs().max() < 1e-5, key
    files = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in (run, other)]
    assert files[0] == files[1]
    assert (run / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, other)]
    assert summaries[0]["stages"]["preference"]["start"] == pytest.approx(summaries[1]["stages"]["preference"]["start"])
    assert summaries[0]["reference"]["identity"] == summaries[1]["reference"]["identity"]


@pytest.mark.matrix
def test_a_cohort_is_its_members_one_by_one(project, one_by_one, tmp_path):
    """The five losses of one sweep, three at a time: two begin where others have ended."""
    ended = sweep_in(tmp_path, project, NAMES, THREE)
    assert "5 members train together, 3 at a time." in ended.out
    assert ended.out.count("SFT was done before") == 4
    for number, name in enumerate(NAMES):
        member = tmp_path / "sweep" / f"{number}-tiny"
        assert_close(member, one_by_one / member.name)
        log = (member / "run.log").read_text()
        summary = json.loads((member / "summary.json").read_text())
        assert summary["stages"]["preference"]["loss"] == name
        assert summary["cohort"] == {"size": 3}
        # Each in its own words alone.
        assert log.count("Before the first update the loss is") == 1
        assert log.count("Answering 2 held-out prompts (final)") == 1
        assert f"[{member.name}] Loading" in ended.out
    assert (tmp_path / "sweep" / "comparison.html").exists()


def killed_at(step, how=signal.SIGKILL):
    """When the second member logs this step; those before it in the sweep have logged it, too."""
    from alignment.runs.record import RunRecord

    same_code()
    log = RunRecord.log

    def patched(self, stage, at, split, metrics):
        if self.run_dir.name == "1-tiny" and (stage, at, split) == ("preference", step, "train"):
            os.kill(os.getpid(), how)
        log(self, stage, at, split, metrics)

    RunRecord.log = patched


@pytest.mark.matrix
def test_a_cohort_goes_on_where_it_stopped(project, one_by_one, tmp_path):
    """Killed with two members begun and one waiting; interrupted when all have begun; ended in two other ways."""
    sweep = tmp_path / "sweep"
    three = (tmp_path, project, NAMES[:3])

    def assert_stopped(ended, *begun):
        assert "Traceback" not in ended.err
        assert not list(sweep.glob("*/summary.json")) and not list(sweep.glob("*/failed.json"))
        checkpoints = [list((sweep / f"{number}-tiny").rglob("checkpoint-*/complete")) for number in range(3)]
        assert [len(found) > 0 for found in checkpoints] == list(begun)

    ended = sweep_in(*three, "trainer.cohort=2", patch=partial(killed_at, 3), code=-signal.SIGKILL)
    assert_stopped(ended, True, True, False)
    ended = sweep_in(*three, "trainer.cohort=3", patch=partial(killed_at, 6, signal.SIGINT), code=1)
    assert_stopped(ended, True, True, True)
    assert ended.out.count("The preference stage continues from step") == 2
    # One of them goes on by itself, and then the sweep in a cohort of another size.
    ended = command(
        *("--config-dir", str(project), "recipe=tiny", "resume=sweep/2-tiny"),
        cwd=tmp_path,
        cache=tmp_path / "cache",
        patch=same_code,
    )
    assert ended.code == 0, ended.err
    ended = sweep_in(*three, "trainer.cohort=2")
    assert "2 members train together, 2 at a time." in ended.out
    assert ended.out.count("The preference stage continues from step") == 2
    for number in range(3):
        assert_close(sweep / f"{number}-tiny", one_by_one / f"{number}-tiny")


@pytest.mark.matrix
def test_a_failed_member_ends_no_other(project, one_by_one, tmp_path):
    ended = sweep_in(tmp_path, project, NAMES[:3], "trainer.cohort=2", patch=failing_second, code=1)
    *_, error, last = ended.err.splitlines()
    assert error == "Error: 1-tiny failed: RuntimeError: out of memory"
    sweep = tmp_path / "sweep"
    assert "in patched" in (sweep / "1-tiny" / "run.log").read_text()
    assert "in patched" not in (sweep / "0-tiny" / "run.log").read_text()
    for number in (0, 2):
        assert_close(sweep / f"{number}-tiny", one_by_one / f"{number}-tiny")
    ended = command(
        *shlex.split(last.split("again with: ")[1])[3:], cwd=tmp_path, cache=tmp_path / "cache", patch=same_code
    )
    assert ended.code == 0, ended.err
    assert_close(sweep / "1-tiny", one_by_one / "1-tiny")


def test_members_take_turns(project, first_two, tmp_path):
    ended = sweep_in(tmp_path, project, NAMES[:2], "trainer.cohort=2")
    assert "2 members train together, 2 at a time." in ended.out
    for number in range(2):
        member, alone = (folder / f"{number}-tiny" for folder in (tmp_path / "sweep", first_two))
        assert_close(member, alone)
        weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (member, alone)]
        assert all((value == weights[1][name]).all() for name, value in weights[0].items())


@pytest.mark.matrix
def test_members_of_a_cohort_are_runs_of_their_own_in_wandb(project, tmp_path):
    ended = command(
        *("--config-dir", str(project), "-m", "recipe=tiny", "loss=dpo,simpo", THREE, "hydra.sweep.dir=sweep"),
        *("tracking=wandb", "tracking.mode=offline", "sft=none", "evaluation.prompts=0"),
        cwd=tmp_path,
        cache=tmp_path / "cache",
    )
    assert ended.code == 0, ended.err
    for number in range(2):
        run = tmp_path / "sweep" / f"{number}-tiny"
        [folder] = (run / "wandb").glob("offline-run-*")
        rows = [row for row in history(read_wandb(folder)) if row.get("stage") == "preference"]
        sent = {row["preference/step"]: row["train/loss"] for row in rows if "train/loss" in row}
        kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = {r["step"]: r["loss"] for r in kept if (r["stage"], r["split"]) == ("preference", "train")}
        assert sent == pytest.approx(losses) and len(sent) >= 4
