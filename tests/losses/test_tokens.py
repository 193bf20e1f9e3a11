"""Losses that weigh tokens, or read more of a token than its log-prob: LD-DPO, SamPO, TDPO, WPO."""

from dataclasses import replace
from itertools import combinations
from math import exp, inf, log, nan

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import DPO, LDDPO, TDPO1, TDPO2, WPO, Quantity, SamPO

RATIOS = {
    "prefers the chosen": [[0.5, -0.25, 1.0, 0.75], [-0.5, 0.25]],
    "prefers the rejected": [[-1.0, 0.25], [0.5, 0.25, 1.0]],
    "one length": [[0.5, -0.25, 1.0], [0.25, 1.5, 0.5]],
}
"""Log-ratios of the tokens of a chosen and a rejected completion: u = 2, -0.75, 1.25 and v = -0.25, 1.75, 2.25."""

every_pair = pytest.mark.parametrize("ratios", RATIOS.values(), ids=RATIOS)


def s(x):
    return 1 / (1 + exp(-x))


def sp(x):
    return log(1 + exp(x))


@pytest.fixture
def pair(inputs):
    """Builds a step of one pair from its tokens' log-ratios; the reference's log-probs are -1, -1.5, -2, ..."""

    def build(ratios, **more):
        reference = [[-1.0 - 0.5 * t for t in range(len(r))] for r in ratios]
        policy = [[a + b for a, b in zip(r, base, strict=True)] for r, base in zip(ratios, reference, strict=True)]
        return inputs(policy, reference, **more)

    return build


