"""Each layout to a row by hand, each broken row to its reason."""

import json

import pytest

from alignment.data.layouts.recognition import recognise, to_row
from alignment.data.rows.row import BadRow, Row
from alignment.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


SYSTEM = {"role": "system", "content": "s"}
PAIR = ([assistant("c")], [assistant("r")])


def read(record, stage="preference", columns=None):
    layout = recognise([record], columns or {}, stage, "f")
    return layout.name, to_row(record, layout, columns or {}, "f", 3)


@pytest.mark.parametrize(
    ("record", "name", "prompt", "completions", "more"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "pairs", "p", ("c", "r"), {}),
        (
            {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")], "key": 7},
            *("pairs", [user("p")], PAIR, {"meta": {"key": 7}}),
        ),
        ({"prompt": "p", "chosen": [assistant("c")], "rejected": [assistant("r")]}, "pairs", [user("p")], PAIR, {}),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 9, "score_rejected": 1.5},
            *("pairs", "p", ("c", "r"), {"scores": (9.0, 1.5)}),
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "system": "s"}, "pairs", [SYSTEM, user("p")], PAIR, {}),
        (
            {"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
            *("implicit-prompt pairs", [user("p")], PAIR, {}),
        ),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: p\n\nAssistant: c",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: p\n\nAssistant: r",
            },
            *("HH dialogue pairs", [user("a"), assistant("b"), user("p")], PAIR, {}),
        ),
        (
            {"conversations": [{"from": "system", "value": "s"}, human("p")], "chosen": gpt("c"), "rejected": gpt("r")},
            *("ShareGPT pairs", [SYSTEM, user("p")], PAIR, {}),
        ),
        (
            {
                "conversations": [
                    human("a"),
                    {"from": "function_call", "value": "f()"},
                    {"from": "function", "value": ""},
                ],
                **{"chosen": gpt("c"), "rejected": gpt("r")},
            },
            *("ShareGPT pairs", [user("a"), assistant("f()"), {"role": "tool", "content": ""}], PAIR, {}),
        ),
        (
            {
                **{"prompt": "p", "prompt_id": "x", "score_chosen": 8.0, "score_rejected": 7.0},
                **{"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
            },
            *("UltraFeedback pairs", [user("p")], PAIR, {"scores": (8.0, 7.0), "meta": {"prompt_id": "x"}}),
        ),
        (
            {
                "prompt": [SYSTEM, user("p")],
                **{"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
            },
            *("UltraFeedback pairs", [SYSTEM, user("p")], PAIR, {}),
        ),
        (
            {
                "prompt": [user("a"), assistant("f()"), {"role": "tool", "content": "t"}, assistant("b"), user("p")],
                **{"chosen": "c", "rejected": "r"},
            },
            "pairs",
            [user("a"), assistant("f()"), {"role": "tool", "content": "t"}, assistant("b"), user("p")],
            *(PAIR, {}),
        ),
        (
            {"messages": [user("p"), assistant("c")], "label": False},
            *("labelled messages", [user("p")], ([assistant("c")],), {"labels": (False,)}),
        ),
        (
            {"conversations": [human("p"), gpt("c")], "label": 1},
            *("labelled ShareGPT", [user("p")], ([assistant("c")],), {"labels": (True,)}),
        ),
        (
            {"prompt": "p", "completion": "c", "label": "True"},
            *("labelled completions", "p", ("c",), {"labels": (True,)}),
        ),
        ({"prompt": "p", "completions": ["a", "b", "c"]}, "ranked lists", "p", ("a", "b", "c"), {}),
        # sorted by their scores, equal ones in the order of the file
        (
            {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [1, 2.5, "3", 2.5], "id": 4},
            *("ranked lists", "p", ("c", "b", "d", "a"), {"scores": (3.0, 2.5, 2.5, 1.0), "meta": {"id": 4}}),
        ),
        (
            {"prompt": [user("p")], "completions": [[assistant("c")], assistant("r"), "x"]},
            *("ranked lists", [user("p")], (*PAIR, [assistant("x")]), {}),
        ),
        (
            {
                **{"source": "s", "instruction": "p", "models": ["m", "n"]},
                "completions": [
                    {"model": "m", "response": "r", "overall_score": 6.5, "annotations": {}},
                    {"model": "n", "response": "c", "overall_score": 8.0, "annotations": {}},
                ],
            },
            *("UltraFeedback lists", "p", ("c", "r")),
            {"scores": (8.0, 6.5), "meta": {"source": "s", "models": ["m", "n"]}},
        ),
        (
            {
                "prompt": "p",
                "steps": "1: x\n",
                "chosen": "c",
                "rejected": "r",
                "score_chosen": 1,
                "score_rejected": 0,
            },
            *("step pairs", "p", ("c", "r"), {"steps": "1: x\n", "scores": (1.0, 0.0)}),
        ),
        (
            {"prompt": "p", "initial_reason_steps": "", "chosen": "c", "rejected": "r", "full_chosen": "c d"},
            *("step pairs", "p", ("c", "r"), {"steps": "", "meta": {"full_chosen": "c d"}}),
        ),
        # a number of steps is no beginning of an answer
        (
            {"prompt": "p", "steps": 3, "chosen": "c", "rejected": "r"},
            *("pairs", "p", ("c", "r"), {"meta": {"steps": 3}}),
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "weight": "0.5"}, "pairs", "p", ("c", "r"), {"weight": 0.5}),
        (
            {"prompt": "p", "completion": "c", "label": False, "weight": 0},
            *("labelled completions", "p", ("c",), {"labels": (False,), "weight": 0.0}),
        ),
        (
            {"prompt": "p", "completions": ["a", "b"], "weight": 2},
            *("ranked lists", "p", ("a", "b"), {"weight": 2.0}),
        ),
    ],
)
def test_preference_layouts(record, name, prompt, completions, more):
    expected = Row(prompt, completions, **({"meta": {}} | more), source="f:3")
    assert read(record) == (name, expected)


