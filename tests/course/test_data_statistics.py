"""Statistics of preference data: numbers worked out by hand, and near-duplicates against all pairs."""

import math
import random

import pytest

from alignment.course.data_statistics import (
    Agreement,
    LengthGroup,
    NearDuplicate,
    agreements,
    answers,
    length_groups,
    lengths,
    near_duplicates,
    overlaps,
    words,
)
from alignment.data.rows.row import Row
from alignment.errors import UserError


def row(chosen: str, rejected: str, prompt: str = "Why?", **others) -> Row:
    return Row(prompt, (chosen, rejected), source="file:3", **others)


def test_lengths_are_words_of_texts_and_of_messages_without_the_system():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What's 2 + 2, please?"}]
    chat = Row(prompt, ([{"role": "assistant", "content": "It is 4."}], [{"role": "assistant", "content": "-"}]))
    assert lengths([chat, row("One two three", "Four")]) == {
        "prompt": [5, 1],  # what s 2 2 please
        "chosen": [3, 3],
        "rejected": [0, 1],
    }


def test_a_list_is_its_best_and_its_worst_answer():
    assert answers([Row("p", ("best", "middle", "worst"))]) == [("best", "worst")]


def test_one_answer_alone_is_refused_by_its_row():
    with pytest.raises(UserError, match="Row file:3 has one completion"):
        lengths([Row("p", ("only",), source="file:3")])


def test_overlap_counts_repeated_words():
    # a a b against A b b: both have a and b once; any has a twice, b twice. No words at all share nothing.
    assert overlaps([row("a a b", "A b, b!"), row("x y", "z"), row("x", "X."), row("!", "?")]) == [0.5, 0.0, 1.0, 0.0]


def test_longer_answers_by_how_much_longer_they_are():
    def by_gap(gap: int) -> Row:
        return row("w " * (10 + gap), "w " * 10)

    gaps = [0, 1, -1, -1, 2, 5, -6, 7, 9]  # sorted by size: 1 1 1 2 | 5 6 7 9
    assert length_groups([by_gap(gap) for gap in gaps], 2) == [LengthGroup(1, 2, 4, 0.5), LengthGroup(5, 9, 4, 0.75)]
    # In three groups the cuts would fall behind 2 and 5 pairs; equal differences stay together.
    assert [group.n for group in length_groups([by_gap(gap) for gap in (1, 1, 1, 1, 1, 9)], 3)] == [5, 1]
    assert [group.n for group in length_groups([by_gap(gap) for gap in (1, 3, -3, 5)], 2)] == [3, 1]
    assert length_groups([by_gap(0)], 4) == []


def test_agreement_of_scores_rules_repeats_and_length():
    rows = [
        row("It is 4.", "It is 5, I think.", "2+2", scores=(5.0, 3.0), meta={"answer": ["4", "four"]}),
        row("5", "4", "2+2", scores=(1.0, 1.0), meta={"answer": "4"}),
        row("It is 5, I think.", "It is 4.", "2+2", scores=(1.0, 2.0)),
        row("It is 4.", "It is 5, I think.", "2+2", scores=(0.5, -0.5)),
        row("It is 4.", "It is 5, I think.", "2+2 again", meta={"answer": 4}),
    ]
    # The three judgements of one comparison: first and third, third and fourth differ, first and fourth agree.
    # Words: 3 against 5, 1 against 1, 5 against 3, 3 against 5 twice.
    assert agreements(rows) == [
        Agreement("scores", 3, 1, 2 / 3),
        Agreement("rules", 3, 0, 2 / 3),
        Agreement("repeats", 3, 0, 1 / 3),
        Agreement("longer", 4, 1, 0.25),
    ]


def test_what_decides_nothing_has_no_share_and_what_is_absent_no_line():
    [longer] = agreements([row("a", "b")])
    assert (longer.judge, longer.n, longer.ties) == ("longer", 0, 1)
    assert math.isnan(longer.share)


def test_near_duplicates_by_hand():
    texts = ["What is twice 7?", "what is Twice 7", "What is twice 8?", "Name a colour"]
    # Phrases of two words: {what is, is twice, twice 7} against {what is, is twice, twice 8} share 2 of 4.
    assert near_duplicates(texts, threshold=0.5, phrase=2) == [
        NearDuplicate(0, 1, 1.0),
        NearDuplicate(0, 2, 0.5),
        NearDuplicate(1, 2, 0.5),
    ]
    assert near_duplicates(texts[:1], texts[2:], threshold=0.5, phrase=2) == [NearDuplicate(0, 0, 0.5)]
    assert near_duplicates(["a b c"], ["c b a"], threshold=1.0, phrase=1) == [NearDuplicate(0, 0, 1.0)]
    assert near_duplicates(["a", "a b"], threshold=0.1, phrase=3) == []
    with pytest.raises(UserError, match="above 0 and at most 1, not 0"):
        near_duplicates(texts, threshold=0, phrase=2)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.6, 0.7, 1.0])
def test_near_duplicates_are_those_of_all_pairs(threshold):
    draw = random.Random(3)
    texts = [" ".join(draw.choices("abcdefgh", k=draw.randint(1, 12))) for _ in range(120)]
    sets = [set(words(text)) for text in texts]
    expected = {
        (i, j)
        for j in range(len(texts))
        for i in range(j)
        if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold
    }
    found = near_duplicates(texts, threshold=threshold, phrase=1)
    assert expected
    assert {(pair.first, pair.second) for pair in found} == expected
    assert len(found) == len(expected)
    across = near_duplicates(texts[:50], texts[50:], threshold=threshold, phrase=1)
    assert {(p.first, p.second + 50) for p in across} == {(i, j) for i, j in expected if i < 50 <= j}