def assert_gradients(found, chosen, rejected):
    """The losses fall by these weights per token: upwards for the chosen, downwards for the rejected."""
    assert found[0] == pytest.approx([-g for g in chosen], rel=1e-12, abs=1e-15)
    assert found[1] == pytest.approx(rejected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "u", "v"),
    [
        ("prefers the chosen", 0.25 + 0.3 * 1.75, -0.25),
        ("prefers the rejected", -0.75, 0.75 + 0.3 * 1.0),
        ("one length", 1.25, 2.25),
    ],
)
def test_ld_dpo_by_hand(pair, gradients, name, u, v):
    """alpha 0.3 weighs the tokens of the longer completion beyond the shorter one's length."""
    step = pair(RATIOS[name])
    output = LDDPO(beta=0.4, alpha=0.3)(step)
    assert output.losses.tolist() == pytest.approx([sp(-0.4 * (u - v))], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx([0.4 * u, 0.4 * v], rel=1e-12)
    g = 0.4 * s(-0.4 * (u - v))
    shared = min(map(len, RATIOS[name]))
    chosen, rejected = ([g if t < shared else 0.3 * g for t in range(len(r))] for r in RATIOS[name])
    assert_gradients(gradients(output.losses, step), chosen, rejected)


@every_pair
def test_ld_dpo_lies_between_dpo_and_dpo_of_equal_lengths(pair, ratios):
    dpo = DPO(beta=0.4, label_smoothing=0.0)
    whole, cut = pair(ratios), pair([r[: min(map(len, ratios))] for r in ratios])
    assert LDDPO(beta=0.4, alpha=1.0)(whole).losses.item() == pytest.approx(dpo(whole).losses.item(), rel=1e-14)
    assert LDDPO(beta=0.4, alpha=0.0)(whole).losses.item() == pytest.approx(dpo(cut).losses.item(), rel=1e-14)


def test_ld_dpo_of_several_pairs_is_that_of_each(pair, inputs):
    """Every pair has its own shared length."""
    steps = [pair(r) for r in RATIOS.values()]
    joined = inputs(*(
        [sequence.tolist() for step in steps for sequence in (getattr(step, side).sequence(i) for i in (0, 1))]
        for side in ("policy", "reference")
    ))  # fmt: skip
    loss = LDDPO(beta=0.4, alpha=0.3)
    assert loss(joined).losses.tolist() == pytest.approx([loss(step).losses.item() for step in steps], rel=1e-14)


@pytest.mark.parametrize(
    ("ratios", "u", "v"), [([[0.5, 0.25], [-0.25] * 5], 0.75, -0.5), ([[-0.5] * 4, [0.25, 0.5]], -1.0, 0.75)]
)
def test_sampo_by_hand(pair, ratios, u, v):
    """Equal log-ratios in the longer completion: any two of them give the same sum."""
    for seed in (1, 2, 3):
        output = SamPO(beta=0.4)(pair(ratios, seeds=torch.tensor([seed])))
        assert output.losses.tolist() == pytest.approx([sp(-0.4 * (u - v))], rel=1e-12)
        assert output.rewards.tolist() == pytest.approx([0.4 * u, 0.4 * v], rel=1e-12)


@pytest.mark.parametrize("name", ["prefers the chosen", "prefers the rejected"])
@pytest.mark.parametrize("seed", [None, 0, 5, 2**62 + 1])
def test_sampo_moves_the_tokens_of_its_draw_alone(pair, gradients, name, seed):
    """As many of the longer completion as the shorter has; value and weights are DPO's on what was drawn."""
    step = pair(RATIOS[name], seeds=None if seed is None else torch.tensor([seed]))
    output = SamPO(beta=0.4)(step)
    found = gradients(output.losses, step)
    drawn = [[t for t, g in enumerate(gradient) if g != 0] for gradient in found]
    assert [len(d) for d in drawn] == [min(map(len, RATIOS[name]))] * 2
    u, v = (sum(r[t] for t in d) for r, d in zip(RATIOS[name], drawn, strict=True))
    assert output.losses.item() == pytest.approx(sp(-0.4 * (u - v)), rel=1e-12)
    g = 0.4 * s(-0.4 * (u - v))
    chosen, rejected = ([g if t in d else 0 for t in range(len(r))] for r, d in zip(RATIOS[name], drawn, strict=True))
    assert_gradients(found, chosen, rejected)


def test_sampo_draws_every_subset_alike(inputs, gradients):
    """3000 seeds, two of four tokens: each of the 6 subsets 500 times, give or take 5 standard deviations of 20."""
    count = 3000
    step = inputs([[-1.0] * 4, [-1.0] * 2] * count, [[-1.0] * 4, [-1.0] * 2] * count, seeds=torch.arange(count))
    found = gradients(SamPO(beta=1.0)(step).losses, step)
    drawn = [tuple(t for t, g in enumerate(gradient) if g != 0) for gradient in found[0::2]]
    for subset in combinations(range(4), 2):
        assert abs(drawn.count(subset) - 500) < 102


def test_sampo_shares_its_draw_between_policy_and_reference(inputs):
    """With two draws of tokens this unlike, equal models would have a margin."""
    tokens = [[-0.1, -5.0, -0.2, -9.0, -0.3], [-1.0, -2.0]]
    step = inputs(tokens, tokens, seeds=torch.tensor([7]))
    assert SamPO(beta=1.0)(step).losses.item() == pytest.approx(log(2), rel=1e-15)


def test_sampo_draws_by_seed_and_without_one_by_lengths(pair, inputs):
    loss, policy = SamPO(beta=0.4), [[-0.1, -0.9, -0.4, -2.0, -1.1], [-0.5, -0.7]]
    reference = [[-1.0] * 5, [-1.0] * 2]

    def losses(seeds):
        return loss(inputs(policy * 8, reference * 8, seeds=seeds)).losses.tolist()

    assert len(set(losses(None))) == 1
    assert losses(None) == losses(None)
    assert len(set(losses(torch.full((8,), 11)))) == 1
    assert len(set(losses(torch.arange(8)))) > 2
    assert losses(torch.arange(8)) == losses(torch.arange(8))


def test_sampo_of_equal_lengths_is_dpo(pair):
    step = pair(RATIOS["one length"], seeds=torch.tensor([3]))
    dpo = DPO(beta=0.4, label_smoothing=0.0)(step).losses.item()
    assert SamPO(beta=0.4)(step).losses.item() == pytest.approx(dpo, rel=1e-15)


DIVERGENCES = [[0.125, 0.5, 0.25, 0.0, 0.375, 0.125], [0.75, 0.25, 1.0, 0.5, 0.25, 0.0]]
"""Enough for the longest completions; sums of the first n."""


def with_divergences(step, ragged):
    """The step with the divergences of its tokens, as a leaf of the graph."""
    lengths = step.policy.lengths.tolist()
    values = ragged([d[:n] for d, n in zip(DIVERGENCES, lengths, strict=True)], requires_grad=True)
    return replace(step, quantities={Quantity.divergence: values})


@every_pair
@pytest.mark.parametrize(
    ("loss", "alpha", "upwards"), [(TDPO1(beta=0.4), 1.0, True), (TDPO2(beta=0.4, alpha=0.3), 0.3, False)]
)
def test_tdpo_by_formula(pair, ragged, gradients, ratios, loss, alpha, upwards):
    """The chosen completion's divergence raises the margin, and has a gradient in TDPO1 alone."""
    step = with_divergences(pair(ratios), ragged)
    output = loss(step)
    n_w, n_l = map(len, ratios)
    d_w, d_l = sum(DIVERGENCES[0][:n_w]), sum(DIVERGENCES[1][:n_l])
    u, v = map(sum, ratios)
    z = 0.4 * (u - v - alpha * (d_l - d_w))
    assert output.losses.tolist() == pytest.approx([sp(-z)], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx([0.4 * (u + alpha * d_w), 0.4 * (v + alpha * d_l)], rel=1e-12)
    assert output.parts["divergence_chosen"].tolist() == pytest.approx([d_w])
    assert output.parts["divergence_rejected"].tolist() == pytest.approx([d_l])
    g = 0.4 * s(-z)
    assert_gradients(gradients(output.losses, step), [g] * n_w, [g] * n_l)
    (divergences,) = torch.autograd.grad(output.losses.sum(), step.quantities[Quantity.divergence].values)
    expected = [-g if upwards else 0.0] * n_w + [alpha * g] * n_l
    assert divergences.tolist() == pytest.approx(expected, rel=1e-12)


PUBLISHED = (
    [[-0.5, -1.0, -0.25, -0.75], [-1.0, -0.5, -1.5, -0.25, -0.75, -1.0]],
    [[-0.75, -1.25, -0.5, -0.5], [-0.5, -0.5, -1.0, -0.5, -0.75, -0.95]],
)
"""The pair of `test_published`: u = 0.5, v = -0.8."""


@pytest.mark.parametrize(
    ("loss", "value"), [(TDPO1(beta=0.1), 0.649159339), (TDPO2(beta=0.1, alpha=0.5), 0.6396589186)]
)
def test_tdpo_published(inputs, ragged, loss, value):
    """D_w = 0.3 and D_l = 0.7: log(1 + e^-(0.1 (1.3 - 0.4))) and log(1 + e^-(0.1 (1.3 - 0.2)))."""
    divergences = ragged([[0.1, 0.05, 0.0, 0.15], [0.2, 0.1, 0.05, 0.15, 0.05, 0.15]])
    step = inputs(*PUBLISHED, quantities={Quantity.divergence: divergences})
    assert loss(step).losses.item() == pytest.approx(value, rel=1e-9)


def test_tdpo_of_distributions(inputs, ragged):
    """From logits of a vocabulary of 5: TDPO1's whole gradient, through log-probs and divergences, by differences."""
    generator = torch.Generator().manual_seed(0)
    logits, reference_logits = (torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = torch.tensor([2, 0, 4, 1, 1])
    reference = reference_logits.log_softmax(-1)
    like = inputs([[0.0] * 3, [0.0] * 2])

    def losses(logits):
        log_probs = logits.log_softmax(-1)

        def laid(values):
            return replace(like.policy, values=values)

        divergence = laid((reference.exp() * (reference - log_probs)).sum(-1))
        chosen = tokens[:, None]
        step = replace(
            like,
            policy=laid(log_probs.gather(1, chosen).squeeze(1)),
            reference=laid(reference.gather(1, chosen).squeeze(1)),
            quantities={Quantity.divergence: divergence},
        )
        return TDPO1(beta=0.7)(step).losses

    assert torch.autograd.gradcheck(losses, logits.requires_grad_())


COLLISIONS = [[-0.9, -1.5, -0.45, -1.2], [-1.3, -0.9, -1.2, -0.45, -1.1, -1.4]]


def test_wpo_published(inputs, ragged):
    """exp(1.55 / 4 + 1.35 / 6) = 1.845 is limited to 1: what is left is DPO's log(1 + e^-0.013)."""
    step = inputs(*PUBLISHED, quantities={Quantity.collision: ragged(COLLISIONS)})
    output = WPO(beta=0.01)(step)
    assert output.losses.item() == pytest.approx(0.6866683054, rel=1e-9)
    assert output.parts["weight"].tolist() == [1.0]
    assert 1.845038233 * output.losses.item() == pytest.approx(1.266929277, rel=1e-9)


@pytest.mark.parametrize("swap", [False, True], ids=["prefers the chosen", "prefers the rejected"])
def test_wpo_by_hand(inputs, ragged, gradients, swap):
    """Collisions 0.5 nearer to 0 than those published: exp(1.55 / 4 - 0.5 + 1.35 / 6 - 0.5) = e^-0.3875 = 0.679.

    The gradient is that of a fixed weight: the same at every token of a completion, and none in the collisions.
    """
    collisions = [[c + 0.5 for c in row] for row in COLLISIONS]
    sides = slice(None, None, -1 if swap else 1)
    given = ragged(collisions[sides], requires_grad=True)
    step = inputs(PUBLISHED[0][sides], PUBLISHED[1][sides], quantities={Quantity.collision: given})
    output = WPO(beta=0.4)(step)
    d, weight = -1.3 if swap else 1.3, exp(-0.3875)
    assert output.parts["weight"].tolist() == pytest.approx([weight], rel=1e-12)
    assert output.losses.tolist() == pytest.approx([weight * sp(-0.4 * d)], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx([0.4 * 0.5, -0.4 * 0.8][sides], rel=1e-12)
    g = weight * 0.4 * s(-0.4 * d)
    chosen, rejected = ([g] * len(tokens) for tokens in PUBLISHED[0][sides])
    assert_gradients(gradients(output.losses, step), chosen, rejected)
    (collision,) = torch.autograd.grad(output.losses.sum(), given.values, allow_unused=True)
    assert collision is None


def test_wpo_limits_the_product_and_not_its_factors(inputs, ragged):
    """Weights e and e^-2 make e^-1; limited one by one they would make e^-2."""
    step = inputs([[-1.0], [-3.0]], [[-1.0], [-3.0]], quantities={Quantity.collision: ragged([[-2.0], [-1.0]])})
    output = WPO(beta=0.4)(step)
    assert output.losses.item() == pytest.approx(exp(-1) * log(2), rel=1e-12)


def test_wpo_of_pairs_that_the_policy_would_not_write(inputs, ragged):
    """A weight of e^-1e4 is 0 and one of e^1e4 is 1 in float32, not infinity times 0."""
    for collision, weight in ((0.0, 0.0), (-2e4, 1.0)):
        quantities = {Quantity.collision: ragged([[collision], [collision]], torch.float32)}
        step = inputs([[-1e4], [-1e4]], [[-1.0], [-1.0]], dtype=torch.float32, quantities=quantities)
        output = WPO(beta=0.4)(step)
        assert output.parts["weight"].tolist() == [weight]
        assert output.losses.item() == pytest.approx(weight * log(2))


@pytest.mark.parametrize(
    ("kind", "valid", "key", "values"),
    [
        (LDDPO, {"beta": 0.1, "alpha": 0.5}, "alpha", [-0.1, 1.1, nan]),
        (TDPO2, {"beta": 0.1, "alpha": 0.5}, "alpha", [0.0, -0.1, inf, nan]),
        *[(kind, {"beta": 0.1}, "beta", [0.0, -1.0, inf, nan]) for kind in (SamPO, TDPO1, WPO)],
        *[(kind, {"beta": 0.1, "alpha": 0.5}, "beta", [0.0, inf, nan]) for kind in (LDDPO, TDPO2)],
    ],
)
def test_refuses(kind, valid, key, values):
    kind(**valid)
    for value in values:
        with pytest.raises(UserError, match=rf"loss\.{key} must be"):
            kind(**valid | {key: value})
