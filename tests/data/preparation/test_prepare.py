"""What the log says of the data that a stage is given: columns that change the loss, answers that are cut."""

import logging

import pytest

from alignment.config.compose import load
from alignment.config.data import ListPairs, Ties
from alignment.data.preparation.prepare import fit_preferences, load_conversations, read_preferences
from alignment.errors import UserError
from tests.conftest import recommended_loss
from tests.helpers.chat_templates import CHATML


def pair(number, **more):
    return {"prompt": f"x{number}", "chosen": "y" * 20, "rejected": "z" * 20, **more}


@pytest.fixture
def said(tiny, config, jsonl, caplog):
    """The log's lines about these pairs."""
    tiny.chat_template = CHATML
    caplog.set_level(logging.INFO)

    def say(*pairs, **fields):
        settings = config(jsonl(pairs), **fields)
        fit_preferences(read_preferences(settings, tiny), settings, recommended_loss("dpo"))
        return [record.getMessage().strip() for record in caplog.records]

    return say


@pytest.fixture
def fit(tiny, config, jsonl, caplog):
    """These rows, trained on and held out, as a loss takes them."""
    tiny.chat_template = CHATML
    caplog.set_level(logging.INFO)

    def run(loss, records, **fields):
        path = jsonl(records)
        settings = config(path, eval_source=str(jsonl(records, "held_out.jsonl")), **fields)
        return fit_preferences(read_preferences(settings, tiny), settings, recommended_loss(loss))[0]

    return run


def test_columns_that_change_the_loss_are_named_with_their_range(said):
    lines = said(pair(1, weight=60), pair(2, weight=74), pair(3, weight=66, id=5, source="s"))
    assert "The column weight (60 to 74) multiplies the loss of its row." in lines
    assert "Training does not read these columns: id, source." in lines


def test_scores_and_steps_are_named(said):
    lines = said(
        pair(1, score_chosen=2, score_rejected=-1, steps="w"), pair(2, score_chosen=9, score_rejected=1, steps="v")
    )
    assert "The column scores (-1 to 9) is read by losses of scores." in lines
    assert any(line.startswith("The column of steps begins the answers") for line in lines)


def test_nothing_is_said_of_plain_pairs(said):
    assert not [line for line in said(pair(1), pair(2)) if "column" in line or "cut" in line]


def test_most_answers_cut_is_a_warning(said, caplog):
    """Those answers do not show how one ends, and nothing is learnt from where they were cut."""
    said(pair(1), pair(2), max_length=24, max_prompt_length=20)
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().startswith("4 of 4 answers are cut at data.max_length=24")


def test_sft_says_so_too(tiny, config, jsonl, caplog):
    tiny.chat_template = CHATML
    load_conversations(
        config(jsonl([{"prompt": "x", "completion": "y" * 50}]), max_length=40, max_prompt_length=30), tiny
    )
    assert "1 of 1 answers are cut at sft.data.max_length=40" in caplog.text


def test_what_decides_a_comparison_and_what_is_left_out_is_said(said):
    """The column, the numbers of ties and of answers that are both bad; neither stops the run."""
    words = ("A", "tie", "B", "both_bad", "tie")
    votes = [
        {"prompt": f"x{k}", "response_a": "y" * 9, "response_b": "z" * 9, "winner": word}
        for k, word in enumerate(words)
    ]
    lines = said(*votes)
    assert lines[0].endswith("layout compared pairs; column winner says which of response_a and response_b won.")
    left = [line.split(", the first ")[0] + line[line.rindex(" row ") :] for line in lines if "left out" in line]
    assert left == ["2 rows are left out row 2: neither answer won.", "1 row is left out row 4: both answers are bad."]


def test_ties_that_are_kept_are_counted(said):
    """With what becomes of them."""
    votes = [
        {"prompt": f"x{k}", "response_a": "y" * 9, "response_b": "z" * 9, "winner": word}
        for k, word in enumerate(("A", "tie", "tie"))
    ]
    lines = said(*votes, ties=Ties.both_ways)
    assert lines[0].endswith("; 2 ties are two pairs each, one for each order, with half the weight.")
    assert "The column weight (0.5 to 1) multiplies the loss of its row." in lines