@pytest.mark.parametrize(
    ("record", "name", "prompt", "completion"),
    [
        ({"messages": [SYSTEM, user("p"), assistant("c")]}, "messages", [SYSTEM, user("p")], [assistant("c")]),
        ({"conversations": [human("p"), gpt("c")]}, "ShareGPT", [user("p")], [assistant("c")]),
        ({"prompt": "p", "completion": "c"}, "completions", "p", "c"),
        ({"prompt": [user("p")], "completion": "c"}, "completions", [user("p")], [assistant("c")]),
    ],
)
def test_sft_layouts(record, name, prompt, completion):
    assert read(record, "sft") == (name, Row(prompt, (completion,), source="f:3"))
    with pytest.raises(UserError, match=r"Preference data is wanted, but f has SFT data \(columns "):
        read(record)


def test_sft_data_has_no_weights_and_no_steps():
    record = {"prompt": "p", "completion": "c", "weight": "heavy"}
    assert read(record, "sft") == ("completions", Row("p", ("c",), meta={"weight": "heavy"}, source="f:3"))
    with pytest.raises(UserError, match=r"SFT learns whole answers, and f has single steps of them"):
        read({"prompt": "p", "steps": "s", "chosen": "c", "rejected": "r"}, "sft")


def test_labelled_steps_of_one_answer_are_no_list_of_answers():
    with pytest.raises(UserError, match="layout of f is not known"):
        read({"prompt": "p", "completions": ["first", "second"], "labels": [True, False]})


def test_columns_are_mapped_and_the_rest_is_kept():
    record = {"question": "p", "good": "c", "bad": "r", "chosen": "old", "good_rating": "4", "bad_rating": "2", "id": 5}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    columns |= {"score_chosen": "good_rating", "score_rejected": "bad_rating"}
    assert read(record, columns=columns)[1] == Row("p", ("c", "r"), None, (4.0, 2.0), {"id": 5}, "f:3")


@pytest.mark.parametrize(
    ("record", "columns", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, {"rejected": "worse"}, "rejected to 'worse'.*columns of f are chosen, prompt"),
        ({"prompt": "p", "chosen": "c"}, {"best": "chosen"}, "key 'best', and the keys are prompt, chosen"),
        (
            {"text": "p", "best": "c"},
            {},
            r"columns are best, text, and accepted are .*pairs \(prompt, chosen, rejected\)",
        ),
        ({"chosen": "c", "rejected": "r"}, {}, "columns are chosen, rejected, and accepted are"),
    ],
)
def test_unknown_layouts_and_mappings(record, columns, message):
    with pytest.raises(UserError, match=message):
        recognise([record], columns, "preference", "f")


