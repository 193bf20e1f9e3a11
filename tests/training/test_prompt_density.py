"""Prompt weights: the classifier against scikit-learn's numbers, embeddings against plain forward passes."""

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch

from alignment.data.tokens.units import as_rows
from alignment.errors import UserError
from alignment.training import prompt_density as density
from alignment.training.prompt_density import density_weights, fit_log_odds, prompt_embeddings, with_density_weights
from alignment.types import Group, MadeOnDemand
from tests.conftest import random_groups, tiny_policy

CPU = torch.device("cpu")


def test_classifier_against_scikit_learn():
    """`LogisticRegression(class_weight="balanced", solver="newton-cholesky", tol=1e-14)` of scikit-learn 1.9.1."""
    x = torch.tensor([[0.5, -1.0], [1.5, 0.25], [-0.5, 2.0], [-1.0, -0.75], [0.25, 0.5], [2.0, -1.5]])
    w, b = fit_log_odds(x, torch.tensor([True, True, False, False, False, False]))
    assert w.tolist() == pytest.approx([0.487244272110612, -0.167341489322886], rel=1e-12)
    assert b.item() == pytest.approx(-0.317447292472842, rel=1e-12)


def test_classifier_by_hand():
    """One desirable prompt at 2, and one or four undesirable ones at 0: n prompts, either label weighing n / 2.

    The slope in b, (n / 2) (S(b) - S(-2 w - b)), is 0 at b = -w. There the slope in w is w - (n / 2) 2 S(-w).
    """
    for repeats, factor in ((1, 2.0), (4, 5.0)):
        low, high = 0.0, 5.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if middle < factor / (1 + exp(middle)) else (low, middle)
        x = torch.tensor([[2.0]] + [[0.0]] * repeats)
        w, b = fit_log_odds(x, torch.tensor([True] + [False] * repeats))
        assert w.item() == pytest.approx(low, rel=1e-12)
        assert b.item() == pytest.approx(-low, rel=1e-12)


def gradient_of_the_objective(x, labels, w, b):
    """Of |w|^2 / 2 + sum of balanced log losses, row by row."""
    n, desirable = len(labels), int(labels.sum())
    at_w, at_b = w.clone(), 0.0
    for e, label in zip(x.double(), labels.tolist(), strict=True):
        sign, share = (1, n / 2 / desirable) if label else (-1, n / 2 / (n - desirable))
        slope = -share * sign * torch.sigmoid(-sign * (e @ w + b))
        at_w, at_b = at_w + slope * e, at_b + slope
    return at_w, at_b


@pytest.mark.parametrize(("rows", "width"), [(300, 20), (40, 100)])
def test_classifier_solves_to_the_end_where_dimensions_are_of_unlike_size(rows, width):
    """As in hidden states: one dimension is 500 times the others', and far from 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    labels = x[:, 0] + x[:, 1] + torch.randn(rows, generator=generator) > 0.7
    x[:, 3] = 500 * (x[:, 3] + 3)
    at_w, at_b = gradient_of_the_objective(x, labels, *fit_log_odds(x, labels))
    assert at_w.abs().max() < 1e-7
    assert abs(at_b) < 1e-9


def test_weights_are_odds_within_bounds_and_of_undesirable_rows_alone():
    """p = 3/4 is 3, p = 1/4 is 1/3 and so 1/2, p = 20/21 is 20 and so 10."""
    log_odds = torch.tensor([log(3), log(1 / 3), log(20), 1000.0, -1000.0, 0.0, log(3)], dtype=torch.float64)
    labels = torch.tensor([False] * 6 + [True])
    assert density_weights(log_odds, labels).tolist() == pytest.approx([3, 0.5, 10, 10, 0.5, 1, 1], rel=1e-14)


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 10_000])
def test_embeddings_are_means_over_the_prompt_however_batched(tokens_per_batch):
    """Of the last hidden states, adapter included; padding and other prompts leave no trace."""
    model = tiny_policy(trained=True)
    prompts = [group.prompt for group in random_groups(7)]
    found = prompt_embeddings(model, prompts, tokens_per_batch, CPU)
    assert not found.requires_grad
    base = tiny_policy(r=None)
    for prompt, embedding in zip(prompts, found, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        with torch.no_grad():
            plain = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            untrained = base(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(embedding, plain.mean(0).float(), rtol=1e-5, atol=1e-6)
        assert (embedding - untrained.mean(0).float()).abs().max() > 1e-2


def labelled_rows():
    """30 desirable rows with prompts of three tokens, 30 undesirable ones: 10 with the same, 20 with three others."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        other = i % 2 == 1 and i % 6 != 1
        prompt = rng.integers(60 if other else 5, 63 if other else 8, rng.integers(4, 12)).astype(np.int32)
        rows.append(Group(prompt, (np.array([1, 2], dtype=np.int32),), labels=(i % 2 == 0,), weight=1 + i / 100))
    return rows


