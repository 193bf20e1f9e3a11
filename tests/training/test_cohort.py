"""Cohorts: members that train together are compared with the same trainings, each by itself."""

import numpy as np
import pytest
import torch

from alignment.kernels import base as kernels_base
from alignment.losses import Quantity
from alignment.policy.layers import checkpoint_layers
from alignment.scoring.logps import score_tokens
from alignment.training.cohort import JointModel, adapted_layers, join, share
from alignment.types import Group
from tests.conftest import random_groups
from tests.helpers.cohorts import LAYOUTS, frozen_base, policy_on

CPU = torch.device("cpu")


SIZES = ({"r": 4, "alpha": 8, "seed": 1}, {"r": 2, "alpha": 6, "seed": 2}, {"r": 8, "alpha": 4, "seed": 3})
ASKED = (frozenset(), frozenset({Quantity.entropy}), frozenset({Quantity.collision, Quantity.entropy}))


def gradients(policy):
    return {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}


def micro_batches(layout, number, seed):
    return next(iter(LAYOUTS[layout]().batches(random_groups(number, seed=seed), 10_000)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout", "every"),
    [
        ("qwen3", "shared", 0),
        ("qwen3", "shared", 1),
        ("qwen3", "flat", 0),
        ("llama", "flat", 1),
        ("gpt_neox", "shared", 0),
    ],
)
def test_a_joint_pass_is_every_member_s_own(layout, kind, every, monkeypatch):
    """Values and gradients, against peft's own layers on flat and shared rows, with other tokens for each member."""
    monkeypatch.setattr(kernels_base, "_MIN_BLOCK_ROWS", 16)  # blocks in which rows of two members meet
    monkeypatch.setattr(kernels_base, "_BLOCK_VALUES", 1)
    base = frozen_base(kind=kind)
    policies = [policy_on(base, **sizes) for sizes in SIZES]
    for policy in policies:
        checkpoint_layers(policy, every)
    joint = JointModel(base, dict(enumerate(policies)))
    members = [2, 0, 1]
    batches = {m: micro_batches(layout, 3 + m, seed=m) for m in members}
    scores = joint.score(members, [batches[m] for m in members], [ASKED[m] for m in members])
    found = [part.values for part in scores]
    weights = {m: torch.randn(values.shape, dtype=values.dtype) for m, values in zip(members, found, strict=True)}
    sum((weights[m] * values).sum() for m, values in zip(members, found, strict=True)).backward()
    for m, values in zip(members, found, strict=True):
        alone = policy_on(base, **SIZES[m], patched=False)
        expected = score_tokens(alone, batches[m], ASKED[m]).values
        (weights[m] * expected).sum().backward()
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
        for name, gradient in gradients(alone).items():
            torch.testing.assert_close(gradients(policies[m])[name], gradient, rtol=1e-9, atol=1e-11)


def test_members_with_other_targets_and_on_a_quantised_base():
    base = frozen_base(torch.float32, nf4=True)
    policies = [policy_on(base, targets=targets, seed=i) for i, targets in enumerate((["q_proj", "up_proj"], ["q_proj", "down_proj"]))]  # fmt: skip # noqa: E501
    batches = [micro_batches("shared", 3, seed=5), micro_batches("shared", 4, seed=6)]
    scores = JointModel(base, dict(enumerate(policies))).score([0, 1], batches, [frozenset()] * 2)
    found = [part.values for part in scores]
    torch.cat(found, 1).sin().sum().backward()
    for policy, batch, values in zip(policies, batches, found, strict=True):
        joint = gradients(policy)
        policy.zero_grad()
        expected = score_tokens(policy, batch).values
        expected.sin().sum().backward()
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(policy).items():
            assert (joint[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_second_model_takes_no_memory_for_weights():
    for nf4 in (False, True):
        base = frozen_base(torch.float32, nf4)
        other = share(base)
        assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in base.parameters()]
        batch = micro_batches("flat", 2, seed=0)
        torch.testing.assert_close(score_tokens(other, batch).values, score_tokens(base, batch).values, rtol=0, atol=0)
        policy_on(base)
        assert not any("lora" in name for name, _ in base.named_modules())
        assert all(module not in set(base.modules()) for module in other.modules())


def test_rows_of_several_micro_batches():
    """Prompts of 2 and 3 tokens with two completions each, in both layouts, by hand."""
    first, second = (
        Group(np.arange(n, dtype=np.int32), tuple(np.arange(m, dtype=np.int32) for m in lengths))
        for n, lengths in ((2, (2, 1)), (3, (2, 3)))
    )
    for layout, sizes, positions in (
        ("shared", [3, 6], [1, 2, 1, 5, 6, 5, 7, 8]),
        # rows of 5 each: the first member's have only 3 of their own
        ("flat", [10, 10], [1, 2, 6, 12, 13, 17, 18, 19]),
    ):
        joined, found = join([next(iter(LAYOUTS[layout]().batches([g], 100))) for g in (first, second)])
        assert found == sizes
        assert joined.score_positions.tolist() == positions
        assert joined.targets.tolist() == [0, 1, 0, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_other_adapters_have_no_joint_form(targets):
    base = frozen_base()
    policy = policy_on(base, targets=[*targets, "q_proj"])
    with pytest.raises(ValueError, match=targets[0]):
        adapted_layers(policy)
