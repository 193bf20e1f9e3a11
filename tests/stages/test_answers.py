"""What a policy answers to held-out prompts is kept, and taken over by whoever would ask it the very same."""

from __future__ import annotations

import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alignment.config.schema import EvaluationConfig, Judge
from alignment.data.preparation.prepare import PreferenceData
from alignment.evaluation.sampling.local import LocalEngine
from alignment.stages.answers import HeldOutAnswers
from alignment.stages.stage import Workspace
from tests.conftest import random_groups, tiny_policy
from tests.helpers.judges import llm_settings

GROUPS = random_groups(5, seed=3)
CONFIG = EvaluationConfig(
    prompts=3, every=None, every_prompts=32, kl_prompts=0, max_new_tokens=4, temperature=0.0, batch_size=2,
    judge=Judge.none, reward_model=None, human_labels=None, llm=llm_settings(),
)  # fmt: skip


class Tokenizer:
    eos_token_id = 96

    def __init__(self, separator: str = " ") -> None:
        self.separator = separator

    def decode(self, tokens, skip_special_tokens):
        return self.separator.join(map(str, tokens))


class Asker:
    """Asks policies as runs do, each in a folder of its own; `asked` counts how often one had to answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = 0
        self._runs = 0

    def __call__(self, model=None, groups=GROUPS, stops=(96,), seed=0, separator=" ", **settings) -> list[str]:
        self._runs += 1
        config = SimpleNamespace(evaluation=replace(CONFIG, **settings), seed=seed)
        rows = [SimpleNamespace(steps=None, meta={}, source="")] * len(groups)
        work = Workspace(
            run_dir=self.folder / f"run {self._runs}",
            cache=self.folder,
            device=torch.device("cpu"),
            tokenizer=Tokenizer(separator),
            slot=None,
            final_policy=self.folder / "adapter",
        )
        answers = HeldOutAnswers(config, PreferenceData(GROUPS, groups, rows, {}), work, stops)
        answers.collect("start", model or tiny_policy())
        return answers.answers["start"]


@pytest.fixture
def ask(tmp_path, monkeypatch) -> Asker:
    asker = Asker(tmp_path)

    own = LocalEngine.draw

    def counted(self, wanted, how):
        asker.asked += 1
        return own(self, wanted, how)

    monkeypatch.setattr(LocalEngine, "draw", counted)
    return asker


def penalised():
    model = tiny_policy()
    model.get_base_model().generation_config.repetition_penalty = 3.0
    return model


def with_end_tokens():
    """As the trainers leave it."""
    model = tiny_policy()
    model.get_base_model().generation_config.eos_token_id = [1, 2]
    model.get_base_model().generation_config.pad_token_id = 1
    return model.train()


def eager():
    model = tiny_policy()
    model.set_attn_implementation("eager")
    return model


SAME = {
    "a fresh adapter of another rank": lambda: {"model": tiny_policy(r=2)},
    "no adapter": lambda: {"model": tiny_policy(r=None)},
    "another seed of greedy answers": lambda: {"seed": 1},
    "what has no part in it": lambda: {"kl_prompts": 9},
    "batch_size": lambda: {"batch_size": 1},
    "attention": lambda: {"model": eager()},
    "tokens that are given anyway": lambda: {"model": with_end_tokens()},
}
OTHER = {
    "trained": lambda: {"model": tiny_policy(trained=True)},
    "other weights": lambda: {"model": tiny_policy(seed=1)},
    "dtype": lambda: {"model": tiny_policy(torch.float32)},
    "presets": lambda: {"model": penalised()},
    "prompts": lambda: {"groups": random_groups(5, seed=4)},
    "stops": lambda: {"stops": (7, 96)},
    "max_new_tokens": lambda: {"max_new_tokens": 5},
    "temperature": lambda: {"temperature": 1.0},
    "seed of drawn answers": lambda: {"temperature": 1.0, "seed": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_who_would_answer_the_same_is_not_asked(name, ask):
    expected = ask()
    assert len(expected) == 3 and len(set(expected)) > 1
    assert ask(**SAME[name]()) == expected
    assert ask.asked == 1


@pytest.mark.slow
def test_whatever_could_change_an_answer_is_asked_anew(ask):
    plain = ask()
    expected = {name: ask(**change()) for name, change in OTHER.items()}
    assert ask.asked == 1 + len(OTHER)
    assert {name: ask(**change()) for name, change in OTHER.items()} == expected
    assert ask.asked == 1 + len(OTHER)
    assert expected["temperature"] != expected["seed of drawn answers"]
    assert expected["trained"] != plain


def test_the_text_is_that_of_the_tokenizer(ask):
    """Tokens are kept: another tokenizer reads the same ones."""
    expected = ask(max_new_tokens=9)
    assert [text.replace("-", " ") for text in ask(max_new_tokens=9, separator="-")] == expected
    assert ask.asked == 1 and any(" " in text for text in expected)


def test_two_at_once_ask_once(ask, monkeypatch, caplog):
    """The second waits for the answers of the first."""
    counted, found = LocalEngine.draw, []

    def slow(self, wanted, how):
        second.start()
        while second.is_alive() and "waiting" not in caplog.text:
            second.join(0.01)
        return counted(self, wanted, how)

    monkeypatch.setattr(LocalEngine, "draw", slow)
    second = threading.Thread(target=lambda: found.append(ask(seed=1)))
    with caplog.at_level(logging.INFO):
        expected = ask()
    second.join(30)
    assert found == [expected] and ask.asked == 1


def test_answers_of_a_run_outlive_the_store(ask):
    """A resumed run reads its own."""
    expected = ask()
    shutil.rmtree(ask.folder / "answers")
    ask._runs -= 1
    assert ask() == expected and ask.asked == 1
