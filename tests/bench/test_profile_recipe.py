"""`make profile` on a tiny recipe: the last step is profiled, its table printed, its trace written."""

import json

import pytest

import alignment.stages.preference
from tests.bench import profile_recipe
from tests.helpers.commands import write_project


@pytest.mark.slow
def test_one_step_of_a_recipe_is_profiled(tiny_model_folder, tmp_path, monkeypatch, capsys):
    project = write_project(tmp_path / "project", tiny_model_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["profile"])
    monkeypatch.setattr(alignment.stages.preference, "PreferenceTrainer", None)  # put back at the end
    monkeypatch.setattr(profile_recipe.ProfiledTrainer, "found", None)
    profile_recipe.main(["recipe=tiny", "--config-dir", str(project), "data.limit=4", "data.eval_limit=2"])
    printed = capsys.readouterr().out
    assert "One step: " in printed and "matrix products" in printed
    trace = tmp_path / "outputs" / "profile" / "tiny" / "trace.json"
    assert "policy forward" in {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert f"Trace: {trace.relative_to(tmp_path)}" in printed
