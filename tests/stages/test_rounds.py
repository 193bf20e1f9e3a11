"""Rounds of a preference stage: what they train on, what they are compared with, and that a kill changes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from alignment.errors import UserError
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.store import AnswerStore
from alignment.onpolicy import rounds as rounds_module
from alignment.onpolicy.rounds import read_round
from alignment.reference.cached import CachedReference
from alignment.runs.record import RunRecord
from alignment.stages import chain as stage_chain
from tests.helpers.rounds import Killed, Project, write_pairs
from tests.helpers.runs import assert_same, metric_rows, weights
from tests.helpers.steps import sequence_logp

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture
def project(tmp_path, tiny_model_folder, data, monkeypatch):
    return Project(tmp_path, tiny_model_folder, data, monkeypatch)


def rounds_of(folder: Path):
    folders = sorted((folder / "stages" / "preference" / "rounds").iterdir())
    return [read_round(folder) for folder in folders]


def start_of(project: Project, *settings: str):
    """The policy that a run starts with, loaded once more, as trained: a model without our scoring would do too."""
    chain = project.chain("start", *settings)
    return chain._load_policy()


# By hand


def by_hand(policy: nn.Module, rounds, every: int, rates, reference: str = "round"):
    """DPO in rounds from full logits: one schedule of the rate over all of them, a reference for each round.

    Asserts on the way that the answers' log-probs are those of the policy that begins the round.
    """

    def summed(group, of):
        return [sequence_logp(of, group.prompt, tokens) for tokens in group.completions]

    policy.eval()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [group for made in rounds for group in made.groups]
    with torch.no_grad():
        compared = [[logps.sum() for logps in summed(group, policy)] for group in groups]
    for step, rate in enumerate(rates):
        number, place = divmod(step, every)
        if place == 0:
            begun = rounds[number].groups
            with torch.no_grad():
                logps = [summed(group, policy) for group in begun]
            for key, value in zip([k for g in begun for k in g.keys()], [v for own in logps for v in own], strict=True):  # noqa: SIM118
                np.testing.assert_allclose(rounds[number].logps[key], value.numpy(), atol=1e-4)
            if reference == "round":
                first = 2 * step
                compared[first : first + len(begun)] = [[value.sum() for value in own] for own in logps]
        losses = []
        for group, others in list(zip(groups, compared, strict=True))[2 * step : 2 * step + 2]:
            a, b = (own.sum() - other for own, other in zip(summed(group, policy), others, strict=True))
            losses.append(-nn.functional.logsigmoid(0.1 * (a - b)))
        gradients = torch.autograd.grad(torch.stack(losses).mean(), trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= rate * gradient
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def test_rounds_are_what_one_does_by_hand(project):
    """At a temperature below 1, where the log-probs that count are still the policy's own.

    Plain gradient descent: Adam makes steps of one size of what is rounding alone.
    """
    settings = ("onpolicy.temperature=0.7", "loss.beta=0.1", "optim.name=sgd", "optim.lr=10", "optim.schedule=linear")
    settings += ("optim.warmup_ratio=0", "optim.max_grad_norm=0")
    project.run("run", *settings)
    rounds = rounds_of(project.folder / "run")
    assert [len(made.groups) for made in rounds] == [6, 6, 4]
    rates = [10 * (1 - step / 8) for step in range(8)]
    trained = by_hand(start_of(project, *settings), rounds, 3, rates)
    found = weights(project.folder / "run")
    for name, tensor in found.items():
        expected = trained[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(tensor, expected.detach(), atol=2e-4, rtol=1e-3, msg=name)


# What it costs


def test_a_round_asks_its_reference_for_nothing_and_a_second_run_draws_and_judges_nothing(project, caplog):
    """But for the held-out pairs, which are scored once: rounds leave them as they are at the start."""
    caplog.set_level("INFO")
    found = project.run("first")
    assert found["reference"]["misses"] == 8
    assert len(found["reference"]["refreshes"]) == 2
    assert found["stages"]["preference"]["start"]["max_token_difference"] < 1e-5
    assert project.judge.asked > 0
    caplog.clear()
    project.run("second")
    assert project.judge.asked == 0
    lines = [message for message in caplog.messages if "were drawn" in message]
    assert len(lines) == 5 and all(line.startswith("0 answers of 0 tokens were drawn") for line in lines), lines
    assert_same(project.folder / "second", project.folder / "first")


def test_a_spot_check_finds_log_probs_of_another_distribution(project, monkeypatch, caplog):
    """Those after the temperature, planted: the reference computes its own, and says so."""
    draw = LocalEngine.draw

    def tempered(self, wanted, how):
        found = draw(self, wanted, how)
        return [[type(one)(one.tokens, one.logps / 0.7, one.finish) for one in own] for own in found]

    monkeypatch.setattr(LocalEngine, "draw", tempered)
    project.run("run", "reference.spot_checks=4")
    assert any("differ from fresh ones" in message for message in caplog.messages)
    rounds = rounds_of(project.folder / "run")
    assert metric_rows(project.folder / "run")[1]["loss"] == pytest.approx(np.log(2), abs=1e-5), len(rounds)


# Killed and resumed


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


KILLS = {
    "while the first round is drawn": lambda: at_call(3, LocalEngine, "draw"),
    "while a later round is drawn": lambda: at_call(5, LocalEngine, "draw"),
    "while a round is written": lambda: at_call(2, rounds_module, "write_sealed"),
    "while the reference follows": lambda: at_call(1, CachedReference, "refresh"),
    "in a round": lambda: at_call(6, RunRecord, "log"),
    "in the last round": lambda: at_call(9, RunRecord, "log"),
}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, tiny_model_folder, data):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("uncut")
        Project(folder, tiny_model_folder, data, patch).run("run")
        return folder / "run"


@pytest.mark.parametrize("moment", [*KILLS, "while a round is judged"])
def test_a_run_that_is_killed_ends_as_one_that_is_not(moment, project, monkeypatch, uncut):
    """To the bit, with the cache of its own that it has filled so far."""
    chain = project.chain("run")
    with monkeypatch.context() as patch:
        if moment in KILLS:
            patch.setattr(*KILLS[moment]())
        else:
            project.judge.killed_at = 30
        with pytest.raises(Killed):
            chain.run()
    project.run("run")
    assert_same(project.folder / "run", uncut)
    for found, expected in zip(rounds_of(project.folder / "run"), rounds_of(uncut), strict=True):
        assert found.metrics == expected.metrics and found.position == expected.position
        assert [group.keys() for group in found.groups] == [group.keys() for group in expected.groups]
        assert all(np.array_equal(found.logps[key], values) for key, values in expected.logps.items())


# Once, and never


def test_one_draw_is_training_on_the_file_of_what_was_drawn(project, monkeypatch):
    """To the bit, with the log-probs of the reference in the store, where the sampler has put them."""
    fixed = ("trainer.plan=off", "trainer.tokens_per_batch=400", "trainer.checkpoint_every=0", "trainer.max_steps=20")
    project.run("once", *fixed, "onpolicy.every=null")
    [made] = rounds_of(project.folder / "once")
    assert 2 <= len(made.groups) < 40, "so the steps go through them more than once"
    fit = stage_chain.fit_preferences

    def drawn(*arguments):
        data, bad = fit(*arguments)
        data.train = list(made.groups)
        return data, bad

    monkeypatch.setattr(stage_chain, "fit_preferences", drawn)
    project.run("offline", *fixed, "onpolicy=none")
    found, expected = weights(project.folder / "once"), weights(project.folder / "offline")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# What is refused


def test_rounds_in_which_all_answers_tie_are_refused_with_the_numbers(project, monkeypatch):
    chain = project.chain("run")
    monkeypatch.setattr(type(project.judge), "_replies", lambda self, items: ((i, 1) for i in range(len(items))))
    with pytest.raises(UserError, match=r"Round 1 has 0 pairs .* of the 16 of 16 prompts with 3 answers each .*\btie"):
        chain.run()


def test_what_cannot_be_is_refused(project):
    cases = {
        "loss=kto onpolicy.pairs.choice=list": "makes lists, and loss kto takes rows",
        "loss=dpo onpolicy.pairs.choice=kto onpolicy.pairs.threshold=1": "makes rows, and loss dpo takes pairs",
        "reference.sync_every=2": "move the reference, and so do rounds",
        "reference=live": "set onpolicy.reference=start",
        "loss=tdpo1": "set onpolicy.reference=start",
        "adapter=none onpolicy.reference=start": "needs a second model",
        "loss=bradley_terry evaluation.prompts=0": "trains a reward model",
        "onpolicy.temperature=0": "draws the same answer 3 times",
        "onpolicy.judge=none": "needs scores: choose a judge",
    }
    for settings, words in cases.items():
        with pytest.raises(UserError, match=re.escape(words)):
            project.chain("run", *settings.split())


def test_answers_come_from_the_store_whoever_asks(project):
    """A store that was filled by another run at the same policy gives the round; nothing else is drawn."""
    project.run("first", "trainer.max_steps=3")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        add = AnswerStore.put_bytes
        patch.setattr(AnswerStore, "put_bytes", lambda self, *a: (drawn.append(len(a[1])), add(self, *a)))
        project.run("second", "trainer.max_steps=6", "optim.lr=2e-2")
    assert len(drawn) > 0
    first, second = rounds_of(project.folder / "first"), rounds_of(project.folder / "second")
    assert [g.keys() for g in first[0].groups] == [g.keys() for g in second[0].groups]
