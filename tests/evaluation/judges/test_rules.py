"""The judge against hand-written answers, most of them meant to fool it."""

import math

import pytest

from alignment.errors import UserError
from alignment.evaluation.intervals import tango_interval
from alignment.evaluation.judges.base import WinRate, compare, win_rate
from alignment.evaluation.judges.rules import accepted_answers, judge

PARIS, TWELVE = ["Paris"], ["12"]

RIGHT = [
    ("Paris.", PARIS),
    ("PARIS!!!", PARIS),
    ("**Paris**", PARIS),
    ("Ｐａｒｉｓ", PARIS),
    ("It’s Paris", PARIS),
    ("1. Paris", PARIS),
    ("Paris, the capital of France", PARIS),
    ("Paris, France.", PARIS),
    ("It is Paris, not London.", PARIS),
    ("It is not London, it is Paris.", PARIS),
    ("It is not London but Paris.", PARIS),
    ("No, it is Paris.", PARIS),
    ("London—no, Paris.", PARIS),
    ("Is it London or Paris? It is Paris.", PARIS),
    ("The capital is Paris. However, Paris is not the only city.", PARIS),
    ("I'm not sure, but it could be Paris.", PARIS),
    ("Great question! Backwards, the word is sub.", ["sub"]),
    ("twelve", TWELVE),
    ("12.0", TWELVE),
    ("5 + 7 = 12", TWELVE),
    ("12 = 5 + 7", TWELVE),
    ("Work out 14 - 2 = 12.", TWELVE),
    ("14 - 2 is 12.", TWELVE),
    ("Of 4 and 12, 12 is larger.", TWELVE),
    ("12 is larger than 4.", TWELVE),
    ("We count both the number of items and their size.\n\nThe larger one is 12, which is 4 more.", TWELVE),
    ("Twenty-one.", ["21"]),
    ("1,200", ["1200"]),
    ("3 5 9", ["3, 5, 9"]),
    ("3, 5 and 9", ["3, 5, 9"]),
    ("3 < 5 < 9", ["3, 5, 9"]),
    ("árbol", ["arbol"]),
    ("A queen.", ["the queen"]),
    ("A.", ["A"]),
    ("Cock-a-doodle-doo!", ["cock-a-doodle-doo"]),
    ("A dog says woof and wags its tail.", ["woof"]),
    ("The plural of mouse is mice, and the singular is mouse.", ["mice"]),
    ("Yes, it is.", ["yes"]),
    ("No, a whale is not a fish.", ["no"]),
    ("The answer is no.", ["no"]),
    ("The answer is no. Is there anything else you want to know?", ["no"]),
]

WRONG = [
    ("", PARIS, "empty"),
    ("  \n\t", PARIS, "empty"),
    ("🙂🙂", PARIS, "empty"),
    ("London.", PARIS, "no accepted answer"),
    ("Parisian comparison", PARIS, "no accepted answer"),
    ("Not Paris.", PARIS, "negated"),
    ("It isn’t Paris.", PARIS, "negated"),
    ("I do not think that it is Paris.", PARIS, "negated"),
    ("Anything but Paris.", PARIS, "negated"),
    ("Rome rather than Paris.", PARIS, "negated"),
    ("Neither Paris nor Rome.", PARIS, "negated"),
    ("Paris is not the capital.", PARIS, "negated"),
    ("Paris is wrong.", PARIS, "negated"),
    ("It is Paris. It is not Paris.", PARIS, "negated"),
    ("Paris or London.", PARIS, "one of several candidates"),
    ("Either London or Paris", PARIS, "one of several candidates"),
    ("It is Rome, Oslo or Paris.", PARIS, "one of several candidates"),
    ("Paris and London.", PARIS, "one of several candidates"),
    ("Paris/London", PARIS, "one of several candidates"),
    ("Paris, London, Berlin, Madrid.", PARIS, "one of several candidates"),
    ("1. London\n2. Paris\n3. Rome", PARIS, "one of several candidates"),
    ("London. Paris. Rome.", PARIS, "one of several candidates"),
    ("Is it Paris?", PARIS, "asked, not said"),
    ("word " * 70 + "Paris", PARIS, "too late"),
    ("London. It is a city near Paris.", PARIS, "only mentioned"),
    ("Paris. No, wait, London.", PARIS, "one of several candidates"),
    ("12. So the answer is 13.", TWELVE, "another answer is claimed"),
    ("The answer is 13. 5 plus 7 is 12.", TWELVE, "another answer is claimed"),
    ("4 is larger than 12.", TWELVE, "only mentioned"),
    ("112", TWELVE, "no accepted answer"),
    ("12.5", TWELVE, "no accepted answer"),
    ("-12", TWELVE, "no accepted answer"),
    ("12%", TWELVE, "no accepted answer"),
    ("10, 11, 12, 13", TWELVE, "one of several candidates"),
    ("12 13", TWELVE, "one of several candidates"),
    ("1, 3, 5, 9", ["3, 5, 9"], "one of several candidates"),
    ("3, 9, 5", ["3, 5, 9"], "no accepted answer"),
    ("A dog.", ["A"], "no accepted answer"),
    ("I have no idea.", ["no"], "no accepted answer"),
    ("Yes and no.", ["yes"], "both yes and no"),
    ("Not yes.", ["yes"], "no accepted answer"),
    ("Yes?", ["yes"], "no accepted answer"),
    ("16 - 8 is 9.", ["8"], "one of several candidates"),
]


