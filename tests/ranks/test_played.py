"""Sixty-four ranks played by one process: the numbers of one, even shares, few collectives; planted faults are seen."""

from functools import partial

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from alignment.training import passes, trainer
from tests.conftest import each
from tests.helpers import rank_steps
from tests.helpers.played_ranks import PlayedTeam
from tests.helpers.precision import policy_on
from tests.helpers.rank_steps import steps

CASE = {"live": False, "num_steps": 2}


def close(found: dict, expected: dict) -> bool:
    """Whether the weights after the steps are the same up to the order of sums."""
    return all(torch.allclose(found["weights"][k], v, rtol=1e-6, atol=1e-7) for k, v in expected["weights"].items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """What one process does."""
    return steps(None, tmp_path_factory.mktemp("alone"), "dpo", **CASE)


@pytest.mark.parametrize("size", [2, pytest.param(64, marks=pytest.mark.slow)])
def test_ranks_that_are_played_are_one_process(size, alone, tmp_path):
    """Far more ranks than groups of a step too: most shares are empty."""
    assert close(steps(PlayedTeam(size), tmp_path, "dpo", **CASE), alone)


OTHERS = {
    "pairs against mismatched ones": ("kto", {}),
    "sorted pairs": ("aot", {}),
    "pairs whose loss is derived as a whole": ("beta_dpo", {}),
    "lists": ("plackett_luce", {}),
    "a stored reference that follows": ("dpo", {"num_steps": 3, "refreshes": (1, 2)}),
    "a live reference that follows": ("dpo", {"num_steps": 3, "refreshes": (1, 2), "live": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_two_and_four_ranks_are_one_process(case, tmp_path):
    """Whatever a loss or a reference computes over a whole step; test_steps.py has every loss in processes."""
    name, settings = OTHERS[case]
    single = steps(None, tmp_path, name, **CASE | settings)
    for size in (2, 4):
        folder = tmp_path / str(size)
        folder.mkdir()
        found = steps(PlayedTeam(size), folder, name, **CASE | settings)
        assert close(found, single), size
        assert found["held_out"] == pytest.approx(single["held_out"], rel=1e-5, abs=1e-7), size


def test_the_factor_of_float16_is_that_of_every_rank(tmp_path):
    """Without it on the rank that follows, half of the gradient would be a 65536th."""
    make = partial(policy_on, torch.device("cpu"), torch.float16)
    alone, shared = (steps(team, tmp_path, "dpo", **CASE, make=make) for team in (None, PlayedTeam(2)))
    for name, value in alone["weights"].items():
        torch.testing.assert_close(shared["weights"][name], value, rtol=0, atol=1e-4)


def all_in_float64(monkeypatch) -> None:
    """Norms too, which compute in float32 otherwise, and steps of AdamW, which magnifies rounding."""

    def forward(norm, x):
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

    monkeypatch.setattr(Qwen3RMSNorm, "forward", forward)
    kind = rank_steps.TrainingArguments
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2}
    monkeypatch.setattr(rank_steps, "TrainingArguments", lambda **given: kind(**{**given, **settings}))


@pytest.mark.slow
def test_only_rounding_tells_ranks_from_one_process(monkeypatch, tmp_path):
    """Where all computes in float64, the weights after AdamW's steps are the same to 13 digits."""
    all_in_float64(monkeypatch)
    alone, shared = (steps(team, tmp_path, "dpo", **CASE) for team in (None, PlayedTeam(2)))
    for name, value in alone["weights"].items():
        torch.testing.assert_close(shared["weights"][name], value, rtol=0, atol=1e-13)


def lose_a_group(monkeypatch) -> None:
    """The last group of the last rank that has one is nobody's."""
    share = trainer.share_groups

    def losing(groups, count):
        shares = share(groups, count)
        next(own for own in reversed(shares) if own).pop()
        return shares

    monkeypatch.setattr(trainer, "share_groups", losing)


def sum_twice(monkeypatch) -> None:
    """Every gradient is added up twice."""
    add_up = PlayedTeam.add_up

    def twice(self, *arguments):
        add_up(self, *arguments)
        add_up(self, *arguments)

    monkeypatch.setattr(PlayedTeam, "add_up", twice)


def order_by_rank(monkeypatch) -> None:
    """The order of the data is that of a rank's own seed."""
    sampler = rank_steps.StepSampler
    monkeypatch.setattr(rank_steps, "StepSampler", lambda num, per, seed, epochs: sampler(num, per, seed + 1, epochs))


def keep_old_weights(monkeypatch) -> None:
    """The others go on with the weights of the step before."""
    monkeypatch.setattr(PlayedTeam, "spread", lambda self, tensors: None)


def weigh_by_share(monkeypatch) -> None:
    """Each rank takes the mean over its own groups."""
    of = passes.StepPart.of

    def own_mean(self, objective, indices):
        part = of(self, objective, indices)
        return passes.replace(part, num_groups=max(1, len(indices)))

    monkeypatch.setattr(passes.StepPart, "of", own_mean)


PLANTS = [lose_a_group, sum_twice, order_by_rank, keep_old_weights, weigh_by_share]


@pytest.mark.parametrize("plant", each(PLANTS, PLANTS[:1]))
def test_a_planted_fault_is_seen(plant, alone, monkeypatch, tmp_path):
    """What compares ranks with one process turns red for each of these."""
    plant(monkeypatch)
    assert not close(steps(PlayedTeam(2), tmp_path, "dpo", **CASE), alone)
