"""What it would take to tell two variants apart: the sentence about folders whose numbers are known."""

import re

import pytest

from alignment.comparison.needs import need_of
from alignment.comparison.sentences import headline
from alignment.comparison.tables import differences
from alignment.evaluation.statistics.power import items_for_sign_test, seeds_needed
from tests.helpers.run_folders import compared, make_run, right, row_of

OTHER = {"beta": 0.5}


def runs(tmp_path, first, second, seeds=None):
    """Two variants with these numbers of right pairs of 100, by seed; the second is right on the last ones."""
    made = [make_run(tmp_path / f"a{i}", right=right(c, 100), seed=i) for i, c in enumerate(first)]
    for i, count in enumerate(second):
        other = right(count, 100)
        made.append(make_run(tmp_path / f"b{i}", settings=OTHER, right=other, seed=i + (seeds or 0)))
    return compared(*made)


def said(found):
    [line] = [line for line in headline(found) if "beta 0.5 is " in line]
    return line.partition("): ")[2]


def test_one_seed_says_the_pairs_and_that_nobody_knows_the_spread(tmp_path):
    """Better on 5 of 100 and worse on none, with one item more for each side: shares 6 and 1 of 102."""
    found = runs(tmp_path, [80], [75])
    need = need_of(found.standing, found.contrasts[0])
    assert need.items == pytest.approx(items_for_sign_test(6 / 102, 1 / 102)) and (need.seeds, need.seeds_here) == (
        None,
        1,
    )
    assert said(found) == (
        "within noise. To tell a difference of this size takes about 250 pairs, 150 more than here (power 80%, "
        "two-sided 5%); with one seed nobody knows what other seeds would change."
    )
    assert row_of(differences(found), "DPO, beta 0.5")["it would take"] == "about 250 pairs"
    assert row_of(differences(found), "DPO, beta 0.1")["it would take"] == "-"


@pytest.mark.parametrize(("first", "second", "size"), [([80], [80], "0.0"), ([80, 70], [70, 80], "0.0")])
def test_nothing_is_promised_for_no_difference(tmp_path, first, second, size):
    found = runs(tmp_path, first, second)
    assert re.search(
        rf"No number of held-out pairs would help a difference this small: it is {size} ± [\d.]+ points\.$", said(found)
    )
    assert "To tell" not in said(found)
    assert row_of(differences(found), "DPO, beta 0.5")["it would take"] == "no number"


def test_a_difference_far_below_its_error_is_none(tmp_path):
    """One more of 100 where 39 differ: its size would need 300 times the pairs, and says nothing."""
    a = make_run(tmp_path / "a", right=right(81, 100))
    b = make_run(tmp_path / "b", settings=OTHER, right=right(80, 100)[::-1])
    assert "difference this small: it is 1.0 ± 12." in said(compared(a, b))


def test_what_binds_is_said(tmp_path):
    pairs = runs(tmp_path / "pairs", [80, 79, 80], [76, 76, 77])
    need = need_of(pairs.standing, pairs.contrasts[0])
    assert need.lacks_items and not need.lacks_seeds
    assert said(pairs).endswith(
        f"; the pairs bind, and of seeds {need.seeds:.0f} would do, by the spread of the 3 here."
    )
    both = runs(tmp_path / "both", [80, 82], [79, 76])
    need = need_of(both.standing, both.contrasts[0])
    assert need.lacks_items and need.seeds == seeds_needed(0.035, 0.0353553) > 2
    ending = f", and {need.seeds:.0f} seeds, by the spread of the 2 here (power 80%, two-sided 5%); the "
    assert ending in said(both) and said(both).endswith(" bind more.")
    seeds = runs(tmp_path / "seeds", [90, 100], [10, 100])
    assert said(seeds).endswith(
        "The pairs tell the two apart, and the seeds are what binds: by the spread of the 2 here it takes 18 seeds "
        "(power 80%, two-sided 5%)."
    )
    assert row_of(differences(seeds), "DPO, beta 0.5")["it would take"] == "18 seeds"


def test_the_best_on_policy_is_compared_with_the_best_offline_of_the_same_loss(tmp_path):
    """Four of DPO, two of them in rounds, and one of SFT: two contrasts, each with what it would take."""
    made = [
        make_run(tmp_path / name, loss, {"beta": beta}, right=right(count, 100), config={"onpolicy": rounds})
        for name, loss, beta, rounds, count in (
            ("a", "dpo", 0.1, {"every": 8}, 80),
            ("b", "dpo", 0.5, {"every": 8}, 76),
            ("c", "dpo", 0.1, None, 77),
            ("d", "dpo", 0.5, None, 79),
            ("e", "nll", 1.0, None, 78),
        )
    ]
    found = compared(*made)
    assert [variant.members[0].name for variant in found.best] == ["a", "d", "e"]
    table = differences(found)
    assert table.caption.startswith("The best setting of each loss, on-policy and offline, and")
    assert all("pairs" in row[-1] or row[-1] == "no number" for row in table.rows[1:]) and len(table.rows) == 3
    assert "the others" not in headline(compared(*made[:2]))[1]
    apart = compared(made[0], make_run(tmp_path / "f", right=right(5, 100), config={"onpolicy": None}))
    assert headline(apart)[1] == "It is ahead of the others by more than noise."


def test_seeds_that_the_two_do_not_share_tell_no_spread(tmp_path):
    assert said(runs(tmp_path, [80, 80], [76, 75], seeds=5)).endswith(
        "; without seeds in common nobody knows what other seeds would change."
    )


def test_the_level_is_shared_by_those_that_are_not_told_yet(tmp_path):
    """Three of four are within noise, so each of them gets a third of 5%; the terms are said once."""
    found = compared(
        *(
            make_run(tmp_path / loss, loss, right=right(count, 20))
            for loss, count in (("dpo", 18), ("ipo", 17), ("kto", 16), ("simpo", 5), ("orpo", 15))
        )
    )
    needs = [need for contrast in found.contrasts if (need := need_of(found.standing, contrast)) is not None]
    assert [need.tests for need in needs] == [3, 3, 3]
    assert needs[0].items == pytest.approx(items_for_sign_test(2 / 22, 1 / 22, level=0.05 / 3))
    text = "\n".join(headline(found))
    assert text.count("(power 80%, two-sided 5% shared by 3 comparisons)") == text.count("nobody knows") == 1
    assert text.count("To tell a difference of this size takes about") == 3


def test_runs_without_common_pairs_are_planned_by_their_interval(tmp_path):
    found = compared(
        *(
            make_run(tmp_path / str(i), settings={"beta": beta}, right=right(count, 100), keep_pairs=False)
            for i, (beta, count) in enumerate(((0.1, 60), (0.5, 50)))
        )
    )
    need = need_of(found.standing, found.contrasts[0])
    # Of two independent shares: 7.85 (0.24 + 0.25) / 0.01 = 385 in each, and Newcombe's interval is a little wider.
    assert need.items == pytest.approx(385, rel=0.1)
