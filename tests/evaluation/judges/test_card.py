"""The card of a judge: agreement with people, order, length. By hand, and on PandaLM's annotators."""

from __future__ import annotations

import json
import math

import pytest

from alignment.errors import UserError
from alignment.evaluation.judges.agreement import agreement
from alignment.evaluation.judges.base import Item, Preference
from alignment.evaluation.judges.card import LongerJudge, against_humans, judge_card
from alignment.evaluation.judges.human_labels import HumanLabels
from tests.conftest import shared_data

YES, NO = 1, -1


def test_kappa_by_hand():
    """Two raters of 50 proposals: 20 and 15 times of one mind, chance would be half: kappa 0.4."""
    first = [YES] * 25 + [NO] * 25
    second = [YES] * 20 + [NO] * 5 + [YES] * 10 + [NO] * 15
    found = agreement(first, second)
    assert (found.n, found.share) == (50, 0.7) and found.kappa == pytest.approx(0.4)
    assert agreement([1, 1], [1, 1]).kappa is None
    assert agreement([1, 0, -1], [1, 0, -1]).kappa == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least one"):
        agreement([], [])


@pytest.mark.parametrize(
    "table", [[[20, 5], [10, 15]], [[30, 4, 1], [2, 40, 6], [3, 5, 9]], [[5, 0, 9], [1, 2, 0], [0, 7, 3]]]
)
def test_the_interval_of_kappa_is_that_of_the_delta_method(table):
    """The published formula against the gradient of kappa by the cells, taken numerically."""
    kinds, n = range(len(table)), sum(map(sum, table))
    cells = {(i, j): table[i][j] / n for i in kinds for j in kinds}

    def kappa(p):
        total = sum(p.values())
        observed = sum(p[i, i] for i in kinds) / total
        chance = sum(sum(p[i, j] for j in kinds) * sum(p[j, i] for j in kinds) for i in kinds) / total**2
        return (observed - chance) / (1 - chance)

    step = 1e-6
    slope = {c: (kappa(cells | {c: cells[c] + step}) - kappa(cells | {c: cells[c] - step})) / (2 * step) for c in cells}
    mean = sum(cells[c] * slope[c] for c in cells)
    error = math.sqrt((sum(cells[c] * slope[c] ** 2 for c in cells) - mean**2) / n)

    pairs = [c for c in cells for _ in range(round(cells[c] * n))]
    found = agreement([i for i, _ in pairs], [j for _, j in pairs])
    assert found.kappa == pytest.approx(kappa(cells))
    assert found.kappa_high - found.kappa == pytest.approx(1.959964 * error, rel=1e-5)


# Order and length


class Fixed(LongerJudge):
    """A judge that has compared."""

    pointwise = False


def pairs(*cases):
    return [(Item("q", (a, b)), Preference(shares)) for a, b, shares in cases]


def test_order_and_length_by_hand():
    """Of four pairs one is unread; the longer answer wins two of three decided ones; one has two orders at odds."""
    card = judge_card(
        Fixed(),
        pairs(
            ("long answer", "short", (1.0, 1.0)),
            ("short", "long answer", (0.0, 0.0)),
            ("long answer", "short", (0.0, 0.0)),
            ("equal", "alike", (1.0, 0.0)),
            ("long answer", "short", (1.0, None)),
        ),
    )
    assert (card["pairs"], card["verdicts"], card["unreadable"]) == (5, 10, 1)
    assert card["consistent"] == 3 / 4
    # Shown first: 1 and 0, 0 and 1, 0 and 1, 1 and 1.
    assert card["first"] == 5 / 8
    assert (card["longer"]["n"], card["longer"]["share"]) == (3, pytest.approx(2 / 3))
    # Outcomes 1, -1, -1, 0, 0 with gaps g, -g, g, 0, g.
    assert card["length_correlation"] == pytest.approx(1 / math.sqrt(4 * 3))


def test_a_judge_of_lengths_alone_is_seen():
    """The longer answer wins whatever is said first; swapped answers have the same card."""
    items = [Item("q", ("a" * n, "b" * (20 - n))) for n in range(3, 17) if n != 10]
    judge = LongerJudge()
    cards = [
        judge_card(judge, list(zip(asked, judge.compare(asked), strict=True)))
        for asked in (items, [item.swapped() for item in items])
    ]
    for card in cards:
        assert card["longer"]["share"] == 1.0 and card["length_correlation"] > 0.8 and "consistent" not in card
    assert cards[0]["length_correlation"] == pytest.approx(cards[1]["length_correlation"])


