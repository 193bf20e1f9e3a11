"""What judgements say of policies: closed forms, simulations, and the mistakes that each method must not make."""

import math

import numpy as np
import pytest

from alignment.evaluation.intervals import Z, tango_interval
from alignment.evaluation.judges.base import win_rate
from alignment.evaluation.statistics.bradley_terry import strengths
from alignment.evaluation.statistics.clusters import effective_count
from alignment.evaluation.statistics.length_control import length_controlled
from alignment.evaluation.statistics.prediction_powered import mended_mean


def sigmoid(z):
    return 1 / (1 + np.exp(-np.asarray(z, dtype=float)))


# Several answers to a prompt


def test_one_answer_a_prompt_is_independent():
    outcomes = [1, 0, -1, 1, 1, 0]
    assert effective_count(outcomes, range(6)) == 6
    assert win_rate(outcomes, range(6)) == win_rate(outcomes)


def test_equal_answers_to_a_prompt_count_about_once():
    """By hand: G prompts of K equal outcomes give n_eff = K G (G - 1) / (K G - 1), a little below G."""
    outcomes, prompts = np.repeat([1, -1, 1, 1, -1], 4), np.repeat(np.arange(5), 4)
    assert effective_count(outcomes, prompts) == pytest.approx(20 * 4 / 19)
    found = win_rate(outcomes.tolist(), prompts.tolist())
    assert (found.low, found.high) == pytest.approx(tango_interval(0.6, 0.0, 80 / 19))


def test_what_varies_within_prompts_alone_is_never_worth_more_than_it_is():
    assert effective_count([1, -1] * 6, np.repeat(range(6), 2).tolist()) == 12
    assert effective_count([0] * 12, np.repeat(range(6), 2).tolist()) == 6  # nothing varies: nothing is known
    assert effective_count([1, -1], ["x", "x"]) == 1
    with pytest.raises(ValueError, match="at least one item"):
        effective_count([], [])


