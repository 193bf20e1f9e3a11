"""Held-out answers while the preference stage trains: what a row has, that nothing else changes, and resuming."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from alignment.config.compose import load
from alignment.errors import UserError
from alignment.evaluation.judges.base import Judge, Preference
from alignment.evaluation.sampling.local import LocalEngine
from alignment.runs.record import RunRecord
from alignment.runs.tracking import Tracker
from alignment.stages import judging
from alignment.training.trainer import PreferenceTrainer
from tests.helpers.rounds import HashJudge, Killed, Project, write_pairs
from tests.helpers.runs import assert_same, metric_rows, weights

pytestmark = pytest.mark.slow

LOOKS = ("evaluation.every=3", "evaluation.judge=rules", "evaluation.prompts=4", "evaluation.every_prompts=3")
FIXED = ("trainer.plan=off", "trainer.tokens_per_batch=400", "trainer.checkpoint_every=0", "trainer.eval_every=4")
OFFLINE = ("onpolicy=none", *FIXED, *LOOKS)


class RandomJudge(HashJudge):
    """Draws random numbers while it judges, as a judge that is a model may when it is loaded."""

    def score(self, items):
        torch.rand(3)
        return super().score(items)


class ComparingJudge(Judge):
    """Prefers the text that comes first in the alphabet."""

    kind = "comparing"
    pointwise = False

    def description(self):
        return {"version": 1}

    def compare(self, items):
        shares = [
            0.5 + ((item.answers[0] < item.answers[1]) - (item.answers[0] > item.answers[1])) / 2 for item in items
        ]
        return [Preference((share, share)) for share in shares]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data"))


class Looked(Project):
    """Runs whose held-out answers are judged: `held_out_judge` is that of the last one."""

    def __init__(self, folder, model, data, monkeypatch, judge=RandomJudge):
        super().__init__(folder, model, data, monkeypatch)

        def make(config, cache, device):
            self.held_out_judge = judge(cache) if judge is RandomJudge else judge()
            return None if config.judge.name == "none" else self.held_out_judge

        monkeypatch.setattr(judging, "make_judge", make)


@pytest.fixture
def project(tmp_path, tiny_model_folder, data, monkeypatch):
    return Looked(tmp_path, tiny_model_folder, data, monkeypatch)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, tiny_model_folder, data):
    """The folder of a run with looks after every three of its eight steps."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("uncut")
        Looked(folder, tiny_model_folder, data, patch).run("run", *OFFLINE)
        return folder / "run"


def rows_of(folder: Path) -> dict[int, dict[str, float]]:
    """What the rows of the looks say of the answers, by step."""
    found = {
        row["step"]: {
            name.removeprefix("answers/"): value for name, value in row.items() if name.startswith("answers/")
        }
        for row in metric_rows(folder)
        if row["split"] == "eval"
    }
    return {step: row for step, row in found.items() if row}


def look_of(folder: Path, step: int) -> dict:
    return json.loads((folder / "stages" / "preference" / "answers" / f"{step:06d}.json").read_text())["content"]


def test_a_row_says_what_its_answers_are_worth(uncut):
    """At the start, after every three steps and at the end; each number from the answers that are kept."""
    rows = rows_of(uncut)
    assert list(rows) == [0, 3, 6, 8]
    others = [row for row in metric_rows(uncut) if row["split"] == "eval"]
    assert [row["step"] for row in others] == [0, 3, 4, 6, 8] and all("nats/margins" in row for row in others)
    start = look_of(uncut, 0)["answers"]
    for step, row in rows.items():
        answers = look_of(uncut, step)["answers"]
        scores = [answer["verdict"]["score"] for answer in answers]
        before = [answer["verdict"]["score"] for answer in start]
        won = [0.5 + ((a > b) - (a < b)) / 2 for a, b in zip(scores, before, strict=True)]
        assert len(answers) == 3
        assert row == pytest.approx(
            {
                "score": np.mean(scores),
                "win_rate": np.mean(won),
                "length": np.mean([answer["tokens"] for answer in answers]),
                "cut_share": np.mean([answer["is_cut"] for answer in answers]),
            }
        )
        assert all(answer["tokens"] == 6 for answer in answers if answer["is_cut"])
    assert rows[0]["win_rate"] == 0.5
    texts = [[answer["answer"] for answer in look_of(uncut, step)["answers"]] for step in rows]
    assert len({json.dumps(one) for one in texts}) > 2, "the policy moves, and so do its answers"
    told = json.loads((uncut / "summary.json").read_text())["stages"]["preference"]["answers"]
    assert [look["step"] for look in told] == [0, 3, 6, 8]
    for look in told:
        assert look["win_rate"]["rate"] == rows[look["step"]]["win_rate"]
        assert look["win_rate"]["low"] <= look["win_rate"]["rate"] <= look["win_rate"]["high"]
        assert look["score"] == rows[look["step"]]["score"]


