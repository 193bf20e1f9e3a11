"""The base that members of a cohort share."""

import torch

from alignment.scoring.logps import score_tokens
from alignment.training.cohort import share
from tests.conftest import random_groups
from tests.helpers.cohorts import LAYOUTS, frozen_base, policy_on


def test_a_second_model_takes_no_memory_for_weights():
    for nf4 in (False, True):
        base = frozen_base(torch.float32, nf4)
        other = share(base)
        assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in base.parameters()]
        batch = next(iter(LAYOUTS["flat"]().batches(random_groups(2, seed=0), 10_000)))
        torch.testing.assert_close(score_tokens(other, batch).values, score_tokens(base, batch).values, rtol=0, atol=0)
        policy_on(base)
        assert not any("lora" in name for name, _ in base.named_modules())
        assert all(module not in set(base.modules()) for module in other.modules())
