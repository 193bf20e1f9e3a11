"""How a step is split changes nothing, for any loss: into micro-batches, or by an interruption."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import TrainingArguments

from alignment.kernels.attention import enable_shared_prompts
from alignment.losses import LOSSES
from alignment.losses.base import Loss
from alignment.reference.live import LiveReference
from alignment.scoring.layout import FlatLayout, SharedLayout
from alignment.training.callbacks import Checkpoints, Rhythm, last_checkpoint
from alignment.training.sampler import StepSampler
from alignment.training.trainer import PreferenceTrainer
from tests.conftest import CORE_LOSSES, each, random_groups, recommended_loss, tiny_policy
from tests.helpers.steps import groups_for, make_trainer, moved, step_gradient

CPU = torch.device("cpu")
NAMES = [name for name in LOSSES if name != "mixture"]
"""A mixture without parts is none; `mpo` stands for it."""
every_loss = pytest.mark.parametrize("name", each([*NAMES, "mpo"], CORE_LOSSES))


@pytest.mark.slow
@every_loss
def test_the_split_into_micro_batches_does_not_matter(name, tmp_path):
    """One micro-batch per group, some, or one for all: loss, gradient, metrics and running state are the same."""
    loss = recommended_loss(name)
    groups = groups_for(loss, num=4)
    policy = tiny_policy(trained=True)
    trainers = [make_trainer(policy, groups, loss, tmp_path, tokens) for tokens in (1, 70, 10_000)]
    moved(policy)
    results = [(*step_gradient(t, groups), t._means.take(), t.objective.state) for t in trainers]
    for loss_value, gradient, metrics, state in results[1:]:
        assert math.isclose(loss_value, results[0][0], rel_tol=1e-6)
        assert max(value.abs().max().item() for value in gradient.values()) > 1e-6
        for key, value in gradient.items():
            torch.testing.assert_close(value, results[0][1][key], rtol=1e-9, atol=1e-12)
        assert metrics == pytest.approx(results[0][2], rel=1e-9, abs=1e-12)
        assert state == pytest.approx(results[0][3], rel=1e-9, abs=1e-12)


@pytest.mark.slow
@every_loss
def test_the_layout_does_not_matter(name, tmp_path):
    """Prompts shared or repeated, also for losses that read prompts or whole distributions."""
    loss = recommended_loss(name)
    groups = groups_for(loss, num=4, seed=8)
    policy = tiny_policy(trained=True)
    trainers = [
        make_trainer(policy, groups, loss, tmp_path, 150, layout=layout) for layout in (FlatLayout(), SharedLayout())
    ]
    moved(policy)
    results = [step_gradient(trainers[0], groups)]
    enable_shared_prompts(policy)
    results.append(step_gradient(trainers[1], groups))
    assert math.isclose(results[0][0], results[1][0], rel_tol=1e-5)
    flat, shared = (torch.cat([value.flatten() for value in gradient.values()]) for _, gradient in results)
    assert flat.norm() > 1e-6
    assert (flat - shared).norm() <= 1e-5 * flat.norm()  # the norms of these layers compute in fp32


def test_the_weight_of_a_group_multiplies_its_loss(tmp_path):
    """A weight of 0 leaves a pair out of the gradient, but not out of the number that the mean divides by."""
    loss = recommended_loss("dpo")
    groups = [replace(group, weight=weight) for group, weight in zip(random_groups(2), (2.0, 0.0), strict=True)]
    results = []
    for step in (groups, [replace(groups[0], weight=1.0)]):
        policy = tiny_policy(trained=True)
        trainer = make_trainer(policy, step, loss, tmp_path)
        moved(policy)
        results.append(step_gradient(trainer, step))
    (both, weighted), (alone, plain) = results
    assert math.isclose(both, alone, rel_tol=1e-6)
    for key, value in weighted.items():
        torch.testing.assert_close(value, plain[key], rtol=1e-9, atol=1e-12)


def train(name, folder, *, max_steps=4, resume=False):
    """Train a tiny policy for a few steps, saving every second one; returns the trainer."""
    torch.manual_seed(0)
    loss = recommended_loss(name)
    groups = groups_for(loss, num=10)
    policy = tiny_policy(trained=True)
    layout = FlatLayout()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=max_steps, use_cpu=True, report_to="none", disable_tqdm=True,
        remove_unused_columns=False, learning_rate=1e-2, save_strategy="steps", save_steps=2, logging_steps=1,
        lr_scheduler_type="constant", seed=3,
    )  # fmt: skip
    trainer = PreferenceTrainer(
        model=policy, args=arguments, groups=groups, eval_groups=[], loss=loss,
        reference=LiveReference(policy, layout, 1000, CPU), layout=layout, tokens_per_batch=60,
        sampler=StepSampler(len(groups), 4, 3, 2), callbacks=[Rhythm(None), Checkpoints(5)],
    )  # fmt: skip
    checkpoint, _ = last_checkpoint(folder) if resume else (None, 0)
    if checkpoint is not None:
        trainer.load_state(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


STATEFUL = [name for name in NAMES if LOSSES[name].initial_state is not Loss.initial_state]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STATEFUL, "kto", "sampo", "mpo"])
def test_resumed_equals_uninterrupted(name, tmp_path):
    """The running state is in the checkpoint, and draws depend on the step's number."""
    whole = train(name, tmp_path / "whole")
    train(name, tmp_path / "cut", max_steps=3)
    resumed = train(name, tmp_path / "cut", resume=True)
    assert resumed.objective.state == pytest.approx(whole.objective.state, rel=1e-12)
    assert whole.objective.state != recommended_loss(name).initial_state() or name not in STATEFUL
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[key], value, rtol=1e-12, atol=1e-14)