def test_first_and_last_look_are_what_the_table_is_made_of(uncut):
    """The same prompts, random numbers and verdicts as before and after the training."""
    samples = {row["prompt"]: row for row in map(json.loads, (uncut / "samples.jsonl").read_text().splitlines())}
    for step, moment in ((0, "start"), (8, "final")):
        for answer in look_of(uncut, step)["answers"]:
            told = samples[answer["prompt"]]
            assert (told[moment], told["verdicts"][moment]) == (answer["answer"], answer["verdict"])


def test_the_last_look_at_all_prompts_is_the_final_table(project, monkeypatch):
    """Drawn answers, too: they have the same random numbers at every moment. A tracker gets rows and answers."""
    tables, sent = {}, []
    monkeypatch.setattr(Tracker, "table", lambda self, name, columns, rows: tables.update({name: rows}))
    monkeypatch.setattr(Tracker, "log", lambda self, stage, step, split, metrics, margins=None: sent.append(metrics))
    settings = ("evaluation.every_prompts=9", "evaluation.temperature=1.0", "evaluation.every=99")
    found = project.run("run", *OFFLINE, *settings)["evaluation"]
    answers = {step: look_of(project.folder / "run", step)["answers"] for step in (0, 8)}
    looked = [(step, one["prompt"], one["answer"]) for step, several in answers.items() for one in several]
    assert [row[:3] for row in tables["answers/samples"]] == looked
    assert sum("answers/win_rate" in row for row in sent) == 2
    rows = rows_of(project.folder / "run")
    assert list(rows) == [0, 8]
    for step, moment in ((0, "start"), (8, "final")):
        assert rows[step]["score"] == found["answers"][moment]["judge_score"]
    assert rows[8]["win_rate"] == found["win_rate"]["final_vs_start"]["rate"]


def watched(project: Project, monkeypatch, name: str, *settings: str, cache: str = "cache") -> list:
    """Runs; what each step begins with: random numbers of torch, numpy and Python, and the model's mode."""
    seen, step = [], PreferenceTrainer.training_step

    def patched(self, model, inputs, num_items_in_batch=None):
        modes = {(name, module.training) for name, module in model.named_modules()}
        seen.append((torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate(), modes))
        return step(self, model, inputs, num_items_in_batch)

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "training_step", patched)
        project.run(name, *settings, cache=cache)
    return seen


@pytest.mark.parametrize("kind", ["offline", "rounds"])
def test_the_training_is_the_same_without_looks(kind, project, monkeypatch):
    """To the bit: random numbers, the model's mode, optimizer, rows and what rounds draw."""
    settings = OFFLINE if kind == "offline" else (*FIXED, *LOOKS)
    looked = watched(project, monkeypatch, "looked", *settings, "evaluation.every=1")
    plain = watched(project, monkeypatch, "plain", *settings, "evaluation.every=null", cache="another")
    assert looked == plain and len(plain) == 8
    both = [project.folder / name for name in ("looked", "plain")]
    trained, expected = map(weights, both)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    for rows in ("train", "eval"):
        found, wanted = (
            {
                row["step"]: {key: value for key, value in row.items() if not key.startswith("answers/")}
                for row in metric_rows(folder)
                if row["split"] == rows
            }
            for folder in both
        )
        assert {step: found[step] for step in wanted} == wanted
    names = ["held_out.jsonl", "samples.jsonl"]
    names += [f"stages/preference/rounds/{n:04d}/answers.jsonl" for n in (1, 2, 3)] if kind == "rounds" else []
    for name in names:
        assert (both[0] / name).read_bytes() == (both[1] / name).read_bytes()


