"""A GPU that runs out of memory: the step starts again with less, and ends as if nothing had happened."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from alignment.errors import UserError
from alignment.policy.layers import checkpoint_layers, decoder_layers
from alignment.scoring.layout import FlatLayout, ForkedLayout, SharedLayout
from alignment.scoring.logps import join_scores, largest_group, score_groups, smaller_budget
from alignment.scoring.prompt_sharing import choose_layout
from alignment.types import Group
from tests.conftest import random_groups, tiny_policy
from tests.helpers.steps import make_loss, make_trainer, step_gradient

CPU = torch.device("cpu")


OUT_OF_MEMORY = (
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
)
"""As torch's allocator, cuBLAS and the driver say it."""


def fail_in_passes(model, numbers, graded=True, error=OUT_OF_MEMORY[0]):
    """Let a GPU's memory run out in passes of these numbers, counted from 0 over those with (or without) gradient."""
    base = model.get_base_model()
    forward, passes = base.forward, iter(range(10**6))

    def failing(*args, **kwargs):
        result = forward(*args, **kwargs)
        if torch.is_grad_enabled() == graded and next(passes) in numbers:
            raise error
        return result

    base.forward = failing


def step_of(tmp_path, budget, loss="dpo", failing=(), every=0, scoring_budget=None):
    """(trainer, loss, gradients, metrics to be logged) of one step, some of whose passes run out of memory."""
    model = tiny_policy(trained=True)
    groups = random_groups(8, k=1 if loss == "kto" else 2, seed=3)
    if loss == "kto":
        groups = [replace(group, labels=(i % 2 == 0,)) for i, group in enumerate(groups)]
    trainer = make_trainer(model, groups, make_loss(loss), tmp_path, scoring_budget or budget)
    trainer.tokens_per_batch = budget  # that of the reference stays
    checkpoint_layers(model, every)
    fail_in_passes(model, failing)
    value, gradients = step_gradient(trainer, groups)
    return trainer, value, gradients, trainer._means.take()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
def test_a_step_that_ran_out_of_memory_is_that_of_the_smaller_budget(loss, failing, tmp_path, caplog):
    """Bit for bit, whichever pass failed: nothing of the first try is left in gradients, metrics or counts."""
    budget = 130
    with caplog.at_level(logging.WARNING):
        trainer, value, gradients, metrics = step_of(tmp_path, budget, loss, failing)
    assert sum("continuing with" in record.message for record in caplog.records) == len(failing)
    assert trainer.tokens_per_batch < budget
    expected, *results = step_of(tmp_path, trainer.tokens_per_batch, loss, scoring_budget=budget)
    assert (value, metrics) == (results[0], results[2])
    assert trainer.num_tokens == expected.num_tokens
    assert all(torch.equal(gradients[name], results[1][name]) for name in results[1])
    other = step_of(tmp_path, budget, loss)[0]
    assert len(list(other.layout.batches(other.groups, budget))) < len(
        list(other.layout.batches(other.groups, trainer.tokens_per_batch))
    )


@pytest.mark.slow
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "cublas", "driver"])
def test_whoever_lacks_the_memory(error, tmp_path):
    """In a step and in a reference pass."""
    model, groups = tiny_policy(trained=True), random_groups(8, seed=3)
    trainer = make_trainer(model, groups, make_loss("dpo"), tmp_path, 130)
    fail_in_passes(model, (1,), error=error)
    step_gradient(trainer, groups)
    assert trainer.tokens_per_batch < 130
    fail_in_passes(model, (1,), graded=False, error=error)
    assert len(list(score_groups(model, groups, FlatLayout(), 130, CPU))) > len(list(FlatLayout().batches(groups, 130)))


def test_another_error_of_a_gpu_is_no_lack_of_memory(tmp_path):
    model, groups = tiny_policy(), random_groups(4)
    trainer = make_trainer(model, groups, make_loss("dpo"), tmp_path, 130)
    fail_in_passes(model, (0,), error=RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        step_gradient(trainer, groups)


@pytest.mark.slow
def test_at_last_every_layer_is_checkpointed_and_then_it_ends(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer, value, gradients, metrics = step_of(tmp_path, 1, failing=(0,), every=0)
    assert "continuing with every layer checkpointed" in caplog.text
    assert all(layer.gradient_checkpointing for layer in decoder_layers(trainer.model))
    _, *expected = step_of(tmp_path, 1)
    assert (value, metrics) == (expected[0], expected[2])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-12, atol=1e-15)
    longest = largest_group(FlatLayout(), random_groups(8, seed=3))
    with pytest.raises(UserError, match=rf"a group of {longest} positions, even with every layer .* lower data.max"):
        step_of(tmp_path, 1, failing=(0, 1), every=0)


@pytest.mark.parametrize(("layout", "budget"), [(FlatLayout(), 200), (SharedLayout(), 90)])
def test_a_reference_pass_goes_on_with_half_the_budget(layout, budget):
    """What was scored before is kept, every group comes once, and the values are those of an undisturbed pass."""
    groups = random_groups(9, seed=1)
    model = tiny_policy(trained=True)
    choose_layout(model, CPU)
    undisturbed = join_scores(groups, list(score_groups(model, groups, layout, budget, CPU)))
    passes = len(list(layout.batches(groups, budget)))
    assert passes > 1
    fail_in_passes(model, (1, 3), graded=False)
    scored = list(score_groups(model, groups, layout, budget, CPU))
    assert sorted(index for batch, _ in scored for index in batch.indices) == list(range(9))
    assert len(scored) > passes
    torch.testing.assert_close(join_scores(groups, scored).values, undisturbed.values, rtol=1e-12, atol=1e-12)


def test_a_reference_pass_ends_where_no_group_fits():
    model = tiny_policy()
    fail_in_passes(model, range(100), graded=False)
    with pytest.raises(UserError, match="too little memory to score one group at a time"):
        list(score_groups(model, random_groups(5), FlatLayout(), 500, CPU))


@pytest.mark.parametrize("layout", [FlatLayout(), SharedLayout(), ForkedLayout(pass_cost=0)])
@pytest.mark.parametrize("seed", range(8))
def test_the_largest_group_is_found_without_laying_out_all(layout, seed):
    """It is that of which a pass of its own has the most positions, in every layout and for any number of answers."""
    generator = np.random.default_rng(seed)

    def tokens(most):
        return np.ones(int(generator.lognormal(0, 1) * most / 4) + 1, dtype=np.int32)

    groups = [
        Group(tokens(40), tuple(tokens(20) for _ in range(generator.integers(2, 5))), source=f"f:{i}")
        for i in range(60)
    ]
    right = max(batch.positions for group in groups for batch in layout.batches([group], 1))
    laid_out = []
    layout_of = layout.batches
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layout, "batches", lambda some, budget: laid_out.append(some) or layout_of(some, budget))
        assert largest_group(layout, groups) == right
    assert len(laid_out) < len(groups) / 2


def test_a_budget_is_halved_down_to_the_largest_group():
    groups = [Group(np.zeros(4, np.int32), (np.zeros(n, np.int32), np.zeros(1, np.int32))) for n in (5, 6, 7, 13)]
    layout = SharedLayout()  # positions: 4 + (n - 1) + 0
    assert largest_group(layout, groups) == 16
    shared = [Group(np.full(4, i, np.int32), group.completions) for i, group in enumerate(groups)]
    assert smaller_budget(layout, shared, 10_000) == (8 + 9 + 10 + 16) // 2
    assert smaller_budget(layout, shared, 21) == 16
    assert smaller_budget(layout, shared, 16) is None
    assert smaller_budget(layout, shared, 1) is None
