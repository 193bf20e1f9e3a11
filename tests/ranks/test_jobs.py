"""A job of a cluster whose tasks are the ranks of one run."""

import json
from functools import partial

import pytest

from tests.helpers.commands import command
from tests.helpers.hazard import finding_modules_in, hazardous_project


@pytest.mark.matrix
def test_a_preempted_job_of_two_tasks_goes_on_where_it_was(tiny_model_folder, tmp_path):
    """submitit starts two tasks for one run, warns both in the third pass, and starts them again."""
    pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher",
        reason="PLUGIN ABSENT: hydra_submitit_launcher is not installed: this did not run",
    )
    project = hazardous_project(tmp_path, tiny_model_folder)
    ended = command(
        *("--config-dir", str(project), "-m", "recipe=tiny", "sft=none", "trainer.max_steps=6"),
        *("trainer.save_every=4", "evaluation.prompts=0", "hydra.sweep.dir=sweep", "loss=hazard"),
        *("loss.fault=preempted", "hydra/launcher=submitit_local", "trainer.devices=2"),
        cwd=tmp_path,
        cache=tmp_path / "cache",
        patch=partial(finding_modules_in, tmp_path),
        timeout=300,
    )
    assert ended.code == 0, ended.err
    folder = tmp_path / "sweep" / "0-tiny"
    said = (folder / "run.log").read_text()
    stop, resumed = said.index("Stopped by SIGUSR2."), said.index("The preference stage continues from step 3.")
    assert stop < resumed and said.count("2 ranks share this run.") == 2
    found = json.loads((folder / "summary.json").read_text())
    assert found["machine"]["ranks"] == 2 and found["stages"]["preference"]["steps"] == 6
    tasks = [path.read_text() for path in (tmp_path / "sweep" / ".submitit").rglob("*_1_log.*")]
    assert len(tasks) == 2 and not any("preference" in text for text in tasks)
