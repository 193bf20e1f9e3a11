"""Pairs under other names than chosen and rejected, recognised with no setting."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.data.rows.row import BadRow, Row
from tests.helpers.compared import assistant, read, user

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
OPENAI: dict[str, Any] = {
    "input": {"messages": [user("p")], "tools": [TOOL], "parallel_tool_calls": True},
    "preferred_output": [assistant("x")],
    "non_preferred_output": [assistant("y")],
}


def test_the_files_of_openai_s_preference_tuning() -> None:
    """The messages and the tools stand in one object with what nothing reads."""
    name, note, (row,) = read(OPENAI)
    assert (name, note) == ("pairs", "preferred_output has the better answers, non_preferred_output the worse ones")
    assert isinstance(row, Row)
    assert (row.prompt, row.completions) == ([user("p")], ([assistant("x")], [assistant("y")]))
    assert row.variables == {"tools": [TOOL]} and row.meta == {"parallel_tool_calls": True}


@pytest.mark.parametrize(
    ("good", "bad"),
    [("accepted", "rejected"), ("Chosen Response", "Rejected Response"), ("win", "lose")],
)
def test_other_names_of_the_field(good: str, bad: str) -> None:
    """Texts and messages; a missing answer is a bad row as ever."""
    (_, _, (first, second)) = read({"question": "p", good: "x", bad: "y"}, {"question": "p", good: "x", bad: ""})
    assert isinstance(first, Row) and (first.prompt, first.completions) == ("p", ("x", "y"))
    assert isinstance(second, BadRow) and second.reason == "empty_answer"


def test_the_turns_of_ultrainteract_and_the_marks_of_stack_exchange() -> None:
    """The prompt is a trajectory; answers to a question have marks."""
    turns = [{"from": "user", "value": "p"}, {"from": "assistant", "value": "a"}, {"from": "user", "value": "q"}]
    (_, _, (row,)) = read({"trajectory": turns, "chosen": "x", "rejected": "y", "task": "Coding"})
    assert isinstance(row, Row) and [m["content"] for m in row.prompt] == ["p", "a", "q"]  # type: ignore[index]
    answers = [{"text": text, "pm_score": score, "selected": False} for text, score in (("y", 1), ("x", 4))]
    (_, _, (ranked,)) = read({"question": "p", "answers": answers})
    assert isinstance(ranked, Row) and (ranked.completions, ranked.scores) == (("x", "y"), (4, 1))


def test_numbers_are_no_answers() -> None:
    """Columns of such names with shares of votes leave a row what it is."""
    records = [{"prompt": "p", "response": "x", "thumbs_up": up, "win": 0.6, "lose": 0.4} for up in (True, False)]
    assert read(*records)[0] == "labelled completions"
