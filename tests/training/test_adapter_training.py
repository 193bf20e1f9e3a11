"""Each kind of adapter in training: the first step's loss is that of the reference, and a resumed run ends the same."""

import functools

import pytest
import torch

from alignment.policy.adapter import attach_adapter
from alignment.training.cohort import share
from alignment.training.start_check import check_start
from tests.helpers.adapter_options import OPTIONS, adapter_cases, each_case, start_sources
from tests.helpers.adapters import adapter
from tests.helpers.policies import NF4, load
from tests.helpers.short_stages import WAYS, prepared, trained


@pytest.fixture(scope="module")
def policy(tiny_model_folder, tmp_path_factory):
    """Makes policies on one base of each kind, which they share."""
    loaded = functools.cache(lambda bits: load(tiny_model_folder, NF4 if bits else None))
    sources = start_sources(tiny_model_folder, tmp_path_factory.mktemp("starts"))
    return lambda option, bits: attach_adapter(share(loaded(bits)), adapter(**OPTIONS[option]), 3, sources)


@pytest.mark.slow
@each_case
def test_each_adapter_starts_at_its_reference(option, bits, policy, tmp_path):
    """At step 0 policy and reference are equal, and the loss is what its formula gives, stored or live."""
    model = policy(option, bits)
    for way in WAYS:
        trainer, groups, reference = prepared(model, way, tmp_path, tmp_path)
        start = check_start(trainer, groups)
        assert start["max_token_difference"] < 2e-5, way
        assert start["loss"] == pytest.approx(start["closed_form"], rel=1e-4), way
        reference.close()


def _ways():
    """Each adapter and each way; of the core of adapters one way each, and the rest in the matrix."""
    for case in adapter_cases():
        option, bits = case.values
        first = 3 * ((len(option) + bool(bits)) % 2)
        for index, way in enumerate(WAYS):
            marks = case.marks if index == first else pytest.mark.matrix
            yield pytest.param(option, bits, way, marks=marks, id="-".join((case.id, *way)))


@pytest.mark.slow
@pytest.mark.parametrize(("option", "bits", "way"), _ways())
def test_each_adapter_resumes_to_the_last_bit(option, bits, way, policy, tmp_path):
    """From a checkpoint, a new policy ends with the weights that the first has ended with."""
    ratio = adapter(**OPTIONS[option]).lr_ratio
    model = policy(option, bits)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    _, ended = trained(model, way, tmp_path / "whole", tmp_path, lr_ratio=ratio)
    assert any(not torch.equal(before[name], ended[name]) for name in before)
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    _, resumed = trained(policy(option, bits), way, tmp_path / "resumed", tmp_path, checkpoint, lr_ratio=ratio)
    assert ended.keys() == resumed.keys()
    assert all(torch.equal(ended[name], resumed[name]) for name in ended)


def test_b_learns_faster_with_lora_plus(policy, tmp_path):
    """Its groups have the ratio's multiple of the rate, through the schedule too."""
    trainer, _ = trained(policy("lora_plus", None), ("dpo", "live"), tmp_path, tmp_path, lr_ratio=4.0)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {
        "lora_B" in names[id(p)]: (group["lr"], group["initial_lr"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert rates[True] == pytest.approx([4 * rate for rate in rates[False]]) and rates[False][1] == 1e-2
    trained_parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(trained_parameters) == sum(p.requires_grad for p in trainer.model.parameters())
