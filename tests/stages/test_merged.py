"""Runs are merged by the command: the merged policy is a run like its parents, and is compared with them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alignment.errors import UserError
from alignment.merge import run as merge
from alignment.stages.merged import read_parents
from tests.helpers.commands import command, write_project
from tests.helpers.runs import metric_rows, same_code

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, tiny_model_folder):
    """Two runs of other seeds, which share their SFT stage, with judged answers; and the configuration folder."""
    root = tmp_path_factory.mktemp("parents")
    config = write_project(root, tiny_model_folder)
    members = ["seed=0,1", "sft.seed=0", "evaluation.judge=rules", "hydra.sweep.dir=runs"]
    ended = command(
        "--config-dir", str(config), "-m", "recipe=tiny", *members, cwd=root, cache=root / "cache", patch=same_code
    )
    assert ended.code == 0, ended.err
    return config, root / "runs", root / "cache"


@pytest.fixture
def merged(sweep, tmp_path, monkeypatch):
    """Merge runs with these words; returns the folder of the merged policy."""
    config, runs, cache = sweep
    monkeypatch.setenv("ALIGNMENT_CACHE", str(cache))

    def run(*words, parents=("0-tiny", "1-tiny")):
        folders = [str(runs / parent) for parent in parents]
        return merge([*folders, *words, f"out={tmp_path / 'out'}", "--config-dir", str(config)]).parent

    return run


def held_out(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    return [row for row in rows if row["moment"] == "final"]


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_all_the_weight_on_one_parent_is_that_parent(sweep, merged):
    """Its held-out log-probs, answers, verdicts and metrics are the parent's: the evaluation is the run's own."""
    out, parent = merged("method=linear", "weights=1,0"), sweep[1] / "0-tiny"
    for found, wanted in zip(held_out(out), held_out(parent), strict=True):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), key
    for found, wanted in zip(samples(out), samples(parent), strict=True):
        assert {k: found[k] for k in ("prompt", "start", "sft")} == {k: wanted[k] for k in ("prompt", "start", "sft")}
        assert found.keys() == wanted.keys()
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (out, parent))
    assert ours["evaluation"]["answers"]["sft"] == theirs["evaluation"]["answers"]["sft"]
    assert ours["evaluation"].keys() == theirs["evaluation"].keys()
    assert ours["stages"]["sft"] == theirs["stages"]["sft"]
    assert ours["reference"]["identity"] == theirs["reference"]["identity"]
    assert ours["reference"]["misses"] == 0
    assert [row for row in metric_rows(out) if row["stage"] == "sft"] == [
        row for row in metric_rows(parent) if row["stage"] == "sft"
    ]


def test_a_merged_policy_is_a_run_beside_its_parents(sweep, merged):
    """A plain adapter, a report that says what was merged, and one page with all three."""
    out = merged("method=ties", "density=0.5")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["recipe"] == "merge"
    facts = summary["merge"]
    assert (facts["method"], facts["density"], facts["weights"], facts["rank"]) == ("ties", 0.5, [1.0, 1.0], 8)
    assert facts["parents"] == [str((sweep[1] / f"{i}-tiny").resolve()) for i in range(2)]
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {w.shape[0] for name, w in weights.items() if "lora_A" in name} == {8}
    report = (out / "report.md").read_text()
    assert "## What was merged" in report and "Saved as an adapter of rank 8" in report
    page = (out / "comparison.md").read_text()
    assert "merge.method ties" in page and "0-tiny" in page and "1-tiny" in page
    with pytest.raises(UserError, match="the folder is not empty"):
        merged("method=ties")
    with pytest.raises(UserError, match="because it is a merge itself"):
        merged("method=ties", str(out))


def test_what_cannot_be_merged_is_one_sentence(sweep, merged, tmp_path):
    """Words, folders and runs that do not fit."""
    config, runs, _ = sweep
    older = yaml.safe_load((runs / "0-tiny" / "config.yaml").read_text())
    unfinished, other = tmp_path / "unfinished", tmp_path / "other"
    for copy in (unfinished, other):
        shutil.copytree(runs / "1-tiny", copy)
    (unfinished / "summary.json").unlink()
    summary = json.loads((other / "summary.json").read_text())
    summary["model"]["base"] = "0" * 64
    (other / "summary.json").write_text(json.dumps(summary))
    one = str(runs / "0-tiny")
    for words, said in (
        ([one, str(unfinished), "method=linear"], "unfinished cannot be merged, because it is not finished"),
        ([one, str(other), "method=linear"], "were trained from other bases"),
        ([one, "method=linear"], "at least two runs"),
        ([one, f"{one}/../0-tiny", "method=linear"], "0-tiny is given twice"),
        ([one, one], "method is missing"),
        ([one, one, "method=linear", "weight=1,1"], r"no setting weight \(did you mean weights\?\)"),
        ([one, one, "method=linear", "weights=1,x"], "weights must be numbers"),
        ([one, one, "method=ties", "density=much"], "density must be a number, not 'much'"),
        ([one, str(tmp_path / "nowhere"), "method=linear"], "is no run folder"),
    ):
        with pytest.raises(UserError, match=said):
            merge([*words, f"out={tmp_path / 'new'}", "--config-dir", str(config)])
    two = [one, str(runs / "1-tiny"), "method=linear"]
    with pytest.raises(UserError, match="that is a file, and the merged policy needs a folder"):
        merge([*two, f"out={one}/report.md", "--config-dir", str(config)])
    assert not (tmp_path / "new").exists()

    # A run keeps its own values: of a setting that has come since, the default; of a default that has changed, the old
    # of one that is gone, none
    del older["optim"]["master_weights"]
    older["trainer"]["joint_passes"] = True
    older["evaluation"]["batch_size"] = 7
    (other / "config.yaml").write_text(yaml.safe_dump(older))
    shutil.copy(runs / "1-tiny" / "summary.json", other)
    found = read_parents([Path(one), other])[1]
    assert found.config.evaluation.batch_size == 7 and found.config.optim.master_weights
    assert found.config.loss.name == "dpo"


@pytest.mark.matrix
def test_experts_of_sft_alone_are_merged(tmp_path, tiny_model_folder, monkeypatch):
    """They have no pairs, so their merge is measured by the held-out conversations, and laid beside them by these."""
    config = write_project(tmp_path / "project", tiny_model_folder)
    words = ["-m", "recipe=tiny", "loss=none", "sft.seed=0,1", "sft.trainer.epochs=1", "hydra.sweep.dir=runs"]
    ended = command("--config-dir", str(config), *words, cwd=tmp_path, cache=tmp_path / "cache")
    assert ended.code == 0, ended.err
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    folders = [tmp_path / "runs" / f"{seed}-tiny" for seed in range(2)]

    def merged(weights):
        out = tmp_path / weights
        merge([*map(str, folders), "method=linear", f"weights={weights}", f"out={out}", "--config-dir", str(config)])
        return out

    def stage(folder):
        return json.loads((folder / "summary.json").read_text())["stages"]

    losses = [stage(folder)["sft"]["metrics"]["eval/loss"] for folder in folders]
    assert losses[0] != losses[1]
    first, mean = stage(merged("1,0")), stage(merged("1,1"))
    assert first.keys() == {"sft"} and first["sft"]["steps"] == 0
    assert first["sft"]["metrics"] == {"eval/loss": pytest.approx(losses[0], abs=1e-5)}
    assert mean["sft"]["metrics"]["eval/loss"] not in losses
    assert {
        w.shape[0] for n, w in load_file(tmp_path / "1,1/adapter/adapter_model.safetensors").items() if "A" in n
    } == {8}
    rows = [line for line in (tmp_path / "1,1/comparison.md").read_text().splitlines() if "| finished |" in line]
    assert [f"{loss:.4g}" in row for loss, row in zip(losses, rows, strict=False)] == [True, True] and len(rows) == 3


@pytest.mark.matrix
def test_whole_models_are_merged_into_a_whole_model(tmp_path, tiny_model_folder, monkeypatch):
    """Runs without an adapter: all the weight on one gives its model; the mean is between them."""
    config = write_project(tmp_path / "project", tiny_model_folder)
    words = ["-m", "recipe=tiny", "adapter=none", "sft=none", "seed=0,1", "trainer.max_steps=2", "evaluation.prompts=0"]
    ended = command("--config-dir", str(config), *words, "hydra.sweep.dir=runs", cwd=tmp_path, cache=tmp_path / "cache")
    assert ended.code == 0, ended.err
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    folders = [tmp_path / "runs" / f"{seed}-tiny" for seed in range(2)]
    parents = [load_file(folder / "model" / "model.safetensors") for folder in folders]
    for given, expected in (("1,0", parents[0]), ("1,1", {n: (w + parents[1][n]) / 2 for n, w in parents[0].items()})):
        out = tmp_path / given
        merge([*map(str, folders), "method=linear", f"weights={given}", f"out={out}", "--config-dir", str(config)])
        found = load_file(out / "model" / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)
    assert any(not w.equal(parents[1][n]) for n, w in parents[0].items())
    assert "Cosines between the parents' updates" in (tmp_path / "1,1" / "report.md").read_text()
