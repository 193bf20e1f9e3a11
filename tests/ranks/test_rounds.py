"""Rounds in several ranks: the prompts, answers, pairs and steps of one process, and any number of ranks goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.errors import UserError
from alignment.onpolicy.rounds import read_round
from alignment.ranks.team import Team
from alignment.runs.record import RunRecord
from tests.helpers.ranks import in_ranks
from tests.helpers.rounds import HashJudge, Killed, Project, write_pairs
from tests.helpers.runs import metric_rows, weights

pytestmark = pytest.mark.slow

CASES: dict[str, tuple[str, ...]] = {
    "round": ("evaluation.kl_prompts=2", "trainer.max_steps=7"),
    "start": ("onpolicy.reference=start", "onpolicy.mix_offline=0.3", "trainer.max_steps=4"),
    "weak": (
        *("onpolicy.judge=none", "onpolicy.k=1", "onpolicy.pairs.choice=sample_vs_weak", "onpolicy.weak=OTHER"),
        "trainer.max_steps=4",
    ),
    "teacher": (
        *("loss=opd", "onpolicy=distill", "onpolicy.k=2", "onpolicy.max_new_tokens=5", "onpolicy.every=3"),
        *("distill.teacher=OTHER", "trainer.groups_per_step=6", "trainer.max_steps=4"),
    ),
    "likeliest": (
        *("loss=tropd", "onpolicy=distill", "onpolicy.k=2", "onpolicy.max_new_tokens=5", "onpolicy.every=3"),
        *("distill.teacher=OTHER", "trainer.groups_per_step=6", "trainer.max_steps=4", "optim.lr=1e-3"),
    ),
    "live": ("reference=live", "onpolicy.reference=start", "trainer.max_steps=4"),
    "shared": ("trainer.shard=node", "onpolicy.reference=start", "trainer.max_steps=4"),
    "shared teacher": (
        *("loss=opd", "onpolicy=distill", "onpolicy.k=2", "onpolicy.max_new_tokens=5", "onpolicy.every=3"),
        *("distill.teacher=OTHER", "trainer.groups_per_step=6", "trainer.shard=node", "trainer.max_steps=4"),
    ),
    "shared, its own judge": ("onpolicy.judge=implicit", "trainer.shard=node", "trainer.max_steps=4"),
    "parts": ("adapter=none", "trainer.shard=node", "optim.lr=1e-4", "trainer.max_steps=4"),
}
CORE = ("round", "start", "weak", "teacher")
CUT = 6
"""The training row at which a run is killed: in its second round."""


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_model_folder) -> tuple[Path, Path, Path]:
    """The model, another one with the same tokenizer, and the data."""
    folder = tmp_path_factory.mktemp("given")
    other = shutil.copytree(tiny_model_folder, folder / "other")
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other)).save_pretrained(other)
    return tiny_model_folder, other, write_pairs(folder)


class Runs:
    """Runs of some cases, in the ranks of a team or in this process."""

    def __init__(self, team: Team | None, folder: Path, given: tuple[Path, Path, Path], monkeypatch: Any) -> None:
        folder.mkdir(exist_ok=True)
        model, self._other, data = given
        self.project = Project(folder, model, data, monkeypatch, team)
        # tests/runs/test_plots.py looks at pictures
        monkeypatch.setattr(Figure, "savefig", lambda self, file, **settings: file.write(b""))

    def run(self, case: str) -> int:
        """The case in a folder of its name, with a cache of its own; how many answers the judge was asked about."""
        settings = [one.replace("OTHER", str(self._other)) for one in CASES[case]]
        if self.project.team is None:
            settings = [one for one in settings if not one.startswith("trainer.shard")]
        self.project.judge = None
        self.project.run(case, *settings, cache=f"cache of {case}")
        return self.project.judge.asked if self.project.judge is not None else 0


def run_all(team: Team, folder: Path, given: tuple[Path, Path, Path], cases: Sequence[str], resumed: str) -> None:
    """Each case in ranks. With `resumed`, one that one process has begun goes on, and two end before their time."""
    runs = Runs(team, folder, given, pytest.MonkeyPatch())
    (folder / "asked.json").write_text(json.dumps({case: runs.run(case) for case in cases}))
    if not resumed:
        return
    Runs(team, folder / resumed, given, pytest.MonkeyPatch()).run("round")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HashJudge, "score", exhausted)
        with pytest.raises(UserError) as said:
            Runs(team, folder / "refused", given, patch).run("round")
        (folder / "said").write_text(str(said.value))
    with pytest.MonkeyPatch.context() as patch:
        kill_in_a_round(patch)
        with pytest.raises(Killed):
            Runs(team, folder / "cut", given, patch).run("round")


def exhausted(self: HashJudge, items: Any) -> Any:
    raise UserError("evaluation.llm.max_calls=3 replies were paid for: raise it.")


def kill_in_a_round(monkeypatch: Any) -> None:
    log = RunRecord.log

    def logged(self: Any, stage: str, step: int, split: str, metrics: Any) -> None:
        if (step, split) == (CUT, "train"):
            raise Killed
        log(self, stage, step, split, metrics)

    monkeypatch.setattr(RunRecord, "log", logged)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def assert_same_rounds(found: Path, expected: Path) -> None:
    """The same prompts, answers, verdicts and groups, and all numbers but for the order of sums."""
    folders = [sorted((run / "stages" / "preference" / "rounds").iterdir()) for run in (found, expected)]
    assert [folder.name for folder in folders[0]] == [folder.name for folder in folders[1]] and len(folders[0]) > 1
    for own, other in zip(*folders, strict=True):
        for line, other_line in zip(lines(own), lines(other), strict=True):
            assert line.pop("scores", []) == pytest.approx(other_line.pop("scores", []), abs=1e-4)
            assert line == other_line
        made, alone = read_round(own), read_round(other)
        assert made is not None and alone is not None
        assert (made.position, made.rate) == (alone.position, alone.rate)
        assert made.metrics == pytest.approx(alone.metrics, rel=1e-3, abs=1e-4)
        for groups in ("groups", "sample"):
            keys = [[group.keys() for group in getattr(one, groups)] for one in (made, alone)]
            assert keys[0] == keys[1]
        assert made.logps.keys() == alone.logps.keys()
        for key, values in alone.logps.items():
            np.testing.assert_allclose(made.logps[key], values, atol=1e-4)
    assert weights(found).keys() == weights(expected).keys()
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=0, atol=2e-5, msg=name)
    rows = [metric_rows(run) for run in (found, expected)]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    for row, other_row in zip(*rows, strict=True):
        numbers = [{k: v for k, v in one.items() if k not in ("stage", "split")} for one in (row, other_row)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-4), row["step"]


@pytest.mark.parametrize("cases", [CORE, pytest.param(tuple(CASES)[len(CORE) :], marks=pytest.mark.matrix)])
def test_two_ranks_have_the_rounds_of_one(cases, given, tmp_path, monkeypatch):
    """DPO compared with the round or with the start, a weaker model, a teacher; judged once, and by rank 0 alone.

    A run that was killed in a round of one process goes on in two, and the other way round. Where the judge ends a run
    in its midst, rank 0 says why and all end.
    """
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    runs = Runs(None, alone, given, monkeypatch)
    asked = {case: runs.run(case) for case in cases}
    resumed = "resumed" if cases is CORE else ""
    if resumed:
        ranks.mkdir()
        with monkeypatch.context() as patch:
            kill_in_a_round(patch)
            with pytest.raises(Killed):
                Runs(None, ranks / resumed, given, patch).run("round")
    code = in_ranks(2, tmp_path / "output", run_all, ranks, given, cases, resumed)
    assert code == [0, 0], (tmp_path / "output" / "stderr0").read_text()
    assert json.loads((ranks / "asked.json").read_text()) == asked
    for case in cases:
        assert_same_rounds(ranks / case, alone / case)
        found, expected = (json.loads((at / case / "summary.json").read_text())["reference"] for at in (ranks, alone))
        assert [found.get(name) for name in ("hits", "misses")] == [expected.get(name) for name in ("hits", "misses")]
    if resumed:
        Runs(None, ranks / "cut", given, monkeypatch).run("round")
        for name in (resumed, "cut"):
            assert_same_rounds(ranks / name / "round", alone / "round")
        assert "onpolicy.llm.max_calls=3 replies were paid for" in (ranks / "said").read_text()
        assert not list((ranks / "refused").glob("round/stages/preference/rounds/*/round.json"))
