"""Early stopping of sweeps by the command: one after the other, together, and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from alignment.config.arguments import check_arguments
from alignment.config.compose import load
from alignment.config.schema import STOPPING_METRICS
from alignment.errors import UserError
from alignment.files import asset_dir
from alignment.run import accuracy
from alignment.runs.record import read_metrics
from alignment.stages import store as stage_store
from tests.helpers.commands import command, write_project
from tests.helpers.run_folders import change_values
from tests.helpers.runs import metric_rows


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_folder) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), tiny_model_folder)


def test_the_objective_of_searches_is_the_metric_of_early_stopping(tmp_path):
    metric = load("recipe=quickstart", "stopping=asha").stopping.metric
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"stages": {"preference": {"metrics": {f"eval/{metric}": 0.625}}}}))
    assert accuracy(summary) == 0.625
    assert f"metric: {{name: eval/{metric}, goal: maximize}}" in (asset_dir("conf") / "wandb_sweep.yaml").read_text()
    assert metric in STOPPING_METRICS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipe=tiny", "stopping=asha"], "stopping=none"),
        (["-m", "recipe=tiny", "seed=0,1", "stopping.eta=3"], "stopping.eta has no effect with stopping=none"),
        (["-m", "recipe=tiny", "seed=0,1", "stopping=asha", "loss=none"], "with loss=none there is none"),
        (["-m", "recipe=tiny", "seed=0,1", "stopping=asha", "stopping.eta=1"], "stopping.eta must be at least 2"),
        (["-m", "recipe=tiny", "seed=0,1", "stopping=asha", "stopping.rungs=0"], "stopping.rungs must be at least 1"),
        (["-m", "recipe=tiny", "seed=0,1", "stopping=asha", "stopping.metric=loss"], "nats/accuracies"),
        (
            ["-m", "recipe=tiny", "loss=dpo,simpo", "stopping=asha", "reference.for_metrics=false"],
            "stopping.metric=nats/accuracies needs a reference: loss simpo has none",
        ),
    ],
)
def test_what_is_refused(arguments, said, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        check_arguments(["--config-dir", str(project), *arguments])
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def same_code():
    stage_store._code = lambda: "code"


SWEEP = (
    "-m",
    "recipe=tiny",
    "sft=none",
    "stopping=asha",
    "stopping.metric=nats/margins",
    "optim.lr=1e-2,1e-9",
    "evaluation.kl_prompts=2",
    "hydra.sweep.dir=sweep",
)


@pytest.fixture(scope="module")
def sweep(project, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("sweep")
    ended = command("--config-dir", str(project), *SWEEP, cwd=cwd, cache=cwd / "cache", patch=same_code)
    assert ended.code == 0, ended.err
    return cwd / "sweep"


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def rows_of(run: Path, split: str) -> dict[int, dict]:
    rows = read_metrics(run / "metrics.jsonl")
    return {row["step"]: row for row in rows if row["stage"] == "preference" and row["split"] == split}


@pytest.mark.slow
def test_the_worse_member_is_stopped(sweep):
    good, bad = sweep / "0-tiny", sweep / "1-tiny"
    assert summary_of(good)["status"] == "finished"
    assert sorted(rows_of(good, "eval")) == [0, 2, 4, 8]
    summary = summary_of(bad)
    assert summary["status"] == "stopped"
    stage = summary["stages"]["preference"]
    assert stage["steps"] == 3
    at_rung = rows_of(bad, "eval")[2]["nats/margins"]
    assert at_rung < rows_of(good, "eval")[2]["nats/margins"]
    assert stage["stopped"] == {
        "step": 3,
        "of_steps": 8,
        "rung": 2,
        "metric": "nats/margins",
        "value": at_rung,
        "place": 2,
        "of_members": 2,
    }
    assert sorted(rows_of(bad, "eval")) == [0, 2, 3] and max(rows_of(bad, "train")) == 3
    assert stage["metrics"]["eval/nats/margins"] == rows_of(bad, "eval")[3]["nats/margins"]
    assert not (bad / "failed.json").exists()


@pytest.mark.slow
def test_a_stopped_member_is_saved_but_answers_nothing_more(sweep):
    good, bad = sweep / "0-tiny", sweep / "1-tiny"
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (good, bad)]
    assert adapters[0].keys() == adapters[1].keys()
    moments = [json.loads(line)["moment"] for line in (bad / "held_out.jsonl").read_text().splitlines()]
    assert moments == ["start"] * 4 + ["final"] * 4
    assert summary_of(bad)["evaluation"] == {}
    assert not (bad / "stages" / "answers_final.json").exists() and not (bad / "samples.md").exists()
    assert summary_of(good)["evaluation"]["kl/sampled"]["n"] == 2 and (good / "samples.md").exists()


@pytest.mark.slow
def test_what_reports_say_of_it(sweep):
    said = "stopped at step 3 of 8: at step 2 number 2 of 2 members by nats/margins"
    own = (sweep / "1-tiny" / "report.md").read_text()
    assert said in own and "Not available" not in own
    assert f"This member was {said}" in (sweep / "1-tiny" / "run.log").read_text()
    page = (sweep / "comparison.md").read_text()
    assert said in page and (said in (sweep / "comparison.html").read_text())
    assert "Stopped early and not ranked: 1 of 2 members." in page
    for absent in ("Not available", "The numbers of steps", "different numbers of prompts", "1-tiny failed"):
        assert absent not in page
    [line] = (line for line in page.splitlines() if "0 stopped at step 3 of 8" in line)
    variant, *cells = line.strip("| ").split(" | ")
    assert variant == "DPO, optim.lr 1e-09" and set(cells) == {"stopped", "0 stopped at step 3 of 8", "-"}


def killed_in_the_second(when: str):
    """When the second member is saved, or before its evaluation at the rung is known."""
    from alignment.runs.record import RunRecord
    from alignment.stages import chain as stages

    same_code()
    log, save = RunRecord.log, stages.save_trained

    def saved(model, tokenizer, folder):
        if "1-tiny" in str(folder):
            os.kill(os.getpid(), signal.SIGKILL)
        save(model, tokenizer, folder)

    def logged(self, stage, step, split, metrics):
        if self.run_dir.name == "1-tiny" and (stage, step, split) == ("preference", 2, "eval"):
            os.kill(os.getpid(), signal.SIGKILL)
        log(self, stage, step, split, metrics)

    if when == "at the rung":
        RunRecord.log = logged
    else:
        stages.save_trained = saved


@pytest.mark.matrix
@pytest.mark.parametrize("when", ["at the rung", "before it is saved"])
def test_a_killed_member_ends_where_it_would_have(when, project, sweep, tmp_path):
    arguments = ("--config-dir", str(project), *SWEEP)
    for name in ("cache", "sweep"):
        shutil.copytree(sweep.parent / name, tmp_path / name)
    good, bad = (tmp_path / "sweep" / name for name in ("0-tiny", "1-tiny"))
    shutil.rmtree(bad)
    ended = command(*arguments, cwd=tmp_path, cache=tmp_path / "cache", patch=partial(killed_in_the_second, when))
    assert ended.code == -signal.SIGKILL, ended.err
    kept = bad / "stages" / "preference" / "rungs.json"
    assert kept.exists() is (when != "at the rung")
    if kept.exists():  # from now on it would be first, but it has been told
        change_values(good, -1e9)
    ended = command(*arguments, cwd=tmp_path, cache=tmp_path / "cache", patch=same_code)
    assert ended.code == 0, ended.err
    assert "0-tiny is finished already." in ended.out
    expected = sweep / "1-tiny"
    assert metric_rows(bad) == metric_rows(expected)
    assert (bad / "held_out.jsonl").read_text() == (expected / "held_out.jsonl").read_text()
    assert summary_of(bad)["status"] == "stopped"
    stages = [summary_of(run)["stages"]["preference"] for run in (bad, expected)]
    assert stages[0]["stopped"] == stages[1]["stopped"] and stages[0]["metrics"] == stages[1]["metrics"]


@pytest.mark.slow
def test_a_stopped_member_stays_stopped(project, sweep):
    before = (sweep / "1-tiny" / "summary.json").stat().st_mtime_ns
    ended = command(
        "--config-dir", str(project), *SWEEP, cwd=sweep.parent, cache=sweep.parent / "cache", patch=same_code
    )
    assert ended.code == 0 and "1-tiny is finished already." in ended.out
    assert (sweep / "1-tiny" / "summary.json").stat().st_mtime_ns == before


@pytest.mark.matrix
def test_members_that_train_together_are_compared_whoever_is_first(project, sweep, tmp_path):
    """One after the other the first would have had nobody to lose to; the third begins in the place that it frees."""
    shutil.copytree(sweep.parent / "cache", tmp_path / "cache")
    arguments = [a for a in SWEEP if not a.startswith("optim.lr=")]
    ended = command(
        *("--config-dir", str(project), *arguments, "optim.lr=1e-9,1e-2,2e-9", "trainer.cohort=2"),
        cwd=tmp_path,
        cache=tmp_path / "cache",
        patch=same_code,
    )
    assert ended.code == 0, ended.err
    runs = [tmp_path / "sweep" / f"{number}-tiny" for number in range(3)]
    assert [summary_of(run)["status"] for run in runs] == ["stopped", "finished", "stopped"]
    first, third = (summary_of(runs[number])["stages"]["preference"]["stopped"] for number in (0, 2))
    assert (first["step"], first["place"], first["of_members"]) == (3, 2, 2)
    assert third["step"] in (3, 5)  # which of the two that hardly learn is the worse is a matter of rounding
