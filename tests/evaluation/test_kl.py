"""The KL from samples: of the tokens that were sampled, by hand, unbiased, and 0 where nothing was learnt."""

import json
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from alignment.config.compose import as_plain, compose_node, to_run_config
from alignment.config.registry import register
from alignment.data.tokens.units import spread_prompts
from alignment.evaluation.kl import sampled_kl
from alignment.evaluation.sampling.answer import Sampling
from alignment.evaluation.sampling.draw import draw
from alignment.evaluation.sampling.local import LocalEngine
from alignment.reference.frozen import FrozenPolicy
from alignment.scoring.layout import FlatLayout
from alignment.stages.chain import Chain
from alignment.types import Group
from tests.conftest import random_groups, tiny_policy
from tests.helpers.commands import command, write_project
from tests.helpers.steps import moved, sequence_logp

CPU = torch.device("cpu")
STOPS = [3, 5]


def estimate(model, start, prompts, max_new_tokens, at_once=4):
    engine = LocalEngine(model, CPU, at_once)
    return sampled_kl(model, start, prompts, STOPS, engine, max_new_tokens, FlatLayout(), 200, CPU, 0)


def prompts_of(num: int) -> list[np.ndarray]:
    return [group.prompt for group in random_groups(num, seed=7)]


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True], ids=["from the base", "from an adapter"])
def test_it_is_zero_at_the_start(trained):
    model = tiny_policy(trained=trained)
    found = estimate(model, FrozenPolicy(model), prompts_of(9), max_new_tokens=6)
    assert found["n"] == 9
    for name in ("mean", "se", "per_token", "per_token_se"):
        assert abs(found[name]) < 1e-12, name


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True], ids=["from the base", "from an adapter"])
def test_by_hand(trained):
    """Log-ratios of the very tokens sampled, from full logits of two models, one prompt at a time."""
    model, start = tiny_policy(trained=trained), tiny_policy(trained=trained)
    frozen = FrozenPolicy(model)
    moved(model)
    model.train()
    prompts = prompts_of(9)
    found = estimate(model, frozen, prompts, max_new_tokens=30)
    assert model.training
    how = Sampling(stops=tuple(STOPS), max_new_tokens=30)
    answers = [answer.tokens for (answer,) in draw(LocalEngine(model, CPU, 9), prompts, 1, how)]
    with torch.no_grad():
        ratios = [
            (sequence_logp(model, prompt, tokens) - sequence_logp(start, prompt, tokens)).sum().item()
            for prompt, tokens in zip(prompts, answers, strict=True)
        ]
    lengths = [len(tokens) for tokens in answers]
    # Both kinds of end occur, and a stop token is one of the tokens.
    ended = [tokens[-1] in STOPS for tokens in answers]
    assert any(ended) and not all(ended)
    assert all(length == 30 for length, end in zip(lengths, ended, strict=True) if not end)
    assert not any(np.isin(tokens[:-1], STOPS).any() for tokens in answers)
    assert found["ended"] == sum(ended) / 9 and found["tokens"] == sum(lengths)
    assert math.isclose(found["mean"], sum(ratios) / 9, rel_tol=1e-9)
    assert math.isclose(found["se"], np.std(ratios, ddof=1) / 3, rel_tol=1e-9)
    per_token = sum(ratios) / sum(lengths)
    assert math.isclose(found["per_token"], per_token, rel_tol=1e-9)
    beside = [ratio - per_token * length for ratio, length in zip(ratios, lengths, strict=True)]
    assert math.isclose(found["per_token_se"], np.std(beside, ddof=1) / 3 / np.mean(lengths), rel_tol=1e-9)


