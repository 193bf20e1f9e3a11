from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.config.schema import TrackingConfig
from alignment.errors import UserError
from alignment.runs.folder import sweep_name
from alignment.runs.record import RunRecord
from alignment.runs.trackers import wandb as wandb_service
from alignment.runs.trackers.base import Row
from alignment.runs.trackers.wandb import WandbRun
from alignment.runs.tracking import Tracker, open_tracker
from tests.helpers.tracked import nobody_logged_in, tracking_config
from tests.helpers.wandb_files import history, of_kind, read_wandb

__all__ = ["nobody_logged_in"]


def start(settings: TrackingConfig | None, run_dir: Path) -> Tracker:
    return open_tracker(
        settings,
        run_dir=run_dir,
        recipe="quickstart",
        run_config={"optim": {"lr": 1e-4}, "hf_token": "s3cret", "tokens_per_batch": 7},
        stages=["sft", "preference"],
    )


@pytest.mark.slow
def test_members_of_a_sweep_are_one_group(tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch) -> None:
    sweep = tmp_path / "betas"
    for name in ("0-tiny", "1-tiny"):
        (sweep / name).mkdir(parents=True)
        (sweep / "multirun.yaml").touch()
        start(tracking_config(), sweep / name).finish()
    for name in ("0-tiny", "1-tiny"):
        [folder] = sweep.glob(f"{name}/wandb/offline-run-*")
        (run,) = (record.run for record in read_wandb(folder) if record.HasField("run"))
        assert (run.run_group, run.job_type, run.display_name) == ("betas", "sweep member", name)


def run_id(tracker: Tracker) -> str | None:
    return tracker.services[0].run_id if tracker.services else None


HOSTILE = [
    "<script>alert(1)</script>",
    "' onload=alert(1) \"",
    "../../etc",
    "a\nb\tc",
    "\u202eevil",
    "ü" * 250,
    "%s{x}$(id)`id`",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE)
