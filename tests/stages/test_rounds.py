"""Rounds of a preference stage: what they train on, what they are compared with, and that a kill changes nothing."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.config.compose import load
from alignment.config.rounds import RoundReference
from alignment.errors import UserError
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.store import AnswerStore
from alignment.losses import LOSSES, Quantity
from alignment.onpolicy import rounds as rounds_module
from alignment.onpolicy.rounds import read_round
from alignment.reference.cached import CachedReference
from alignment.runs.folder import by_round
from alignment.runs.record import RunRecord
from alignment.stages import run_data
from tests.conftest import recommended_loss
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


def by_hand(policy: nn.Module, rounds, every: int, rates, reference: str):
    """DPO in rounds from full logits: one schedule of the rate over all of them, a reference for each round.

    Asserts on the way that the answers' log-probs are those of the policy that begins the round.

    Returns:
        The trained tensors, and for each round how far it is from the next policy: the mean over its sample of
        log-ratios per answer, and of the start's policy to it.
    """

    def summed(group):
        return [sequence_logp(policy, group.prompt, tokens) for tokens in group.completions]

    @torch.no_grad()
    def plain(groups):
        return [[logps.sum() for logps in summed(group)] for group in groups]

    policy.eval()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [group for made in rounds for group in made.groups]
    compared, of_start, moved, away = plain(groups), [plain(made.sample) for made in rounds], [], []
    for step, rate in enumerate(rates):
        number, place = divmod(step, every)
        if place == 0:
            begun = rounds[number]
            for group in [*begun.groups, *begun.sample]:
                with torch.no_grad():
                    for key, value in zip(group.keys(), summed(group), strict=True):
                        np.testing.assert_allclose(begun.logps[key], value.numpy(), atol=2e-5)
            if reference == "round":
                compared[2 * step : 2 * step + len(begun.groups)] = plain(begun.groups)
            drawn = plain(begun.sample)
            away.append(np.mean([a[0] - b[0] for a, b in zip(drawn, of_start[number], strict=True)]))
        losses = []
        for group, others in list(zip(groups, compared, strict=True))[2 * step : 2 * step + 2]:
            a, b = (own.sum() - other for own, other in zip(summed(group), others, strict=True))
            losses.append(-nn.functional.logsigmoid(a - b))
        gradients = torch.autograd.grad(torch.stack(losses).mean(), trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= rate * gradient
        if place == every - 1 or step == len(rates) - 1:
            moved.append(np.mean([a[0] - b[0] for a, b in zip(plain(begun.sample), drawn, strict=True)]))
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}, moved, away


@pytest.mark.parametrize(("temperature", "reference"), [(0.7, "round"), (1.0, "start")])
def test_rounds_are_what_one_does_by_hand(temperature, reference, project):
    """At a temperature below 1 too, where the log-probs that count are still the policy's own.

    Plain gradient descent: Adam makes steps of one size of what is rounding alone.
    """
    settings = (f"onpolicy.temperature={temperature}", f"onpolicy.reference={reference}", "loss.beta=1")
    settings += ("optim.name=sgd", "optim.lr=0.01", "optim.schedule=linear", "optim.warmup_ratio=0")
    settings += ("optim.max_grad_norm=0",)
    project.run("run", *settings)
    rounds = rounds_of(project.folder / "run")
    assert [len(made.groups) for made in rounds] == [6, 6, 4]
    rates = [0.01 * (1 - step / 8) for step in range(8)]
    trained, moved, away = by_hand(start_of(project, *settings), rounds, 3, rates, reference)
    for name, tensor in weights(project.folder / "run").items():
        expected = trained[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(tensor, expected.detach(), atol=2e-5, rtol=1e-4, msg=name)
    rows = {row["step"]: row for row in metric_rows(project.folder / "run") if row["split"] == "train"}
    assert [step for step, row in rows.items() if "onpolicy/round" in row] == [1, 4, 7]
    measured = [-row["onpolicy/kl_round"] for row in rows.values() if "onpolicy/kl_round" in row]
    if temperature < 1:
        assert measured == [], "answers are not drawn from the policy itself"
        return
    np.testing.assert_allclose(measured, moved, atol=1e-4)
    assert all("onpolicy/effective" in rows[step] for step in (3, 6, 8))
    np.testing.assert_allclose([rows[step]["onpolicy/kl_start"] for step in (4, 7)], away[1:], atol=1e-4)
    assert min(map(abs, moved)) > 1e-3


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


def test_the_models_own_generation_settings_have_no_part_in_rounds(project, tiny_model_folder):
    """Tokens that it never writes and a temperature, planted in its folder."""
    folder = shutil.copytree(tiny_model_folder, project.folder / "model")
    own = {"suppress_tokens": [*range(1, 250, 2)], "temperature": 0.1, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(own))
    settings = ("trainer.max_steps=1", "evaluation.prompts=0")
    project.run("plain", *settings)
    project.run("planted", *settings, f"model.name={folder}", cache="another")
    (plain,), (planted,) = (rounds_of(project.folder / name) for name in ("plain", "planted"))
    assert [group.keys() for group in plain.groups] == [group.keys() for group in planted.groups]


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


START = "in a round that is compared with the start"
KILLS = {
    "while the first round is drawn": lambda: at_call(3, LocalEngine, "draw"),
    "while a later round is drawn": lambda: at_call(5, LocalEngine, "draw"),
    "while a round is written": lambda: at_call(2, rounds_module, "write_sealed"),
    "while the reference follows": lambda: at_call(1, CachedReference, "refresh"),
    "in a round": lambda: at_call(6, RunRecord, "log"),
    START: lambda: at_call(6, RunRecord, "log"),
    "in the last round": lambda: at_call(9, RunRecord, "log"),
}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, tiny_model_folder, data):
    """The folder of a run with these settings that is not killed."""

    @cache
    def run(*settings: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            folder = tmp_path_factory.mktemp("uncut")
            Project(folder, tiny_model_folder, data, patch).run("run", *settings)
            return folder / "run"

    return run


@pytest.mark.parametrize("moment", [*KILLS, "while a round is judged"])
def test_a_run_that_is_killed_ends_as_one_that_is_not(moment, project, monkeypatch, uncut):
    """To the bit, with the cache of its own that it has filled so far."""
    settings = ("onpolicy.reference=start",) if moment == START else ()
    uncut = uncut(*settings)
    chain = project.chain("run", *settings)
    with monkeypatch.context() as patch:
        if moment in KILLS:
            patch.setattr(*KILLS[moment]())
        else:
            project.judge.killed_at = 30
        with pytest.raises(Killed):
            chain.run()
    project.run("run", *settings)
    assert_same(project.folder / "run", uncut)
    for found, expected in zip(rounds_of(project.folder / "run"), rounds_of(uncut), strict=True):
        assert found.metrics == expected.metrics and found.position == expected.position
        assert [group.keys() for group in found.groups] == [group.keys() for group in expected.groups]
        assert all(np.array_equal(found.logps[key], values) for key, values in expected.logps.items())


def test_each_round_has_its_own_rows_however_rarely_steps_are_logged(project, uncut):
    """What is measured at the end of a round stands in its last row, and not in the first one of the next."""
    project.run("run", "trainer.log_every=5", "trainer.save_every=0")
    found, expected = metric_rows(project.folder / "run"), metric_rows(uncut())
    assert [row["step"] for row in found if row["split"] == "train"] == [3, 5, 6, 8]
    for name in ("kl_round", "kl_start", "staleness", "score_mean"):
        measured = by_round(found, f"onpolicy/{name}")
        assert measured and measured == by_round(expected, f"onpolicy/{name}"), name


# Once, and never


def test_one_draw_is_training_on_the_file_of_what_was_drawn(project, monkeypatch):
    """To the bit, with the log-probs of the reference in the store, where the sampler has put them."""
    fixed = ("trainer.plan=off", "trainer.tokens_per_batch=400", "trainer.checkpoint_every=0", "trainer.max_steps=20")
    project.run("once", *fixed, "onpolicy.every=null")
    [made] = rounds_of(project.folder / "once")
    assert 2 <= len(made.groups) < 40, "so the steps go through them more than once"
    fit = run_data.fit_preferences

    def drawn(*arguments):
        data, bad = fit(*arguments)
        data.train = list(made.groups)
        return data, bad

    monkeypatch.setattr(run_data, "fit_preferences", drawn)
    project.run("offline", *fixed, "onpolicy=none")
    found, expected = weights(project.folder / "once"), weights(project.folder / "offline")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# What rounds are made of


def written_model(folder: Path, like: Path) -> Path:
    """Another model with the same tokenizer."""
    shutil.copytree(like, folder)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like))
    model.save_pretrained(folder)
    return folder


def is_labelled(group, made):
    return len(group.completions) == 1 and group.labels is not None


MADE = {
    "loss=kto onpolicy.pairs.choice=kto onpolicy.pairs.threshold=1.5": is_labelled,
    "loss=kto": is_labelled,
    "loss=plackett_luce onpolicy.pairs.choice=list": lambda g, _: (
        len(g.completions) >= 2 and sorted(g.scores, reverse=True) == list(g.scores) and g.scores[0] > g.scores[-1]
    ),
    "onpolicy.judge=none onpolicy.k=1 onpolicy.pairs.choice=gold_vs_sample": lambda g, made: (
        [g.key(k) in made.logps for k in (0, 1)] == [False, True]
    ),
    "onpolicy.judge=none onpolicy.k=1 onpolicy.pairs.choice=sample_vs_weak onpolicy.weak=WEAK": lambda g, made: (
        [g.key(k) in made.logps for k in (0, 1)] == [True, False]
    ),
    "reference=live onpolicy.reference=start": lambda g, _: g.scores[0] > g.scores[1],
    "loss=simpo optim.lr=1e-3": lambda g, _: g.scores[0] > g.scores[1],
}


@pytest.mark.parametrize("settings", MADE)
def test_rounds_of_every_kind(settings, project, tiny_model_folder):
    if "WEAK" in settings:
        settings_now = settings.replace("WEAK", str(written_model(project.folder / "weak", tiny_model_folder)))
    else:
        settings_now = settings
    found = project.run("run", "trainer.max_steps=4", *settings_now.split())
    rounds = rounds_of(project.folder / "run")
    assert [len(made.groups) for made in rounds] == [6, 2]
    assert all(MADE[settings](group, made) for made in rounds for group in made.groups)
    assert found["stages"]["preference"]["start"]["loss"] == pytest.approx(
        found["stages"]["preference"]["start"]["closed_form"], abs=1e-4
    )


@pytest.mark.matrix
def test_every_loss_takes_rounds_but_those_of_rewards_a_teacher_or_three_answers():
    """As it is composed: with pairs, or lists for losses of lists, and the start where whole distributions count."""
    pairs = load("recipe=quickstart", "onpolicy=rounds")
    lists = load("recipe=quickstart", "loss=plackett_luce", "onpolicy=rounds", "onpolicy.pairs.choice=list")
    refused = set()
    for name in LOSSES:
        loss = recommended_loss(name) if name != "mixture" else pairs.loss
        config = lists if loss.requirements().unit == "list" else pairs
        start = Quantity.divergence in loss.requirements().quantities
        onpolicy = replace(config.onpolicy, reference=RoundReference.start if start else RoundReference.round)
        try:
            replace(config, loss=loss, onpolicy=onpolicy)
        except UserError:
            refused.add(name)
    assert refused == {"bradley_terry", "opd", "tropd", "tpo", "tpo_l"}


def test_a_share_of_each_round_is_of_the_data(project):
    project.run("run", "onpolicy.mix_offline=0.5")
    offline = [group for made in rounds_of(project.folder / "run") for group in made.groups if group.scores is None]
    counts = [sum(g.scores is None for g in made.groups) for made in rounds_of(project.folder / "run")]
    assert counts == [3, 3, 2]
    assert len({group.source for group in offline}) == 8, "each pair of the data once before one comes again"


def test_prompts_of_the_held_out_set_are_not_trained_on(project):
    """Planted: all training prompts are held out, too."""
    other = shutil.copy(project.data, project.folder / "held_out.jsonl")
    with pytest.raises(UserError, match="20 contaminated"):
        project.run("run", "data.eval_size=0", f"data.eval_source={other}")


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
        "loss=tpo onpolicy.pairs.choice=list": "Loss tpo reads lists of three answers",
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
