"""Single answers with scores or thumbs, lists of answers with scores or ranks, and prompts under other names."""

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.data.layouts.recognition import recognise, rows_of
from alignment.data.rows import sequences
from alignment.data.rows.row import BadRow, Row
from alignment.data.sources.loading import load_rows
from alignment.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(*records, stage="preference", columns=None):
    """The layout's name, what was decided, and what becomes of the records."""
    layout = recognise(records, columns or {}, stage, "f")
    numbered = [("f", number, record) for number, record in enumerate(records, 1)]
    return layout.name, layout.reading.note, list(rows_of(numbered, layout, columns or {}))


RATED = [
    {"prompt": "p", "response": "x", "score": 2.0, "model": "m", "split": "a"},
    {"prompt": "q", "response": "u", "score": 1.0, "model": "m", "split": "a"},
    {"prompt": "p", "response": "y", "score": "4.5", "model": "n", "split": "a"},
    {"prompt": "only", "response": "z", "score": 3, "model": "m", "split": "a"},
    {"prompt": "p", "response": "z", "score": 3, "model": "o", "split": "a"},
    {"prompt": "q", "response": "v", "score": 1.0, "model": "n", "split": "a"},
]


def test_rated_answers_to_one_prompt_become_a_ranked_list():
    """Wherever they stand in the file, best first; a lonely one is left out and is no fault."""
    name, note, rows = read(*RATED)
    assert (name, note) == ("rated answers", "column score ranks the answers to each prompt")
    best, equal = [row for row in rows if isinstance(row, Row)]
    assert (best.prompt, best.completions, best.scores) == ("p", ("y", "z", "x"), (4.5, 3.0, 2.0))
    assert (equal.completions, equal.scores, equal.source) == (("u", "v"), (1.0, 1.0), "f:2")
    assert best.meta == {"split": "a"}  # what all of them share
    [alone] = [row for row in rows if isinstance(row, BadRow)]
    assert (alone.reason, alone.row, alone.fault) == ("single_answer", 4, False)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.booleans()), min_size=3, max_size=25))
@settings(max_examples=40, deadline=None)
def test_many_rated_answers_are_gathered_in_a_file_as_few_are_in_memory(tmp_path_factory, answers):
    """By prompt, in the order in which the prompts come first, and of each prompt in the order of the answers."""
    numbered = [
        (
            "f",
            n,
            {"prompt": f"p{p}", "completion": f"x{n}", "score": score if sound else "high", "at": date(2026, 1, 1)},
        )
        for n, (p, score, sound) in enumerate(answers, 1)
    ]
    expected = {}
    for _, n, record in numbered:
        if record["score"] != "high":
            expected.setdefault(record["prompt"], []).append((n, record["score"]))
    right = [
        (prompt, [f"x{n}" for n, _ in sorted(own, key=lambda answer: -answer[1])])
        for prompt, own in expected.items()
        if len(own) > 1
    ]
    layout = recognise([{"prompt": "p", "completion": c, "score": 1} for c in "xy"], {}, "preference", "f")
    in_memory = list(rows_of(numbered, layout, {}))
    assert [(row.prompt, [*row.completions]) for row in in_memory if isinstance(row, Row)] == right
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sequences, "KEPT_ROWS", 2)
        assert list(rows_of(numbered, layout, {}, tmp_path_factory.getbasetemp())) == in_memory


def test_answers_under_different_systems_are_not_compared():
    """Their prompts are not the same."""
    records = [{"prompt": "p", "response": f"x{k}", "score": k, "system": f"s{k % 2}"} for k in range(4)]
    assert [row.scores for row in read(*records)[2]] == [(2.0, 0.0), (3.0, 1.0)]


@pytest.mark.parametrize(
    "columns",
    [
        *[
            ("instruction", "output", "rating"),
            ("question", "answer", "overall_score"),
            ("prompt", "completion", "reward"),
        ],
        *[("query", "reply", "Quality Score"), ("prompt", "response", "helpfulness"), ("context", "response", "score")],
    ],
)
def test_names_of_rated_answers(columns):
    """As UltraFeedback, HelpSteer and others call them."""
    prompt, answer, score = columns
    records = [{prompt: "p", answer: text, score: value} for text, value in (("x", 1), ("y", 2))]
    [row] = read(*records)[2]
    assert (row.prompt, row.completions, row.scores) == ("p", ("y", "x"), (2.0, 1.0))


@given(order=st.permutations(RATED))
@settings(max_examples=20, deadline=None)
def test_the_order_of_rated_answers_does_not_matter(order):
    """The same lists with the same scores."""

    def lists(rows):
        return {(row.prompt, tuple(sorted(zip(row.completions, row.scores, strict=True)))) for row in rows}

    assert lists(r for r in read(*order)[2] if isinstance(r, Row)) == lists(
        r for r in read(*RATED)[2] if isinstance(r, Row)
    )


