"""Inputs as people have them, kind by kind: each is read right, or refused in one sentence that says what it is."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from alignment.config.data import DataConfig
from alignment.data.rows.row import Row
from alignment.data.sources.loading import load_rows
from alignment.data.tokens.tokenization import tokenize_groups, tokenize_sft
from alignment.errors import UserError
from tests.helpers.chat_templates import CHATML

RECORDS = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(3)]
PAIR = ("q0", "yes", "no")


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def lines(records: Sequence[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def table(*rows: Sequence[Any]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


def texts(row: Row) -> tuple[Any, ...]:
    """The row's prompt and answers; a conversation as (role, text) pairs, one answer of the assistant as its text."""

    def short(text: Any, is_answer: bool) -> Any:
        if isinstance(text, str):
            return text
        pairs = [(message["role"], message["content"]) for message in text]
        if [role for role, _ in pairs] == ["assistant" if is_answer else "user"]:
            return pairs[0][1]
        return pairs

    return (short(row.prompt, False), *(short(answer, True) for answer in row.completions))


@pytest.fixture
def outcome(tmp_path: Path, config: Callable[..., DataConfig]) -> Callable[..., tuple[Any, ...] | str]:
    """The texts of a file's first row, or the sentence with which it is refused."""

    def read(content: str | bytes | Sequence[Any], name: str = "data.jsonl", stage: Any = "preference") -> Any:
        path = tmp_path / name
        if not isinstance(content, str | bytes):
            content = lines(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            return texts(load_rows(config(path), stage=stage).train[0])
        except UserError as error:
            return str(error)

    return read


@pytest.fixture
def chat(tiny: Any) -> Any:
    """The tiny tokenizer with ChatML, beside the one without a template."""
    tokenizer = copy.copy(tiny)
    tokenizer.chat_template = CHATML
    return tokenizer


def check(found: tuple[Any, ...] | str, right: tuple[Any, ...] | str) -> None:
    """Compare the texts, or search the sentence, which has one line and ends once."""
    if isinstance(right, tuple):
        assert found == right
    else:
        assert isinstance(found, str) and re.search(right, found) and re.search(r"[^.]\.$", found), found


# The inputs that were found

FOUND: dict[str, int | str] = {
    "pairs.jsonl": 15,
    "01-preformatted-prompts/formatted.jsonl": "15 of 15 rows hold text that was formatted with a chat template before",
    "04-csv-with-messages/json.csv": 15,
    "04-csv-with-messages/repr.csv": 15,
    "05-content-parts/parts.jsonl": 15,
    "05-content-parts/numbers.jsonl": "row 1: column 'chosen' holds the number 5, not text or messages",
    "06-tools-column/pairs.jsonl": 15,
    "08-reasoning-content/pairs.jsonl": 15,
    "09-save-to-disk/one_split": 15,
    "09-save-to-disk/two_splits": 10,
    "09-save-to-disk/hub_clone": 10,
    "10-containers/array.jsonl": 15,
    "10-containers/bom_crlf_u2028.jsonl": 15,
    "10-containers/pairs.jsonl.gz": 15,
    "10-containers/pairs.ndjson": 15,
    "10-containers/pairs.tsv": 15,
    "10-containers/pretty.jsonl": 15,
    "10-containers/wrapped.json": 15,
    "20-all-answers-cut/stories.jsonl": 32,
    "22-values-on-the-command-line/größe.jsonl": 15,
    "28-system-ignored/some_system.jsonl": 15,
    "32-columns-with-other-meaning/steps_text.jsonl": 15,
    "32-columns-with-other-meaning/weight_kg.jsonl": 15,
}
FOUND_SFT: dict[str, int | str] = {
    "sft.jsonl": 15,
    "06-tools-column/openai.jsonl": 15,
    "06-tools-column/sharegpt.jsonl": 15,
    "08-reasoning-content/sft.jsonl": 15,
    "30-roles/assistant_first.jsonl": 15,
    "30-roles/developer.jsonl": 15,
    "30-roles/empty_earlier_answer.jsonl": 15,
    "30-roles/late_system.jsonl": 15,
    "30-roles/two_users.jsonl": 15,
    "30-roles/ends_with_user.jsonl": "rows 1, 2, 3, 4 and 5: the conversation ends with a turn of user",
    "30-roles/two_answers.jsonl": "rows 1, 2, 3, 4 and 5: another turn of assistant stands right before the answer",
}


@pytest.mark.matrix
@pytest.mark.parametrize("name", [*FOUND, *FOUND_SFT])
def test_inputs_that_were_found(name: str, chat: Any, config: Callable[..., DataConfig], shared: Path) -> None:
    """Each file gives all of its rows, or the sentence that says what is wrong with it."""
    settings = config(shared / "found" / name, max_length=4000, max_prompt_length=2000)
    right = (FOUND | FOUND_SFT)[name]

    def count() -> int:
        if name in FOUND:
            return len(tokenize_groups(load_rows(settings, stage="preference").train, chat, settings).groups)
        return len(tokenize_sft(load_rows(settings, stage="sft").train, chat, settings).sequences)

    if isinstance(right, int):
        assert count() == right
    else:
        with pytest.raises(UserError, match=right):
            count()


# Containers

CONTAINERS: dict[str, tuple[Any, str, tuple[Any, ...] | str]] = {
    "gzip without its ending": (gzip.compress(lines(RECORDS).encode()), "data.jsonl", "is a .gz file by its content"),
    "a zip archive": (b"PK\x03\x04" + b"x" * 60, "data.json", "is a .zip file by its content"),
    "columns": (json.dumps({k: {"0": r} for k, r in RECORDS[0].items()}), "data.json", "a table by columns"),
    "numbered rows": (json.dumps(dict(enumerate(RECORDS))), "data.json", "or by row numbers"),
    "columns, index, data": (json.dumps({"columns": ["a"], "index": [0], "data": [["b"]]}), "data.json", "a table by"),
    "a list for each column": (json.dumps({k: [r, r] for k, r in RECORDS[0].items()}), "data.json", "a table by"),
    "arrays as rows": (lines([["q", "a", "b"]] * 3), "data.jsonl", "rows 1, 2 and 3: the row is a list, not an object"),
    "an array of arrays": (json.dumps([["q", "a", "b"]]), "data.json", "row 1: the row is a list, not an object"),
    "numbers as rows": ("1\n2\n", "data.jsonl", "row 1: the row is the number 1, not an object"),
    "data beside a version": (
        json.dumps({"version": 1, "data": RECORDS}),
        "data.json",
        "the list of rows under 'data'",
    ),
    "one row alone": (json.dumps(RECORDS[0]), "data.json", PAIR),
    "one row of messages": (
        json.dumps({"prompt": user("q"), "chosen": said("a"), "rejected": said("b")}),
        "data.json",
        ("q", "a", "b"),
    ),
    "a broken Parquet file": (b"PAR1" * 9, "data.parquet", "is not a readable Parquet file"),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_containers(case: str, outcome: Callable[..., Any]) -> None:
    """Rows in other forms than one object each are named, whatever the file is called."""
    content, name, right = CONTAINERS[case]
    check(outcome(content, name), right)


# Tables whose cells hold lists

TABLES: dict[str, tuple[str, tuple[Any, ...] | str]] = {
    "JSON lists": (table(("prompt", "completions", "scores"), ("q", '["a", "b"]', "[1, 2]")), ("q", "b", "a")),
    "Python lists": (table(("prompt", "completions", "scores"), ("q", "['a', 'b']", "[2.0, 1]")), ("q", "a", "b")),
    "other names": (table(("instruction", "responses", "ratings"), ("q", '["a", "b"]', "[1, 2]")), ("q", "b", "a")),
    "ranks": (table(("prompt", "responses", "ranks"), ("q", '["a", "b"]', "[2, 1]")), ("q", "b", "a")),
    "items with scores": (
        table(("prompt", "responses"), ("q", json.dumps([{"text": "a", "score": 1}, {"text": "b", "score": 2}]))),
        ("q", "b", "a"),
    ),
    "lists of numpy": (
        table(("prompt", "response_a", "response_b", "winner"), ("['x' 'y']", "['a' 'b']", "['c' 'd']", "A")),
        "column 'prompt' holds text that is neither JSON nor a Python literal",
    ),
    "empty scores": (
        table(("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "weight"), (*PAIR, "", "", "")),
        PAIR,
    ),
    "one empty score": (
        table(("prompt", "chosen", "rejected", "score_chosen", "score_rejected"), (*PAIR, "4", "")),
        "are not 2 numbers",
    ),
    "labels of pandas": (table(("prompt", "completion", "label"), ("q", "a", "1.0"), ("r", "b", "0.0")), ("q", "a")),
    "a number that is no label": (table(("prompt", "completion", "label"), ("q", "a", "0.5")), "a label is true or"),
    "capitals and spaces": (table(("Prompt", " Chosen", "REJECTED"), PAIR), PAIR),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(case: str, outcome: Callable[..., Any]) -> None:
    """Cells are texts: lists, labels and missing numbers are read from them."""
    content, right = TABLES[case]
    check(outcome(content, "data.csv"), right)


# What belongs to a prompt

SYSTEM = ("system", "Be brief.")
TURNS = [("user", "h"), ("assistant", "i")]
PROMPTS: dict[str, tuple[dict[str, Any], tuple[Any, ...] | str]] = {
    "system": ({"system": "Be brief."}, ([SYSTEM, ("user", "q0")], "yes", "no")),
    "system_prompt": ({"system_prompt": "Be brief."}, ([SYSTEM, ("user", "q0")], "yes", "no")),
    "an empty one": ({"system": "", "system_message": "Be brief."}, ([SYSTEM, ("user", "q0")], "yes", "no")),
    "history": ({"history": [["h", "i"]]}, ([*TURNS, ("user", "q0")], "yes", "no")),
    "history in a cell": ({"history": '[["h", "i"]]'}, ([*TURNS, ("user", "q0")], "yes", "no")),
    "both": ({"system": "Be brief.", "history": [["h", "i"]]}, ([SYSTEM, *TURNS, ("user", "q0")], "yes", "no")),
    "another history": ({"history": "of Rome"}, PAIR),
    "history of messages": ({"history": [user("h"), said("i")]}, ([*TURNS, ("user", "q0")], "yes", "no")),
    "history of ShareGPT": (
        {"history": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "i"}]},
        ([*TURNS, ("user", "q0")], "yes", "no"),
    ),
    "history in columns": (
        {"history": {"role": ["user", "assistant"], "content": ["h", "i"]}},
        ([*TURNS, ("user", "q0")], "yes", "no"),
    ),
    "history as one text": (
        {"history": "Human: h\n\nAssistant: i"},
        ([*TURNS, ("user", "q0")], "yes", "no"),
    ),
    "history with a system text": (
        {"history": [{"role": "system", "content": "Be brief."}, user("h"), said("i")]},
        ([SYSTEM, *TURNS, ("user", "q0")], "yes", "no"),
    ),
    "history with the same system text": (
        {"system": "Be brief.", "history": [{"role": "system", "content": "Be brief."}, user("h"), said("i")]},
        ([SYSTEM, *TURNS, ("user", "q0")], "yes", "no"),
    ),
    "history with another system text": (
        {"system": "Be brief.", "history": [{"role": "system", "content": "Be long."}, user("h"), said("i")]},
        "column 'history' begins with another system text",
    ),
    "history of triples": ({"history": [["h", "i", "j"]]}, "column 'history' holds a list that is neither messages"),
    "history of numbers": ({"history": [1, 2]}, r"data\.ignore=\[history\] leaves the column out"),
    "history of objects": ({"history": [{"q": "h"}]}, "a message in column 'history' has no role and content"),
    "no history": ({"history": []}, PAIR),
    "two system texts": (
        {"system": "Be brief.", "prompt": [{"role": "system", "content": "Be long."}, user("q")]},
        "column 'system' and the first message are two system texts",
    ),
    "the same twice": (
        {"system": "Be brief.", "prompt": [{"role": "system", "content": "Be brief. "}, user("q")]},
        ([("system", "Be brief. "), ("user", "q")], "yes", "no"),
    ),
    "no system text": ({"system_prompt": 3}, "column 'system_prompt' holds the number 3, not text"),
    "weights of 0": ({"weight": 0}, PAIR),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_what_belongs_to_a_prompt(case: str, outcome: Callable[..., Any]) -> None:
    """System texts and earlier turns in columns of their own stand in front of the prompt, and nothing is lost."""
    more, right = PROMPTS[case]
    check(outcome([{**record, **more} for record in RECORDS]), right)


RATED = {
    "tools": [[{"name": "add"}], [{"name": "mul"}]],
    "documents": [[{"text": "x"}], [{"text": "y"}]],
    "chat_template_kwargs": [{"enable_thinking": True}, {"enable_thinking": False}],
    "system": ["Be brief.", "Be long."],
    "history": [[["a", "b"]], [["a", "c"]]],
}


@pytest.mark.parametrize("column", RATED)
def test_rated_answers_to_the_same_words_may_be_to_other_prompts(
    column: str, jsonl: Callable[..., Path], config: Callable[..., DataConfig]
) -> None:
    """Answers are compared where all that was asked is the same, and each list keeps what was asked."""
    rows = [
        {"prompt": "q", column: RATED[column][k % 2], "completion": f"a{k}", "score": (0, 1, 3, 2)[k]} for k in range(4)
    ]
    found = load_rows(config(jsonl(rows)), stage="preference").train
    assert [texts(row)[1:] for row in found] == [("a2", "a0"), ("a3", "a1")]
    assert (found[0].prompt, found[0].variables) != (found[1].prompt, found[1].variables)


# Ratings and verdicts

RATINGS: dict[str, tuple[list[dict[str, Any]], tuple[Any, ...] | str]] = {
    "ranked rows": ([{"prompt": "q", "response": f"a{k}", "rank": 3 - k} for k in range(3)], ("q", "a2", "a1", "a0")),
    "rated messages": ([{"messages": [user("q"), said(f"a{k}")], "score": k} for k in range(2)], ("q", "a1", "a0")),
    "rated ShareGPT": (
        [
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": f"a{k}"}], "reward": k}
            for k in range(2)
        ],
        ("q", "a1", "a0"),
    ),
    "no number": (
        [{"prompt": "q", "completion": f"a{k}", "score": [1, 2, float("nan")][k]} for k in range(3)],
        "row 3: column 'score' has nan, which is no finite number",
    ),
    "no numbers to compare": (
        [{"prompt": "q", "response_a": "a", "response_b": "b", "score_a": float("nan"), "score_b": 1}] * 2,
        "column 'score_a' has nan, which is no finite number",
    ),
    "the turn that was judged": (
        [
            {
                **{f"conversation_{w}": [user("q"), said(w), user("r"), said(w * 2)] for w in "ab"},
                "winner": "model_b",
                "turn": "1",
            }
        ],
        ("q", "b", "a"),
    ),
}


@pytest.mark.parametrize("case", RATINGS)
def test_ratings(case: str, outcome: Callable[..., Any]) -> None:
    """Ranks, rated conversations, numbers that are none."""
    records, right = RATINGS[case]
    check(outcome(records), right)


# Messages

MESSAGES: dict[str, tuple[list[dict[str, Any]], tuple[Any, ...] | str]] = {
    "capitals": ([{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}], ("q", "a")),
    "mixed keys": ([{"role": "user", "value": "q"}, {"from": "gpt", "content": "a"}], ("q", "a")),
    "other names": ([{"from": "prompter", "value": "q"}, {"from": "bot", "value": "a"}], ("q", "a")),
    "parts of another API": (
        [user([{"type": "input_text", "text": "q"}]), said([{"type": "output_text", "text": "a"}])],
        ("q", "a"),
    ),
    "an image": ([user([{"type": "input_image"}]), said("a")], "a part of type 'input_image', and only text is read"),
    "an unknown role": ([{"role": "narrator", "content": "q"}, said("a")], "has the role 'narrator', and the roles"),
    "no role": ([{"content": "q"}, said("a")], "a message in column 'messages' has no role and content"),
    "calls without arguments": (
        [
            user("q"),
            said(None, tool_calls=[{"function": {"name": "now", "arguments": ""}}]),
            {"role": "ipython", "content": {"time": 1}},
            said("a"),
        ],
        ([("user", "q"), ("assistant", ""), ("tool", '{"time": 1}')], "a"),
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case: str, outcome: Callable[..., Any]) -> None:
    """Names of roles and keys, parts and calls as the field writes them."""
    messages, right = MESSAGES[case]
    check(outcome([{"messages": messages}] * 2, stage="sft"), right)


# Text that was formatted before


FORMATTED = (
    "[INST] What? [/INST]",
    "<|user|>\nWhat?</s>\n<|assistant|>\n",
    "<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>",
    "<start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\n",
    "<|start|>user<|message|>What?<|end|><|start|>assistant",
    "<｜User｜>What?<｜Assistant｜>",
)


@pytest.mark.parametrize("text", FORMATTED)
@pytest.mark.parametrize("place", ["prompt", "answer"])
def test_text_formatted_for_another_model_is_refused(
    text: str, place: str, chat: Any, config: Callable[..., DataConfig]
) -> None:
    """Its signs are no tokens of this tokenizer, and would be learnt letter by letter."""
    prompt, chosen = (text, "yes") if place == "prompt" else ("q", text)
    rows = [Row(prompt, (chosen, "no"), source=f"data.jsonl:{k}") for k in range(3)]
    with pytest.raises(UserError, match="3 of 3 rows hold text that was formatted with a chat template before"):
        tokenize_groups(rows, chat, config())
    assert len(tokenize_groups(rows, chat, config(allow=["formatted"])).groups) == 3


@pytest.mark.parametrize("text", ["What is [INST]?", "<|user> and <user>", "Human: who?", "start_of_turn", "### Notes"])
def test_other_text_is_no_format(text: str, chat: Any, config: Callable[..., DataConfig]) -> None:
    """Brackets and words alone say nothing."""
    assert tokenize_groups([Row(text, ("yes", "no"), source="data.jsonl:1")], chat, config()).findings == []


def test_a_prompt_that_is_a_dialogue(chat: Any, tiny: Any, config: Callable[..., DataConfig]) -> None:
    """A chat template gets the turns of "Human: ... Assistant:", in pairs and SFT; plain text stays as it is."""
    text = "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Who?\n\nAssistant:"
    turns = [user("Hi"), said("Yo"), user("Who?")]
    one, same = Row(text, (" me", " you")), Row(turns, ([said("me")], [said("you")]))
    (group,), (right,) = (tokenize_groups([row], chat, config()).groups for row in (one, same))
    assert group.prompt.tolist() == right.prompt.tolist()
    assert [c.tolist() for c in group.completions] == [c.tolist() for c in right.completions]
    (learnt,), (right_learnt,) = (tokenize_sft([row], chat, config()).sequences for row in (one, same))
    assert learnt == right_learnt
    (plain,) = tokenize_groups([one], tiny, config()).groups
    assert tiny.decode(plain.prompt) == f"<s>{text}"