def test_a_second_run_draws_and_asks_nothing(project, caplog):
    project.run("first", *OFFLINE)
    assert project.held_out_judge.asked > 0
    caplog.clear()
    with caplog.at_level("INFO"):
        project.run("second", *OFFLINE)
    assert project.held_out_judge.asked == 0
    lines = [message for message in caplog.messages if "were drawn" in message]
    assert len(lines) == 6 and all(line.startswith("0 answers of 0 tokens were drawn") for line in lines), lines
    assert_same(project.folder / "second", project.folder / "first")


def at_call(number: int, owner, name: str):
    """Kills at the n-th call of a method."""
    calls, method = 0, getattr(owner, name)

    def patched(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            raise Killed
        return method(*args, **kwargs)

    return owner, name, patched


@pytest.mark.parametrize("moment", ["drawn", "judged", "later"])
def test_a_run_that_is_killed_at_a_look_goes_on_as_if_not(moment, project, monkeypatch, uncut):
    """While it draws or judges, and later, when it goes on from a checkpoint behind a look."""
    chain = project.chain("run", *OFFLINE)
    kills = {
        "drawn": (3, LocalEngine, "draw"),
        "judged": (5, HashJudge, "score"),
        "later": (11, RunRecord, "log"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*at_call(*kills[moment]))
        with pytest.raises(Killed):
            chain.run()
    project.run("run", *OFFLINE)
    assert_same(project.folder / "run", uncut)


def test_a_judge_that_compares_gives_win_rates_alone(tmp_path, tiny_model_folder, data, monkeypatch):
    project = Looked(tmp_path, tiny_model_folder, data, monkeypatch, judge=ComparingJudge)
    project.run("run", *OFFLINE)
    rows = rows_of(tmp_path / "run")
    assert (
        all(row.keys() == {"win_rate", "length", "cut_share"} for row in rows.values()) and rows[0]["win_rate"] == 0.5
    )
    answers = [look_of(tmp_path / "run", step)["answers"] for step in (0, 8)]
    expected = [(a["answer"] < b["answer"]) - (a["answer"] > b["answer"]) for b, a in zip(*answers, strict=True)]
    assert [answer["outcome"] for answer in answers[1]] == expected


def test_without_a_judge_answers_are_measured(project):
    project.run("run", *OFFLINE, "evaluation.judge=none")
    assert all(row.keys() == {"length", "cut_share"} for row in rows_of(project.folder / "run").values())


def test_members_of_a_sweep_may_be_stopped_by_their_answers(project):
    """The value of a rung is that of the look that it asks for."""
    project.run("run", *OFFLINE, "evaluation.every=99", "stopping=asha", "stopping.metric=answers/score")
    rows = rows_of(project.folder / "run")
    assert list(rows) == [0, 2, 4, 8]
    rungs = json.loads((project.folder / "run" / "stages" / "preference" / "rungs.json").read_text())
    assert {rung["step"]: rung["value"] for rung in rungs.values()} == {step: rows[step]["score"] for step in (2, 4)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["evaluation.every=0"], r"^evaluation\.every must be null or at least 1, not 0\.$"),
        (["evaluation.every=2", "evaluation.every_prompts=0"], r"^evaluation\.every_prompts must be at least 1, not 0"),
        (["evaluation.every=2", "loss=none"], r"^evaluation\.every=2 is of preference stages, and with"),
        (
            ["evaluation.every=2", "evaluation.prompts=0"],
            r"^evaluation\.every=2 asks held-out prompts, and evaluation\.",
        ),
        (
            ["evaluation.every=2", "loss=bradley_terry", "evaluation.prompts=0", "evaluation.kl_prompts=0"],
            r"^evaluation\.every=2 asks for answers, and loss bradley_terry trains a reward model, .*every=null\.$",
        ),
        (
            ["stopping=asha", "stopping.metric=answers/score"],
            r"^stopping\.metric=answers/score is of answers that are ju",
        ),
    ],
)
def test_looks_at_nothing_are_refused_when_they_are_composed(settings, said):
    with pytest.raises(UserError, match=said):
        load("recipe=quickstart", *settings)


def test_looks_need_held_out_prompts(project):
    """Which is known before the model is loaded."""
    with pytest.raises(UserError, match=r"^evaluation\.every=3 asks held-out prompts, but none are held out: set data"):
        project.chain("run", *OFFLINE, "data.eval_size=0")
    assert not (project.folder / "run" / "metrics.jsonl").exists()
