"""`python -m alignment.migrate`: whose file it is, what it writes and prints, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.config.compose import load
from alignment.migrate import main

DPO = """
model_name_or_path: org/model
dataset_name: org/pairs
beta: 0.3
learning_rate: 5e-7
output_dir: ${HOME}/out
mystery: 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ends_with(*arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    said = str(caught.value)
    assert said.startswith("Error: ") and "\n" not in said
    return said


def test_a_recipe_is_written_that_a_run_takes(folder, capsys):
    Path("dpo v2.yaml").write_text(DPO)
    main(["dpo v2.yaml"])
    told = capsys.readouterr().out
    assert "a file of TRL: DPO" in told and "known here, and are left out: mystery" in told
    assert told.endswith("mine/recipe/dpo_v2.yaml\npython -m alignment.run --config-dir mine recipe=dpo_v2\n")
    config = load("recipe=dpo_v2", config_dir=folder / "mine")
    assert (config.loss.beta, config.optim.lr, config.data.source) == (0.3, 5e-7, "org/pairs")
    recipe = Path("mine/recipe/dpo_v2.yaml").read_text()
    assert recipe.startswith("# @package _global_\n# Made by") and "lr: 5.0e-07  # learning_rate" in recipe
    assert "mystery" in recipe and "- output_dir: Runs go to" in recipe


def test_text_with_a_dollar_names_no_other_setting(folder):
    Path("f.yaml").write_text("model_name_or_path: ${oc.env:HOME}/m\ndataset_name: d\nloss_type: sigmoid\n")
    main(["f.yaml", "own/recipe/deep/f.yaml"])
    assert load("recipe=deep/f", config_dir=folder / "own").model.name == "${oc.env:HOME}/m"


def test_an_optimizer_that_is_not_there_is_said(folder, capsys):
    Path("f.yaml").write_text(f"{DPO}optim: rmsprop_of_mine\n")
    main(["f.yaml"])
    assert "A run would stop: optim.name must be one of" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("a: [", (), "f.yaml, line 1 is not YAML"),
        ("[1, 2]", (), "must map keys to values"),
        ("name: x", (), "none of its keys is known"),
        ("learning_rate: 1e-5", (), "no key that only one of the tools has"),
        (
            "dataset_name: d\nbase_model: m",
            (),
            "keys of several tools (dataset_name is a key of TRL and base_model is a key",
        ),
        ("stage: ppo", (), "f.yaml: stage: ppo has no translation"),
        (DPO, ("--rows", "0"), "--rows must be at least 1"),
        (DPO, ("--from", "trlx"), "did you mean trl"),
        (DPO, ("out.yaml",), "in a folder named recipe"),
        (DPO, ("mine/recipe/a b.yaml",), "letters, digits, _ and - only"),
        (f"{DPO}warmup_ratio: 1.5", (), "f.yaml makes no recipe that can run: optim.warmup_ratio must be in [0, 1)"),
        (f"{DPO}load_in_4bit: true", (), "A quantised base cannot be trained itself"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(folder, text, arguments, said):
    Path("f.yaml").write_text(text)
    assert said in ends_with("f.yaml", *arguments)
    assert [path.name for path in folder.iterdir()] == ["f.yaml"]


def test_a_file_that_is_there_stays(folder):
    Path("f.yaml").write_text(DPO)
    Path("mine/recipe").mkdir(parents=True)
    Path("mine/recipe/f.yaml").write_text("mine")
    assert "is there already" in ends_with("f.yaml")
    assert Path("mine/recipe/f.yaml").read_text() == "mine"
    assert "cannot be read: No such file" in ends_with("none.yaml")