def test_answers_of_a_prompt_taken_for_independent_give_intervals_that_are_too_narrow():
    """40 prompts of 6 answers, whose win rate differs from prompt to prompt, in mean 0.6."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 6).tolist()
    covered = {"clustered": 0, "planted": 0}
    for _ in range(400):
        wins = np.repeat(rng.beta(1.2, 0.8, 40), 6) > rng.random(240)
        outcomes = (2 * wins.astype(int) - 1).tolist()
        for name, found in (("clustered", win_rate(outcomes, prompts)), ("planted", win_rate(outcomes))):
            covered[name] += found.low <= 0.6 <= found.high
    assert covered["clustered"] / 400 == pytest.approx(0.95, abs=0.025)
    assert covered["planted"] / 400 < 0.8


# Length


def pairs_by_length(rng, count, phi, theta=0.0, longer=0.6):
    """Gaps of which the first answer has the longer end, and wins by a judge that pays phi for length."""
    gaps = 80 * rng.normal(longer, 1, count)
    wins = rng.random(count) < sigmoid(theta + phi * np.tanh(gaps / gaps.std(ddof=1)))
    return wins.astype(float), gaps


def test_a_judge_of_length_alone_gives_one_half():
    rng = np.random.default_rng(1)
    found, raw = [], []
    for _ in range(4):
        shares, gaps = pairs_by_length(rng, 600, phi=2.5)
        found.append(length_controlled(shares, gaps, range(600)).rate)
        raw.append(shares.mean())
    assert min(raw) > 0.62
    assert np.mean(found) == pytest.approx(0.5, abs=0.03)
    assert all(abs(rate - 0.5) < 0.08 for rate in found)


def test_a_judge_that_does_not_heed_length_gives_the_plain_win_rate():
    """Exactly: theta alone is the logit of the mean, and it is not penalised."""
    rng = np.random.default_rng(2)
    shares = (rng.random(300) < 0.7).astype(float)
    assert length_controlled(shares, np.full(300, 12.0), range(300)).rate == pytest.approx(shares.mean(), abs=1e-6)
    found = length_controlled(shares, rng.normal(40, 80, 300), range(300))
    assert found.rate == pytest.approx(shares.mean(), abs=0.03)
    assert found.low < shares.mean() < found.high and abs(found.length) < 0.5


def test_the_coefficients_are_found_again():
    shares, gaps = pairs_by_length(np.random.default_rng(3), 3000, phi=1.5, theta=0.4)
    found = length_controlled(shares, gaps, range(3000))
    assert found.length == pytest.approx(1.5, abs=0.2)
    assert found.rate == pytest.approx(sigmoid(0.4), abs=0.03)
    assert found.low < found.rate < found.high and found.high - found.low < 0.08


def test_difficulties_take_part():
    """S is no line: the mean over prompts of S(theta + psi gamma) is not S(theta)."""
    rng = np.random.default_rng(4)
    gamma = rng.normal(0, 1.5, 2000)
    shares = (rng.random(2000) < sigmoid(0.8 + gamma)).astype(float)
    found = length_controlled(shares, rng.normal(0, 9, 2000), range(2000), gamma)
    assert found.difficulty == pytest.approx(1, abs=0.15)
    assert found.rate == pytest.approx(sigmoid(0.8 + gamma).mean(), abs=0.03)


def test_swapping_the_models_gives_the_rest():
    shares, gaps = pairs_by_length(np.random.default_rng(5), 200, phi=1.0, theta=0.5)
    prompts = np.repeat(range(100), 2).tolist()
    there = length_controlled(shares, gaps, prompts)
    back = length_controlled(1 - shares, -gaps, prompts)
    assert there.rate == pytest.approx(1 - back.rate, abs=1e-6) and there.length == pytest.approx(back.length)


def test_folds_are_of_prompts():
    """Each prompt has two equal answers, and its gap is noise: folds of pairs would see the same noise twice."""
    rng = np.random.default_rng(6)
    gaps, wins = rng.normal(0, 50, 40), (rng.random(40) < 0.5).astype(float)
    together = length_controlled(np.repeat(wins, 2), np.repeat(gaps, 2), np.repeat(range(40), 2).tolist())
    once = length_controlled(wins, gaps, range(40))
    assert together.length == pytest.approx(once.length, abs=0.05)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_nothing_but_wins_or_ties_has_a_rate_and_an_interval(share):
    found = length_controlled([share] * 20, range(20), range(20))
    assert found.rate == pytest.approx(share, abs=1e-3)
    assert found.low < 0.5 < found.high or (0 < found.high - found.low < 0.4)


# Bradley and Terry


def test_two_policies_have_the_logit_of_the_win_rate():
    shares = [1.0] * 6 + [0.5] * 2 + [0.0] * 2
    first, second = strengths([(0, 1)] * 10, shares, range(10), 2)
    assert first.logit - second.logit == pytest.approx(math.log(0.7 / 0.3))
    assert (first.rate, second.rate) == pytest.approx((0.5, 0.3))
    assert first.rate_low == first.rate_high == 0.5 and second.rate_low < 0.3 < second.rate_high < 0.6


def test_strengths_are_found_again_also_by_way_of_others():
    """No pair of 2 with 3 was compared."""
    rng = np.random.default_rng(7)
    true = np.array([0.0, 0.5, -0.7, 1.0])
    pairs = [(0, 1), (0, 2), (1, 3), (2, 0)] * 3000
    shares = [float(rng.random() < sigmoid(true[i] - true[j])) for i, j in pairs]
    found = strengths(pairs, shares, [n // 4 for n in range(len(pairs))], 4)
    assert [one.logit for one in found] == pytest.approx(true - true.mean(), abs=0.1)
    assert all(one.low - 0.05 < t < one.high + 0.05 for one, t in zip(found, true - true.mean(), strict=True))
    assert sum(one.logit for one in found) == pytest.approx(0, abs=1e-9)


def test_the_order_of_a_pair_and_of_the_policies_does_not_matter():
    pairs, shares = [(0, 1), (1, 2), (2, 0), (0, 1)] * 5, [1.0, 0.5, 0.0, 0.0] * 5
    prompts = [n // 4 for n in range(20)]
    found = strengths(pairs, shares, prompts, 3)
    turned = strengths([(b, a) for a, b in pairs], [1 - share for share in shares], prompts, 3)
    assert [one.logit for one in found] == pytest.approx([one.logit for one in turned])
    moved = strengths([(2 - a, 2 - b) for a, b in pairs], shares, prompts, 3)
    assert [one.logit for one in found] == pytest.approx([one.logit for one in moved[::-1]])


def test_a_policy_that_never_loses_is_the_strongest_with_a_wide_interval():
    found = strengths([(0, 1), (1, 2)] * 8, [0.0, 1.0] * 8, [n // 2 for n in range(16)], 3)
    assert found[1].logit > max(found[0].logit, found[2].logit) + 5
    assert found[1].rate > 0.99 and found[1].rate_low < 0.95
    with pytest.raises(ValueError, match="no common scale"):
        strengths([(0, 1), (2, 3)], [1.0, 1.0], [0, 1], 4)


def test_all_pairs_of_a_prompt_are_drawn_together():
    """Ten copies of a comparison in one prompt are one comparison."""
    rng = np.random.default_rng(8)
    wins = (rng.random(30) < 0.6).astype(float)
    once = strengths([(0, 1)] * 30, wins, range(30), 2)[1]
    copied = strengths([(0, 1)] * 300, np.repeat(wins, 10), np.repeat(range(30), 10).tolist(), 2)[1]
    assert copied.rate == pytest.approx(once.rate)
    assert copied.rate_high - copied.rate_low == pytest.approx(once.rate_high - once.rate_low, rel=0.35)


# A judge mended by people


def biased(rng, count):
    """People's verdicts, 0.45 in mean, and those of a judge who takes three of ten losses for wins: 0.615."""
    people = rng.random(count) < 0.45
    return people.astype(float), (people | (rng.random(count) < 0.3)).astype(float)


