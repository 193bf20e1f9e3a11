"""Two answers with a verdict: every layout of the field, every spelling of a winner, and what is refused."""

import csv
import json
from collections import Counter
from itertools import product

import pytest

from alignment.config.data import Strengths, Ties
from alignment.data.layouts.recognition import recognise
from alignment.data.rows.row import BadRow, Row
from alignment.data.sources.loading import load_rows
from alignment.data.tokens.tokenization import tokenize_groups
from alignment.errors import UserError
from tests.helpers.compared import X, Y, assistant, outcomes, read, user

LLMBAR = [
    {"input": "Name a fruit.", "output_1": "Apple.", "output_2": "Car.", "label": 1},
    {"input": "Name a car part.", "output_1": "Apple.", "output_2": "Wheel.", "label": 2},
]
PANDALM = [
    {
        **{"idx": 0, "instruction": "Shorten it.", "input": "It is cold.", "response1": "Cold.", "response2": "Warm."},
        **{"annotator1": 1, "annotator2": 2, "annotator3": 1},
    },
    {
        **{"idx": 1, "instruction": "Say hello.", "input": "", "response1": "Bye.", "response2": "Hello."},
        **{"annotator1": 0, "annotator2": 2, "annotator3": 2},
    },
    {
        **{"idx": 2, "instruction": "Say yes.", "input": "", "response1": "Yes.", "response2": "Yes!"},
        **{"annotator1": 0, "annotator2": 1, "annotator3": 2},
    },
]
ARENA = [
    {
        **{"question_id": "q1", "model_a": "m", "model_b": "n", "winner": winner, "judge": "user", "turn": 1},
        "conversation_a": [user("2 + 2?"), assistant("4")],
        "conversation_b": [user("2 + 2?"), assistant("5")],
    }
    for winner in ("model_a", "model_b", "tie", "tie (bothbad)")
]
KAGGLE = [
    {
        **{"id": 1, "model_a": "m", "model_b": "n", "prompt": '["Capital of Peru?"]', "response_a": '["Lima."]'},
        **{"response_b": '["Quito."]', "winner_model_a": a, "winner_model_b": b, "winner_tie": tie},
    }
    for a, b, tie in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
]
HELPSTEER2 = [
    {"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": strength} for strength in (-3, 0, 1)
]
HELPSTEER3 = [
    {
        **{"domain": "general", "language": "english", "context": [user("p")], "response1": "x", "response2": "y"},
        "overall_preference": strength,
        "individual_preference": [{"score": strength, "reasoning": "because"}],
    }
    for strength in (-2, 3)
]
SAFE = [
    {"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": better, "safer_response_id": 0}
    for better in (0, 1)
]
SHP = [
    {"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": 1, "score_A": 9, "score_B": 2},
    {"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": 0, "score_A": 3, "score_B": 8},
]
WEBGPT = [
    {"question": {"id": 1, "full_text": "p"}, "answer_0": "x", "answer_1": "y", "score_0": first, "score_1": -first}
    for first in (-0.5, 1.0, 0.0)
]
CHOSEN = [{"question": "p", "answer_a": "x", "answer_b": "y", "chosen": chosen} for chosen in ("A", "B")]


