"""Rounds in which the policy judges its own answers by how much likelier it makes them than it did at the start."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from alignment.errors import UserError
from alignment.evaluation.judges.implicit import ImplicitJudge
from alignment.onpolicy.rounds import read_round
from alignment.stages.rounds import Rounds
from tests.helpers.rounds import Killed, Project, write_pairs
from tests.helpers.runs import assert_same, metric_rows
from tests.helpers.steps import sequence_logp

pytestmark = pytest.mark.slow

OWN = ("onpolicy.judge=implicit",)


@pytest.fixture
def project(tmp_path, tiny_model_folder, monkeypatch):
    return Project(tmp_path, tiny_model_folder, write_pairs(tmp_path), monkeypatch)


def rounds_of(folder):
    return [read_round(one) for one in sorted((folder / "stages" / "preference" / "rounds").iterdir())]


@pytest.fixture
def policies(project, monkeypatch):
    """Loads the policy with which a round of the last run began, by the round's number from 0 on."""
    take, seen = Rounds._take, []

    def seeing(self, number, model, *judge):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        take(self, number, model, *judge)

    monkeypatch.setattr(Rounds, "_take", seeing)

    def load(number: int):
        policy = project.chain("loaded", *OWN)._load_policy().eval()
        policy.load_state_dict(seen[number], strict=False)
        return policy

    return load


@torch.no_grad()
def ratios(policy, start, group) -> list[torch.Tensor]:
    """(tokens,) float64 log-ratios of each completion, from full logits."""
    return [
        sequence_logp(policy, group.prompt, tokens).double() - sequence_logp(start, group.prompt, tokens).double()
        for tokens in group.completions
    ]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_policy_scores_its_answers_by_its_way_from_the_start(reduction, project, policies):
    """The first round is the data's own pairs, and draws nothing. The later ones have the scores that full logits give,
    less the length's cost: of all answers, whose best and worst make the pairs. A part of these rounds is of the data,
    too, and goes on where the first has ended."""
    settings = (*OWN, f"onpolicy.implicit.reduction={reduction}", "onpolicy.mix_offline=0.5")
    project.run("run", *settings)
    first, *later = rounds_of(project.folder / "run")
    assert len(first.groups) == 6 and not first.logps and not first.sample
    assert all(group.scores is None for group in first.groups)
    assert "onpolicy/length_penalty" not in first.metrics and first.metrics["onpolicy/prompts"] == 0
    start = policies(0)
    for number, made in enumerate(later, 1):
        policy, penalty = policies(number), made.metrics["onpolicy/length_penalty"]
        judged = [group for group in made.groups if group.scores is not None]
        assert len(judged) == len(made.groups) // 2
        for group in judged:
            expected = [
                (values.mean() if reduction == "mean" else values.sum()).item() - penalty * len(values)
                for values in ratios(policy, start, group)
            ]
            np.testing.assert_allclose(group.scores, expected, atol=2e-5)
            assert group.scores[0] > group.scores[1]
        file = project.folder / "run" / "stages" / "preference" / "rounds" / f"{1 + number:04d}" / "answers.jsonl"
        lines = {line["source"]: line["scores"] for line in map(json.loads, file.read_text().splitlines())}
        for group in judged:
            assert group.scores == (max(lines[group.source]), min(lines[group.source]))
    offline = [group.source for made in (first, *later) for group in made.groups if group.scores is None]
    assert len(offline) == 11 and len(set(offline)) == 11
    rows = {row["step"]: row for row in metric_rows(project.folder / "run") if row["split"] == "train"}
    assert "onpolicy/kl_round" not in rows[3] and "onpolicy/kl_round" in rows[6]
    assert rows[4]["onpolicy/kl_start"] != 0


def test_a_given_cost_of_length(project, policies):
    """Where a round takes more pairs than the data have, they come again."""
    fixed = ("onpolicy.implicit.length_penalty=0.5", "onpolicy.every=9", "trainer.max_steps=10")
    project.run("run", *OWN, *fixed)
    start, policy = policies(0), policies(1)
    first, made = rounds_of(project.folder / "run")
    assert len(first.groups) == 18 and len({group.source for group in first.groups}) == 16
    assert made.metrics["onpolicy/length_penalty"] == 0.5
    for group in made.groups:
        expected = [values.sum().item() - 0.5 * len(values) for values in ratios(policy, start, group)]
        np.testing.assert_allclose(group.scores, expected, atol=2e-5)


def test_killed_while_it_judges_and_again_from_the_start(project, monkeypatch):
    """A run that is killed while its second round is judged ends, to the bit, as one that is not. A second run of the
    same draws no token and scores no answer."""
    project.run("run", *OWN)
    asked = ImplicitJudge._asked
    calls = []

    def counted(self, items):
        calls.append(len(items))
        yield from asked(self, items)

    def killed(self, items):
        yield next(asked(self, items))
        raise Killed

    monkeypatch.setattr(ImplicitJudge, "_asked", counted)
    project.run("second", *OWN)
    assert not calls
    assert_same(project.folder / "second", project.folder / "run")

    chain = project.chain("cut", *OWN, cache="another")
    with monkeypatch.context() as patch:
        patch.setattr(ImplicitJudge, "_asked", killed)
        with pytest.raises(Killed):
            chain.run()
    project.run("cut", *OWN, cache="another")
    assert calls and assert_same(project.folder / "cut", project.folder / "run") is None
    for found, expected in zip(rounds_of(project.folder / "cut"), rounds_of(project.folder / "run"), strict=True):
        assert found.metrics == expected.metrics
        assert [group.keys() for group in found.groups] == [group.keys() for group in expected.groups]
        assert [group.scores for group in found.groups] == [group.scores for group in expected.groups]


def test_a_whole_model_is_its_own_judge_beside_its_start(project):
    """And of a loss of rows both answers of a pair are taken, where there are more than enough."""
    whole = ("adapter=none", "reference=live", "onpolicy.reference=start", "optim.lr=1e-3", "loss=kto")
    project.run("run", *OWN, *whole, "trainer.max_steps=6")
    _, later = rounds_of(project.folder / "run")
    assert later.metrics["onpolicy/kept"] > 3
    assert sorted(group.labels for group in later.groups) == [(False,)] * 3 + [(True,)] * 3


def test_what_cannot_be_is_refused(project):
    cases = {
        "onpolicy.every=null": "it draws before it moves: set onpolicy.every",
        "adapter=none": "set reference=live, reference.for_metrics=true and onpolicy.reference=start",
        "onpolicy.implicit.length_penalty=-1": "length_penalty must be null or a finite number, at least 0, not -1",
        "evaluation.judge=implicit": "evaluation.judge=implicit is of rounds alone",
    }
    for settings, words in cases.items():
        with pytest.raises(UserError, match=re.escape(words)):
            project.chain("run", *OWN, *settings.split())
    with pytest.raises(UserError, match=r"in this training of 3 steps there is none: set a smaller onpolicy\.every"):
        project.run("run", *OWN, "trainer.max_steps=3")
