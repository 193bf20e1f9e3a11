"""A GPU without room for a pass: the step, or the reference's pass, goes on with smaller ones and gives the same."""

import pytest
import torch

from alignment.errors import UserError
from alignment.policy.adapter import attach_adapter
from alignment.policy.layers import decoder_layers
from alignment.scoring.layout import SharedLayout
from alignment.scoring.logps import join_scores, score_groups
from alignment.training.layer_probe import is_usual
from tests.conftest import tiny_policy
from tests.helpers.policies import adapter
from tests.helpers.steps import groups_for, make_loss
from tests.pretended_gpu.device import GPU, module_to_gpu, room_for, to_host
from tests.pretended_gpu.machine import pretended_gpu
from tests.pretended_gpu.steps import Side

LOGIT = 4 * 97
"""Bytes of one token's logits, the largest tensors of a pass."""


@pytest.fixture(scope="module")
def side(tmp_path_factory) -> Side:
    with pretended_gpu() as device:
        return Side(device, tmp_path_factory.mktemp("gpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_step_goes_on_with_smaller_passes(name, side):
    """KTO takes statistics from the whole step: its passes without gradient are made smaller as well."""
    with pretended_gpu():
        trainer = side.trainer(make_loss(name), num_groups=12)
        fitting = side.step(trainer)
        short = side.trainer(make_loss(name), num_groups=12)
        largest = max(len(b.targets) for b in short.layout.batches(short.groups, 10_000))
        with room_for(largest * LOGIT // 2):
            found = side.step(short)
    assert fitting.tokens_per_batch == 10_000 > 10 * found.tokens_per_batch
    assert found.loss == pytest.approx(fitting.loss, rel=1e-6)
    assert (found.gradient - fitting.gradient).norm() <= 1e-5 * fitting.gradient.norm()
    assert found.metrics == pytest.approx(fitting.metrics, rel=1e-5, abs=1e-5)


def test_a_reference_pass_goes_on_with_smaller_passes(side):
    groups = groups_for(make_loss("dpo"), num=12)
    with pretended_gpu():
        expected = list(score_groups(side.model, groups, SharedLayout(), 10_000, GPU))
        with room_for(len(expected[0][0].targets) * LOGIT // 2):
            found = list(score_groups(side.model, groups, SharedLayout(), 10_000, GPU))
        found_values, values = (to_host(join_scores(groups, scored).values) for scored in (found, expected))
    assert len(found) > len(expected) == 1
    torch.testing.assert_close(found_values, values, rtol=1e-5, atol=1e-5)


def test_it_ends_where_no_group_fits(side):
    with pretended_gpu():
        trainer = side.trainer(make_loss("dpo"))
        with room_for(LOGIT // 2), pytest.raises(UserError, match="too little memory"):
            trainer.training_step(side.model, {"groups": trainer.groups})


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_attention_without_a_flash_kernel_is_measured_for_the_plan(capability, side):
    """It goes by masks, and keeps each completion's keys beside its prompt's: more than is counted."""
    model = attach_adapter(tiny_policy(torch.float16, r=None), adapter(r=4), 0)
    [batch] = SharedLayout().batches(groups_for(make_loss("dpo"), num=1), 10_000)
    with pretended_gpu(capability):
        module_to_gpu(model)
        assert is_usual(model, decoder_layers(model), batch) == (capability >= (8, 0))