@pytest.mark.parametrize(
    ("records", "prompts", "expected", "note"),
    [
        (
            *(LLMBAR, ["Name a fruit.", "Name a car part."], [("Apple.", "Car."), ("Wheel.", "Apple.")]),
            "column label says which of output_1 and output_2 won: 1 and 2 as in their names",
        ),
        (
            *(PANDALM, ["Shorten it.\nIt is cold.", "Say hello."], [("Cold.", "Warm."), ("Hello.", "Bye."), "tie"]),
            "most votes of annotator1, annotator2, annotator3 say which of response1 and response2 won: "
            "1 and 2 as in their names, 0 a tie",
        ),
        (
            ARENA,
            [[user("2 + 2?")]] * 2,
            [([assistant("4")], [assistant("5")]), ([assistant("5")], [assistant("4")]), "tie", "both_bad"],
            "column winner says which of conversation_a and conversation_b won",
        ),
        (
            KAGGLE,
            [[user("Capital of Peru?")]] * 2,
            [([assistant("Lima.")], [assistant("Quito.")]), ([assistant("Quito.")], [assistant("Lima.")]), "tie"],
            "the columns winner_model_a, winner_model_b, winner_tie say which answer won",
        ),
        (
            *(HELPSTEER2, ["p", "p"], [X, "tie", Y]),
            "column preference_strength says which of response_1 and response_2 won: "
            "below 0 the first, above 0 the second, 0 a tie",
        ),
        (
            *(HELPSTEER3, [[user("p")]] * 2),
            [([assistant("x")], [assistant("y")]), ([assistant("y")], [assistant("x")])],
            "column overall_preference says which of response1 and response2 won: "
            "below 0 the first, above 0 the second, 0 a tie",
        ),
        (
            *(SAFE, ["p", "p"], [X, Y]),
            "column better_response_id says which of response_0 and response_1 won: 0 and 1 as in their names",
        ),
        (SHP, ["p", "p"], [X, Y], "the higher of score_A and score_B won"),
        (WEBGPT, ["p", "p"], [Y, X, "tie"], "the higher of score_0 and score_1 won"),
        (CHOSEN, ["p", "p"], [X, Y], "column chosen says which of answer_a and answer_b won"),
    ],
    ids=(
        "LLMBar",
        "PandaLM",
        "arena",
        "arena in lists",
        "HelpSteer2",
        "HelpSteer3",
        "SafeRLHF",
        "SHP",
        "WebGPT",
        "chosen",
    ),
)
def test_layouts_of_the_field(records, prompts, expected, note):
    """Each is recognised with no setting, the log says what decided, and the pairs are those worked out by hand."""
    name, said, rows = read(*records)
    assert (name, said) == ("compared pairs", note)
    assert outcomes(rows) == expected
    assert [row.prompt for row in rows if isinstance(row, Row)] == prompts
    assert [row.source for row in rows if isinstance(row, Row)] == [
        f"f:{number}" for number, outcome in enumerate(expected, 1) if not isinstance(outcome, str)
    ]


def test_real_votes_are_read_as_they_were_converted_before(shared):
    """PandaLM's 999 human judgements: the 836 pairs with a majority, as the folder's own conversion has them."""
    records = json.loads((shared / "pandalm_human" / "testset-v1.json").read_text())
    lines = (shared / "pandalm_human" / "pairs.jsonl").read_text().splitlines()
    _, _, rows = read(*records)

    def key(prompt, chosen, rejected):
        return "".join(prompt.split()), chosen, rejected

    found = Counter(key(row.prompt, *row.completions) for row in rows if isinstance(row, Row))
    converted = [[pair[c][0]["content"] for c in ("prompt", "chosen", "rejected")] for pair in map(json.loads, lines)]
    assert found == Counter(key(*texts) for texts in converted)
    assert Counter(row.reason for row in rows if isinstance(row, BadRow)) == {
        "tie": 105, "empty_answer": 52, "wrong_type": 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("votes", "outcome"),
    [
        ("AAB", X),
        ("AB", "tie"),
        ("BBB", Y),
        ("ABC", "tie"),
        (["A", None, None], X),
        (["A", "both_bad", "both_bad"], "both_bad"),
    ],
)
def test_more_than_half_of_the_votes_decide(votes, outcome):
    """Half of them do not; missing votes do not count."""
    record = {"prompt": "p", "response_a": "x", "response_b": "y"}
    columns = {f"annotator_{k}": vote for k, vote in enumerate(votes, 1)}
    full = record | dict.fromkeys(columns, "A")
    assert outcomes(read(full, full, record | columns)[2])[-1] == outcome
    listed = record | {"votes": [vote for vote in votes if vote is not None]}
    assert outcomes(read(record | {"votes": ["A"]}, listed)[2])[-1] == outcome


