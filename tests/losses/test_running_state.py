"""Losses that follow statistics from step to step: values by hand, the state, and what a step may not depend on."""

import json
from collections import Counter
from dataclasses import replace
from math import exp, inf, log, nan, sqrt

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import BCO, DPO, AlphaDPO, BCOPair, BetaDPO, SimPO
from tests.helpers.loss_examples import EXAMPLES
from tests.helpers.loss_steps import MOVING, make_step, sequences_of, take, with_policy

every_moving_loss = pytest.mark.parametrize("loss", [EXAMPLES[name] for name in MOVING], ids=MOVING)

BETA = {"beta": 0.1, "alpha": 0.6, "dropped_share": 0.0, "decay": 0.5}
ALPHA = {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": 0.1, "decay": 0.5}


def s(x):
    return 1 / (1 + exp(-x))


def sp(x):
    return log(1 + exp(x))


def seeds(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


def rows_with(inputs, rewards, labels, **more):
    """Rows of one token with these log-ratios."""
    return inputs([[r - 9.0] for r in rewards], [[-9.0]] * len(rewards), labels, **more)


def pairs_with(inputs, margins, **more):
    """Pairs: a chosen completion of two tokens with this log-ratio together, a rejected one of one token with 0."""
    policy = [tokens for d in margins for tokens in ([d - 9.0, -3.0], [-5.0])]
    return inputs(policy, [[-9.0, -3.0], [-5.0]] * len(margins), **more)


def test_bco_by_hand(inputs, gradients):
    """Rewards log 6, log 6, log 2/9: delta is log 2, so they stand at log 3, log 3, -log 9 from it.

    S(log 3) = 3/4. Desirable: log 4/3 with slope 1/4, and far on the wrong side log 10 with slope 9/10. Undesirable,
    and preferred all the same: log 4 with slope 3/4.
    """
    loss = BCO(beta=1.0, density_weights=False)
    rewards = [log(6), log(6), log(2 / 9)]
    step = rows_with(inputs, rewards, [True, False, True], state=loss.initial_state(), seeds=seeds(1, 2, 3))
    output = loss(step)
    assert output.losses.tolist() == pytest.approx([log(4 / 3), log(4), log(10)], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx(rewards, rel=1e-12)
    assert output.parts["delta"].tolist() == pytest.approx([log(2)] * 3, rel=1e-12)
    assert output.state == pytest.approx({"delta": log(2), "count": 3}, rel=1e-12)
    assert gradients(output.losses, step) == [pytest.approx([g], rel=1e-12) for g in (-1 / 4, 3 / 4, -9 / 10)]


def test_bco_goes_on_from_its_state(inputs):
    """Three rows with mean log 2, two with 7 log 2 together: delta = 10 log 2 / 5, which half the batch would not give.

    They stand at log 3 and log 8/3 from it: log 4 for the undesirable row, log(1 + 3/8) for the desirable one.
    """
    loss = BCO(beta=1.0, density_weights=False)
    state = {"delta": log(2), "count": 3.0}
    rewards = [2 * log(2) + log(3), 5 * log(2) - log(3)]
    step = rows_with(inputs, rewards, [False, True], state=state, seeds=seeds(1, 2))
    output = loss(step)
    assert output.losses.tolist() == pytest.approx([log(4), log(11 / 8)], rel=1e-12)
    assert output.state == pytest.approx({"delta": 2 * log(2), "count": 5}, rel=1e-12)
    held_out = loss(replace(step, seeds=None))
    assert held_out.state == state
    assert held_out.losses.tolist() == pytest.approx([sp(log(6)), sp(log(3 / 16))], rel=1e-12)


def test_bco_multiplies_log_ratios_summed_over_tokens_by_beta(inputs, gradients):
    """Beta 1/2, u = 2 log 3 over two and 0 over three tokens: rewards log 3 and 0, delta (log 3) / 2."""
    loss = BCO(beta=0.5, density_weights=False)
    policy, reference = [[log(3) - 1, log(3) - 2], [-1.0, -2.0, -3.0]], [[-1.0, -2.0], [-2.0, -2.0, -2.0]]
    step = inputs(policy, reference, [True, False], state=loss.initial_state(), seeds=seeds(1, 2))
    output = loss(step)
    weight = s(-log(3) / 2)
    assert output.losses.tolist() == pytest.approx([sp(-log(3) / 2)] * 2, rel=1e-12)
    first, second = gradients(output.losses, step)
    assert first == pytest.approx([-0.5 * weight] * 2, rel=1e-12)
    assert second == pytest.approx([0.5 * weight] * 3, rel=1e-12)


def test_bco_over_a_run_has_the_mean_of_all_rewards(inputs):
    """Steps of unlike sizes: a mean of the steps' means would be another number."""
    loss, state, seen = BCO(beta=0.3, density_weights=False), {"delta": 0.0, "count": 0.0}, []
    for rewards in ([4.0], [-1.0, 2.0, 0.5], [-8.0, 1.0]):
        seen += [0.3 * r for r in rewards]
        labels = [True] * len(rewards)
        state = loss(rows_with(inputs, rewards, labels, state=state, seeds=seeds(*range(len(rewards))))).state
        assert state == pytest.approx({"delta": sum(seen) / len(seen), "count": len(seen)}, rel=1e-12)


def test_bco_with_a_fixed_delta_against_finite_differences():
    """So many rows have been seen that those of a step add nothing to the mean."""
    loss = EXAMPLES["bco"]
    step = replace(make_step(loss), state={"delta": 0.3, "count": 1e300})

    def losses(values):
        return loss(with_policy(step, values)).losses

    assert torch.autograd.gradcheck(losses, step.policy.values, rtol=1e-6, atol=1e-8)
    assert loss(step).state == step.state


def test_bco_without_a_shift_is_the_loss_of_pairs(inputs):
    loss = BCO(beta=0.3, density_weights=False)
    policy, reference = [[-1.0, -2.0], [-0.5], [-3.0], [-1.5, -0.25]], [[-2.0, -2.5], [-1.5], [-1.0], [-1.0, -2.0]]
    rows = loss(inputs(policy, reference, [True, False] * 2, state={"delta": 0.0, "count": 4.0}))
    pairs = BCOPair(beta=0.3)(inputs(policy, reference))
    assert (rows.losses[0::2] + rows.losses[1::2]).tolist() == pytest.approx(pairs.losses.tolist(), rel=1e-14)


def test_beta_dpo_by_hand(inputs, gradients):
    """Margins 3, -1, 1: mean 1 and deviation 2, so m = 1/2 and s = 1 with a decay of 1/2 from 0.

    beta = 0.1 (1 + 0.6 (1 - 1/2)) = 0.13. The policy prefers the wrong answer in the second pair.
    """
    loss = BetaDPO(**BETA)
    step = pairs_with(inputs, [3.0, -1.0, 1.0], state=loss.initial_state(), seeds=seeds(1, 2, 3))
    output = loss(step)
    assert output.losses.tolist() == pytest.approx([sp(-0.39), sp(0.13), sp(-0.13)], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx([0.3, 0, -0.1, 0, 0.1, 0], abs=1e-12)
    assert output.parts["beta"].tolist() == pytest.approx([0.13] * 3, rel=1e-12)
    assert output.parts["kept"].tolist() == [1, 1, 1]
    assert output.state == pytest.approx({"mean": 0.5, "std": 1.0}, rel=1e-12)
    for i, d in enumerate((3, -1, 1)):
        chosen, rejected = gradients(output.losses, step)[2 * i : 2 * i + 2]
        assert chosen == pytest.approx([-0.13 * s(-0.13 * d)] * 2, rel=1e-12)
        assert rejected == pytest.approx([0.13 * s(-0.13 * d)], rel=1e-12)


def test_beta_dpo_outside_training(inputs):
    """Nothing is drawn and nothing moves: M = 1, m = 3/4 give 0.1 (1 + 0.6 / 4) = 0.115, with every pair in it."""
    loss, state = BetaDPO(**BETA | {"dropped_share": 0.5}), {"mean": 0.75, "std": 2.0}
    output = loss(pairs_with(inputs, [3.0, -1.0, 1.0], state=state))
    assert output.losses.tolist() == pytest.approx([sp(-0.345), sp(0.115), sp(-0.115)], rel=1e-12)
    assert output.parts["kept"].tolist() == [1, 1, 1]
    assert output.state == state


def test_beta_dpo_has_a_least_beta(inputs):
    """0.1 (1 + 0.6 (1 - 50)) is negative."""
    output = BetaDPO(**BETA)(pairs_with(inputs, [3.0, -1.0, 1.0], state={"mean": 50.0, "std": 1.0}))
    assert output.parts["beta"].tolist() == [1e-3] * 3
    assert output.losses.tolist() == pytest.approx([sp(-0.003), sp(0.001), sp(-0.001)], rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_beta_dpo_is_the_mean_over_the_kept_pairs(inputs, gradients, seed):
    """Two of four stay: theirs count twice, the others have neither loss nor gradient, and beta is from them alone."""
    loss = BetaDPO(**BETA | {"dropped_share": 0.5})
    margins = [3.0, -1.0, 1.0, 2.0]
    numbers = [1000 * seed + i for i in range(4)]
    step = pairs_with(inputs, margins, state=loss.initial_state(), seeds=seeds(*numbers))
    output = loss(step)
    kept = [d for d, share in zip(margins, output.parts["kept"].tolist(), strict=True) if share]
    assert len(kept) == 2
    assert output.state["mean"] == pytest.approx(1.25 / 2, rel=1e-12)
    beta = 0.1 * (1 + 0.6 * (sum(kept) / 2 - 0.625))
    assert output.parts["beta"].tolist() == pytest.approx([beta] * 4, rel=1e-12)
    assert output.losses.mean().item() == pytest.approx(sum(sp(-beta * d) for d in kept) / 2, rel=1e-12)
    for i, d in enumerate(margins):
        weight = 2 * beta * s(-beta * d) if d in kept else 0
        chosen, rejected = gradients(output.losses, step)[2 * i : 2 * i + 2]
        assert chosen == pytest.approx([-weight] * 2, rel=1e-12)
        assert rejected == pytest.approx([weight], rel=1e-12)


@pytest.mark.parametrize(
    ("share", "num_pairs", "kept"), [(0.2, 5, 4), (0.2, 7, 5), (0.9, 20, 2), (0.3, 10, 7), (0.9, 2, 1)]
)
def test_how_many_pairs_beta_dpo_keeps(inputs, share, num_pairs, kept):
    """n (1 - share) rounded down, though 20 (1 - 0.9) is below 2 in floating point, and never none."""
    loss = BetaDPO(**BETA | {"dropped_share": share})
    step = pairs_with(inputs, range(num_pairs), state=loss.initial_state(), seeds=seeds(*range(num_pairs)))
    assert loss(step).parts["kept"].sum().item() == kept


def draws(inputs, share, times):
    """How often each set of pairs was kept; with a decay of 0, m and s are 1 and sqrt(7)."""
    loss = BetaDPO(**BETA | {"dropped_share": share, "decay": 0.0})
    step = pairs_with(inputs, [-2.0, 2.0, 3.0], state=loss.initial_state())
    found = Counter()
    for i in range(times):
        kept = loss(replace(step, seeds=seeds(3 * i, 3 * i + 1, 3 * i + 2))).parts["kept"]
        found[tuple(kept.nonzero().flatten().tolist())] += 1 / times
    return found


def test_beta_dpo_draws_by_weight_and_without_replacement(inputs):
    """Weights exp(-z^2 / 2) with z^2 = 9/7, 1/7, 4/7; the second of two is drawn from what the first left.

    2000 draws: a share's standard deviation is at most 0.012.
    """
    weights = [exp(-9 / 14), exp(-1 / 14), exp(-4 / 14)]
    p = [w / sum(weights) for w in weights]
    one, two = draws(inputs, 0.6, 2000), draws(inputs, 0.3, 2000)
    for i in range(3):
        assert one[(i,)] == pytest.approx(p[i], abs=0.045)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert two[(i, j)] == pytest.approx(p[i] * p[j] / (1 - p[i]) + p[i] * p[j] / (1 - p[j]), abs=0.045)


def test_beta_dpo_draws_where_every_weight_is_0_in_floating_point(inputs):
    """A deviation of 1e-6 from many steps: the nearest pairs stay, as weights of e^-1e12 and less say."""
    loss = BetaDPO(**BETA | {"dropped_share": 0.5, "decay": 1 - 1e-9})
    margins = [4.0, 1.0, 3.0, -2.0]
    step = pairs_with(inputs, margins, state={"mean": 0.0, "std": 1e-6}, seeds=seeds(1, 2, 3, 4))
    assert loss(step).parts["kept"].tolist() == [0, 1, 0, 1]


def test_alpha_dpo_by_hand(inputs, gradients):
    """Mean log-ratios 1.5 and -0.5 against 0: m = 1/4 and s = sqrt(2) / 2 with a decay of 1/2 from 0.

    They stand 5/4 sqrt(2) and -3/4 sqrt(2) from m in deviations: margins 0.5 + 0.125 sqrt(2), 0.5 - 0.075 sqrt(2).
    Per token the policy prefers the rejected completion of the second pair.
    """
    loss = AlphaDPO(**ALPHA)
    step = pairs_with(inputs, [3.0, -1.0], state=loss.initial_state(), seeds=seeds(1, 2))
    output = loss(step)
    margins = [0.5 + 0.125 * sqrt(2), 0.5 - 0.075 * sqrt(2)]
    # Policy means: (3 - 12) / 2 and (-1 - 12) / 2 of the chosen, -5 of the rejected completions.
    excess = [2 * (margins[0] - 0.5), 2 * (margins[1] + 1.5)]
    assert output.losses.tolist() == pytest.approx([sp(x) for x in excess], rel=1e-12)
    assert output.parts["margin"].tolist() == pytest.approx(margins, rel=1e-12)
    assert output.rewards.tolist() == pytest.approx([2 * (-4.5 - 0.15), -10, 2 * (-6.5 + 0.05), -10], rel=1e-12)
    assert output.state == pytest.approx({"mean": 0.25, "std": sqrt(2) / 2}, rel=1e-12)
    first, second, third, fourth = gradients(output.losses, step)
    assert first == pytest.approx([-2 * s(excess[0]) / 2] * 2, rel=1e-12)
    assert second == pytest.approx([2 * s(excess[0])], rel=1e-12)
    assert third == pytest.approx([-2 * s(excess[1]) / 2] * 2, rel=1e-12)
    assert fourth == pytest.approx([2 * s(excess[1])], rel=1e-12)


def test_alpha_dpo_outside_training(inputs):
    """(1.5 - 1) / 2 and (-0.5 - 1) / 2 of a deviation: margins 0.525 and 0.425; nothing moves."""
    loss, state = AlphaDPO(**ALPHA), {"mean": 1.0, "std": 2.0}
    output = loss(pairs_with(inputs, [3.0, -1.0], state=state))
    assert output.parts["margin"].tolist() == pytest.approx([0.525, 0.425], rel=1e-12)
    assert output.state == state


def test_where_they_start_from(inputs):
    """Before the first step, outside training: SimPO; and DPO where beta does not move."""
    step = pairs_with(inputs, [3.0, -1.0, 0.5], state={"mean": 0.0, "std": 0.0})
    simpo = SimPO(beta=2.0, gamma_beta_ratio=0.5)(step).losses.tolist()
    assert AlphaDPO(**ALPHA)(step).losses.tolist() == pytest.approx(simpo, rel=1e-14)
    dpo = DPO(beta=0.1, label_smoothing=0.0)(step).losses.tolist()
    assert BetaDPO(**BETA | {"alpha": 0.0, "dropped_share": 0.5})(step).losses.tolist() == pytest.approx(dpo, rel=1e-14)


@pytest.mark.parametrize("loss", [BetaDPO(**BETA | {"dropped_share": 0.5}), AlphaDPO(**ALPHA)], ids=["beta", "alpha"])
def test_a_first_step_of_a_policy_that_is_its_reference(inputs, loss):
    """All margins are 0 and so is their deviation; 0 / 0 would be in the state for good."""
    output = loss(pairs_with(inputs, [0.0, 0.0], state=loss.initial_state(), seeds=seeds(1, 2)))
    assert output.losses.isfinite().all()
    assert output.state == {"mean": 0.0, "std": 0.0}


@pytest.mark.parametrize("loss", [BetaDPO(**BETA), AlphaDPO(**ALPHA)], ids=["beta", "alpha"])
def test_moving_averages_over_a_run(inputs, loss):
    """After k steps: 1/2 of the last, 1/4 of the one before it, and so on; the weights' sum is below 1."""
    state = loss.initial_state()
    steps = [(1.0, 3.0), (-2.0, 4.0), (0.5, 0.5)]
    for margins in steps:
        state = loss(pairs_with(inputs, margins, state=state, seeds=seeds(1, 2))).state
    # Means 2, 1, 0.5, deviations sqrt(2), 3 sqrt(2), 0 of sums; the chosen completions have two tokens.
    unit = 1 if isinstance(loss, BetaDPO) else 0.5
    mean, std = 0.5 / 2 + 1 / 4 + 2 / 8, 3 * sqrt(2) / 4 + sqrt(2) / 8
    assert state == pytest.approx({"mean": unit * mean, "std": unit * std}, rel=1e-12)


def run(loss, first, last, state):
    outputs = []
    for number in range(first, last):
        outputs.append(loss(replace(make_step(loss, seed=number), state=state)))
        state = outputs[-1].state
    return outputs, state


@every_moving_loss
def test_a_run_goes_on_from_a_saved_state(loss):
    """Through JSON, as a checkpoint keeps it, and to the last bit."""
    whole, end = run(loss, 0, 6, loss.initial_state())
    _, middle = run(loss, 0, 3, loss.initial_state())
    rest, resumed = run(loss, 3, 6, json.loads(json.dumps(middle)))
    assert resumed == end
    for ours, theirs in zip(rest, whole[3:], strict=True):
        assert torch.equal(ours.losses, theirs.losses)
    restarted, _ = run(loss, 3, 6, loss.initial_state())
    assert not torch.equal(restarted[-1].losses, whole[-1].losses)


@every_moving_loss
def test_the_order_of_the_items_does_not_change_a_bit(loss):
    step = replace(make_step(loss), state=run(loss, 1, 4, loss.initial_state())[1])
    order = [3, 0, 4, 1, 2]
    whole, permuted = loss(step), loss(take(step, loss, order))
    assert permuted.state == whole.state
    assert torch.equal(permuted.losses, whole.losses[order])
    assert torch.equal(permuted.rewards, whole.rewards[sequences_of(step, loss, order)])


@every_moving_loss
def test_only_the_state_of_a_step_moves(loss):
    """The same call twice is the same, outside training too, and what it was given is left as it was."""
    step = make_step(loss)
    given = dict(step.state)
    for inputs in (step, replace(step, seeds=None)):
        once, again = loss(inputs), loss(inputs)
        assert torch.equal(once.losses, again.losses)
        assert once.state == again.state
    assert step.state == given
    assert loss(replace(step, seeds=None)).state == given
    assert loss(step).state != given


@pytest.mark.parametrize(
    ("cls", "settings", "key"),
    [
        (BCO, {"beta": 0.0, "density_weights": False}, "beta"),
        (BCO, {"beta": inf, "density_weights": True}, "beta"),
        (BetaDPO, BETA | {"beta": nan}, "beta"),
        (BetaDPO, BETA | {"beta": 1e-4}, "beta"),
        (BetaDPO, BETA | {"alpha": -0.1}, "alpha"),
        (BetaDPO, BETA | {"alpha": 0.0}, "alpha"),
        (BetaDPO, BETA | {"dropped_share": 1.0}, "dropped_share"),
        (BetaDPO, BETA | {"dropped_share": -0.1}, "dropped_share"),
        (BetaDPO, BETA | {"decay": 1.0}, "decay"),
        (AlphaDPO, ALPHA | {"beta": -1.0}, "beta"),
        (AlphaDPO, ALPHA | {"gamma_beta_ratio": -0.1}, "gamma_beta_ratio"),
        (AlphaDPO, ALPHA | {"gamma_beta_ratio": inf}, "gamma_beta_ratio"),
        (AlphaDPO, ALPHA | {"alpha": 0.0}, "alpha"),
        (AlphaDPO, ALPHA | {"alpha": 1.0}, "alpha"),
        (AlphaDPO, ALPHA | {"decay": -0.5}, "decay"),
    ],
)
def test_settings_out_of_range_are_refused(cls, settings, key):
    with pytest.raises(UserError, match=rf"^loss\.{key} must be .*, not "):
        cls(**settings)
