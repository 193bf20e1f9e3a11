"""What the docs give you for clusters: the script for Slurm does what it says, and Kubernetes would take its file."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

RANKS = Path(__file__).parents[2] / "docs" / "ranks.md"


def block(name: str) -> str:
    """The code block of the docs behind a mark."""
    return re.search(rf"<!-- {name} -->\n```[a-z]+\n(.*?)```", RANKS.read_text(), re.DOTALL)[1]


def stand_in(folder: Path, name: str, lines: str) -> None:
    """A command of Slurm's that writes down how it was called."""
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "{name} $*" >>{folder}/called\n{lines}\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("begun", "restarts", "code", "called"),
    [
        (False, "0", 0, ["recipe=dpo_qwen3 hydra.run.dir=outputs/slurm/7"]),
        (True, "1", 0, ["resume=outputs/slurm/7"]),
        (True, "1", 1, ["resume=outputs/slurm/7", "scontrol requeue 7"]),
        (True, "5", 1, ["resume=outputs/slurm/7"]),
    ],
)
def test_the_script_for_slurm_begins_goes_on_and_starts_again(begun, restarts, code, called, tmp_path):
    """Its own number names the run, and a job that cannot end is given up after some starts."""
    if begun:
        folder = tmp_path / "outputs" / "slurm" / "7"
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    stand_in(tmp_path, "srun", f"exit {code}")
    stand_in(tmp_path, "scontrol", "")
    ended = subprocess.run(
        ["bash", "-c", block("sbatch")],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}:/bin:/usr/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == code, ended.stderr
    found = (tmp_path / "called").read_text().splitlines()
    srun = "srun --kill-on-bad-exit=1 python -m alignment.run "
    assert [line.removeprefix(srun) for line in found] == called


def test_the_file_for_kubernetes_starts_the_command_once_on_each_machine():
    """As many machines as ranks expect, each with as many ranks as GPUs, which meet on the first."""
    found = yaml.safe_load(block("jobset"))
    [job] = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    [script] = container["args"]
    said = dict(re.findall(r"--([a-z-]+)=(\S+)", script))
    assert spec["completions"] == spec["parallelism"] == int(said["nnodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(said["nproc-per-node"])
    first = f"{found['metadata']['name']}-{job['name']}-0-0.{found['metadata']['name']}"
    assert said["master-addr"] == first and spec["completionMode"] == "Indexed"
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


@pytest.mark.parametrize("begun", [False, True])
def test_the_task_for_skypilot_starts_the_command_once_on_each_machine(begun, tmp_path):
    """The variables that SkyPilot sets on each machine name all that torchrun asks for; what has begun goes on."""
    task = yaml.safe_load(block("skypilot"))
    assert task["envs"]["ALIGNMENT_CACHE"].startswith(f"{next(iter(task['volumes']))}/")
    if begun:
        (tmp_path / "dpo").mkdir()
        (tmp_path / "dpo" / "config.yaml").touch()
    stand_in(tmp_path, "torchrun", "")
    subprocess.run(
        ["bash", "-c", task["run"].replace("/outputs", str(tmp_path))],
        env={
            "PATH": f"{tmp_path}:/bin:/usr/bin", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
            "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        },
        check=True,
    )  # fmt: skip
    run = f"{tmp_path}/dpo"
    settings = f"resume={run}" if begun else f"recipe=dpo_qwen3 hydra.run.dir={run}"
    assert (tmp_path / "called").read_text() == (
        "torchrun --nnodes=2 --nproc-per-node=8 --node-rank=1 --master-addr=10.0.0.1 --master-port=29500 "
        f"-m alignment.run {settings}\n"
    )


@pytest.mark.slow
def test_skypilot_takes_the_task(tmp_path, monkeypatch):
    """Its own reader of tasks, with the schema of every key."""
    monkeypatch.setenv("HOME", str(tmp_path))  # it keeps files there, and tells how it is used
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    sky = pytest.importorskip("sky", reason="PLUGIN ABSENT: skypilot is not installed: this did not run")
    path = tmp_path / "alignment.yaml"
    text = block("skypilot").replace("workdir: .", f"workdir: {tmp_path}")
    path.write_text(text)
    assert sky.Task.from_yaml(str(path)).num_nodes == 2
    path.write_text(text.replace("num_nodes", "nodes"))
    with pytest.raises(ValueError, match="nodes"):
        sky.Task.from_yaml(str(path))


@pytest.mark.slow
def test_kubernetes_takes_the_jobs_of_the_file():
    """Its published schema of a Job; the JobSet around it is a definition of its own."""
    validator = pytest.importorskip(
        "kubernetes_validate", reason="PLUGIN ABSENT: kubernetes-validate is not installed: this did not run"
    )
    [job] = yaml.safe_load(block("jobset"))["spec"]["replicatedJobs"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
    validator.validate(json.loads(json.dumps(whole)), validator.latest_version(), strict=True)
    whole["spec"]["completion"] = 2
    with pytest.raises(validator.ValidationError):
        validator.validate(whole, validator.latest_version(), strict=True)