def test_an_arena_conversation_ends_at_the_turn_that_was_judged():
    """MT-bench shows two turns and asks for a verdict on one of them."""
    record = {
        "conversation_a": [user("p"), assistant("x"), user("more"), assistant("later x")],
        "conversation_b": [user("p"), assistant("y"), user("more"), assistant("later y")],
        **{"winner": "model_b", "turn": 1},
    }
    [row] = read(record)[2]
    assert (row.prompt, row.completions) == ([user("p")], ([assistant("y")], [assistant("x")]))
    written = record | {side: json.dumps(record[side]) for side in ("conversation_a", "conversation_b")}
    assert read(written)[2] == [row]


def test_arena_conversations_differ_from_the_first_answer_on():
    """Each side has its own earlier answers: the pair is of whole trajectories after the first question."""
    sides = {
        side: [user("p"), assistant(f"{side}1"), user("more"), assistant(f"{side}2")]
        for side in ("conversation_a", "conversation_b")
    }
    [row] = read({**sides, "winner": "model_b", "turn": 2})[2]
    assert row.prompt == [user("p")]
    assert row.completions == (sides["conversation_b"][1:], sides["conversation_a"][1:])


def test_arena_votes_in_a_table(config, tmp_path):
    """All cells are text there: lists of turns, and the ones and zeros of the winner."""
    path = tmp_path / "votes.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, KAGGLE[0].keys())
        writer.writeheader()
        writer.writerows(KAGGLE)
    loaded = load_rows(config(path), stage="preference")
    assert [row.completions[0][0]["content"] for row in loaded.train] == ["Lima.", "Quito."]
    assert [(row.reason, row.row) for row in loaded.dropped] == [("tie", 3)]
    assert loaded.bad == []


def test_compared_pairs_have_the_tokens_of_the_pairs_that_they_are(qwen, config, jsonl, shared):
    """Real votes through the chat template: as if a script had written chosen and rejected."""
    records = json.loads((shared / "pandalm_human" / "testset-v1.json").read_text())[:18]
    loaded = load_rows(config(jsonl(records)), stage="preference")
    pairs = [
        {"prompt": row.prompt, "chosen": row.completions[0], "rejected": row.completions[1]} for row in loaded.train
    ]
    converted = load_rows(config(jsonl(pairs, "pairs.jsonl")), stage="preference")
    ours, theirs = (tokenize_groups(rows.train, qwen, config()).groups for rows in (loaded, converted))
    assert len(ours) == len(theirs) > 10
    for group, other in zip(ours, theirs, strict=True):
        assert [ids.tolist() for ids in (group.prompt, *group.completions)] == [
            ids.tolist() for ids in (other.prompt, *other.completions)
        ]


def test_sentences_without_a_question_are_no_answers():
    """Data of paraphrases have two texts and a label, and nothing was asked."""
    with pytest.raises(UserError, match="layout of f is not known"):
        read({"text_a": "x", "text_b": "y", "label": 1})


def test_several_turns_in_lists_of_texts_become_conversations():
    """The questions and the answers of one side alternate; a missing answer is a bad row."""
    record = {"prompt": ["p", "q"], "response_a": ["x", "z"], "response_b": ["x", "y"], "winner": "a"}
    missing = record | {"response_b": ["x", None]}
    row, bad = read(record, missing)[2]
    assert row.prompt == [user("p"), assistant("x"), user("q")]
    assert row.completions == ([assistant("z")], [assistant("y")])
    assert bad.reason == "empty_answer"


def test_strengths_become_scores_or_weights():
    """The winner's score is the strength, the other's 0; as weights they multiply the row's own."""
    rows = [row for row in read(*HELPSTEER2)[2] if isinstance(row, Row)]
    assert [(row.scores, row.weight) for row in rows] == [((3.0, 0.0), 1.0), ((1.0, 0.0), 1.0)]
    weighted = [record | {"weight": 0.5} for record in HELPSTEER2]
    rows = [row for row in read(*weighted, strengths=Strengths.weights)[2] if isinstance(row, Row)]
    assert [(row.scores, row.weight) for row in rows] == [(None, 1.5), (None, 0.5)]
    assert read({"prompt": "p", "output_1": "x", "output_2": "y", "winner": "A>>B"})[2][0].scores == (2.0, 0.0)
    votes = PANDALM[0] | {f"annotator{k}": value for k, value in ((1, -3), (2, -1), (3, 2))}
    winner = {"first": [-3, -2, -1], "second": [1, 2, 3]}
    assert read(votes, winner=winner)[2][0].scores == (2.0, 0.0)  # the mean of those who agree


