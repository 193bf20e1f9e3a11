"""How a winner may be written: names of answers, words and numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.errors import UserError
from tests.helpers.compared import X, Y, outcomes, read

COLUMNS = [
    *[(f"{stem}_a", f"{stem}_b") for stem in ("response", "answer", "output", "completion", "text")],
    *[("response_A", "response_B"), ("Answer 1", "Answer 2"), ("response1", "response2"), ("output_1", "output_2")],
    *[("response_0", "response_1"), ("model_a_response", "model_b_response"), ("first_answer", "second_answer")],
    *[("response_model_1", "response_model_2"), ("completionA", "completionB")],
]
SPELLINGS = [
    *[("A", "B"), ("a", "b"), ("model_a", "model_b"), ("Model A", "Model B"), ("[[A]]", "[[B]]"), ("(A)", "(B)")],
    *[("response_a", "response_b"), ("response_1", "response_2"), ("Response 1", "Response 2"), ("first", "second")],
    *[("A>>B", "B>>A"), ("a>b", "a<b"), ("[[A>B]]", "[[B>A]]"), ("left", "right"), ("A is better", "B is better")],
    *[("Assistant A wins", "Assistant B wins"), ("output_1", "output_2"), ("Option A", "Option B")],
]
TIES = ["tie", "Tie", "TIE", "draw", "equal", "same", "both_good", "[[C]]", "A=B", "tie (bothgood)", "neither"]
BAD = ["both_bad", "tie (bothbad)", "Both Bad", "both are bad"]


@pytest.mark.slow
@given(
    columns=st.sampled_from(COLUMNS),
    words=st.sampled_from([*SPELLINGS, ("COLUMN", "COLUMN"), ("TEXT", "TEXT")]),
    verdict=st.sampled_from(["winner", "preference", "label", "chosen", "better", "Verdict"]),
    second=st.booleans(),
    texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=2, unique_by=str.strip),
)
@settings(max_examples=60, deadline=None)
def test_exchanging_answers_and_verdict_gives_the_same_pair(columns, words, verdict, second, texts):
    """Whatever names the answers have and however the winner is spelt, also by its column's name or its text."""
    if columns[0] == "response_0" and any("1" in word for word in words):
        words = ("response_0", "response_1")
    texts = [f"{text} {'xy'[k]}" for k, text in enumerate(texts)]
    by_kind = {"COLUMN": columns, "TEXT": texts}
    words = by_kind.get(words[0], words)
    record = {"prompt": "p", **dict(zip(columns, texts, strict=True)), verdict: words[second]}
    swapped = {"prompt": "p", **dict(zip(columns, texts[::-1], strict=True))}
    swapped[verdict] = record[verdict] if words is texts else words[not second]
    [row], [other] = read(record)[2], read(swapped)[2]
    assert row.completions == (texts[second], texts[not second])
    assert other == row


@pytest.mark.parametrize("word", [*TIES, *BAD])
def test_words_for_a_tie_and_for_two_bad_answers(word):
    """Both are left out, each under its own name, and neither is a fault."""
    won, left = read(*[{"prompt": "p", "response_a": "x", "response_b": "y", "winner": w} for w in ("A", word)])[2]
    assert won.completions == X
    assert (left.reason, left.fault) == ("both_bad" if word in BAD else "tie", False)


def numbers(suffixes, values, **more):
    return [
        {"prompt": "p", f"response_{suffixes[0]}": "x", f"response_{suffixes[1]}": "y", "label": value, **more}
        for value in values
    ]


@pytest.mark.parametrize(
    ("suffixes", "values", "expected"),
    [
        ("12", (1, 2), [X, Y]),
        ("12", ("1", "2.0"), [X, Y]),
        ("12", (2, 0, 1), [Y, "tie", X]),
        ("12", (1,), [X]),
        ("ab", (1, 2), [X, Y]),
        ("01", (0, 1), [X, Y]),
        ("01", ("1", "0"), [Y, X]),
        ("01", (1,), [Y]),
    ],
)
def test_numbers_that_have_one_meaning(suffixes, values, expected):
    """By the names of the answers' columns and all values together."""
    assert outcomes(read(*numbers(suffixes, values))[2]) == expected


@pytest.mark.parametrize(
    ("suffixes", "values"),
    [
        ("ab", (0, 1)),
        ("ab", (1,)),
        ("ab", (0, 1, 2)),
        ("12", (0, 1)),
        ("01", (0, 1, 2)),
        ("01", (1, 2)),
        ("12", (-1, 1)),
    ],
)
def test_numbers_with_several_meanings_are_refused_with_the_setting_that_decides(suffixes, values):
    """Index, tie or truth: the data do not say. With ratings beside the answers these decide."""
    records = numbers(suffixes, values)
    with pytest.raises(UserError, match=r"f: the column label has the values .* data\.winner=\{first: ") as error:
        read(*records)
    assert all(str(value) in str(error.value) for value in values)
    rated = numbers(suffixes, values, **{f"score_{suffixes[0]}": 4, f"score_{suffixes[1]}": 3})
    assert outcomes(read(*rated)[2]) == [X] * len(values)
    first, second = values[0], values[-1]
    if first != second:
        decided = outcomes(
            read(
                *records,
                winner={"first": [first], "second": [second]},
            )[2]
        )
        assert (decided[0], decided[-1]) == (X, Y)


def test_a_few_odd_numbers_are_bad_rows_and_do_not_hide_what_the_others_mean():
    """One 7 among forty votes, and a number among words."""
    *rows, odd = read(*numbers("12", [1, 2] * 20 + [7]))[2]
    assert outcomes(rows) == [X, Y] * 20
    assert odd.message == (
        "column 'label' has 7, and accepted are A, B, tie, both_bad, 1, 2, 0, and what data.winner names"
    )


def test_the_setting_wins_over_what_the_values_seem_to_say():
    """Also for words, and a value that it does not name is a bad row."""
    winner = {"first": ["B", "left"], "second": ["A"], "tie": ["C"]}
    records = [{"prompt": "p", "response_a": "x", "response_b": "y", "winner": w} for w in ("A", "B", "left", "C", "D")]
    _, _, rows = read(*records, winner=winner)
    assert outcomes(rows) == [Y, X, X, "tie", "bad_verdict"]
    assert rows[-1].message == "column 'winner' has 'D', and data.winner names B, left, A, C"
