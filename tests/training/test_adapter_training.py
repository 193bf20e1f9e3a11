"""Each kind of adapter in training: the first step's loss is that of the reference, and a resumed run ends the same."""

import functools

import pytest
import torch

from alignment.data.units import as_rows
from alignment.policy.adapter import attach_adapter
from alignment.training.cohort import share
from alignment.training.objective import groups_to_reference
from alignment.training.sampler import StepSampler
from alignment.training.start_check import check_start
from tests.conftest import random_groups
from tests.helpers.adapter_options import OPTIONS, each_case, start_sources
from tests.helpers.adapters import adapter
from tests.helpers.policies import NF4, load
from tests.helpers.references import cached, live
from tests.helpers.steps import make_loss, make_trainer

PAIRS = random_groups(4, seed=21)


@pytest.fixture(scope="module")
def policy(tiny_model_folder, tmp_path_factory):
    """Makes policies on one base of each kind, which they share."""
    loaded = functools.cache(lambda bits: load(tiny_model_folder, NF4 if bits else None))
    sources = start_sources(tiny_model_folder, tmp_path_factory.mktemp("starts"))
    return lambda option, bits: attach_adapter(share(loaded(bits)), adapter(**OPTIONS[option]), 3, sources)


def prepared(model, option, loss, mode, folder, store):
    """A trainer of two steps, the groups, and their reference."""
    groups = PAIRS if loss == "dpo" else as_rows(PAIRS)
    sampler = StepSampler(len(groups), len(groups) // 2, 0, max_steps=2)
    reference = cached(model, store) if mode == "cache" else live(model)
    steps = [range(len(groups)), *sampler.first_steps(2)]
    reference.prepare(groups_to_reference(make_loss(loss), groups, steps, ()))
    trainer = make_trainer(model, groups, make_loss(loss), folder, reference=reference)
    trainer.sampler = sampler
    trainer.lr_ratio = adapter(**OPTIONS[option]).lr_ratio
    return trainer, groups, reference


def trained(model, option, loss, mode, folder, store, checkpoint=None):
    """The trainer after its two steps, the first of which it keeps, and what has trained."""
    trainer, _, reference = prepared(model, option, loss, mode, folder, store)
    settings = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    for name, value in settings.items():
        setattr(trainer.args, name, value)
    if checkpoint is not None:
        trainer.load_state(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    reference.close()
    return trainer, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@each_case
def test_each_adapter_starts_at_its_reference(option, bits, policy, tmp_path):
    """At step 0 policy and reference are equal, and the loss is what its formula gives, stored or live."""
    model = policy(option, bits)
    for loss in ("dpo", "kto"):
        for mode in ("cache", "live"):
            trainer, groups, reference = prepared(model, option, loss, mode, tmp_path, tmp_path)
            start = check_start(trainer, groups)
            assert start["max_token_difference"] < 2e-5, (loss, mode)
            assert start["loss"] == pytest.approx(start["closed_form"], rel=1e-4), (loss, mode)
            reference.close()


@each_case
def test_each_adapter_resumes_to_the_last_bit(option, bits, policy, tmp_path):
    """From a checkpoint, a new policy ends with the weights that the first has ended with."""
    loss, mode = ("dpo", "cache") if (len(option) + bool(bits)) % 2 else ("kto", "live")
    model = policy(option, bits)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    _, ended = trained(model, option, loss, mode, tmp_path / "whole", tmp_path)
    assert any(not torch.equal(before[name], ended[name]) for name in before)
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    _, resumed = trained(policy(option, bits), option, loss, mode, tmp_path / "resumed", tmp_path, checkpoint)
    assert ended.keys() == resumed.keys()
    assert all(torch.equal(ended[name], resumed[name]) for name in ended)


def test_b_learns_faster_with_lora_plus(policy, tmp_path):
    """Its groups have the ratio's multiple of the rate, through the schedule too."""
    trainer, _ = trained(policy("lora_plus", None), "lora_plus", "dpo", "live", tmp_path, tmp_path)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {
        "lora_B" in names[id(p)]: (group["lr"], group["initial_lr"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert rates[True] == pytest.approx([4 * rate for rate in rates[False]]) and rates[False][1] == 1e-2
    trained_parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(trained_parameters) == sum(p.requires_grad for p in trainer.model.parameters())