def test_a_rated_answer_that_cannot_be_used_is_a_bad_row_of_its_own():
    """The others of its prompt still make their list."""
    rows = read(*RATED[:3], RATED[4] | {"score": "?"}, RATED[4] | {"response": " "}, RATED[4] | {"prompt": None})[2]
    assert [(row.reason, row.row) for row in rows if isinstance(row, BadRow) and row.fault] == [
        *(("bad_score", 4), ("empty_answer", 5), ("missing_field", 6)),
    ]
    assert [row.completions for row in rows if isinstance(row, Row)] == [("y", "x")]


def test_rated_data_without_two_answers_to_a_prompt_are_refused(config, jsonl):
    """The message says why, and not that the layout is unknown."""
    path = jsonl([{"prompt": f"p{k}", "response": "x", "score": k} for k in range(3)])
    with pytest.raises(
        UserError, match=r"no usable row, and 3 whose prompt has no second answer: rows 1, 2 and 3: its prompt has no"
    ):
        load_rows(config(path), stage="preference")


def test_a_file_in_the_order_of_its_models_is_read_beyond_the_limit(config, jsonl):
    """The second answer to a prompt may stand far below; the limit counts lists."""
    records = [{"prompt": f"p{k}", "response": f"{model}{k}", "score": model} for model in (1, 2) for k in range(50)]
    rows = load_rows(config(jsonl(records), limit=2), stage="preference").train
    assert [(row.prompt, row.completions) for row in rows] == [("p0", ("20", "10")), ("p1", ("21", "11"))]


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_sft_learns_all_rated_answers(config, jsonl, answer):
    """A score beside an answer changes nothing for SFT, whatever the answer's column is called."""
    records = [{"prompt": "p", answer: text, "score": k} for k, text in enumerate("xy")]
    rows = load_rows(config(jsonl(records)), stage="sft").train
    assert [row.completions for row in rows] == [("x",), ("y",)]


def test_answers_in_any_order_are_no_ranked_list():
    """Only `completions` stand best first by themselves: a list of another name needs scores or ranks."""
    with pytest.raises(UserError, match="layout of f is not known"):
        read({"prompt": "p", "responses": ["x", "y"]})


@pytest.mark.parametrize(
    "more",
    [
        {"generations": ["r", "c"], "rating": [1, 9]},
        {"response1": "r", "response2": "c", "overall_preference": -2},
        {"response": "other", "score": 3},
        {"response": "other", "feedback": "up"},
    ],
)
def test_chosen_and_rejected_say_more_than_what_stands_beside_them(more):
    """As in sets that keep the comparison from which their pairs were made."""
    [row] = read({"question": "p", "chosen": "c", "rejected": "r"} | more)[2]
    assert (row.prompt, row.completions) == ("p", ("c", "r"))


@pytest.mark.parametrize(
    ("record", "completions", "scores"),
    [
        ({"prompt": "p", "completions": ["x", "y", "z"], "ranks": [3, 1, 2]}, ("y", "z", "x"), (-1.0, -2.0, -3.0)),
        ({"prompt": "p", "completions": ["x", "y", "z"], "ranks": [2, 1, 1]}, ("y", "z", "x"), (-1.0, -1.0, -2.0)),
        ({"prompt": "p", "responses": ["x", "y"], "rewards": [0.1, 0.7]}, ("y", "x"), (0.7, 0.1)),
        ({"question": "p", "answers": ["x", "y"], "rank": ["2", "1"]}, ("y", "x"), (-1.0, -2.0)),
        ({"prompt": "p", "generations": ["x", "y"], "rating": [8, 9.5]}, ("y", "x"), (9.5, 8.0)),
        (
            {"prompt": "p", "answers": [{"answer": "x", "model": "m", "rank": 2.0}, {"answer": "y", "rank": 1.0}]},
            *(("y", "x"), (-1.0, -2.0)),
        ),
        (
            {"instruction": "p", "responses": [{"response": "x", "score": 1}, {"response": "y", "score": 5}]},
            *(("y", "x"), (5.0, 1.0)),
        ),
        (
            {"prompt": "p", "completions": [{"text": "x", "rank": 2}, {"text": "y", "rank": 1}]},
            ("y", "x"),
            (-1.0, -2.0),
        ),
    ],
)
def test_lists_with_scores_or_ranks(record, completions, scores):
    """The best first; the first rank is the best, and equal ranks are equal scores."""
    layout = recognise([record], {}, "preference", "f")
    [row] = rows_of([("f", 1, record)], layout, {})
    assert (row.prompt, row.completions, row.scores) == ("p", completions, scores)
    assert "ranks" not in row.meta


@pytest.mark.parametrize("column", ["completions", "replies"])
@pytest.mark.parametrize("speaker", [("role", "assistant", "content"), ("from", "gpt", "value")])
def test_a_score_inside_a_message_ranks_it(column, speaker):
    """It is no key of the message that a chat template would read, and the order of the file says nothing."""
    role, name, content = speaker
    said = [{role: name, content: text, "score": score} for text, score in (("x", 1), ("y", 5))]
    record = {"prompt": "p", column: said}
    layout = recognise([record], {}, "preference", "f")
    for written in (record, record | {column: [[one] for one in said]}):
        [row] = rows_of([("f", 1, written)], layout, {})
        assert (row.completions, row.scores) == (([assistant("y")], [assistant("x")]), (5.0, 1.0))


