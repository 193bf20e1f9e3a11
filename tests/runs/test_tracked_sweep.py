"""A sweep in W&B, offline: the runs of its members, one of them killed twice, and that of the sweep."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from alignment.runs.record import read_metrics
from tests.helpers.commands import command, write_project
from tests.helpers.wandb_files import history, of_kind, read_wandb

pytestmark = pytest.mark.matrix


def offline(home: Path, killed_at: int | None) -> None:
    """Nothing of the user's own W&B; the second member may be killed at a step of its preference stage."""
    names = ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_RESUME")
    os.environ.update({"WANDB_MODE": "offline", **dict.fromkeys(names, "")})
    for kind in ("DATA", "CACHE", "CONFIG"):
        os.environ[f"WANDB_{kind}_DIR"] = str(home / kind)
    for name in names:
        del os.environ[name]
    if killed_at is None:
        return
    from alignment.runs.record import RunRecord

    log = RunRecord.log

    def patched(self, stage, step, split, metrics):
        if self.run_dir.name == "1-tiny" and (stage, step, split) == ("preference", killed_at, "train"):
            os.kill(os.getpid(), signal.SIGKILL)
        log(self, stage, step, split, metrics)

    RunRecord.log = patched


def places(rows: list[dict]) -> list[tuple[str, int, str]]:
    return [(row["stage"], row["step"], row["split"]) for row in rows]


def sent_places(rows: list[dict]) -> list[tuple[str, int, str]]:
    return [
        (row["stage"], row[f"{row['stage']}/step"], "eval" if any("eval/" in name for name in row) else "train")
        for row in rows
    ]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, tiny_model_folder) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    project = write_project(folder / "project", tiny_model_folder)
    arguments = ["--config-dir", str(project), "-m", "recipe=tiny", "tracking=wandb", "loss.beta=0.1,0.2"]
    arguments += ["trainer.max_steps=4", "trainer.log_every=1", "sft.trainer.epochs=1", "evaluation.prompts=0"]
    whole, alone = [*arguments, "hydra.sweep.dir=sweep"], [*arguments[:2], "resume=sweep/1-tiny"]
    for words, killed_at in ((whole, 3), (alone, 4), (whole, None)):
        patch = partial(offline, folder / "home", killed_at)
        ended = command(*words, cwd=folder, cache=folder / "cache", patch=patch)
        assert ended.code == (0 if killed_at is None else -signal.SIGKILL), ended.err
    page = ended.out.index("All members side by side: sweep/comparison.html")
    assert page < ended.out.rindex("wandb sync sweep/wandb/"), "nobody waits for W&B to see the page"
    return folder / "sweep"


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*"))


def test_members_are_runs_of_one_group_and_the_killed_one_has_its_whole_history(sweep):
    assert (len(parts(sweep / "0-tiny")), len(parts(sweep / "1-tiny"))) == (1, 3)
    for name in ("0-tiny", "1-tiny"):
        *earlier, last = parts(sweep / name)
        assert all(list(part.glob("*.wandb.synced")) for part in earlier)
        records = read_wandb(last)
        [run] = of_kind(records, "run")
        assert (run.run_group, run.job_type, run.display_name) == ("sweep", "sweep member", name)
        assert run.run_id == (sweep / name / "wandb_run_id").read_text().strip()
        rows = read_metrics(sweep / name / "metrics.jsonl")
        sent = [row for row in history(records) if "stage" in row]  # the tables at the end belong to no step
        assert sorted(sent_places(sent)) == sorted(places(rows))
        names = {name for row in sent for name in row}
        assert {"train/nats/margins", "eval/kl/offline", "train/rewards/accuracies", "sft/eval/loss"} <= names
        axes = {"stage", "sft/step", "preference/step"}
        assert all(name.startswith(("train/", "eval/", "sft/")) for name in names - axes), "all have a step axis"


def test_the_sweep_has_a_run_of_its_own_in_the_group(sweep):
    [folder] = parts(sweep)
    records = read_wandb(folder)
    [run] = of_kind(records, "run")
    assert (run.run_group, run.job_type, run.display_name) == ("sweep", "sweep summary", "sweep")
    [row] = history(records)
    assert {f"comparison/{name}/path" for name in ("variants", "nats-margins", "logps-chosen")} <= row.keys()
    kept = {artifact.type: artifact for artifact in of_kind(records, "artifact")}["comparison"]
    assert {entry.path for entry in kept.manifest.contents} == {f"comparison.{kind}" for kind in ("html", "md", "csv")}
    assert "2 variants" in run.notes
