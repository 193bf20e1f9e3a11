"""Each choice and each filter, on answers whose pairs were written down by hand."""

from dataclasses import replace

import numpy as np
import pytest

from alignment.config.onpolicy import DropCut
from alignment.errors import UserError
from alignment.evaluation.judges.base import Preference
from alignment.evaluation.sampling.answer import Answer, Finish
from alignment.onpolicy.counts import Counts
from alignment.onpolicy.held_out import HeldOutPrompts
from alignment.onpolicy.pairs import build, win_matrix, win_shares
from tests.helpers.drawn import answer, drawn, ids, pairs_config, words

FOUR = {"aZ": 0.2, "bbZ": 0.9, "cZ": 0.5, "dddZ": 0.2}


def made(one, choice, **more):
    """What an answer's group says, sorted, and what was dropped."""
    built = build([one], pairs_config(choice, **more))
    return sorted(map(words, built.groups)), {k: v for k, v in built.counts.dropped.items() if v}


# Choices


def test_best_vs_rest():
    assert made(drawn(FOUR), "best_vs_rest") == ([("bbZ", "aZ"), ("bbZ", "cZ"), ("bbZ", "dddZ")], {})


def test_best_vs_worst_takes_one_of_the_equally_bad():
    found, dropped = made(drawn(FOUR), "best_vs_worst")
    assert len(found) == 1 and found[0] in [("bbZ", "aZ"), ("bbZ", "dddZ")] and not dropped


def test_all_pairs_but_the_tie():
    rest = [("bbZ", "aZ"), ("bbZ", "cZ"), ("bbZ", "dddZ"), ("cZ", "aZ"), ("cZ", "dddZ")]
    assert made(drawn(FOUR), "all_pairs") == (rest, {"tie": 1})


def test_best_vs_random_is_drawn_by_the_prompt_and_the_seed():
    """Each of the others is taken, about equally often, and the same one whatever else is built."""
    ones = [drawn({"aZ": 0, "bZ": 3, "cZ": 1, "dZ": 2}, prompt=f"p{i}") for i in range(300)]
    config = pairs_config("best_vs_random")
    found = [words(group) for group in build(ones, config, seed=7).groups]
    assert {chosen for chosen, _ in found} == {"bZ"}
    rejected = [other for _, other in found]
    assert all(70 < rejected.count(text) < 130 for text in ("aZ", "cZ", "dZ"))
    assert [words(build([one], config, seed=7).groups[0]) for one in ones] == found
    copies = [replace(one, prompt=one.prompt.copy()) for one in ones[::-1]]
    assert [words(group) for group in build(copies, config, seed=7).groups] == found[::-1]
    assert [words(group) for group in build(ones, config, seed=8).groups] != found


def test_mu_minus_two_sigma():
    """All but -2, -4 and -8 are 0: mean -0.875, deviation sqrt(84 / 16 - 0.875^2) = 2.118; less two, -5.110.

    Less one it would be -2.993, nearest to -2.
    """
    low = {"bestZ": 0.0001, "worstZ": -8.0, "lowZ": -4.0, "lowishZ": -2.0}
    scores = {f"{letter}Z": 0.0 for letter in "abcdefghijkl"} | low
    found, dropped = made(drawn(scores), "mu_minus_2sigma")
    assert found == [("bestZ", "lowZ")] and not dropped
    assert made(drawn(scores), "best_vs_worst")[0] == [("bestZ", "worstZ")]


def test_mu_minus_two_sigma_needs_16_answers():
    few = drawn({f"{letter}Z": float(k) for k, letter in enumerate("abcdefghijklmno")})
    with pytest.raises(UserError, match=r"choice=mu_minus_2sigma needs at least 16 answers to a prompt, not 15"):
        made(few, "mu_minus_2sigma")
    unreadable = replace(few, answers=[*few.answers, answer("pZ")], texts=[*few.texts, "p"], scores=[*few.scores, None])
    assert made(unreadable, "mu_minus_2sigma") == ([], {"unreadable": 1})


def test_gold_vs_sample():
    one = drawn(None, "aZ", "goldZ", "bb", "aZ", gold=ids("goldZ"))
    built = build([one], pairs_config("gold_vs_sample"))
    assert sorted(map(words, built.groups)) == [("goldZ", "aZ"), ("goldZ", "bb")]
    assert built.counts.identical == 1 and built.counts.repeated == 1 and built.counts.drawn == 4
    assert all(group.scores is None and group.labels is None for group in built.groups)
    with pytest.raises(UserError, match="needs an answer of the data to each prompt, and x:3 has none"):
        made(drawn(None, "aZ", source="x:3"), "gold_vs_sample")