@pytest.mark.parametrize("ranks", [[1], 1, ["first", 2], [1, None]])
def test_ranks_that_are_no_ranks(ranks):
    """One number for each completion."""
    good = {"prompt": "p", "completions": ["x", "y"], "ranks": [1, 2]}
    layout = recognise([good], {}, "preference", "f")
    [bad] = rows_of([("f", 1, good | {"ranks": ranks})], layout, {})
    assert bad.reason == "bad_score"


UP = [
    "up",
    "👍",
    "👍🏽",
    "Thumbs Up",
    "thumbs_up",
    ":thumbsup:",
    "like",
    "Good",
    "positive",
    "desirable",
    "chosen",
    True,
    1,
]
DOWN = [
    "down",
    "👎",
    "👎🏿",
    "Thumbs-Down",
    "thumbs_down",
    "dislike",
    "BAD",
    "negative",
    "undesirable",
    "rejected",
    False,
    0,
]


@pytest.mark.parametrize("column", ["thumbs_up", "feedback", "label", "liked", "reaction"])
@pytest.mark.parametrize(("up", "down"), list(zip(UP, DOWN, strict=False)))
def test_thumbs_are_labels(column, up, down):
    """In the spellings of logs and of annotation tools."""
    records = [{"prompt": "p", "response": "x", column: up}, {"prompt": "p", "response": "y", column: down}]
    _, note, rows = read(*records)
    assert [(row.completions, row.labels) for row in rows] == [(("x",), (True,)), (("y",), (False,))]
    assert note == ("" if column == "label" else f"column {column} says whether an answer is good")


def test_thumbs_under_whole_conversations():
    """Messages that end with the answer, and a column beside them."""
    records = [{"messages": [user("p"), assistant("x")], "feedback": word} for word in ("👍", "👎")]
    rows = read(*records)[2]
    assert [(row.prompt, row.completions, row.labels) for row in rows] == [
        ([user("p")], ([assistant("x")],), (True,)),
        ([user("p")], ([assistant("x")],), (False,)),
    ]


def test_a_thumb_that_says_nothing_is_a_bad_row():
    """Missing or unreadable."""
    good = {"prompt": "p", "response": "x", "feedback": "up"}
    rows = read(good, good, good | {"feedback": None}, good | {"feedback": "so-so"})[2]
    assert [row.reason for row in rows[2:]] == ["missing_field", "bad_label"]
    assert rows[3].message == "a label is true or false, or a word such as good or bad, up or down"


def test_two_columns_of_thumbs():
    """Up and down in one column each: neither, or both, is no vote, which is no fault."""
    votes = ((1, 0), (0, 1), (0, 0), (1, 1))
    records = [{"prompt": "p", "response": "x", "thumbs_up": up, "thumbs_down": down} for up, down in votes]
    rows = read(*records)[2]
    assert [row.labels if isinstance(row, Row) else (row.reason, row.fault) for row in rows] == [
        *((True,), (False,)), *[("no_vote", False)] * 2,
    ]  # fmt: skip


def test_written_feedback_is_no_thumb():
    """Then the rating decides."""
    records = [{"prompt": "p", "response": t, "feedback": "A fine text.", "rating": k} for k, t in enumerate("xy")]
    assert read(*records)[0] == "rated answers"


@pytest.mark.parametrize(
    ("record", "stage", "name", "prompt", "completions"),
    [
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3", "history": []},
            *("sft", "completions", "Add.\n1, 2", ("3",)),
        ),
        ({"instruction": "Hi.", "input": "", "output": "Hello."}, "sft", "completions", "Hi.", ("Hello.",)),
        (
            {"instruction": "Add.", "input": "1, 2", "chosen": "3", "rejected": "4"},
            *("preference", "pairs", "Add.\n1, 2", ("3", "4")),
        ),
        ({"question": "p", "chosen": "x", "rejected": "y"}, "preference", "pairs", "p", ("x", "y")),
        ({"query": "p", "response": "x", "label": False}, "preference", "labelled completions", "p", ("x",)),
    ],
)
def test_prompts_and_answers_under_other_names(record, stage, name, prompt, completions):
    """An Alpaca input stands on a line of its own below its instruction."""
    found, _, [row] = read(record, stage=stage)
    assert (found, row.prompt, row.completions) == (name, prompt, completions)


def test_alpaca_data_are_no_preferences():
    """The preference stage says so, as of other SFT data."""
    with pytest.raises(UserError, match=r"f has SFT data \(columns input, instruction, output\)"):
        read({"instruction": "Add.", "input": "1, 2", "output": "3"})