def test_labels_mend_a_biased_judge():
    rng = np.random.default_rng(9)
    covered = {"mended": 0, "raw": 0}
    width = {"mended": 0.0, "labels": 0.0}
    for _ in range(800):
        people, judge = biased(rng, 1000)
        found = mended_mean(people[:150], judge[:150], judge[150:])
        covered["mended"] += found.low <= 0.45 <= found.high
        low, high = tango_interval(judge.mean(), 0.0, 1000)
        covered["raw"] += low <= 0.45 <= high
        width["mended"] += found.high - found.low
        width["labels"] += 2 * Z * people[:150].std(ddof=1) / math.sqrt(150)
    assert 0.93 <= covered["mended"] / 800 <= 0.97
    assert covered["raw"] == 0
    assert width["mended"] < 0.85 * width["labels"]


def test_a_judge_that_tells_nothing_leaves_the_labels_alone():
    rng = np.random.default_rng(10)
    people = (rng.random(100) < 0.5).astype(float)
    found = mended_mean(people, np.full(100, 0.5), np.full(400, 0.5))
    half = Z * people.std(ddof=1) / 10
    assert found.power == 0 and found.mean == people.mean()
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))


def test_a_perfect_judge_counts_fully_where_others_are_many():
    """By hand: the power is 1 / (1 + n / N), and the mean is that of all."""
    rng = np.random.default_rng(11)
    truth = (rng.random(4000) < 0.3).astype(float)
    found = mended_mean(truth[:100], truth[:100], truth[100:])
    assert found.power == pytest.approx(3900 / 4000, rel=0.15)
    assert found.mean == pytest.approx(truth.mean(), abs=0.01) and found.labelled == 100 and found.items == 4000
    with pytest.raises(ValueError, match="two labelled items"):
        mended_mean([1.0], [1.0], [1.0, 0.0])