def test_sample_vs_weak():
    """The policy's are chosen; log-probs of the weak model are not taken for the policy's."""
    one = drawn(None, "aZ", "bZ", weak=drawn(None, "vZ", "wZ"))
    built = build([one], pairs_config("sample_vs_weak"))
    assert {chosen for chosen, _ in map(words, built.groups)} == {"aZ", "bZ"}
    assert {rejected for _, rejected in map(words, built.groups)} == {"vZ", "wZ"}
    assert sorted(built.logps) == sorted(group.key(0) for group in built.groups)
    with pytest.raises(UserError, match="as many answers of the weaker model as of the policy, and a prompt has 1 and"):
        made(drawn(None, "aZ", "bZ", weak=drawn(None, "vZ")), "sample_vs_weak")


def test_a_list_is_ranked_with_its_scores():
    scores = {"aZ": 1.0, "bZ": 3.0, "cut": 9.0, "Z": 8.0, "cZ": None, "dZ": 1.0, "eZ": 2.0}
    built = build([drawn(scores, source="s:1", dataset="d")], pairs_config("list"))
    [group] = built.groups
    assert words(group)[:2] == ("bZ", "eZ") and sorted(words(group)[2:]) == ["aZ", "dZ"]
    assert group.scores == (3.0, 2.0, 1.0, 1.0) and group.source == "s:1" and group.dataset == "d"
    assert built.counts.drawn == built.counts.kept == 1


@pytest.mark.parametrize(
    ("scores", "more", "reason"),
    [
        ({"aZ": 1.0, "bZ": 1.0}, {}, "tie"),
        ({"aZ": 1.0, "bZ": 1.4}, {"min_margin": 0.5}, "margin"),
        ({"aZ": 1.0, "bZ": None}, {}, "unreadable"),
        ({"aZ": 1.0, "Z": 2.0}, {}, "empty"),
        ({"aZ": 1.0, "b": 2.0}, {}, "cut"),
        ({"aZ": 1.0, "bbbZ": 2.0}, {"max_length_gap": 1}, "length"),
    ],
)
def test_why_a_list_is_dropped(scores, more, reason):
    assert made(drawn(scores), "list", **more) == ([], {reason: 1})


def test_kto_rows():
    scores = {"aZ": 0.9, "bZ": 0.1, "cut": 0.8, "low": 0.2, "dZ": 0.5, "eZ": None, "Z": 0.0, "fZ": 0.55}
    built = build([drawn(scores)], pairs_config("kto", threshold=0.5, min_margin=0.06))
    assert {words(group)[0]: group.labels for group in built.groups} == {
        "aZ": (True,),
        "bZ": (False,),
        "low": (False,),
    }
    dropped = {"cut": 1, "tie": 1, "unreadable": 1, "empty": 1, "margin": 1}
    assert {k: v for k, v in built.counts.dropped.items() if v} == dropped
    both = build([drawn(scores)], pairs_config("kto", threshold=0.5, drop_cut=DropCut.both))
    assert sorted(words(group)[0] for group in both.groups) == ["aZ", "bZ", "fZ"]


# Filters


@pytest.mark.parametrize(
    ("scores", "more", "reason"),
    [
        ({"aZ": 0.5, "bZ": 0.5}, {}, "tie"),
        ({"aZ": 0.5, "bZ": 0.75}, {"min_margin": 0.5}, "margin"),
        ({"aZ": 0.5, "bZ": 1.0}, {"min_margin": 0.5}, None),
        ({"aZ": 0.5, "bZ": None}, {}, "unreadable"),
        ({"aZ": 0.5, "bZ": float("nan")}, {}, "unreadable"),
        ({"aZ": 0.5, "bb": 0.7}, {}, "cut"),
        ({"aZ": 0.5, "bb": 0.3}, {}, None),
        ({"aZ": 0.5, "bb": 0.3}, {"drop_cut": DropCut.both}, "cut"),
        ({"aZ": 0.5, "Z": 0.3}, {}, "empty"),
        ({"aZ": 0.5, "Z": 0.7}, {}, "empty"),
        ({"aZ": 0.5, "bbbZ": 0.7}, {"max_length_gap": 1}, "length"),
        ({"aZ": 0.5, "bbbZ": 0.7}, {"max_length_gap": 2}, None),
    ],
)
def test_filters(scores, more, reason):
    found, dropped = made(drawn(scores), "best_vs_worst", **more)
    assert dropped == ({} if reason is None else {reason: 1}) and len(found) == (reason is None)


