"""Preferences in both orders, and the store of replies."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.evaluation.judges.base import Item, Judge, Judgement, Preference, by_scores
from alignment.evaluation.judges.rules import RuleJudge
from alignment.evaluation.judges.store import JudgementStore
from alignment.files import CacheKind

READ, UNREADABLE = (1.0, 0.5, 0.0, 0.8, 0.3), None


@pytest.mark.parametrize(
    ("shares", "outcome"),
    [
        ((1.0, 1.0), 1), ((0.0, 0.0), -1), ((0.5, 0.5), 0), ((1.0, 0.0), 0), ((1.0, 0.5), 0), ((0.6, 0.9), 1),
        ((None, 1.0), 0), ((1.0, None), 0), ((None, None), 0),
    ],
)  # fmt: skip
def test_an_answer_wins_where_both_orders_say_so(shares, outcome):
    """All else is a tie: of what is left unread nothing is dropped."""
    found = Preference(shares)
    assert found.outcome == outcome
    assert found.unreadable == shares.count(None)


@pytest.mark.parametrize("first", [*READ, UNREADABLE])
@pytest.mark.parametrize("second", [*READ, UNREADABLE])
def test_swapping_the_answers_gives_the_complement(first, second):
    """Of the outcome and of the share; what is unread counts one half for both."""
    found = Preference((first, second), (3, 1))
    assert found.swapped().share == pytest.approx(1 - found.share)
    assert found.swapped().outcome == -found.outcome
    assert found.swapped().swapped().shares == pytest.approx(found.shares, nan_ok=True) or None in found.shares


def test_scores_make_preferences_and_a_missing_one_is_counted():
    """The order has no part in them."""
    better, worse, none = Judgement(2.0), Judgement(1.0), Judgement(None)
    assert [by_scores(a, b).outcome for a, b in ((better, worse), (worse, better), (worse, worse))] == [1, -1, 0]
    assert (by_scores(better, none).outcome, by_scores(better, none).unreadable) == (0, 2)


def test_a_judgement_comes_back_from_its_file():
    """What a judge does not say is left out, and a missing score stays."""
    whole = RuleJudge().score([Item("Capital of France?", ("Paris.",), {"answer": "Paris"})])[0]
    assert list(whole.as_json()) == ["score", "correct", "direct", "words", "reasons"]
    for one in (whole, Judgement(None, reasons=("no reply",)), Judgement(7.0)):
        assert Judgement.from_json({**one.as_json(), "reasons": list(one.reasons)}) == one
    assert str(Judgement(7.0)) == "score 7" and "no readable score" in str(Judgement(None))


# The store


class Asked(Judge):
    """Counts the items that reach it."""

    kind = "asked"

    def __init__(self, cache: Path, version: int = 1) -> None:
        self.cache, self.version, self.asked = cache, version, []

    def description(self) -> dict:
        return {"version": self.version}

    def replies(self, items) -> list:
        def ask(missing):
            self.asked += missing
            for place in reversed(range(len(missing))):
                if missing[place].prompt != "silent":
                    yield place, {"said": [missing[place].prompt, *missing[place].answers]}

        with JudgementStore(self.cache, self) as store:
            return store.replies(items, ask)


ITEMS = [Item("p", ("a", "b")), Item("p", ("b", "a")), Item("p", ("a",)), Item("pa", ("b",)), Item("p", ("a", "b"))]


def test_a_question_is_prompt_answers_and_their_order(tmp_path):
    """Replies come back in the order of the items, whatever the order in which they came; equal items ask once."""
    first, second = Asked(tmp_path), Asked(tmp_path)
    expected = [{"said": [item.prompt, *item.answers]} for item in ITEMS]
    assert first.replies(ITEMS) == second.replies(ITEMS) == expected
    assert len(first.asked) == 4 and second.asked == []
    assert second.replies([Item("p", ("a", "b"), {"other": 1}, "elsewhere")]) == expected[:1] and second.asked == []


def test_another_judge_has_other_replies(tmp_path):
    """Each in a folder of its own, which `alignment.cache` lists."""
    for version in (1, 2):
        judge = Asked(tmp_path, version)
        judge.replies(ITEMS)
        assert len(judge.asked) == 4
        assert (CacheKind.judgements.under(tmp_path) / judge.identity[:32] / "judgements.sqlite").is_file()


def test_what_has_no_reply_is_asked_again(tmp_path):
    """It is None, in its place."""
    judge = Asked(tmp_path)
    for times in (1, 2):
        assert judge.replies([Item("silent", ("a",)), ITEMS[2]]) == [None, {"said": ["p", "a"]}]
        assert [item.prompt for item in judge.asked].count("silent") == times
