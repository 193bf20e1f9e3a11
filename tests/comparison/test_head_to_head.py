"""Answers against answers, by hand and by enumeration."""

import itertools

import pytest

from alignment.comparison.head_to_head import MAX_ENTRANTS, duels, entrants
from alignment.comparison.tables import head_to_head
from tests.helpers.run_folders import change_json, compared, make_run


@pytest.fixture
def two(tmp_path):
    """A has two seeds and B has one; on four prompts, A against B:

    first seed  1, 1, 0, .5 against 1, .5, 0, 1: tied, won, tied, lost
    second seed 1, 1, 1, .5 against 1, .5, 0, 1: tied, won, won, lost
    So A's shares are 1/2, 1, 3/4, 0.
    """
    return compared(
        make_run(tmp_path / "a0", scores=[1.0, 1.0, 0.0, 0.5]),
        make_run(tmp_path / "a1", seed=1, scores=[1.0, 1.0, 1.0, 0.5]),
        make_run(tmp_path / "b", "ipo", {"tau": 0.1}, scores=[1.0, 0.5, 0.0, 1.0]),
    )


def test_every_seed_meets_every_seed_on_the_same_prompts(two):
    variants = two.variants
    [duel] = duels(variants).values()
    assert duel.rate == pytest.approx((0.5 + 1 + 0.75 + 0) / 4)
    assert (duel.ahead.better, duel.ahead.worse, duel.ahead.count) == (2, 1, 4), "prompts, however many seeds"
    assert duel.p == 1.0, "two against one say nothing"
    [turned] = duels(variants[::-1]).values()
    assert turned.rate == pytest.approx(1 - duel.rate)
    assert turned.bounds == pytest.approx((1 - duel.bounds[1], 1 - duel.bounds[0]))


def test_the_table_says_the_same_from_both_sides(two):
    table = head_to_head(two)
    assert table.header == ["variant", "DPO", "IPO"]
    cells = {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}
    assert cells["DPO"]["IPO"].startswith("56.2%") and cells["DPO"]["IPO"].endswith("2 / 1 / 1")
    assert cells["IPO"]["DPO"].startswith("43.8%") and cells["IPO"]["DPO"].endswith("1 / 1 / 2")
    assert cells["DPO"]["DPO"] == "-"
    assert table.shades == [[None, 0.5625], [0.4375, None]]
    assert table.note.endswith("no pair reaches that.")


def test_what_is_more_than_noise_stays_so_among_several_comparisons(tmp_path):
    """DPO beats IPO on 12 of 20 prompts and never loses: p is 2 / 2^12, times 3 for three comparisons after Holm.

    SimPO beats IPO on 5 and never loses: p is 2 / 32, which no number of comparisons makes smaller.
    """
    table_of = {"dpo": 12, "simpo": 5, "ipo": 0}
    folders = [
        make_run(tmp_path / loss, loss, {"beta": 0.1}, scores=[float(i < best) for i in range(20)])
        for loss, best in table_of.items()
    ]
    found = compared(*folders)
    variants = [next(v for v in found.variants if v.loss == loss) for loss in table_of]
    met = duels(variants)
    outcomes = sum(abs(sum(tosses) - 6) >= 6 for tosses in itertools.product((0, 1), repeat=12)) / 2**12
    assert met[0, 2].p == pytest.approx(3 * outcomes)
    assert not met[0, 2].is_noise and met[0, 2].rate == pytest.approx(0.5 + 12 / 40)
    assert met[1, 2].p == pytest.approx(2 / 32) and met[1, 2].is_noise
    said = {row[0]: row for row in head_to_head(found).rows}
    assert said["DPO"][-1].endswith("more than noise") and not said["SimPO"][-1].endswith("more than noise")


def test_few_variants_all_meet_and_of_many_the_best_of_each_loss(tmp_path):
    few = [
        make_run(tmp_path / f"{loss}{beta}", loss, {"beta": beta}, scores=[beta, 0.0], before=[0.0, 0.0])
        for loss in ("dpo", "ipo")
        for beta in (0.1, 0.2)
    ]
    assert len(entrants(compared(*few))) == 4
    more = [
        make_run(tmp_path / f"kto{i}", "kto", {"beta": float(i)}, scores=[0.5, 0.5], before=[0.0, 0.0])
        for i in range(1, MAX_ENTRANTS)
    ]
    assert sorted(variant.loss for variant in entrants(compared(*few, *more))) == ["dpo", "ipo", "kto"]


def test_without_verdicts_nobody_meets(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "ipo")
    assert head_to_head(compared(a, b)) is None
    scored = [make_run(tmp_path / name, name, scores=[1.0, 0.0]) for name in ("kto", "orpo")]
    rows = [row for folder in scored for row in [folder / "samples.jsonl"]]
    for path in rows:
        path.write_text(path.read_text().replace('"verdicts"', '"were"'))
    for folder in scored:
        change_json(folder / "summary.json", evaluation={})
    assert head_to_head(compared(a, b, *scored)) is None