def test_any_folder_name_is_a_name_for_wandb(text: str, tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch) -> None:
    """A run, and a sweep, may be called anything: W&B gets the name as text, cut to what it takes, and all rows."""
    run_dir = tmp_path / text.replace("/", "-").encode()[:200].decode("utf-8", "ignore") / "0"
    (run_dir / ".hydra").mkdir(parents=True)
    (run_dir / ".hydra" / "hydra.yaml").write_text("mode: MULTIRUN\n")
    with start(tracking_config(name=text[:128], tags=[text[:64]]), run_dir) as tracker:
        tracker.log("sft", 1, "train", {text: 1.5})
    [run] = of_kind(read_wandb(*run_dir.glob("wandb/offline-run-*")), "run")
    assert (run.display_name, list(run.tags)) == (text[:128], [text[:64]])
    assert run.run_group == run_dir.parent.name[:128]
    assert history(read_wandb(*run_dir.glob("wandb/offline-run-*")))[0][f"sft/train/{text}"] == 1.5


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tags": ["t" * 65]}, "tracking.tags: W&B takes tags of at most 64"),
        ({"project": "a/b"}, "tracking.project: W&B takes no / in"),
        *(({key: "x" * 129}, f"tracking.{key}: W&B takes at most 128") for key in ("project", "group", "name")),
    ],
)
def test_names_that_wandb_would_refuse_are_refused_before_the_run(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tracking_config(**values)


@pytest.mark.slow
@pytest.mark.parametrize("agent", [{}, {"WANDB_SWEEP_ID": "sweep1"}], ids=["alone", "under an agent"])
def test_two_members_are_two_runs_whatever_the_environment_sets(
    agent: dict[str, str], tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch
) -> None:
    """A fixed id, name, group or way to resume in the environment merges no members; folders have any character."""
    fixed = {"RUN_ID": "fixed", "RESUME": "must", "NAME": "same", "RUN_GROUP": "all", "FORK_FROM": "fixed?_step=1"}
    for name, value in ({f"WANDB_{key}": value for key, value in fixed.items()} | agent).items():
        nobody_logged_in.setenv(name, value)
    sweep = tmp_path / "größe=1, 'a' \"b\" [c] 50%"
    trackers = []
    for name in ("0-tiny", "1-tiny"):
        (sweep / name).mkdir(parents=True)
        (sweep / "multirun.yaml").touch()
        with start(tracking_config(), sweep / name) as tracker:
            trackers.append(run_id(tracker))
    assert len({*trackers, "fixed"}) == 3
    for name, known in zip(("0-tiny", "1-tiny"), trackers, strict=True):
        [folder] = sweep.glob(f"{name}/wandb/offline-run-*")
        [run] = of_kind(read_wandb(folder), "run")
        assert (run.run_id, run.run_group, run.display_name) == (known, sweep.name, name)
        assert (sweep / name / "wandb_run_id").read_text().strip() == known


def test_variables_that_wandb_refuses_are_named(
    tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They end no training unless W&B is required."""
    nobody_logged_in.setenv("WANDB_INIT_TIMEOUT", "soon")
    assert run_id(start(tracking_config(), tmp_path / "a")) is None
    assert "WANDB_*" in caplog.text and "training goes on" in caplog.text
    with pytest.raises(UserError, match=r"WANDB_\*.*tracking=none"):
        start(tracking_config(mode="online"), tmp_path / "b")


def test_a_member_is_known_by_what_other_sweepers_leave_too(
    tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch
) -> None:
    """Optuna's writes no multirun.yaml."""
    for name, mode in (("a/0", "MULTIRUN"), ("b/1", "RUN")):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra" / "hydra.yaml").write_text(f"hydra:\n  mode: {mode}\n")
    assert [sweep_name(tmp_path / name) for name in ("a/0", "b/1", "c/2")] == ["a", None, None]


def test_a_run_of_wandbs_own_agent_counts_for_its_sweep(tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch) -> None:
    for name, value in (("SWEEP_ID", "sweep1"), ("RUN_ID", "run1"), ("PROJECT", "of-the-sweep")):
        nobody_logged_in.setenv(f"WANDB_{name}", value)
    with start(tracking_config(), tmp_path / "r") as tracker:
        assert run_id(tracker) == "run1"
    [run] = of_kind(read_wandb(*tmp_path.glob("r/wandb/offline-run-*")), "run")
    assert (run.sweep_id, run.run_id, run.project) == ("sweep1", "run1", "of-the-sweep")


def test_offline_run_holds_everything_and_continues_under_its_id(
    tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    run_dir = tmp_path / "outputs" / "quickstart" / "today"
    with caplog.at_level(logging.INFO, "alignment"):
        with start(tracking_config(tags=["baseline"]), run_dir) as tracker:
            tracker.log("sft", 3, "train", {"loss": 1.5})
            tracker.log("preference", 0, "eval", {"rewards/accuracies": 0.0, "rewards/margins": math.nan})
        (line,) = (record.getMessage() for record in caplog.records if record.name == "alignment.runs.trackers.wandb")
        begun_id = (run_dir / "wandb_run_id").read_text().strip()
        continued = start(tracking_config(tags=["baseline"]), run_dir)
        continued.log("preference", 1, "train", {"loss": 0.69})
        continued.summary({"status": "finished", "api_key": "s3cret", "stages": {"sft": {"path": Path("a/b")}}})
        continued.__exit__(ValueError, ValueError(), None)
    assert "you are not logged in" in line
    assert f"wandb sync {run_dir}/wandb/offline-run-*" in line
    assert capfd.readouterr().out == "", "wandb itself prints nothing"
    assert begun_id == (run_dir / "wandb_run_id").read_text().strip()

    first, second = sorted(run_dir.glob("wandb/offline-run-*"))
    records = read_wandb(first)
    (run,) = (record.run for record in records if record.HasField("run"))
    values = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert values["optim"] == {"lr": 1e-4}
    assert (values["hf_token"], values["tokens_per_batch"]) == ("***", 7)
    assert (run.project, run.run_group, run.job_type) == ("p", "quickstart", "sft+preference")
    assert (run.display_name, list(run.tags)) == ("quickstart-today", ["baseline"])
    axes = {m.metric.glob_name or m.metric.name: m.metric.step_metric for m in records if m.HasField("metric")}
    assert axes == {
        "sft/step": "",
        "sft/*": "sft/step",
        "preference/step": "",
        "train/*": "preference/step",
        "eval/*": "preference/step",
    }
    assert [m.metric.name for m in records if m.metric.options.hidden] == ["sft/step", "preference/step"]
    sft, evaluation = history(records)
    assert sft == {"sft/train/loss": 1.5, "sft/step": 3, "stage": "sft"}
    assert math.isnan(evaluation.pop("eval/rewards/margins"))
    assert evaluation == {"eval/rewards/accuracies": 0.0, "preference/step": 0, "stage": "preference"}
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]

    records = read_wandb(second)
    (run,) = (record.run for record in records if record.HasField("run"))
    assert run.run_id == begun_id
    assert history(records) == [{"train/loss": 0.69, "preference/step": 1, "stage": "preference"}]
    text = next(second.glob("*.wandb")).read_bytes()
    assert b"finished" in text
    assert b"a/b" in text
    assert b"s3cret" not in text
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]


@pytest.mark.slow
def test_an_unreachable_server_leaves_an_offline_run(
    tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match="you are not logged in; run 'wandb login'"):
        start(tracking_config(mode="online"), tmp_path)
    nobody_logged_in.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match="the login is not valid"):
        start(tracking_config(mode="online"), tmp_path)
    nobody_logged_in.setenv("WANDB_API_KEY", "a" * 40)
    nobody_logged_in.setattr(wandb_service, "_INIT_SECONDS", 1.0)
    (tmp_path / "wandb_run_id").write_text("given-id")
    with start(tracking_config(mode="online"), tmp_path) as tracker:
        tracker.log("sft", 1, "train", {"loss": 1.0})
        assert run_id(tracker) == "given-id"
    assert "cannot be reached" in caplog.text
    (folder,) = tmp_path.glob("wandb/offline-run-*")

    assert [row["sft/train/loss"] for row in history(read_wandb(folder))] == [1.0]

    nobody_logged_in.setattr(wandb_service, "login_problem", lambda: pytest.fail("it was known to be out of reach"))
    start(tracking_config(), tmp_path / "next").finish()


