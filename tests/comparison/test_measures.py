"""What a comparison takes from the verdicts of each kind of judge."""

from types import SimpleNamespace

from alignment.comparison.measures import CORRECT, WIN_RATE, verdicts
from alignment.evaluation.judges.base import Judgement, Preference


def member(*samples, stages=("preference",)):
    """A run with these samples, the only facts that are looked at."""
    run = SimpleNamespace(samples=list(samples), summary={"stages": {name: {"steps": 1} for name in stages}})
    return SimpleNamespace(run=run)


def test_a_judge_that_compares_gives_wins_without_scores():
    """By its preference against the model before the preference stage, here the one after SFT."""
    won, lost = (Preference(shares).as_json() for shares in ((1.0, 1.0), (0.0, 0.0)))
    tied = Preference((1.0, None)).as_json()
    found = member(
        {"prompt": "a", "preferences": {"start": lost, "sft": won}},
        {"prompt": "b", "preferences": {"start": lost, "sft": tied}},
        {"prompt": "c"},
        stages=("sft", "preference"),
    )
    assert list(WIN_RATE.items(found).values()) == [1.0, 0.5]
    assert verdicts(found) == CORRECT.items(found) == {}


def test_grades_win_and_say_nothing_of_right_or_wrong():
    """A missing grade is a tie; only a judge that says what is right counts as correct answers."""
    good, bad, none, right = (
        one.as_json() for one in (Judgement(8.0), Judgement(3.0), Judgement(None), Judgement(1.0, True))
    )
    found = member(
        {"prompt": "a", "verdicts": {"start": bad, "final": good}},
        {"prompt": "b", "verdicts": {"start": good, "final": none}},
        {"prompt": "c", "verdicts": {"start": bad, "final": right}},
    )
    assert list(WIN_RATE.items(found).values()) == [1.0, 0.5, 0.0]
    assert list(CORRECT.items(found).values()) == [1.0]
