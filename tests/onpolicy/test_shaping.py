"""What length costs: by hand, and against every penalty of a fine grid."""

import numpy as np
import pytest

from alignment.onpolicy.pairs import build
from alignment.onpolicy.shaping import balanced_penalty, shaped
from tests.helpers.drawn import drawn, pairs_config, words


def test_each_token_costs_as_much():
    [one] = shaped([drawn({"aZ": 1.0, "bbbZ": 2.0, "cc": None})], 0.25)
    assert one.scores == [0.5, 1.0, None]


def test_the_penalty_by_hand():
    """Answers of 2, 3 and 6 tokens. The second beats the third from 3.3 / 3 a token on, the first the third from
    4.8 / 4 on, and the first the second from 1.5 on: the best is longer than the worst by 4 tokens, then 1, -3, -4."""
    one = drawn({"aZ": 0.0, "aaZ": 1.5, "aaaaaZ": 4.8})
    gaps = {1.0: 4, 1.15: 1, 1.3: -3, 2.0: -4}
    for penalty, gap in gaps.items():
        [pair] = build(shaped([one], penalty), pairs_config("best_vs_worst")).groups
        assert np.diff([len(tokens) for tokens in pair.completions])[0] == -gap
    assert balanced_penalty([one]) == pytest.approx((1.1 + 1.2) / 2)


def random_prompts(rng, prompts, answers):
    found = []
    for number in range(prompts):
        texts = {}
        while len(texts) < answers:
            length = int(rng.integers(1, 20))
            text = "".join(chr(97 + letter) for letter in rng.integers(0, 26, length)) + "Z"
            texts[text] = float(0.3 * length + rng.normal())
        found.append(drawn(texts, prompt=f"ask {number}"))
    return found


def gap_of(prompts, penalty):
    pairs = build(shaped(prompts, penalty), pairs_config("best_vs_worst")).groups
    return np.mean([len(pair.completions[0]) - len(pair.completions[1]) for pair in pairs])


@pytest.mark.parametrize("seed", range(2))
def test_no_other_penalty_makes_both_sides_more_alike(seed):
    """Rewards that grow by 0.3 a token: the pairs that are made with the penalty are as long on both sides in the mean,
    to less than a token, and no penalty of a grid is better; without one the chosen are much longer."""
    prompts = random_prompts(np.random.default_rng(seed), 20, 4)
    found = balanced_penalty(prompts)
    assert 0.15 < found < 0.6 and gap_of(prompts, 0.0) > 5
    best = min(abs(gap_of(prompts, penalty)) for penalty in np.linspace(0, 1, 101))
    assert abs(gap_of(prompts, found)) <= best + 1e-12 and best < 1
    assert found == balanced_penalty(prompts[::-1])


def test_what_counts():
    """Cut, empty and unscored answers and prompts with one other answer do not. Where short answers win, and where all
    are as long, nothing is taken off."""
    both = [
        drawn({"aZ": 0.0, "aaaaaZ": 4.0}),
        drawn({"bZ": 0.0, "bbZ": 2.0}),
    ]  # changes at 1 and 2, from 5 to -3 tokens
    assert balanced_penalty(both) == 1.5
    more = [drawn({"bZ": 0.0, "bbbbbb": 9.0}), drawn({"cZ": 0.0, "cccccZ": None}), drawn({"dZ": 5.0, "Z": 0.0})]
    assert balanced_penalty([*both, *more]) == 1.5
    assert balanced_penalty([drawn({"aZ": 1.0, "aaaZ": 0.0})]) == 0.0
    assert balanced_penalty([drawn({"aZ": 1.0, "bZ": 0.0})]) == 0.0
    assert balanced_penalty([]) == 0.0


def test_what_is_trained_on_has_the_scores_that_count():
    [pair] = build(shaped([drawn({"aaZ": 1.0, "aaaaZ": 2.0})], 1.0), pairs_config("best_vs_worst")).groups
    assert words(pair) == ("aaZ", "aaaaZ") and pair.scores == (-2.0, -3.0)