def test_a_cut_best_answer_has_no_second_best():
    assert made(drawn({"aZ": 1, "bZ": 2, "ccc": 3}), "best_vs_rest") == ([], {"cut": 2})


@pytest.mark.parametrize("prompt", [f"p{i}" for i in range(8)])
def test_of_equal_scores_a_whole_answer_is_taken(prompt):
    """Whatever the hash of the tokens says."""
    best = drawn({"aZ": 1, "bZ": 2, "ccc": 2}, prompt=prompt)
    worst = drawn({"aZ": 1, "bZ": 2, "Z": 1, "cut": 1}, prompt=prompt)
    assert made(best, "best_vs_worst") == made(worst, "best_vs_worst", drop_cut=DropCut.both) == ([("bZ", "aZ")], {})


def test_equal_ids_are_no_pair_and_the_same_pair_comes_once():
    """A judge that scores one answer twice, differently."""
    one = replace(drawn({"aZ": 1.0, "bZ": 2.0}, "aZ", "aZ"), scores=[1.0, 2.0])
    assert made(one, "best_vs_worst") == ([], {"identical": 1})
    three = replace(drawn(None, "aZ", "aZ", "bZ"), scores=[1.0, 1.0, 2.0])
    assert made(three, "all_pairs") == ([("bZ", "aZ")], {"identical": 1, "repeated": 1})


def test_ids_are_the_samplers_and_log_probs_come_along():
    """The text "ab" would be one token; the sampler wrote two, and other ids with the same text."""
    odd = Answer(np.array([7, 8, 2], dtype=np.int32), np.array([-1, -2, -3], dtype=np.float32), Finish.stop)
    even = Answer(np.array([9, 2], dtype=np.int32), np.array([-4, -5], dtype=np.float32), Finish.stop)
    one = replace(drawn({"xZ": 0, "yZ": 1}), answers=[odd, even], texts=["ab", "ab"])
    built = build([one], pairs_config("best_vs_worst"))
    [group] = built.groups
    assert [tokens.tolist() for tokens in group.completions] == [[9, 2], [7, 8, 2]] and group.scores == (1.0, 0.0)
    assert [built.logps[key].tolist() for key in group.keys()] == [[-4, -5], [-1, -2, -3]]  # noqa: SIM118
    assert group.completions[0] is even.tokens


# Wins


def test_wins_become_shares():
    """1 beats 0 and 2; 0 ties with 2."""
    first, second, tie = Preference((1, 1)), Preference((0, 0)), Preference((1, 0))
    wins = win_matrix(3, [second, tie, first])
    assert win_shares(wins) == [0.25, 1.0, 0.25]
    one = drawn(None, "aZ", "bZ", "cZ", wins=wins)
    assert made(one, "all_pairs") == ([("bZ", "aZ"), ("bZ", "cZ")], {"tie": 1})


def test_an_unreadable_verdict_is_no_pair_and_counts_one_half():
    broken, first = Preference((None, 1)), Preference((1, 1))
    wins = win_matrix(3, [first, broken, first])
    assert win_shares(wins) == [0.75, 0.5, 0.25]
    one = drawn(None, "aZ", "bZ", "cZ", wins=wins)
    assert made(one, "all_pairs") == ([("aZ", "bZ"), ("bZ", "cZ")], {"unreadable": 1})
    assert made(one, "best_vs_worst") == ([], {"unreadable": 1})
    assert win_shares(win_matrix(2, [broken])) == [None, None]


def test_a_judge_that_always_says_a_makes_no_pair():
    wins = win_matrix(3, [Preference((1, 0))] * 3)
    assert made(drawn(None, "aZ", "bZ", "cZ", wins=wins), "all_pairs") == ([], {"tie": 3})


@pytest.mark.parametrize("wins", [[[0, 1], [1, 0]], [[0, 1.5], [-0.5, 0]], [[0, np.nan], [0, 0]], [[0, 1]]])
def test_wins_that_do_not_add_up(wins):
    with pytest.raises(ValueError, match=r"(Wins|Shares of a win) must be"):
        win_shares(np.array(wins, dtype=np.float64))


# Held-out prompts

HELD_OUT = "Write a letter to the landlord and ask why the heating is off since Monday"
"""15 words."""