@pytest.mark.slow
def test_unbiased():
    """Answers of one token, where the KL is a sum over the vocabulary: the estimate is as far off as it says it is."""
    model, start = tiny_policy(), tiny_policy()
    for each in (model, start):
        each.get_output_embeddings().weight.data.mul_(10)  # else its distributions are all but uniform
    frozen = FrozenPolicy(model)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.6)
    prompts = [np.array([one, other], np.int32) for one in range(60) for other in range(50)]
    ids = torch.from_numpy(np.stack(prompts).astype(np.int64))
    with torch.no_grad():
        policy, reference = (m(input_ids=ids).logits[:, -1].log_softmax(-1) for m in (model, start))
    exact = (policy.exp() * (policy - reference)).sum(-1).mean().item()
    variance = (policy.exp() * (policy - reference).square()).sum(-1).mean().item() - exact**2
    found = estimate(model, frozen, prompts, max_new_tokens=1, at_once=1000)
    assert exact > 0.05
    assert math.isclose(found["se"], math.sqrt(variance / 3000), rel_tol=0.1)
    assert abs(found["mean"] - exact) < 3 * found["se"] < exact
    assert found["mean"] == found["per_token"]  # every answer has one token


def test_one_answer_has_no_standard_error():
    model = tiny_policy()
    found = estimate(model, FrozenPolicy(model), prompts_of(1), max_new_tokens=2)
    assert found["se"] is None and found["per_token_se"] is None


def test_prompts_are_different_and_spread():
    groups = random_groups(6)
    twice = [Group(group.prompt, group.completions[::-1]) for group in groups]
    mixed = [group for two in zip(groups, twice, strict=True) for group in two]
    assert spread_prompts(mixed, 3) == [0, 4, 8]
    assert spread_prompts(mixed, 100) == [0, 2, 4, 6, 8, 10]
    assert spread_prompts(mixed, 0) == []


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_folder) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), tiny_model_folder)


SHORT = ("recipe=tiny", "sft=none", "trainer.max_steps=2", "trainer.eval_every=0", "trainer.save_every=0")


def finish(project: Path, folder: Path, *overrides: str) -> dict:
    """The summary of a run in this process."""
    register(project)
    node = compose_node([*SHORT, "tracking=none", *overrides])
    return Chain(to_run_config(node), folder, "tiny", as_plain(node)).run()


def assert_estimated(summary: dict, report: str, n: int) -> None:
    found = summary["evaluation"]["kl/sampled"]
    assert found["n"] == n and found["mean"] != 0 and 0 < found["tokens"] <= 4 * n
    assert ("answers" in summary["evaluation"]) == ("samples" in summary["files"]) == (n == 2)
    [lines] = re.findall(r"^\| KL to start, nats/answer (.*\n.*)", report, re.MULTILINE)
    mean, low, high = map(float, re.findall(r"-?\d[\d.e-]*", lines.replace("95%", "")))
    half = 1.96 * found["se"]
    assert [mean, low, high] == pytest.approx([found["mean"], found["mean"] - half, found["mean"] + half], rel=2e-3)


WHOLE_MODEL = ("adapter=none", "optim.lr=1e-3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "n"),
    [
        (["loss=simpo", "reference.for_metrics=false", "evaluation.prompts=0", "evaluation.kl_prompts=4"], 4),
        ([*WHOLE_MODEL, "reference=live"], 2),
    ],
    ids=["no reference, no other answers", "whole model"],
)
def test_a_run_estimates_it(project, tmp_path, overrides, n):
    summary = finish(project, tmp_path, *overrides)
    assert_estimated(summary, (tmp_path / "report.md").read_text(), n)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"), [(["evaluation.kl_prompts=0"], False), (WHOLE_MODEL, True)], ids=["off", "whole model"]
)
def test_a_run_leaves_it_out(project, tmp_path, overrides, said, caplog):
    with caplog.at_level(logging.INFO):
        summary = finish(project, tmp_path, *overrides)
    assert "kl/sampled" not in summary["evaluation"] and "kl" not in summary["stages"]["preference"]
    assert ("The KL from samples is left out" in caplog.text) == said


@pytest.mark.slow
def test_the_command_estimates_it_after_sft(project, tmp_path):
    """From as many prompts as are answered; the start of the stage is an adapter."""
    arguments = ("--config-dir", str(project), "recipe=tiny", "trainer.max_steps=2")
    ended = command(*arguments, cwd=tmp_path, cache=tmp_path / "cache")
    assert ended.code == 0, ended.err
    [folder] = (tmp_path / "outputs" / "tiny").iterdir()
    assert_estimated(json.loads((folder / "summary.json").read_text()), (folder / "report.md").read_text(), 2)