@pytest.mark.parametrize(
    ("stage", "split", "name", "sent"),
    [
        ("preference", "train", "rewards/chosen", "train/rewards/chosen"),
        ("preference", "train", "loss", "train/loss"),
        ("preference", "eval", "rewards/margins", "eval/rewards/margins"),
        ("sft", "train", "loss", "sft/train/loss"),
        ("sft", "eval", "loss", "sft/eval/loss"),
    ],
)
def test_metric_names(stage: str, split: str, name: str, sent: str) -> None:
    run = ListingRun()
    WandbRun(run).row(Row(stage, 4, split, {name: 0.5}, 0.0))  # type: ignore[arg-type]
    assert run.rows == [{sent: 0.5, f"{stage}/step": 4, "stage": stage}]


@pytest.mark.slow
def test_without_tracking_wandb_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from alignment.runs.tracking import open_tracker\n"
        "with open_tracker(None, run_dir=pathlib.Path(sys.argv[1]), recipe='r', run_config={}, stages=['sft']\n"
        "                  ) as tracker:\n"
        "    tracker.log('sft', 1, 'train', {'loss': 1.0})\n"
        "    tracker.summary({})\n"
        "assert tracker.services == [] and not {'wandb', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "setting", "mode"),
    [
        ("", "auto", "auto"),
        ("", "online", "online"),
        ("offline", "online", "offline"),
        ("dryrun", "auto", "offline"),
        ("online", "offline", "online"),
    ],
)
def test_wandb_mode_goes_before_the_setting(
    monkeypatch: pytest.MonkeyPatch, variable: str, setting: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_service._mode(tracking_config(mode=setting)) == mode


def test_wandb_mode_disabled_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert run_id(start(tracking_config(mode="online"), tmp_path)) is None
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with pytest.raises(UserError, match=r"WANDB_MODE must be one of online, .*not 'sideways'"):
        start(tracking_config(), tmp_path)


@pytest.mark.slow
def test_a_table_has_its_columns_and_rows(tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch) -> None:
    """Empty cells, too, beside numbers."""
    rows = [(0, "Who?", "I.", 0.5, None), (8, "Who?", "You.", None, 1)]
    with start(tracking_config(), tmp_path) as tracker:
        tracker.table("answers/samples", ("step", "prompt", "answer", "score", "outcome"), rows)
    [folder] = tmp_path.glob("wandb/offline-run-*")
    [sent] = history(read_wandb(folder))
    assert all(name.startswith("answers/samples") for name in sent)
    [path] = folder.rglob("*.table.json")
    found = json.loads(path.read_text())
    assert found["columns"] == ["step", "prompt", "answer", "score", "outcome"]
    assert found["data"] == [list(row) for row in rows]


class BrokenRun:
    id = "x"

    def __init__(self) -> None:
        self.calls = 0

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, _: object) -> None:
        self.calls += 1
        raise ConnectionResetError("the service is gone")


