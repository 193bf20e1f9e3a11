"""Likely mistakes: each kind is planted and found with its numbers, and data without any have none."""

import pytest

from alignment.data.inspection.mistakes import ENOUGH, likely_mistakes
from alignment.data.rows.row import Row

TEN = "one two three four five six seven eight nine ten"


def pair(number, chosen="It is four, I think.", rejected="It may be five, perhaps.", prompt=None, **more):
    return Row(prompt or f"What is number {number} of this list?", (chosen, rejected), source=f"f:{number}", **more)


def labelled(number, answer, label):
    return Row(f"What is number {number} of this list?", (answer,), labels=(label,), source=f"f:{number}")


def clean(count=ENOUGH):
    return [pair(number) for number in range(1, count + 1)]


def sentences(rows):
    return [mistake.sentence for mistake in likely_mistakes(rows)]


def test_clean_rows_have_none():
    """Pairs, labelled rows, conversations and no rows at all."""
    turns = [{"role": "user", "content": "Say in one word how you are."}]
    chat = Row(turns, ([{"role": "assistant", "content": "Well."}], [{"role": "assistant", "content": "Bad."}]))
    rows = [labelled(number, "It is four.", number % 2 == 0) for number in range(2 * ENOUGH)]
    for given in (clean(), rows, [chat], []):
        assert sentences(given) == []


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            pair(3, chosen="You ask: What is number  3\nof this list? Four."),
            "1 of 4 rows have an answer that holds its prompt (5 words or more); the first is f:3.",
        ),
        (
            pair(3, chosen="It is\nfour. ", rejected="It is four."),
            "1 of 4 pairs have answers that are equal but for white space; the first is f:3.",
        ),
        (
            pair(3, scores=(1.0, 2.0)),
            "1 of 1 pairs have a lower score for the chosen answer than for the rejected one; the first is f:3.",
        ),
    ],
)
def test_a_row_that_looks_wrong_is_found_with_its_place(row, sentence):
    """The prompt inside an answer, answers equal but for white space, scores against the order."""
    assert sentences([pair(1), pair(2), row, pair(4)]) == [sentence]


def test_short_prompts_may_stand_in_an_answer():
    """Four words occur by accident, five do not."""
    for prompt, count in (("What is four plus?", 0), ("What is four plus one?", 1)):
        assert len(sentences([pair(1, chosen=f"{prompt} Five.", prompt=prompt)])) == count


def test_rejected_answers_that_are_mostly_longer_are_told_with_the_rule():
    """16 of 20 pairs have 10 words against 5; at 15 of 20, the limit, nothing is said."""
    for longer in (16, 15):
        rows = [*clean(ENOUGH - longer), *(pair(100 + n, rejected=TEN) for n in range(longer))]
        found = sentences(rows)
        assert len(found) == (longer == 16)
    (sentence,) = sentences([*clean(4), *(pair(100 + n, rejected=TEN) for n in range(16))])
    assert sentence == (
        "16 of 20 pairs have the longer answer as rejected, with 9 words on average against 5: right for data that "
        "reward brevity, else the labels are inverted."
    )


def test_few_pairs_say_nothing_about_the_labels():
    """One pair less than enough."""
    assert sentences([pair(n, rejected=TEN) for n in range(ENOUGH - 1)]) == []


@pytest.mark.parametrize(("label", "name"), [(True, "desirable"), (False, "undesirable")])
def test_labels_of_one_kind_alone_are_told(label, name):
    """Nobody thinks of it where the other half of a set was lost on the way."""
    rows = [labelled(number, "It is fine.", label) for number in range(ENOUGH)]
    [mistake] = likely_mistakes(rows)
    assert mistake.sentence.startswith(f"{ENOUGH} of {ENOUGH} rows are labelled {name}: losses of labels learn from")
    assert likely_mistakes([*rows, labelled(99, "It is so.", not label)]) == []
    assert likely_mistakes(rows[:-1]) == []


def test_chosen_answers_that_are_next_to_nothing_are_told():
    """Three of 20 chosen answers have one word beside 20, one the other way round."""
    long = f"{TEN} {TEN}"
    rows = [*clean(16), *(pair(50 + n, chosen="N/A.", rejected=long) for n in range(3)), pair(60, long, "No.")]
    assert sentences(rows) == [
        "3 of 20 pairs have a chosen answer of at most 2 words beside a rejected one of at least 20 (the other way "
        "round: 1); the first is f:50."
    ]


@pytest.mark.parametrize("as_pairs", [True, False])
def test_chosen_answers_that_refuse_more_than_the_rejected_ones_are_told(as_pairs):
    """Five of 20 refuse, and two of the others; with three of the others it may be the data's subject."""
    for others in (2, 3):
        good = ["I'm sorry, but I cannot say."] * 5 + ["It is four, I think."] * 15
        bad = ["As an AI I have no lists."] * others + ["It may be five, perhaps."] * (20 - others)
        rows = [pair(n, a, b) for n, (a, b) in enumerate(zip(good, bad, strict=True))]
        names = ("chosen", "rejected")
        if not as_pairs:
            rows = [labelled(n, text, n < 20) for n, text in enumerate([*good, *bad])]
            names = ("desirable", "undesirable")
        expected = (
            f"5 of 20 {names[0]} answers begin with a refusal, and 2 of 20 {names[1]} ones: the labels may be inverted."
        )
        assert sentences(rows) == ([expected] if others == 2 else [])
