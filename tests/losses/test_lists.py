"""Losses of ranked lists: by hand, by formulas in plain numbers, and against the losses of pairs that they extend."""

from itertools import combinations
from math import exp, inf, lgamma, log, log1p, nan

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import DPO, NCA, AllPairs, BestVsRest, InfoNCA, LiPO, NCAList, PlackettLuce
from alignment.losses.lists import better_pairs

BETA = 0.5


def s(x):
    return 1 / (1 + exp(-x))


def softmax(values):
    whole = sum(map(exp, values))
    return [exp(value) / whole for value in values]


def in_order(scores):
    """Pairs of places, the better completion first; ties are none."""
    return [(i, j) for i, j in combinations(range(len(scores)), 2) if scores[i] > scores[j]]


def plackett_luce(r, scores):
    rest = [softmax(r[k:]) for k in range(len(r))]
    drawn = [sum(rest[k][i - k] for k in range(i + 1)) for i in range(len(r))]
    return -sum(log(p[0]) for p in rest), [1 - d for d in drawn]


def best_vs_rest(r, scores):
    p = softmax(r)
    return -log(p[0]), [float(i == 0) - p[i] for i in range(len(r))]


def weighted_pairs(r, scores, weight):
    weights = [0.0] * len(r)
    loss = 0.0
    for i, j in in_order(scores):
        loss -= weight(i, j) * log(s(r[i] - r[j]))
        weights[i] += weight(i, j) * s(r[j] - r[i])
        weights[j] -= weight(i, j) * s(r[j] - r[i])
    return loss, weights


def all_pairs(r, scores):
    return weighted_pairs(r, scores, lambda i, j: 1 / max(len(in_order(scores)), 1))


def infonca(r, scores):
    p, t = softmax(r), softmax([score / 0.8 for score in scores])
    return -sum(t[i] * log(p[i]) for i in range(len(r))), [t[i] - p[i] for i in range(len(r))]


def nca_list(r, scores):
    t, k = softmax([score / 0.8 for score in scores]), len(r)
    loss = -sum(t[i] * log(s(r[i])) + log(s(-r[i])) / k for i in range(k))
    return loss, [t[i] * s(-r[i]) - s(r[i]) / k for i in range(k)]


def lipo(r, scores):
    rank = {i: place for place, i in enumerate(sorted(range(len(r)), key=lambda i: -r[i]), 1)}

    def weight(i, j):
        gains = 2 ** (scores[i] / 1.5) - 2 ** (scores[j] / 1.5)
        return gains * abs(1 / log1p(rank[i]) - 1 / log1p(rank[j]))

    return weighted_pairs(r, scores, weight)


CASES = {
    "plackett_luce": (PlackettLuce(beta=BETA), plackett_luce, False),
    "best_vs_rest": (BestVsRest(beta=BETA), best_vs_rest, False),
    "all_pairs": (AllPairs(beta=BETA), all_pairs, True),
    "infonca": (InfoNCA(beta=BETA, alpha=0.8), infonca, True),
    "nca_list": (NCAList(beta=BETA, alpha=0.8), nca_list, True),
    "lipo": (LiPO(beta=BETA, scale=1.5), lipo, True),
}
every_case = pytest.mark.parametrize(("loss", "formula", "scored"), CASES.values(), ids=CASES)

RATIOS = {
    "right order": [[0.75, 0.5], [0.25], [-0.5, -0.25, -1.0]],
    "wrong order": [[-1.0, -1.5], [0.25, 0.5], [2.0]],
    "a pair": [[0.5], [0.25, 1.25]],
    "four": [[1.0, 0.5, -0.25], [2.5, -1.0], [-0.75], [0.125]],
    "equal scores": [[-0.25], [1.25, 1.0], [0.75, 0.5]],
}
"""Log-ratios per token, of lists of different lengths."""

SCORES = {
    "right order": [3.0, 2.0, 0.5],
    "wrong order": [2.5, 2.0, 1.0],
    "a pair": [1.5, 1.0],
    "four": [4.0, 3.5, 1.0, -0.5],
    "equal scores": [2.0, 2.0, 1.0],
}


def step_of(inputs, names, scored=True):
    """The lists in one step; the reference gives every token -1."""
    ratios = [sequence for name in names for sequence in RATIOS[name]]
    return inputs(
        [[x - 1 for x in sequence] for sequence in ratios],
        [[-1.0] * len(sequence) for sequence in ratios],
        sizes=torch.tensor([len(RATIOS[name]) for name in names]),
        scores=torch.tensor([x for name in names for x in SCORES[name]], dtype=torch.float64) if scored else None,
    )


