from __future__ import annotations

import json
import logging
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment import tracking
from alignment.config import TrackingConfig
from alignment.errors import UserError
from alignment.tracking import NullTracker, WandbTracker, metric_row, open_tracker


def config(**values: Any) -> TrackingConfig:
    defaults = {"project": "p", "entity": None, "mode": "auto", "group": None, "name": None, "tags": []}
    return TrackingConfig(**(defaults | values))


def start(settings: TrackingConfig | None, run_dir: Path) -> tracking.Tracker:
    return open_tracker(
        settings,
        run_dir=run_dir,
        recipe="quickstart",
        run_config={"optim": {"lr": 1e-4}, "hf_token": "s3cret", "tokens_per_batch": 7},
        stages=["sft", "preference"],
    )


@pytest.fixture
def nobody_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def read_wandb(folder: Path) -> list[Any]:
    """Records of an offline run: a LevelDB log with a 7-byte file header, each record a protobuf message."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # as at the end of the process: the service writes the file out
    (path,) = folder.glob("*.wandb")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts, found = 7, b"", []
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def history(records: list[Any]) -> list[dict[str, Any]]:
    found = []
    for record in records:
        if record.HasField("history"):
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            found.append({key: value for key, value in row.items() if key not in ("_timestamp", "_runtime", "_step")})
    return found


def test_members_of_a_sweep_are_one_group(tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch) -> None:
    sweep = tmp_path / "betas"
    for name in ("0-tiny", "1-tiny"):
        (sweep / name).mkdir(parents=True)
        (sweep / "multirun.yaml").touch()
        start(config(), sweep / name).finish()
    for name in ("0-tiny", "1-tiny"):
        [folder] = sweep.glob(f"{name}/wandb/offline-run-*")
        (run,) = (record.run for record in read_wandb(folder) if record.HasField("run"))
        assert (run.run_group, run.job_type, run.display_name) == ("betas", "sweep member", name)


def test_offline_run_holds_everything_and_continues_under_its_id(
    tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    run_dir = tmp_path / "outputs" / "quickstart" / "today"
    with caplog.at_level(logging.INFO, "alignment"):
        with start(config(tags=["baseline"]), run_dir) as tracker:
            tracker.log("sft", 3, "train", {"loss": 1.5})
            tracker.log("preference", 0, "eval", {"rewards/accuracies": 0.0, "rewards/margins": math.nan})
        (line,) = (record.getMessage() for record in caplog.records if record.name == "alignment.tracking")
        continued = start(config(tags=["baseline"]), run_dir)
        continued.log("preference", 1, "train", {"loss": 0.69})
        continued.summary({"status": "finished", "api_key": "s3cret", "stages": {"sft": {"path": Path("a/b")}}})
        continued.__exit__(ValueError, ValueError(), None)
    assert "nobody is logged in" in line
    assert f"wandb sync {run_dir}/wandb/offline-run-*" in line
    assert capfd.readouterr().out == "", "wandb itself prints nothing"
    assert continued.run_id == tracker.run_id == (run_dir / "wandb_run_id").read_text().strip()

    first, second = sorted(run_dir.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
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
    sft, evaluation = history(records)
    assert sft == {"sft/train/loss": 1.5, "sft/step": 3, "stage": "sft"}
    assert math.isnan(evaluation.pop("eval/rewards/margins"))
    assert evaluation == {"eval/rewards/accuracies": 0.0, "preference/step": 0, "stage": "preference"}
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]

    records = read_wandb(second)
    (run,) = (record.run for record in records if record.HasField("run"))
    assert run.run_id == tracker.run_id
    assert history(records) == [{"train/loss": 0.69, "preference/step": 1, "stage": "preference"}]
    text = next(second.glob("*.wandb")).read_bytes()
    assert b"finished" in text
    assert b"a/b" in text
    assert b"s3cret" not in text
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]


def test_an_unreachable_server_leaves_an_offline_run(
    tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match="nobody is logged in; run 'wandb login'"):
        start(config(mode="online"), tmp_path)
    nobody_logged_in.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match="the login is no valid one"):
        start(config(mode="online"), tmp_path)
    nobody_logged_in.setenv("WANDB_API_KEY", "a" * 40)
    nobody_logged_in.setattr(tracking, "_INIT_SECONDS", 1.0)
    (tmp_path / "wandb_run_id").write_text("given-id")
    with start(config(mode="online"), tmp_path) as tracker:
        tracker.log("sft", 1, "train", {"loss": 1.0})
    assert tracker.run_id == "given-id"
    assert "cannot be reached" in caplog.text
    (folder,) = tmp_path.glob("wandb/offline-run-*")

    assert [row["sft/train/loss"] for row in history(read_wandb(folder))] == [1.0]


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
    assert metric_row(stage, 4, split, {name: 0.5}) == {sent: 0.5, f"{stage}/step": 4, "stage": stage}


def test_without_tracking_wandb_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from alignment.tracking import open_tracker\n"
        "with open_tracker(None, run_dir=pathlib.Path(sys.argv[1]), recipe='r', run_config={}, stages=['sft']\n"
        "                  ) as tracker:\n"
        "    tracker.log('sft', 1, 'train', {'loss': 1.0})\n"
        "    tracker.summary({})\n"
        "assert tracker.run_id is None and not {'wandb', 'torch'} & set(sys.modules)\n"
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
    assert tracking._mode(config(mode=setting)) == mode


def test_wandb_mode_disabled_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert isinstance(start(config(mode="online"), tmp_path), NullTracker)
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with pytest.raises(UserError, match=r"WANDB_MODE must be one of online, .*not 'sideways'"):
        start(config(), tmp_path)


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
    with WandbTracker(run) as tracker:  # type: ignore[arg-type]
        tracker.log("sft", 1, "train", {"loss": 1.0})
        tracker.log("sft", 2, "train", {"loss": 1.0})
        tracker.summary({"a": 1})
    assert run.calls == 1
    assert len(caplog.messages) == 1
    assert "the service is gone" in caplog.text
