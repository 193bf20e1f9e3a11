"""Runs of the command in tests: how to start them, where to interrupt them, and whether two are the same."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from safetensors.torch import load_file

from tests.helpers.commands import Ended, command

TINY = ("recipe=tiny",)
"""The recipe of `write_project`."""


def run(project: Path, cwd: Path, *arguments: str, patch=None) -> Ended:
    """The command in the folder `cwd`, with a cache in there."""
    cwd.mkdir(exist_ok=True)
    return command("--config-dir", str(project), *arguments, cwd=cwd, cache=cwd / "cache", patch=patch)


def only_run(cwd: Path) -> Path:
    [folder] = (cwd / "outputs" / "tiny").iterdir()
    return folder


# Patches of the process that runs the command


def same_code():
    """Edits of the package while the tests run would make every stage another one."""
    from alignment.stages import store as stage_store

    stage_store._code = lambda: "code"


def at_row(stage, step, how=signal.SIGKILL):
    """At the training row of this step, half of which is written if the process is killed."""
    from alignment.runs.record import RunRecord

    log = RunRecord.log

    def patched(self, at_stage, at_step, split, metrics):
        if (at_stage, at_step, split) == (stage, step, "train"):
            if how is signal.SIGKILL:
                with self.metrics_path.open("ab") as file:
                    file.write(b'{"stage": "' + stage.encode())
            os.kill(os.getpid(), how)
        log(self, at_stage, at_step, split, metrics)

    RunRecord.log = patched


def failing_second():
    from alignment.stages.preference import PreferenceStage

    same_code()
    run = PreferenceStage.run

    def patched(self, *arguments):
        if self._work.run_dir.name == "1-tiny":
            raise RuntimeError("out of\nmemory")
        return run(self, *arguments)

    PreferenceStage.run = patched


# What is compared


def metric_rows(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("time", "wall_s", "crc32")} for row in rows]


def summary(folder: Path) -> dict:
    """The summary without what depends on time and memory, on where the run stands, on what the store had already."""
    found = json.loads((folder / "summary.json").read_text())
    for stage in found["stages"].values():
        stage.pop("taken_over", None)
        del stage["seconds"], stage["tokens_per_second"], stage["memory"]["predicted"], stage["memory"]["measured"]
    found["reference"] = {key: found["reference"].get(key) for key in ("mode", "identity")}
    return {key: value for key, value in found.items() if key not in ("seconds", "files", "git_commit")}


def weights(folder: Path) -> dict:
    [file] = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return load_file(file)


def assert_whole(folder: Path) -> None:
    """Every file can be read, and nothing is left of what was under way."""
    for path in folder.rglob("*"):
        assert not path.name.startswith("checkpoint") and path.suffix not in (".tmp", ".partial"), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert all(json.loads(line) for line in path.read_text().splitlines())
        elif path.suffix == ".safetensors":
            load_file(path)
    assert (folder / "report.md").is_file()


def assert_same(folder: Path, expected: Path, logged: bool = True) -> None:
    """Bit for bit: a resumed run has done the very same arithmetic.

    A run that SIGTERM has stopped has logged before its last checkpoint too: `logged` leaves out what it has logged.
    """
    if logged:
        assert metric_rows(folder) == metric_rows(expected)
        assert summary(folder) == summary(expected)
    for name in ("samples.jsonl", "held_out.jsonl"):
        assert (folder / name).read_text() == (expected / name).read_text()
    found, wanted = weights(folder), weights(expected)
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)
    assert_whole(folder)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