@pytest.mark.parametrize(
    ("prompt", "overlap"),
    [
        (HELD_OUT.upper() + "!", 1.0),
        ("Please: " + HELD_OUT, 1.0),
        ("Write a letter to the landlord and ask for money", 8 / 15),
        ("Write a letter to the landlord and beg", 0.0),
        ("off since Monday", 0.0),
        ("What is two and two", 1.0),
        ("So what is two and two", 0.0),
        ([{"role": "system", "content": "x"}, {"role": "user", "content": "What is two and two?"}], 1.0),
        ("?!", 1.0),
        ("?", 0.0),
    ],
)
def test_overlap(prompt, overlap):
    held_out = HeldOutPrompts([HELD_OUT, "What is two and two?", "?!"])
    assert held_out.overlap(prompt) == pytest.approx(overlap)
    assert held_out.has(prompt) == (overlap >= 0.5)


def test_a_held_out_prompt_makes_nothing_and_is_counted():
    ones = [drawn(FOUR, question=HELD_OUT), drawn(FOUR, question="Another")]
    built = build(ones, pairs_config("best_vs_rest"), held_out=HeldOutPrompts([HELD_OUT]))
    assert len(built.groups) == 3 and built.counts.contaminated == 3 and built.counts.drawn == 6
    assert built.counts.metrics()["informative"] == 0.5


# Counts and settings


def test_the_metrics_of_a_round():
    """Two prompts: one with a pair, of 3 and 2 tokens, one that ties."""
    ones = [drawn({"aaZ": 1.0, "bZ": 0.0, "c": None}), drawn({"dZ": 0.5, "eeeZ": 0.5, "fZ": 0.5})]
    found = build(ones, pairs_config("best_vs_worst")).counts.metrics()
    assert found == pytest.approx(
        {
            "prompts": 2,
            "kept": 1,
            "informative": 1 / 2,
            "score_mean": 2.5 / 5,
            "score_best": 1.5 / 2,
            "length_mean": 14 / 6,
            "length_chosen": 3,
            "length_rejected": 2,
            "cut_share": 1 / 6,
            "distinct_share": 1.0,
            **dict.fromkeys((f"dropped/{name}" for name in Counts().dropped), 0.0),
            "dropped/tie": 1 / 2,
        }
    )
    assert build([], pairs_config("list")).counts.metrics() == {"prompts": 0, "kept": 0}


def test_counts_must_add_up():
    with pytest.raises(ValueError, match="Of 3 drawn, 1 are kept"):
        Counts(drawn=3, kept=1, tie=1)


@pytest.mark.parametrize(
    ("choice", "more", "message"),
    [
        ("kto", {}, r"threshold is for onpolicy.pairs.choice=kto, which needs one, .* it is null for kto"),
        ("list", {"threshold": 0.5}, r"it is 0.5 for list"),
        ("kto", {"threshold": float("nan")}, "must be a finite number"),
        ("kto", {"threshold": 0.5, "max_length_gap": 3}, "compares two answers"),
        ("gold_vs_sample", {"min_margin": 0.1}, "needs scores"),
        ("list", {"min_margin": -1.0}, "at least 0"),
        ("list", {"max_length_gap": -1}, "null or at least 0"),
    ],
)
def test_settings_that_make_no_sense(choice, more, message):
    with pytest.raises(UserError, match=message):
        pairs_config(choice, **more)


def test_what_a_choice_makes():
    assert [pairs_config(name).unit for name in ("list", "all_pairs", "gold_vs_sample")] == ["list", "pair", "pair"]
    assert pairs_config("kto", threshold=1.0).unit == "row" and not pairs_config("sample_vs_weak").is_judged


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scores": [1.0]}, "2 answers cannot have 1 scores"),
        ({"scores": [1.0, 2.0], "wins": np.zeros((2, 2))}, "not both"),
        ({"weak": drawn(None, "aZ", prompt="other")}, "same prompt"),
    ],
)
def test_drawn_answers_that_do_not_fit(more, message):
    with pytest.raises(ValueError, match=message):
        replace(drawn(None, "aZ", "bZ"), **more)


def test_a_judged_choice_needs_a_judge():
    with pytest.raises(ValueError, match="needs a judge's scores or wins"):
        made(drawn(None, "aZ", "bZ"), "list")
    with pytest.raises(UserError, match="best_vs_worst needs at least 2 answers to a prompt, not 1"):
        made(drawn({"aZ": 1.0}), "best_vs_worst")