def test_rows_get_the_weights_of_their_prompts():
    """Prompts three times as frequent among desirable rows count more, others less; all else of a row stays."""
    model, rows = tiny_policy(), labelled_rows()
    weighted = with_density_weights(rows, model, 200, CPU)
    embeddings = prompt_embeddings(model, [row.prompt for row in rows], 10_000, CPU)
    labels = torch.tensor([row.labels[0] for row in rows])
    w, b = fit_log_odds(embeddings, labels)
    expected = density_weights(embeddings.double() @ w + b, labels)
    factors = [new.weight / old.weight for new, old in zip(weighted, rows, strict=True)]
    assert factors == pytest.approx(expected.tolist(), rel=1e-5)
    assert factors[0::2] == [1.0] * 30
    likely = [f for f, row in zip(factors, rows, strict=True) if not row.labels[0] and row.prompt[0] < 8]
    unlikely = [f for f, row in zip(factors, rows, strict=True) if not row.labels[0] and row.prompt[0] > 8]
    assert np.mean(likely) > 2
    assert unlikely == pytest.approx([0.5] * 20)
    for new, old in zip(weighted, rows, strict=True):
        assert replace(new, weight=0.0).keys() == old.keys()
        assert (new.labels, new.source) == (old.labels, old.source)


def test_weights_do_not_depend_on_the_order_of_the_rows_and_come_again(monkeypatch):
    """Though the classifier sees a part of them only."""
    monkeypatch.setattr(density, "PROMPTS_PER_LABEL", 10)
    model, rows = tiny_policy(), labelled_rows()
    order = np.random.default_rng(1).permutation(60).tolist()
    first, again = (with_density_weights(rows, model, 200, CPU) for _ in range(2))
    permuted = with_density_weights([rows[i] for i in order], model, 200, CPU)
    assert [row.weight for row in again] == [row.weight for row in first]
    assert [row.weight for row in permuted] == pytest.approx([first[i].weight for i in order], rel=1e-6)
    monkeypatch.setattr(density, "PROMPTS_PER_LABEL", 1000)
    everything = with_density_weights(rows, model, 200, CPU)
    assert [row.weight for row in everything] != pytest.approx([row.weight for row in first], rel=1e-3)


def test_rows_in_files_are_weighted_when_they_are_asked_for():
    """They get the weights that rows in memory get, and no more than a factor of each is held."""
    model, rows = tiny_policy(), labelled_rows()
    weighted = with_density_weights(tuple(rows), model, 200, CPU)
    assert isinstance(weighted, MadeOnDemand)
    assert [row.weight for row in weighted] == [row.weight for row in with_density_weights(rows, model, 200, CPU)]
    assert [row.keys() for row in weighted] == [row.keys() for row in rows]


def test_rows_of_pairs_have_no_weights(monkeypatch):
    """Both labels of a pair have one prompt: nothing tells them apart, though the classifier sees a part of them."""
    monkeypatch.setattr(density, "PROMPTS_PER_LABEL", 5)
    rows = [replace(row, prompt=row.prompt.copy()) for row in as_rows(random_groups(12))]
    weighted = with_density_weights(rows, tiny_policy(), 200, CPU)
    assert [row.weight for row in weighted] == pytest.approx([1.0] * 24, abs=1e-6)


@pytest.mark.parametrize("label", [True, False])
def test_rows_of_one_label_are_refused(label):
    rows = [replace(row, labels=(label,)) for row in labelled_rows()]
    with pytest.raises(UserError, match=f"all 60 rows of data.source are {'desirable' if label else 'undesirable'}"):
        with_density_weights(rows, tiny_policy(), 200, CPU)


def test_hidden_states_that_are_not_finite_are_refused():
    model = tiny_policy(r=None)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.inf
    rows = [Group(np.array([3, 4], dtype=np.int32), row.completions, labels=row.labels) for row in labelled_rows()]
    with pytest.raises(UserError, match="not finite"):
        with_density_weights(rows, model, 200, CPU)
