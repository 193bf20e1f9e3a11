"""What each rank asks of W&B where the system metrics of all ranks go to one run; nothing is sent anywhere."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignment.errors import UserError
from alignment.ranks.team import Post, Team
from alignment.runs.trackers import wandb as wandb_service
from alignment.runs.tracking import open_tracker
from tests.helpers.ranks import in_ranks
from tests.helpers.tracked import nobody_logged_in, tracking_config
from tests.helpers.wandb_files import read_wandb

__all__ = ["nobody_logged_in"]

SECRET = "a" * 40


class StubbedRun:
    """Notes what it is asked; refuses all but its end on a rank that follows."""

    project, entity, url, starting_step = "p", None, "", 0

    def __init__(self, rank: int, folder: Path, settings: dict[str, Any]) -> None:
        self._path = folder / f"rank{rank}.jsonl"
        chosen = settings.pop("settings")  # real ones, which the installed W&B has checked
        self.id = settings["id"] or "chosen-id"
        self.settings = SimpleNamespace(mode=settings["mode"])
        known = chosen.model_dump(exclude_unset=True, mode="json")
        self._note("init", {key: value for key, value in settings.items() if key != "dir"} | {"settings": known})
        self._rank = rank

    def _note(self, what: str, value: Any = None) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([what, value]) + "\n")

    def __getattr__(self, name: str) -> Any:
        if self._rank and name != "finish":
            raise AssertionError(f"rank {self._rank} asks for {name}")
        return lambda *values, **_: self._note(name, [v for v in values if isinstance(v, dict)])


def stub(rank: int, folder: Path, problem: str = "") -> None:
    import wandb

    os.environ["WANDB_RUN_ID"] = "of-another-run"
    os.environ["WANDB_API_KEY"] = SECRET
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank + 4)
    wandb.setup = lambda *_, **__: None
    wandb.init = lambda **settings: StubbedRun(rank, folder, settings)
    wandb_service.login_problem = lambda: problem


def stub_there(post: Post, asked: tuple[Path, str]) -> None:
    stub(post.team.place.rank, *asked)


def track(team: Team, folder: Path, problem: str = "", system: str = "each", begun: bool = False) -> None:
    stub(0, folder)
    team.tell(stub_there, (folder, problem))
    logging.basicConfig(level=logging.INFO)
    run_dir = folder / "run"
    run_dir.mkdir()
    if begun:
        (run_dir / "wandb_run_id").write_text("begun-id\n")
        row = {
            "stage": "sft",
            "step": 1,
            "split": "train",
            "loss": 2.0,
            "time": "2026-11-01T00:00:00+00:00",
            "wall_s": 0.0,
        }
        (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    asked = tracking_config(system=system, mode="online")
    with open_tracker(asked, run_dir=run_dir, recipe="r", run_config={"k": 1}, stages=["sft"], team=team) as tracker:
        tracker.log("sft", 1, "train", {"loss": 2.0})
        tracker.log("sft", 2, "train", {"loss": 1.0})


def asked_of(folder: Path, rank: int) -> list[Any]:
    path = folder / f"rank{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tracked(folder: Path, *arguments: Any) -> str:
    """Track in two ranks; what rank 0 has logged."""
    folder.mkdir(exist_ok=True)
    code = in_ranks(2, folder / "output", track, folder, *arguments)
    said = (folder / "output" / "stderr0").read_text()
    assert code == [0, 0], said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True])
def test_each_rank_sends_its_system_metrics_to_one_run(begun, tmp_path):
    """The others under their label and nothing else; metrics, settings and the end are rank 0's. No secret travels.

    Of a run that goes on only new rows are sent, since W&B does not say how many it has.
    """
    tracked(tmp_path, "", "each", begun)
    (first, settings), *rest = asked_of(tmp_path, 0)
    assert first == "init" and (settings["mode"], settings["resume"]) == ("shared", None)
    chosen = settings["settings"]
    assert (chosen["x_label"], chosen["x_primary"], chosen["x_update_finish_state"]) == ("rank-0", True, True)
    assert chosen["x_stats_gpu_device_ids"] == [4]
    losses = [value[0]["sft/train/loss"] for what, value in rest if what == "log"]
    assert losses == ([1.0] if begun else [2.0, 1.0])

    (first, settings), *rest = asked_of(tmp_path, 1)
    chosen = settings.pop("settings")
    run_id = "begun-id" if begun else "chosen-id"
    assert settings == {"project": "p", "entity": None, "id": run_id, "reinit": "create_new", "mode": "shared"}
    assert (chosen["x_label"], chosen["x_primary"], chosen["x_update_finish_state"]) == ("rank-1", False, False)
    assert chosen["x_stats_gpu_device_ids"] == [5]
    assert (chosen["disable_git"], chosen["save_code"], chosen["x_disable_meta"]) == (True, False, True)
    assert rest == [["finish", []]]
    assert SECRET not in json.dumps([asked_of(tmp_path, 0), asked_of(tmp_path, 1)])


@pytest.mark.slow
def test_a_rank_that_cannot_join_is_named_and_nothing_stops(tmp_path):
    said = tracked(tmp_path, "you are not logged in")
    assert "1 of 1 ranks send no system metrics to W&B (rank 1: you are not logged in); training goes on." in said
    assert asked_of(tmp_path, 1) == []
    assert [what for what, _ in asked_of(tmp_path, 0)].count("log") == 2


@pytest.mark.slow
def test_by_default_rank_0_alone_knows_wandb(tmp_path):
    tracked(tmp_path, "", "rank0")
    (_, settings), *_ = asked_of(tmp_path, 0)
    assert settings["mode"] == "online" and "x_label" not in settings["settings"]
    assert asked_of(tmp_path, 1) == []


def test_offline_it_is_refused(tmp_path, nobody_logged_in):
    """In one sentence, before a file is written."""
    asked = {"run_dir": tmp_path / "run", "recipe": "r", "run_config": {}, "stages": ["sft"]}
    team: Any = SimpleNamespace()
    for setting, variable in (("offline", ""), ("auto", "offline")):
        nobody_logged_in.setenv("WANDB_MODE", variable)
        sentence = r"tracking\.system=each needs W&B online, .*: set tracking\.mode=online, or tracking\.system=rank0\."
        with pytest.raises(UserError, match=sentence):
            open_tracker(tracking_config(system="each", mode=setting), **asked, team=team)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"tracking\.system must be one of rank0, each, not 'all'"):
        tracking_config(system="all")


@pytest.mark.slow
def test_without_a_login_the_run_is_kept_and_the_log_says_what_is_not(tmp_path, nobody_logged_in, caplog):
    """No rank is asked for anything."""
    team: Any = SimpleNamespace()
    asked = {"run_dir": tmp_path, "recipe": "r", "run_config": {}, "stages": ["sft"]}
    open_tracker(tracking_config(system="each"), **asked, team=team).finish()
    assert "W&B keeps this run offline because you are not logged in" in caplog.text
    assert "tracking.system=each: only rank 0's system metrics are kept" in caplog.text
    [folder] = tmp_path.glob("wandb/offline-run-*")
    assert read_wandb(folder)