def test_one_odd_row_does_not_hide_the_layout():
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    records = [{"prompt": 1, "chosen": None}, good, good]
    layout = recognise(records, {}, "preference", "f")
    assert [type(to_row(r, layout, {}, "f", 1)) for r in records] == [BadRow, Row, Row]


def pair(**fields):
    return {"prompt": "p", "chosen": "c", "rejected": "r"} | fields


def chat(*prompt, chosen=None):
    return {"prompt": list(prompt), "chosen": chosen or [assistant("c")], "rejected": [assistant("r")]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["p", "c", "r"], "wrong_type"),
        (pair(prompt=3), "wrong_type"),
        (pair(chosen=["c"]), "wrong_type"),
        (chat({"role": "user", "content": None}), "wrong_type"),
        (chat({"role": "user", "content": "p", "tool_calls": [1]}), "wrong_type"),
        (pair(system=3), "wrong_type"),
        (pair(rejected=None), "missing_field"),
        ({"prompt": "p", "chosen": "c"}, "missing_field"),
        (chat({"role": "user"}), "missing_field"),
        (pair(prompt=" \n"), "empty_prompt"),
        (pair(prompt=[]), "empty_prompt"),
        (chat(user("")), "empty_prompt"),
        (pair(chosen=""), "empty_answer"),
        (pair(rejected="\n\t"), "empty_answer"),
        (chat(user("p"), chosen=[assistant(" ")]), "empty_answer"),
        (pair(chosen=[]), "empty_answer"),
        (pair(rejected="c"), "identical_answers"),
        (chat(user("p"), chosen=[assistant("r")]), "identical_answers"),
        (chat(user("p"), SYSTEM), "bad_roles"),
        (chat(SYSTEM), "bad_roles"),
        (chat(user("p"), assistant("a")), "bad_roles"),
        (chat({"role": "tool", "content": "t"}), "bad_roles"),
        (chat({"role": "wizard", "content": "p"}), "bad_roles"),
        (chat({"role": ["user"], "content": "p"}), "bad_roles"),
        (chat(user("p"), chosen=[user("p"), assistant("c")]), "bad_roles"),
        (chat(user("p"), chosen=[assistant("c"), user("p")]), "bad_roles"),
        (chat(user("p"), chosen=[assistant("c"), user("p"), tool("t"), assistant("c")]), "bad_roles"),
        (chat(user("p"), chosen=[assistant("c"), user("p"), assistant("")]), "empty_answer"),
        (chat(user("p"), chosen=[assistant("c"), user("\ud800"), assistant("c")]), "lone_surrogate"),
        (pair(chosen=[user("q"), assistant("c")], rejected=[user("q"), assistant("r")]), "prompts_differ"),
        (
            {"prompt": [user("q")], "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
            "prompts_differ",
        ),
        (pair(chosen=[user("p"), assistant("c")], rejected=[user("q"), assistant("r")]), "prompts_differ"),
        (pair(prompt="\ud800"), "lone_surrogate"),
        (pair(chosen="a\udfffb"), "lone_surrogate"),
        (pair(score_chosen=1), "bad_score"),
        (pair(score_chosen=1, score_rejected="high"), "bad_score"),
        (pair(score_chosen=1, score_rejected=float("nan")), "bad_score"),
        (pair(score_chosen=1, score_rejected=10**400), "bad_score"),
        (pair(weight=10**400), "bad_weight"),
        (pair(weight=-0.5), "bad_weight"),
        (pair(weight=float("inf")), "bad_weight"),
        (pair(weight=float("nan")), "bad_weight"),
        (pair(weight="heavy"), "bad_weight"),
        (pair(weight=[1]), "bad_weight"),
    ],
)
def test_bad_pairs(record, reason):
    layout = recognise([pair()], {}, "preference", "f")
    bad = to_row(record, layout, {}, "f", 3)
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.file, bad.row) == (reason, "f", 3)


