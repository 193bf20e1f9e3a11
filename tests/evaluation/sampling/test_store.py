"""Answers that are kept: nobody draws them twice, and nobody gets those of another policy or setting."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from alignment.evaluation.sampling import store as stores
from alignment.evaluation.sampling.answer import Sampling
from alignment.evaluation.sampling.draw import draw
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.store import AnswerStore
from alignment.types import Group
from tests.conftest import random_groups, tiny_policy
from tests.helpers.policies import scores
from tests.helpers.stores import overwrite

CPU = torch.device("cpu")
PROMPTS = [group.prompt for group in random_groups(5, seed=7)]
HOW = Sampling(stops=(3, 5), max_new_tokens=8, seed=1)


def content(answers):
    """Without the log-probs, which rounding makes others in other batches."""
    return [[(a.tokens.tolist(), a.finish) for a in each] for each in answers]


def kept(cache, model=None, prompts=PROMPTS, count=2, how=HOW):
    """The answers, and how many of them were drawn."""
    with AnswerStore(cache, LocalEngine(model or tiny_policy(torch.float32), CPU, 8)) as store:
        answers = content(draw(store, prompts, count, how))
        assert store.drawn + store.found == len({prompt.tobytes() for prompt in prompts}) * count
        assert (store.tokens > 0) == (store.drawn > 0)
        return answers, store.drawn


def test_a_second_run_draws_nothing(tmp_path):
    """Nor does one with an adapter that has no effect; more answers, or more prompts, draw what is new."""
    model = tiny_policy(torch.float32)
    expected = content(draw(LocalEngine(model, CPU, 8), PROMPTS, 4, HOW))
    assert kept(tmp_path, prompts=PROMPTS[:3]) == ([each[:2] for each in expected[:3]], 6)
    assert kept(tmp_path, prompts=PROMPTS[:3][::-1]) == ([each[:2] for each in expected[:3]][::-1], 0)
    assert kept(tmp_path, tiny_policy(torch.float32, r=2)) == ([each[:2] for each in expected], 4)
    assert kept(tmp_path, count=4) == (expected, 10)
    assert kept(tmp_path, count=4) == (expected, 0)
    with AnswerStore(tmp_path, LocalEngine(model, CPU, 8)) as store:
        answers = draw(store, PROMPTS, 2, HOW)
    groups = [Group(prompt, tuple(a.tokens for a in each)) for prompt, each in zip(PROMPTS, answers, strict=True)]
    logps = np.concatenate([answer.logps for each in answers for answer in each])
    np.testing.assert_allclose(logps, scores(model, groups).numpy(), rtol=0, atol=5e-5)


@pytest.mark.slow
def test_whatever_decides_an_answer_is_part_of_its_key(tmp_path):
    """Policy, seed, settings, the model's own generation settings where they act; for greedy answers no seed."""
    penalised = tiny_policy(torch.float32)
    penalised.get_base_model().generation_config.repetition_penalty = 3.0
    others = [
        {}, {"model": tiny_policy(torch.float32, trained=True)}, {"how": replace(HOW, seed=2)},
        {"how": replace(HOW, temperature=0.5)}, {"how": replace(HOW, top_k=9)}, {"how": replace(HOW, stops=(3,))},
        {"how": replace(HOW, max_new_tokens=9)}, {"how": replace(HOW, presets=True)},
        {"how": replace(HOW, presets=True), "model": penalised},
    ]  # fmt: skip
    assert [kept(tmp_path, **other)[1] for other in others] == [10] * len(others)
    assert [kept(tmp_path, **other)[1] for other in others] == [0] * len(others)
    greedy = replace(HOW, temperature=0.0)
    assert kept(tmp_path, count=1, how=greedy)[1] == 5
    assert kept(tmp_path, count=1, how=replace(greedy, seed=2, top_k=9))[1] == 0
    assert kept(tmp_path, count=1, how=replace(HOW, stops=(5, 3)))[1] == 0


def test_what_was_drawn_before_a_crash_stays(tmp_path, monkeypatch):
    """Parts are kept as they come."""
    monkeypatch.setattr(stores, "_PART", 4)
    own, calls = LocalEngine.draw, []

    def fails(self, wanted, how):
        calls.append(len(wanted))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(self, wanted, how)

    monkeypatch.setattr(LocalEngine, "draw", fails)
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path)
    assert kept(tmp_path)[1] == 6 and calls == [2, 2, 2, 1]


def test_damaged_answers_are_drawn_again(tmp_path, caplog):
    """A damaged file is set aside, and never gives a wrong answer."""
    expected, _ = kept(tmp_path)
    [path] = tmp_path.glob("answers/*/answers.sqlite")
    overwrite(path, path.stat().st_size // 2, bytes(4096))
    with caplog.at_level(logging.WARNING):
        assert kept(tmp_path) == (expected, 10)
    assert "The store of answers" in caplog.text
    assert kept(tmp_path) == (expected, 0)
