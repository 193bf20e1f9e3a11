"""What the notebooks call: runs by the settings that tell them apart, done once, and their table."""

import json
from pathlib import Path

import pytest

from alignment.course import lab
from alignment.errors import UserError
from alignment.runs.folder import RunFiles

PREFERENCE = {
    "eval/nats/accuracies": 0.5,
    "eval/nats/margins": 1.5,
    "eval/rewards/margins": 0.15,
    "eval/ranking/accuracies": 0.75,
}


def row(step: int, logps: float) -> dict:
    return {"stage": "preference", "split": "eval", "step": step, "logps/chosen": logps}


def test_the_table_has_what_was_measured_and_an_interval():
    summary = {
        "stages": {"preference": {"metrics": PREFERENCE}},
        "data": {"preference": {"eval": 4}},
        "evaluation": {"answers": {"final": {"words": 6.5, "judge_score": 0.4}}},
    }
    [found] = lab.table({"loss=dpo": RunFiles(Path("there"), summary=summary, metrics=[row(0, -9.0), row(8, -11.5)])})
    # Wilson's interval of 2 in 4: the half width is z / (1 + z^2 / 4) * sqrt(1/16 + z^2 / 64) with z = 1.96.
    assert found == {
        "run": "loss=dpo",
        "pairs": 4,
        "reward accuracy": 0.5,
        "from": pytest.approx(0.15004, abs=1e-5),
        "to": pytest.approx(0.84996, abs=1e-5),
        "ranking accuracy": 0.75,
        "margin (nats)": 1.5,
        "margin (own units)": 0.15,
        "change of chosen (nats)": -2.5,
        "words per answer": 6.5,
        "judge score": 0.4,
    }


def test_a_run_that_says_nothing_has_an_empty_row():
    [found] = lab.table({"lost": RunFiles(Path("there"))})
    assert {value for key, value in found.items() if key not in ("run", "pairs")} == {None}


@pytest.mark.parametrize(("value", "fast"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_fast_is_asked_for(monkeypatch, value, fast):
    monkeypatch.delenv("ALIGNMENT_FAST", raising=False)
    if value is not None:
        monkeypatch.setenv("ALIGNMENT_FAST", value)
    assert lab.is_fast() is fast


def test_runs_are_named_in_order_and_done_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALIGNMENT_FAST", raising=False)
    called = []

    def command(module: str, *arguments: str) -> None:
        called.append((module, *arguments))
        folder = Path(arguments[-1].removeprefix("hydra.sweep.dir="))
        for number in range(4):
            (folder / f"{number}-quickstart").mkdir(parents=True, exist_ok=True)
            (folder / f"{number}-quickstart" / "summary.json").write_text(json.dumps({"number": number}))

    monkeypatch.setattr(lab, "_command", command)
    runs = lab.train("quickstart", "loss.beta=0.1,0.5", "seed=0,1", "optim.lr=1e-3")
    assert {name: run.summary["number"] for name, run in runs.items()} == {
        "loss.beta=0.1, seed=0": 0,
        "loss.beta=0.1, seed=1": 1,
        "loss.beta=0.5, seed=0": 2,
        "loss.beta=0.5, seed=1": 3,
    }
    given = ("alignment.run", "-m", "recipe=quickstart", "tracking=none", "loss.beta=0.1,0.5", "seed=0,1")
    assert called[0][:-1] == (*given, "optim.lr=1e-3")
    assert lab.train("quickstart", "loss.beta=0.1,0.5", "seed=0,1", "optim.lr=1e-3").keys() == runs.keys()
    assert len(called) == 1, "nothing is done twice"
    lab.train("quickstart", "loss.beta=0.1,0.5", "seed=0,1", "optim.lr=1e-2")
    assert called[1][-1] != called[0][-1], "other settings are other runs"
    next(Path(called[0][-1].removeprefix("hydra.sweep.dir=")).glob("2-*/summary.json")).unlink()
    lab.train("quickstart", "loss.beta=0.1,0.5", "seed=0,1", "optim.lr=1e-3")
    assert called[2] == called[0], "what is not finished is run again"


@pytest.mark.slow
def test_a_command_that_fails_says_why(capsys):
    with pytest.raises(UserError, match="status 1: Error: There is no loss 'dppo'"):
        lab._command("alignment.losses", "show", "dppo")
    assert capsys.readouterr().out == "python -m alignment.losses show dppo\n"