def rated(*scores):
    return [{"response": f"r{i}", "overall_score": score} for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"completions": "abc"}, "wrong_type"),
        ({"completions": ["a", 3]}, "wrong_type"),
        ({"completions": ["a", {"body": "b"}]}, "missing_field"),
        ({"completions": []}, "too_few_answers"),
        ({"completions": ["a"]}, "too_few_answers"),
        ({"completions": ["a", "a", "a"]}, "identical_answers"),
        ({"completions": ["a", " "]}, "empty_answer"),
        ({"completions": ["a", [user("p"), assistant("b")]]}, "bad_roles"),
        ({"scores": [1]}, "bad_score"),
        ({"scores": [1, None]}, "bad_score"),
        ({"scores": [1, float("nan")]}, "bad_score"),
        ({"scores": [1, -(10**400)]}, "bad_score"),
        ({"scores": [1, "high"]}, "bad_score"),
        ({"scores": 3}, "bad_score"),
        ({"completions": rated(1, None)}, "bad_score"),
        ({"completions": rated(1, float("inf"))}, "bad_score"),
        ({"weight": -1}, "bad_weight"),
    ],
)
def test_bad_lists(fields, reason):
    good = {"prompt": "p", "completions": ["a", "b"]}
    layout = recognise([good], {}, "preference", "f")
    assert to_row(good | fields, layout, {}, "f", 1).reason == reason


@pytest.mark.parametrize(
    ("steps", "reason"), [(None, "missing_field"), (["s"], "wrong_type"), ("\ud800", "lone_surrogate")]
)
def test_bad_steps(steps, reason):
    good = pair(steps="s")
    layout = recognise([good], {}, "preference", "f")
    assert to_row(good | {"steps": steps}, layout, {}, "f", 1).reason == reason


@pytest.mark.parametrize("label", [None, 2, 0.5, "fine", [], {}])
def test_bad_labels(label):
    layout = recognise([{"prompt": "p", "completion": "c", "label": True}], {}, "preference", "f")
    bad = to_row({"prompt": "p", "completion": "c", "label": label}, layout, {}, "f", 1)
    assert bad.reason == ("missing_field" if label is None else "bad_label")


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("\n\nHuman: q\n\nAssistant: x\n\nHuman: p\n\nAssistant: c", "prompts_differ"),
        ("p\n\nAssistant: c", "bad_roles"),
        ("\n\nHuman: p\n\nAssistant:", "empty_answer"),
        (5, "wrong_type"),
    ],
)
def test_bad_dialogues(chosen, reason):
    good = {"chosen": "\n\nHuman: p\n\nAssistant: c", "rejected": "\n\nHuman: p\n\nAssistant: r"}
    layout = recognise([good], {}, "preference", "f")
    assert to_row(good | {"chosen": chosen}, layout, {}, "f", 1).reason == reason


def rows_of(path):
    text = path.read_text(encoding="utf-8")
    records = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]
    layout = recognise(records, {}, "preference", path.name)
    return layout.name, [to_row(record, layout, {}, "f", i) for i, record in enumerate(records, 1)]


@pytest.mark.parametrize(
    ("raw", "converted", "names"),
    [
        ("dpo_en_demo.json", "pairs_en.jsonl", ("ShareGPT pairs", "pairs")),
        ("dpo_zh_demo.json", "pairs_zh.jsonl", ("ShareGPT pairs", "pairs")),
        ("kto_en_demo.json", "kto_en.jsonl", ("labelled messages", "labelled completions")),
    ],
)
def test_the_same_real_data_in_two_layouts_gives_the_same_rows(shared, raw, converted, names):
    first, rows = rows_of(shared / "llamafactory_demo" / raw)
    second, others = rows_of(shared / "llamafactory_demo" / converted)
    assert (first, second) == names
    assert len(rows) == 300
    assert rows == others


def test_a_column_that_another_stands_for_is_named(caplog):
    """`data.columns` takes an answer from another column, so the file's own is not read: the log says so, once."""
    record = {"prompt": "p", "chosen": "a", "rejected": "b", "mended": "c"}
    with caplog.at_level("WARNING"):
        layout = recognise([record], {"chosen": "mended", "rejected": "chosen"}, "preference", "f")
    assert [r.getMessage() for r in caplog.records] == [
        "data.columns takes rejected from 'chosen': the column 'rejected' of f is not read."
    ]
    assert layout.family == "pairs"