@pytest.mark.parametrize("written", [float, str])
@pytest.mark.parametrize("column", ["preference_strength", "overall_preference"])
def test_strengths_may_have_fractions(column, written):
    """The sign names the winner and the rest is the strength, also where a table writes them as text."""
    records = [
        {"prompt": "p", "response_1": "x", "response_2": "y", column: written(s)} for s in (-1.5, 0.25, -2, 0, 3)
    ]
    right = [(X, (1.5, 0.0)), (Y, (0.25, 0.0)), (X, (2.0, 0.0)), (Y, (3.0, 0.0))]
    rows = read(*records)[2]
    assert rows[3].reason == "tie"
    assert [(row.completions, row.scores) for row in rows if isinstance(row, Row)] == right
    weights = [row.weight for row in read(*records, strengths=Strengths.weights)[2] if isinstance(row, Row)]
    assert weights == [1.5, 0.25, 2, 3]


def test_fractions_in_another_column_are_refused_with_the_setting_that_decides():
    """A share, a difference or a strength: only you know; `negative` and `positive` stand for all numbers of a sign."""
    records = [{"prompt": "p", "response_a": "x", "response_b": "y", "preference": p} for p in (0.5, -1.5, 0.0)]
    with pytest.raises(UserError, match=r"f: the column preference has numbers with fractions, .*\[negative\]"):
        read(*records)
    winner = {"first": ["positive"], "second": ["negative"], "tie": [0]}
    rows = read(*records, winner=winner)[2]
    assert outcomes(rows) == [X, Y, "tie"]
    assert [row.scores for row in rows[:2]] == [(0.5, 0.0), (1.5, 0.0)]


def test_ratings_of_both_answers_are_the_scores_of_the_pair():
    """Whichever won."""
    assert [row.scores for row in read(*SHP)[2]] == [(9.0, 2.0), (8.0, 3.0)]
    record = {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "B", "rating_a": "1", "rating_b": 3.5}
    assert read(record)[2][0].scores == (3.5, 1.0)
    [tie] = [row for row in read(record | {"winner": "A"}, SHP[0] | {"score_B": 9})[2] if not isinstance(row, Row)]
    assert tie.reason == "missing_field"


def test_ties_kept_are_two_pairs_of_half_the_weight():
    """One for each order, so that they pull together to equal rewards; two bad answers stay out."""
    _, _, rows = read(*ARENA, ties=Ties.both_ways)
    four, five = [assistant("4")], [assistant("5")]
    assert outcomes(rows) == [(four, five), (five, four), (four, five), (five, four), "both_bad"]
    assert [row.weight for row in rows[:4]] == [1.0, 1.0, 0.5, 0.5]
    assert rows[2].source == rows[3].source == "f:3"


def test_a_winner_may_be_the_name_of_its_model():
    """As some arenas write it."""
    rows = [{**ARENA[0], "winner": winner} for winner in ("m", "n", "o")]
    four, five = [assistant("4")], [assistant("5")]
    assert outcomes(read(*rows)[2]) == [(four, five), (five, four), "bad_verdict"]


def test_other_names_are_mapped():
    """The answers' and the verdict's."""
    records = [{"task": "p", "old": "x", "new": "y", "pick": pick, "id": 3} for pick in ("B", "A")]
    columns = {"prompt": "task", "response_a": "old", "response_b": "new", "winner": "pick"}
    rows = read(*records, columns=columns)[2]
    assert outcomes(rows) == [Y, X]
    assert rows[0].meta == {"id": 3}


COMPARED = {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "A"}