def test_what_wandb_raises_ends_the_tracking_only(caplog: pytest.LogCaptureFixture) -> None:
    run = BrokenRun()
    with Tracker([WandbRun(run)]) as tracker:  # type: ignore[arg-type]
        tracker.log("sft", 1, "train", {"loss": 1.0})
        tracker.log("sft", 2, "train", {"loss": 1.0})
        tracker.summary({"a": 1})
    assert run.calls == 1
    assert len(caplog.messages) == 1
    assert "the service is gone" in caplog.text


def test_a_run_goes_on_where_wandb_cannot_even_start(
    tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: object) -> None:
        raise OSError("the disk is full")

    nobody_logged_in.setattr("wandb.init", fail)
    assert run_id(start(tracking_config(), tmp_path)) is None
    assert [record.getMessage() for record in caplog.records if record.name == "alignment.runs.trackers.wandb"] == [
        "W&B failed and gets nothing of this run; training goes on: the disk is full"
    ]
    assert not (tmp_path / "wandb_run_id").exists()


class ListingRun:
    """What is sent to a run of which W&B has the first rows."""

    id = "x"
    starting_step = 0

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def test_a_continued_run_gets_what_it_lacks_and_nothing_twice() -> None:
    rows = [
        Row("preference", step, split, {"loss": float(step)}, 0.0)
        for step, split in ((0, "eval"), (1, "train"), (2, "train"), (3, "train"))
    ]
    run = ListingRun()
    tracker = Tracker([WandbRun(run, rows[:2])], rows)  # type: ignore[arg-type]
    lacking = [{"train/loss": float(step), "preference/step": step, "stage": "preference"} for step in (2, 3)]
    assert run.rows == lacking
    # The resume does steps 2 and 3 again, then goes on.
    for step in (2, 3, 4):
        tracker.log("preference", step, "train", {"loss": -1.0})
    tracker.log("preference", 3, "eval", {"loss": 7.0})
    assert [(row["preference/step"], row.get("train/loss"), row.get("eval/loss")) for row in run.rows[2:]] == [
        (4, -1.0, None),
        (3, None, 7.0),
    ]


def test_what_wandb_has_of_a_run_is_where_its_rows_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are the rows that it was sent."""
    record, run = RunRecord(tmp_path), ListingRun()
    for step in (1, 2, 3):
        record.log("sft", step, "train", {"loss": 1.0})
    run.starting_step = 2
    monkeypatch.setattr(wandb_service, "start_run", lambda *_, **__: run)
    start(tracking_config(), tmp_path)
    assert [row["sft/step"] for row in run.rows] == [3]


def test_offline_a_continued_part_holds_the_whole_history(tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch) -> None:
    record = RunRecord(tmp_path)
    with start(tracking_config(), tmp_path) as tracker:
        for step in (1, 2):
            record.log("sft", step, "train", {"loss": 1.0 / step})
            tracker.log("sft", step, "train", {"loss": 1.0 / step})
    with start(tracking_config(), tmp_path) as tracker:
        for step in (2, 3):
            tracker.log("sft", step, "train", {"loss": 1.0 / step})
    first, second = sorted(tmp_path.glob("wandb/offline-run-*"))
    records = read_wandb(second)
    assert [(row["sft/step"], row["sft/train/loss"]) for row in history(records)] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    [run] = of_kind(records, "run")
    assert not run.resume, "it takes the place of what was sent before"
    assert list(first.glob("*.wandb.synced")) and not list(second.glob("*.wandb.synced"))