# People


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"prompt": "p", "answers": ["aa", "b"], "labels": [1, "first", 2]},
    {"prompt": "p", "answers": ["a", "bb"], "label": "tie"},
    {"prompt": "q", "answers": ["aa", "b"], "labels": [0, 1, 2]},
    {"prompt": "r", "answers": ["aa", "b"], "label": 2},
]


def test_labels_of_a_file(tmp_path):
    """A majority decides, none is a tie; the labels judge in either order, and know no other pair."""
    humans = HumanLabels(write(tmp_path / "labels.jsonl", ROWS))
    assert humans.outcomes == [1, 0, 0, -1]
    shown = [humans.items[0], humans.items[3].swapped(), Item("p", ("aa", "c"))]
    assert [(one.outcome, one.unreadable) for one in humans.compare(shown)] == [(1, 0), (1, 0), (0, 2)]
    among = humans.among_annotators()
    assert (among.n, among.share) == (6, 1 / 6)
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    assert HumanLabels(tmp_path / "list.json").identity == humans.identity
    assert HumanLabels(write(tmp_path / "less.jsonl", ROWS[:3])).identity != humans.identity


def test_agreement_with_people_by_hand(tmp_path):
    """Longer says 1, -1, 1, 1 where people say 1, 0, 0, -1: one of four, and one of the two on which both decide."""
    found = against_humans(LongerJudge(), HumanLabels(write(tmp_path / "labels.jsonl", ROWS)))
    assert (found["judge"]["n"], found["judge"]["share"]) == (4, 0.25)
    assert found["judge"]["decisive"] == {"n": 2, "share": 0.5}
    assert found["longer"] == found["judge"] and found["annotators"]["n"] == 6


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "answers": ["a", "b"]}, {"prompt": "p", "answers": ["a"], "label": 1}, [1],
        {"prompt": "p", "answers": ["a", "b"], "label": 3}, {"prompt": 1, "answers": ["a", "b"], "label": 1},
        {"prompt": "p", "answers": ["a", "b"], "label": True}, {"prompt": "p", "answers": ["a", "b"], "labels": []},
        {"prompt": "p", "answers": ["a", "b"], "label": [1]},
    ],
)  # fmt: skip
def test_a_row_that_is_no_label_is_refused(row, tmp_path):
    """By its place."""
    with pytest.raises(UserError, match=r"labels.jsonl row 2 is no human label"):
        HumanLabels(write(tmp_path / "labels.jsonl", [ROWS[0], row]))


@pytest.mark.parametrize(("text", "said"), [("", "hold no row"), ("{", "no JSON Lines"), (None, "cannot be read")])
def test_a_file_of_labels_that_cannot_be_read_is_refused(text, said, tmp_path):
    """In one sentence."""
    if text is not None:
        (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        HumanLabels(tmp_path / "x.jsonl")


def test_pandalms_annotators_and_the_longer_answer(tmp_path):
    """Published labels of 999 pairs: annotators agree in 0.91 to 0.93 (kappa 0.85 to 0.88); the longer answer agrees in
    0.61 (kappa 0.30), and in 67.5 % of the pairs on which both decide."""
    rows = json.loads((shared_data("pandalm_human") / "testset-v1.json").read_text())
    votes = [[row[f"annotator{k}"] for row in rows] for k in (1, 2, 3)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        found = agreement(votes[a], votes[b])
        assert 0.91 <= found.share <= 0.93 and 0.85 <= found.kappa <= 0.88
    labelled = [
        {
            "prompt": f"{row['instruction']}\n\n{row['input']}",
            "answers": [str(row["response1"]), str(row["response2"])],
            "labels": list(vote),
        }
        for row, vote in zip(rows, zip(*votes, strict=True), strict=True)
    ]
    humans = HumanLabels(write(tmp_path / "labels.jsonl", labelled))
    card = against_humans(LongerJudge(), humans)
    assert card["judge"]["share"] == pytest.approx(0.611, abs=5e-4)
    assert card["judge"]["kappa"] == pytest.approx(0.303, abs=5e-4)
    assert card["judge"]["decisive"]["share"] == pytest.approx(0.675, abs=5e-4)
    assert card["annotators"]["n"] == 3 * 999 and card["annotators"]["kappa"] == pytest.approx(0.864, abs=2e-3)
    assert humans.compare(humans.items)[0].outcome == humans.outcomes[0]