@pytest.mark.parametrize(
    ("fields", "reason", "message"),
    [
        ({"winner": None}, "missing_field", "column 'winner' is absent or null"),
        ({"winner": "maybe"}, "bad_verdict", "column 'winner' has 'maybe', and accepted are A, B, tie, both_bad, and"),
        ({"winner": 7}, "bad_verdict", "column 'winner' has 7, and accepted are A, B, tie, both_bad, and what"),
        ({"response_a": None}, "missing_field", "column 'response_a' is absent or null"),
        ({"response_b": " "}, "empty_answer", "column 'response_b' is empty"),
        ({"response_b": 3}, "wrong_type", "column 'response_b' holds the number 3, not text or messages"),
        ({"response_b": "x"}, "identical_answers", "the answers are the same"),
        ({"prompt": ""}, "empty_prompt", "the prompt is empty"),
        ({"prompt": None}, "missing_field", "column 'prompt' is absent or null"),
    ],
)
def test_a_bad_row_is_named_by_the_columns_of_its_file(fields, reason, message):
    """One sentence with the column, what it holds and what is accepted."""
    good = [COMPARED] * 3
    *_, bad = read(*good, COMPARED | fields)[2]
    assert (bad.reason, bad.file, bad.row, bad.fault) == (reason, "f", 4, True)
    assert bad.message.startswith(message)


def test_one_hot_columns_say_one_thing():
    """Two winners, or none where a tie has its own column, are a bad row."""
    *_, two, none = read(*KAGGLE, KAGGLE[0] | {"winner_model_b": 1}, KAGGLE[0] | {"winner_model_a": 0})[2]
    assert (two.reason, none.reason) == ("bad_verdict", "bad_verdict")
    columns = ("winner_model_a", "winner_model_b")
    without = [{k: v for k, v in record.items() if k != "winner_tie"} for record in KAGGLE]
    assert [row.reason for row in read(*without)[2] if isinstance(row, BadRow)] == ["tie"]
    assert columns[0] in two.message


def test_two_answers_without_a_verdict_are_refused_by_name():
    """The message says what is missing and which columns are accepted."""
    with pytest.raises(UserError, match=r"f has two answers \(response_a, response_b\), and no column says which"):
        read({"prompt": "p", "response_a": "x", "response_b": "y"})


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [user("p"), assistant("c")], "response_a": "x", "response_b": "y", "winner": "A"},
        {"prompt": "p", "completion": "c", "answer_1": "x", "answer_2": "y", "label_quality": 3},
        {"prompt": "p", "completion": "c", "score": 4},
        {"messages": [user("p"), assistant("c")], "thumbs_up": True},
    ],
)
def test_sft_data_stay_sft_data(record):
    """What is read as conversations in the SFT stage is read as before, whatever stands beside it."""
    layout = recognise([record], {}, "sft", "f")
    assert (layout.family, layout.reading) == ("sft", None)


def test_pairs_stay_pairs():
    """A verdict and both answers beside chosen and rejected change nothing."""
    record = COMPARED | {"chosen": "c", "rejected": "r"}
    layout = recognise([record], {}, "preference", "f")
    assert (layout.name, layout.reading) == ("pairs", None)


def test_three_answers_are_no_comparison_of_two():
    """They have no winner among two."""
    record = {"prompt": "p", **{f"response_{k}": f"x{k}" for k in (1, 2, 3)}, "label": 1}
    with pytest.raises(UserError, match="layout of f is not known"):
        read(record)


def test_sft_learns_the_chosen_answer_of_a_comparison(config, jsonl):
    """The layout serves both stages; a tie has no chosen answer, however ties are kept."""
    tie = LLMBAR[0] | {"label": 0}
    loaded = load_rows(config(jsonl([*LLMBAR, tie]), ties=Ties.both_ways), stage="sft")
    assert [row.completions for row in loaded.train] == [("Apple.",), ("Wheel.",)]


@pytest.mark.parametrize(("order", "ties"), product(("AB", "BA"), Ties))
def test_the_row_of_a_pair_keeps_its_other_columns(order, ties):
    """What the comparison reads is gone, the rest is metadata for judges and filters."""
    record = COMPARED | {"winner": order[0], "language": "en", "system": "s", "tools": [{"name": "f"}]}
    [row] = read(record, ties=ties)[2]
    assert row.meta == {"language": "en"}
    assert row.variables == {"tools": [{"name": "f"}]}
    assert row.prompt[0] == {"role": "system", "content": "s"}