@pytest.mark.parametrize(
    ("winner", "message"),
    [
        ({"first": [0]}, "data.winner must list values for first and for second"),
        ({"first": 0, "second": 0}, "data.winner lists the value 0 twice"),
        (
            {"first": 0, "second": 1, "third": 2},
            "data.winner has the key 'third', and the keys are first, second, tie, both_bad",
        ),
    ],
)
def test_a_winner_that_says_nothing_is_refused(config, winner, message):
    """Each in one sentence."""
    with pytest.raises(UserError, match=message):
        config(winner=winner)


@pytest.mark.slow
def test_the_winner_is_given_on_the_command_line():
    """A value alone is a list of one; words and numbers are kept as they are."""
    config = load("recipe=quickstart", "data.winner={first: [A, 1], second: 0, tie: both}", "data.ties=both_ways")
    assert config.data.winner == {"first": ["A", 1], "second": [0], "tie": ["both"]}


LISTS = [
    {"prompt": "a", "completions": ["x", "y", "z"], "scores": [1, 3, 2]},
    {"prompt": "b", "completions": ["x", "y"], "scores": [1, 1]},
    {"prompt": "c", "completions": ["x", "y", "z", "v"], "scores": [4, 4, 1, 0]},
]


def test_equal_scores_in_lists_of_two_are_no_pair_either(fit):
    """Also where no list is longer."""
    data = fit("dpo", [LISTS[1], {"prompt": "d", "completions": ["x", "y"], "scores": [1, 2]}])
    assert [(group.scores, group.source.rpartition(":")[2]) for group in data.train] == [((2.0, 1.0), "2")]


@pytest.mark.parametrize("loss", ["plackett_luce", "best_vs_rest", "all_pairs"])
def test_a_loss_that_ranks_equal_scores_says_so(fit, caplog, loss):
    """Two of the three lists have some; a loss of pairs of unequal scores leaves them out by itself."""
    fit(loss, LISTS)
    said = "2 of 3 lists have equal scores" in caplog.text
    assert said is (loss != "all_pairs")


GAPS = [
    {"prompt": f"p{k}", "chosen": "x", "rejected": "y", "score_chosen": score, "score_rejected": 1}
    for k, score in enumerate((4, 3, 2.5, 0))
]


@pytest.mark.parametrize(("gap", "left"), [(0, [4.0, 3.0, 2.5, 0.0]), (0.5, [4.0, 3.0, 2.5]), (2, [4.0, 3.0])])
def test_pairs_with_a_minimal_gap_of_scores(fit, caplog, gap, left):
    """At the gap a pair stays; what is left out is counted, also in the held-out part."""
    data = fit("dpo", GAPS, min_score_gap=gap)
    assert [group.scores[0] for group in data.train] == [group.scores[0] for group in data.eval] == left
    assert [row.prompt for row in data.eval_rows] == [f"p{k}" for k in range(len(left))]
    assert (f"{4 - len(left)} of 4 pairs are left out, their scores differ by less than {gap}" in caplog.text) is (
        gap > 0
    )


def test_a_minimal_gap_chooses_among_the_pairs_of_a_list(fit):
    """Of six pairs of four answers those with a gap of 3 or more."""
    data = fit("dpo", LISTS[2:], list_pairs=ListPairs.all_pairs, min_score_gap=3)
    assert [group.scores for group in data.train] == [(4.0, 1.0), (4.0, 0.0), (4.0, 1.0), (4.0, 0.0)]


@pytest.mark.parametrize(
    ("loss", "records", "gap", "message"),
    [
        ("plackett_luce", LISTS, 1, "data.min_score_gap=1 chooses pairs, and the loss takes whole lists: set it to 0"),
        (
            "dpo",
            [{"prompt": "p", "chosen": "x", "rejected": "y"}],
            1,
            r"min_score_gap=1 needs scores, and .* set it to 0",
        ),
        ("dpo", GAPS, 9, r"no training pair has scores that differ by data\.min_score_gap=9"),
        ("dpo", GAPS, -1, r"data\.min_score_gap must be a finite number, at least 0, not -1"),
    ],
)
def test_a_gap_that_chooses_nothing_is_refused(fit, loss, records, gap, message):
    """In one sentence that says what to set."""
    with pytest.raises(UserError, match=message):
        fit(loss, records, min_score_gap=gap)