@pytest.mark.parametrize(("answer", "accepted"), RIGHT)
def test_right(answer, accepted):
    verdict = judge(answer, accepted)
    assert verdict.correct
    assert verdict.score >= 0.7
    assert verdict.reasons[0].startswith("says ")


@pytest.mark.parametrize(("answer", "accepted", "reason"), WRONG)
def test_wrong(answer, accepted, reason):
    verdict = judge(answer, accepted)
    assert not verdict.correct
    assert verdict.score == 0.0
    assert verdict.reasons[0] == reason


@pytest.mark.parametrize(
    ("answer", "score", "direct"),
    [
        ("Paris.", 1.0, True),
        ("We all know well the capital is Paris.", 1.0, True),  # 8 words
        ("We all know very well the capital is Paris.", 0.9812, False),  # 9 words: 0.7 + 0.3 * 15/16 = 0.98125
        ("It is Paris, which lies on a long river in the north of the land.", 0.8688, False),  # 15: 0.7 + 0.3 * 9/16
        ("It is Paris" + "".join(f" w{i}" for i in range(30)), 0.7, False),  # 33 words
        ("Maybe Paris.", 0.7, False),
        ("Great question! It is Paris.", 0.7, False),
        ("Paris Paris Paris", 0.7, False),
        ("It is Paris. It is Paris.", 0.7, False),
        ("Rome.", 0.0, True),
        ("", 0.0, False),
    ],
)
def test_score_and_directness(answer, score, direct):
    verdict = judge(answer, PARIS)
    assert verdict.score == pytest.approx(score, abs=1e-4)
    assert verdict.direct is direct


def test_words_are_counted_as_read():
    assert judge("It's the twenty-first day, isn't it?", PARIS).words == 7
    assert judge("Twenty-one.", ["21"]).words == 1


@pytest.mark.parametrize("accepted", [[], [""], ["?!"]])
def test_nothing_accepted_is_an_error(accepted):
    with pytest.raises(UserError, match="at least one accepted answer"):
        judge("Paris.", accepted)


@pytest.mark.parametrize(
    "text", ["\x00", "a" * 5000, "\n" * 99, "?!?", "’’", "𝟙𝟚", "-", "1,2,3,,4..5", "否", "\ud800x", "a'"]
)
def test_any_string_gets_a_verdict(text):
    for accepted in (PARIS, TWELVE, ["yes"], ["A"], ["3, 5, 9"]):
        assert 0 <= judge(text, accepted).score <= 1
        assert 0 <= judge(f"{text} Paris {text} 12 {text}", accepted).score <= 1


def test_compare_orders_and_is_symmetrical():
    best, padded, wrong, rambling = (
        judge(text, PARIS)
        for text in ("Paris.", "Sure! It is Paris.", "Rome.", "Rome, I think, but it depends on many things.")
    )
    ranked = [best, padded, wrong]
    for i, a in enumerate(ranked):
        for j, b in enumerate(ranked):
            assert compare(a, b) == (j > i) - (j < i) == -compare(b, a)
    # Style alone wins nothing.
    assert compare(wrong, rambling) == 0


def test_win_rate_by_hand():
    good, bad = judge("Paris.", PARIS), judge("Rome.", PARIS)
    result = win_rate(compare(a, b) for a, b in [(good, bad)] * 6 + [(good, good)] * 2 + [(bad, good)] * 2)
    assert (result.wins, result.ties, result.losses, result.rate) == (6, 2, 2, 0.7)
    assert (result.low, result.high) == tango_interval(0.7, 0.2, 10)


def test_win_rate_of_the_swapped_pairs_is_the_complement():
    good, bad = judge("Paris.", PARIS), judge("Rome.", PARIS)
    pairs = [(good, bad)] * 5 + [(bad, bad)] * 3 + [(bad, good)]
    ours, theirs = win_rate(compare(a, b) for a, b in pairs), win_rate(compare(b, a) for a, b in pairs)
    assert (theirs.wins, theirs.losses) == (ours.losses, ours.wins)
    for a, b in ((theirs.rate, ours.rate), (theirs.low, ours.high), (theirs.high, ours.low)):
        assert math.isclose(a, 1 - b)


def test_win_rate_at_the_edges():
    assert win_rate([1] * 4).high == pytest.approx(1.0)
    assert win_rate([0]) == WinRate(0, 1, 0, 0.5, *(pytest.approx(x, abs=1e-4) for x in (0.1033, 0.8967)))
    with pytest.raises(UserError, match="at least one pair"):
        win_rate([])


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [("4", ["4"]), (4, ["4"]), (["4", None, "four", " "], ["4", "four"]), (None, []), ("", []), ([], []), (0, ["0"])],
)
def test_a_null_and_an_empty_text_are_no_accepted_answers(answer, accepted):
    """They would be compared as the words None and nothing."""
    assert accepted_answers({"answer": answer}) == accepted and accepted_answers({}) == []
