"""A loss from outside the package: the documented example, run as it stands, and what is refused."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from alignment.config.arguments import check_arguments
from alignment.config.compose import load
from alignment.errors import UserError
from alignment.files import asset_dir
from tests.helpers.commands import command, write_project
from tests.helpers.runs import at_row

SHORT = ("recipe=tiny", "sft=none", "trainer.max_steps=4", "trainer.log_every=1", "evaluation.prompts=0")


def documented():
    """The shell commands of the document, without the last one, and the arguments of that one."""
    section = (asset_dir("recipes") / "README.md").read_text().split("## Your own loss\n")[1].split("\n## ")[0]
    block = re.search(r"(?:^    .*\n|^\n(?=    ))+", section, re.MULTILINE)[0]
    *commands, last = re.sub(r"^    ", "", block, flags=re.MULTILINE).strip().splitlines()
    assert last.startswith("python -m alignment.run ")
    return "\n".join(commands), last.split()[3:]


@pytest.fixture
def folder(tmp_path, tiny_model_folder):
    """A working folder as the document makes it, and the recipe `tiny`."""
    subprocess.run(["bash", "-euc", documented()[0]], cwd=tmp_path, check=True)
    write_project(tmp_path / "project", tiny_model_folder).joinpath("recipe").rename(tmp_path / "mine" / "recipe")
    return tmp_path


def from_here(then=None):
    """As `python -m` does: modules of the working folder can be imported."""
    sys.path.insert(0, "")
    if then is not None:
        then()


def run(folder: Path, *arguments: str, then=None):
    assert "loss=margin_dpo" in documented()[1]
    return command(
        *documented()[1], *SHORT, *arguments, cwd=folder, cache=folder / "cache", patch=partial(from_here, then)
    )


def numbers(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_documented_example_is_ten_lines_long():
    code = documented()[0].split("PYTHON'\n")[1].split("\nPYTHON")[0]
    own = [line for line in code.split("@dataclass")[1].splitlines() if line.strip()]
    assert len(own) == 10


@pytest.mark.slow
def test_the_documented_example_runs_and_resumes(folder):
    ended = run(folder)
    assert ended.code == 0, ended.err
    [whole] = (folder / "outputs" / "tiny").iterdir()
    stage = json.loads((whole / "summary.json").read_text())["stages"]["preference"]
    assert (stage["loss"], stage["settings"]) == ("margin_dpo", {"beta": 0.1, "margin": 0.5})
    assert "loss:\n  beta: 0.1\n  margin: 0.5\n" in (whole / "config.yaml").read_text()
    assert "margin_dpo (beta 0.1, margin 0.5)" in (whole / "report.md").read_text()
    killed = run(folder, "hydra.run.dir=killed", then=partial(at_row, "preference", 3))
    assert killed.code < 0
    ended = run(folder, "resume=killed")
    assert ended.code == 0, ended.err
    assert numbers(folder / "killed") == numbers(whole)
    wrong = run(folder, "loss.bata=1", "hydra.run.dir=wrong")
    [line] = wrong.err.splitlines()
    assert wrong.code == 1 and "beta, margin" in line and not (folder / "wrong").exists()


@pytest.mark.matrix
def test_it_is_swept_over_and_mixed(folder):
    ended = run(folder, "-m", "loss.margin=0.0,2.0")
    assert ended.code == 0, ended.err
    first, second = (numbers(next(folder.glob(f"outputs/sweeps/*/{number}-tiny")))[0] for number in range(2))
    assert first < 1 < second
    mixed = ("loss=mixture", "loss.weights={margin_dpo: 2, dpo: 1}", "loss.settings.margin_dpo.margin=0")
    ended = run(folder, *mixed, "hydra.run.dir=mixed")
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (folder / "mixed" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["margin_dpo/loss"] == pytest.approx(row["dpo/loss"]) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["loss.bata=1"], ["bata", "beta, margin"]),
        (["loss.margin=wide"], ["wide", "loss.margin"]),
        (["loss.beta=0"], ["loss.beta must be"]),
        (["-m", "loss.beta=0.1,0"], ["loss.beta must be"]),
    ],
    ids=lambda value: value[-1],
)
def test_its_settings_are_checked_like_those_of_every_loss(arguments, said, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    with pytest.raises(UserError) as caught:
        check_arguments([*documented()[1], *SHORT, *arguments])
    assert all(part in str(caught.value) for part in said), caught.value
    assert not (folder / "outputs").exists()


MODULE = """
from dataclasses import dataclass
from alignment.losses import DPO, Loss
from alignment.losses.base import BetaPairLoss

class NoLoss: ...

class Undecorated(BetaPairLoss):
    margin: float

@dataclass(kw_only=True)
class Impostor(DPO): ...

@dataclass(kw_only=True)
class Nameless(BetaPairLoss): ...

@dataclass(kw_only=True)
class Unfinished(BetaPairLoss):
    name, needs_reference = "unfinished", True

@dataclass(kw_only=True)
class Odd(BetaPairLoss):
    name, needs_reference = "odd", True
    shape: object | Loss
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("_target_: absent_module.Mine\nbeta: 1", ["mine.yaml", "absent_module.Mine", "cannot be imported"]),
        ("_target_: some_losses.Absent\nbeta: 1", ["mine.yaml", "some_losses.Absent", "cannot be imported"]),
        ("_target_: Mine\nbeta: 1", ["mine.yaml", "Mine", "module.Class"]),
        ("_target_: broken_losses.Mine\nbeta: 1", ["mine.yaml", "SyntaxError"]),
        ("_target_: some_losses.NoLoss\nbeta: 1", ["mine.yaml", "some_losses.NoLoss", "alignment.losses.Loss"]),
        ("_target_: some_losses.Undecorated\nbeta: 1\nmargin: 1", ["mine.yaml", "Undecorated", "dataclass"]),
        ("_target_: some_losses.Impostor\nbeta: 1", ["mine.yaml", "name", "shipped"]),
        ("_target_: some_losses.Nameless\nbeta: 1", ["mine.yaml", "name"]),
        ("_target_: some_losses.Unfinished\nbeta: 1", ["Unfinished", "abstract", "at_reference"]),
        ("_target_: some_losses.Unfinished\nbeta: high", ["high", "loss.beta"]),
        ("_target_: some_losses.Unfinished\nbata: 1", ["mine", "bata", "beta"]),
        ("_target_: some_losses.Unfinished\n", ["No value is given for: loss.beta"]),
        ("_target_: some_losses.Odd\nbeta: 1", ["mine.yaml", "shape"]),
    ],
)
def test_refusals(text, said, tmp_path, monkeypatch):
    (tmp_path / "some_losses.py").write_text(MODULE)
    (tmp_path / "broken_losses.py").write_text("class Mine(:")
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "mine.yaml").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_losses", raising=False)
    with pytest.raises(UserError) as caught:
        load("loss=mine", config_dir=tmp_path / "mine")
    assert all(part in str(caught.value) for part in said), caught.value
    assert "\n" not in str(caught.value)


def test_a_file_with_the_name_of_a_shipped_loss_is_refused(tmp_path):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "dpo.yaml").write_text("_target_: my_losses.MarginDPO\nbeta: 1\n")
    with pytest.raises(UserError, match=r"dpo\.yaml: a shipped configuration has this name"):
        load("loss=dpo", config_dir=tmp_path)
