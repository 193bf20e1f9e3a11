"""One whole training step against a plain computation from full logits that shares no code with it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from alignment.data.tokens.units import as_rows
from tests.conftest import random_groups, tiny_policy
from tests.helpers.steps import SETTINGS, make_loss, make_trainer, moved, plain_loss, sequence_logp, step_gradient

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_step_equals_a_plain_computation(name, dtype, tolerance, tmp_path):
    """Loss and gradient of every adapter tensor, from several padded micro-batches, at a moved policy."""
    groups = random_groups(5, seed=3)
    if name == "kto":
        groups = as_rows(groups)[2:9]
    policy, start = tiny_policy(dtype, trained=True), tiny_policy(dtype, trained=True)
    trainer = make_trainer(policy, groups, make_loss(name), tmp_path, tokens_per_batch=60)
    moved(policy)
    loss, gradient = step_gradient(trainer, groups)
    trainer.reference.close()
    policy.zero_grad()
    expected = plain_loss(name, policy, start, groups)
    expected.backward()
    assert math.isclose(loss, expected.item(), rel_tol=max(tolerance, 1e-6))  # the loss is accumulated in fp32
    total = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    found = torch.cat([gradient[n].flatten() for n, p in policy.named_parameters() if p.requires_grad])
    assert total.norm() > 1e-3
    assert (found - total).norm() <= tolerance * total.norm()


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_split_into_micro_batches_does_not_matter(name, tmp_path):
    groups = random_groups(6, seed=4)
    if name == "kto":
        groups = as_rows(groups)
    results = []
    for tokens_per_batch in (1, 70, 10_000):
        policy = tiny_policy(trained=True)
        trainer = make_trainer(policy, groups, make_loss(name), tmp_path, tokens_per_batch)
        moved(policy)
        results.append((*step_gradient(trainer, groups), trainer._means.take()))
    for loss, gradient, metrics in results[1:]:
        assert math.isclose(loss, results[0][0], rel_tol=1e-6)
        for key, value in gradient.items():
            torch.testing.assert_close(value, results[0][1][key], rtol=1e-9, atol=1e-12)
        assert metrics.keys() == results[0][2].keys()
        for key, value in metrics.items():
            assert math.isclose(value, results[0][2][key], rel_tol=1e-9, abs_tol=1e-12), key


def test_the_order_within_a_step_does_not_matter_for_pairs(tmp_path):
    groups = random_groups(6, seed=5)
    policy = tiny_policy(trained=True)
    trainer = make_trainer(policy, groups, make_loss("dpo"), tmp_path, 80)
    moved(policy)
    first = step_gradient(trainer, groups)
    second = step_gradient(trainer, groups[::-1])
    assert math.isclose(first[0], second[0], rel_tol=1e-6)
    for key, value in first[1].items():
        torch.testing.assert_close(second[1][key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_evaluation_does_not_depend_on_its_batches(name, tmp_path):
    """Nine pairs in batches of any size give the same loss and metrics: exact means over the examples."""
    groups = random_groups(9, seed=6)
    results = []
    for tokens_per_batch in (1, 64, 10_000):
        policy = tiny_policy(trained=True)
        train = as_rows(groups) if name == "kto" else groups
        trainer = make_trainer(policy, train, make_loss(name), tmp_path, tokens_per_batch)
        moved(policy)
        results.append(trainer.held_out_metrics(groups))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, value in other.items():
            assert math.isclose(value, results[0][key], rel_tol=1e-9, abs_tol=1e-12), key


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_sources_of_a_mixture_are_evaluated_apart(name, tmp_path):
    """Each as it would be alone, though one pass scores all: metrics of pairs, and losses that look at one pair."""
    groups = [replace(group, dataset="ab"[i % 3 == 0]) for i, group in enumerate(random_groups(7, seed=6))]
    policy = tiny_policy(trained=True)
    train = as_rows(groups) if name == "kto" else groups
    trainer = make_trainer(policy, train, make_loss(name), tmp_path)
    moved(policy)
    found = trainer.held_out_metrics(groups)
    for source in "ab":
        alone = trainer.held_out_metrics([replace(g, dataset="") for g in groups if g.dataset == source])
        apart = {key.removeprefix(f"{source}/"): value for key, value in found.items() if key.startswith(f"{source}/")}
        assert {"loss", "rewards/margins", "nats/margins", "ranking/accuracies", "lengths/gap"} <= apart.keys()
        for key in apart.keys() - ({"loss"} if name == "kto" else set()):  # its baseline is that of all rows
            assert math.isclose(apart[key], alone[key], rel_tol=1e-9, abs_tol=1e-12), key
    shares = {source: sum(group.dataset == source for group in groups) / len(groups) for source in "ab"}
    assert math.isclose(found["loss"], sum(found[f"{source}/loss"] * share for source, share in shares.items()))
    assert all("dataset" in row for row in trainer._evaluated(groups, False)[1])


def test_kto_evaluates_pairs_as_pairs(tmp_path):
    """Its loss runs over the rows, its margins over the pairs: both by hand from the sequence log-probs."""
    groups = random_groups(4, seed=7)
    policy, start = tiny_policy(trained=True), tiny_policy(trained=True)
    trainer = make_trainer(policy, as_rows(groups), make_loss("kto"), tmp_path)
    moved(policy)
    metrics = trainer.held_out_metrics(groups)
    trainer.reference.close()
    with torch.no_grad():
        assert math.isclose(metrics["loss"], plain_loss("kto", policy, start, as_rows(groups)).item(), rel_tol=1e-9)

        def ratio(prompt, completion):
            return (sequence_logp(policy, prompt, completion) - sequence_logp(start, prompt, completion)).sum().item()

        ratios = [[ratio(g.prompt, c) for c in g.completions] for g in groups]
    assert math.isclose(metrics["nats/margins"], np.mean([a - b for a, b in ratios]), rel_tol=1e-9)
    assert math.isclose(metrics["rewards/margins"], 0.3 * np.mean([a - b for a, b in ratios]), rel_tol=1e-9)
    assert math.isclose(metrics["rewards/accuracies"], np.mean([a > b for a, b in ratios]))


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_evaluation_at_the_start_runs_no_model(name, tmp_path, monkeypatch):
    """At step 0 the policy is its reference: the same metrics as a real evaluation, without a forward pass."""
    groups = random_groups(5, seed=8)
    policy = tiny_policy(trained=True)
    trainer = make_trainer(policy, as_rows(groups) if name == "kto" else groups, make_loss(name), tmp_path)
    trainer.eval_groups = groups
    expected = {f"eval_{key}": value for key, value in trainer.held_out_metrics(groups).items()}
    monkeypatch.setattr("alignment.training.objective.score_tokens", None)
    found = trainer.evaluate_start()
    found.pop("epoch", None)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