@every_case
def test_by_formula(inputs, gradients, loss, formula, scored):
    """All lists in one step, so that short ones are padded: values, the gradient at every token, rewards."""
    step = step_of(inputs, RATIOS, scored)
    output = loss(step)
    rewards = [[BETA * sum(sequence) for sequence in RATIOS[name]] for name in RATIOS]
    expected = [formula(r, SCORES[name]) for r, name in zip(rewards, RATIOS, strict=True)]
    assert output.losses.tolist() == pytest.approx([value for value, _ in expected], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx([x for r in rewards for x in r], rel=1e-12)
    weights = [BETA * weight for _, per_list in expected for weight in per_list]
    for gradient, weight in zip(gradients(output.losses, step), weights, strict=True):
        assert gradient == pytest.approx([-weight] * len(gradient), rel=1e-11, abs=1e-14)


@every_case
def test_a_list_does_not_depend_on_its_neighbours(inputs, loss, formula, scored):
    together = loss(step_of(inputs, RATIOS, scored)).losses.tolist()
    alone = [loss(step_of(inputs, [name], scored)).losses.item() for name in RATIOS]
    assert alone == pytest.approx(together, rel=1e-15)


def by_hand(inputs, weights, scores=None):
    """One list of completions of one token whose rewards at beta 1 are the logarithms of these weights."""
    return inputs(
        [[log(weight) - 9] for weight in weights],
        [[-9.0] for _ in weights],
        sizes=torch.tensor([len(weights)]),
        scores=None if scores is None else torch.tensor(scores, dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("loss", "weights", "scores", "value"),
    [
        # e^r is 6, 3, 1: the first is drawn with 6/10, the second of the rest with 3/4
        (PlackettLuce(beta=1.0), (6, 3, 1), None, log(20 / 9)),
        (PlackettLuce(beta=1.0), (1, 3, 6), None, log(30)),
        (BestVsRest(beta=1.0), (6, 3, 1), None, log(10 / 6)),
        (BestVsRest(beta=1.0), (1, 3, 6), None, log(10)),
        # 6/9, 6/7, 3/4; then 1/4, 1/7, 3/9
        (AllPairs(beta=1.0), (6, 3, 1), None, log(7 / 3) / 3),
        (AllPairs(beta=1.0), (1, 3, 6), None, log(84) / 3),
        # the first two are equal: 6/7 and 3/4 are left
        (AllPairs(beta=1.0), (6, 3, 1), [5, 5, 2], log(14 / 9) / 2),
        (AllPairs(beta=1.0), (6, 3, 1), [5, 5, 5], 0.0),
        # targets 1/2, 1/3, 1/6
        (
            InfoNCA(beta=1.0, alpha=2.0),
            *((6, 3, 1), [2 * log(3), 2 * log(2), 0]),
            log(10 / 6) / 2 + log(10 / 3) / 3 + log(10) / 6,
        ),
        (InfoNCA(beta=1.0, alpha=1e-4), (1, 3, 6), [9, 8, 8], log(10)),
        (InfoNCA(beta=1.0, alpha=1e-4), (1, 3, 6), [9, 9, 8], (log(10) + log(10 / 3)) / 2),
        # S(r) is 6/7, 3/4, 1/2
        (
            NCAList(beta=1.0, alpha=2.0),
            *((6, 3, 1), [2 * log(3), 2 * log(2), 0]),
            log(7 / 6) / 2 + log(4 / 3) / 3 + log(2) / 6 + log(7 * 4 * 2) / 3,
        ),
        (NCAList(beta=1.0, alpha=1e-4), (1, 3), [9, 8], log(2) + (log(2) + log(4)) / 2),
        # gains 3, 1, 0 and the ranks of the list; then its ranks are 3, 2, 1
        (
            LiPO(beta=1.0, scale=10.0),
            *((6, 3, 1), [20, 10, 0]),
            2 * (1 / log(2) - 1 / log(3)) * log(9 / 6)
            + 3 * (1 / log(2) - 1 / log(4)) * log(7 / 6)
            + (1 / log(3) - 1 / log(4)) * log(4 / 3),
        ),
        (
            LiPO(beta=1.0, scale=10.0),
            *((1, 3, 6), [20, 10, 0]),
            2 * (1 / log(3) - 1 / log(4)) * log(4)
            + 3 * (1 / log(2) - 1 / log(4)) * log(7)
            + (1 / log(2) - 1 / log(3)) * log(3),
        ),
    ],
)
def test_by_hand(inputs, loss, weights, scores, value):
    assert loss(by_hand(inputs, weights, scores)).losses.item() == pytest.approx(value, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("name", ["a pair"])
def test_lists_of_two_are_pairs(inputs, name):
    """DPO for four of them, NCA for one; LiPO is DPO up to its weight."""
    step = step_of(inputs, [name])
    pair = inputs(*([[list(r.sequence(i)) for i in range(2)] for r in (step.policy.detach(), step.reference)]))
    dpo = DPO(beta=BETA, label_smoothing=0.0)(pair).losses.item()
    for loss in (PlackettLuce(beta=BETA), BestVsRest(beta=BETA), AllPairs(beta=BETA), InfoNCA(beta=BETA, alpha=1e-4)):
        assert loss(step).losses.item() == pytest.approx(dpo, rel=1e-14)
    assert NCAList(beta=BETA, alpha=1e-4)(step).losses.item() == pytest.approx(NCA(beta=BETA)(pair).losses.item())
    weight = (2**1.5 - 2) * (1 / log(2) - 1 / log(3))
    assert LiPO(beta=BETA, scale=1.0)(step).losses.item() == pytest.approx(weight * dpo, rel=1e-14)


def test_the_order_of_the_worse_ones_matters_to_the_ranking_only(inputs):
    step, other = by_hand(inputs, (6, 3, 1)), by_hand(inputs, (6, 1, 3))
    assert BestVsRest(beta=1.0)(step).losses.item() == pytest.approx(BestVsRest(beta=1.0)(other).losses.item())
    assert PlackettLuce(beta=1.0)(other).losses.item() == pytest.approx(log(10 / 6) + log(4), rel=1e-12)


def test_at_the_reference(inputs):
    """Equal rewards: K! rankings, K completions, every pair at log 2; LiPO ranks by the list."""
    step = by_hand(inputs, (1, 1, 1, 1), [3, 2, 2, 0])
    discounts = [1 / log1p(rank) for rank in (1, 2, 3, 4)]
    weight = sum(
        (2 ** [3, 2, 2, 0][i] - 2 ** [3, 2, 2, 0][j]) * (discounts[i] - discounts[j])
        for i, j in combinations(range(4), 2)
    )
    for loss, value in (
        (PlackettLuce(beta=0.3), lgamma(5)),
        (BestVsRest(beta=0.3), log(4)),
        (AllPairs(beta=0.3), log(2)),
        (InfoNCA(beta=0.3, alpha=0.1), log(4)),
        (NCAList(beta=0.3, alpha=0.1), 2 * log(2)),
        (LiPO(beta=0.3, scale=1.0), weight * log(2)),
    ):
        assert loss.at_reference(step).tolist() == pytest.approx([value], rel=1e-12)
        assert loss(step).losses.tolist() == pytest.approx([value], rel=1e-12)


@pytest.mark.parametrize(("loss", "formula", "scored"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("ratios", [(1e4, 0.0, -1e4), (-1e4, 0.0, 1e4), (0.0, 0.0, 0.0), (-1e4, -1e4, -1e4)])
def test_extremes_of_a_longer_list_in_float32(inputs, loss, formula, scored, ratios):
    """Beside a list of two, so that one is padded."""
    policy = [[-1e4 + ratio] for ratio in ratios] + [[-1e-8], [0.0]]
    step = inputs(
        policy,
        [[-1e4]] * 3 + [[-1.0]] * 2,
        dtype=torch.float32,
        sizes=torch.tensor([3, 2]),
        scores=torch.tensor([1e3, 0, -1e3, 1, 0], dtype=torch.float64) if scored else None,
    )
    losses = loss(step).losses
    (gradient,) = torch.autograd.grad(losses.sum(), step.policy.values)
    assert losses.isfinite().all() and gradient.isfinite().all()


def test_a_list_of_equal_scores_has_no_pair_at_the_reference_either(inputs):
    step = by_hand(inputs, (1, 1, 1), [5, 5, 5])
    assert AllPairs(beta=0.3).at_reference(step).tolist() == AllPairs(beta=0.3)(step).losses.tolist() == [0]


def test_better_pairs():
    sizes = torch.tensor([3, 2])
    assert better_pairs(sizes).nonzero().tolist() == [[0, 0, 1], [0, 0, 2], [0, 1, 2], [1, 0, 1]]
    scores = torch.tensor([2.0, 2.0, 1.0, -1.0, -1.0])
    assert better_pairs(sizes, scores).nonzero().tolist() == [[0, 0, 2], [0, 1, 2]]
    scores[3:] = nan  # the second list has none: its order counts
    assert better_pairs(sizes, scores).nonzero().tolist() == [[0, 0, 2], [0, 1, 2], [1, 0, 1]]


@pytest.mark.parametrize(
    ("kind", "valid", "key"),
    [
        *((kind, {}, "beta") for kind in (PlackettLuce, BestVsRest, AllPairs)),
        *((kind, {"alpha": 1.0}, "beta") for kind in (InfoNCA, NCAList)),
        *((kind, {"beta": 0.1}, "alpha") for kind in (InfoNCA, NCAList)),
        (LiPO, {"scale": 1.0}, "beta"),
        (LiPO, {"beta": 0.1}, "scale"),
    ],
)
def test_refuses(kind, valid, key):
    kind(**valid, **{key: 0.1})
    for value in (0.0, -1.0, inf, nan):
        with pytest.raises(UserError, match=rf"^loss\.{key} must be a finite number above 0, not "):
            kind(**valid, **{key: value})
