"""Messages as data sets write them, each to what it means or to one sentence."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.data.conversations.messages import ROLES, TRAIN_KEYS, learned, messages_of, text_of
from alignment.data.rows.row import Rejected

USER = {"role": "user", "content": "p"}
CALL = {"function": {"name": "add", "arguments": {"x": 1}}}
FUNCTION = {"type": "function"} | CALL
CALLED = {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'}
SILENT = {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (USER, [USER]),
        ({"from": "human", "value": "p", "weight": None}, [USER]),
        ({"role": "developer", "content": "p"}, [{"role": "developer", "content": "p"}]),
        (
            {"role": "user", "content": [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]},
            [USER | {"content": "pq"}],
        ),
        ({"role": "user", "content": ["p", "q"]}, [USER | {"content": "pq"}]),
        ({"role": ["user", "user"], "content": ["p", "q"]}, [USER, USER | {"content": "q"}]),
        (USER | {"name": "Ada", "id": 3, "tags": [], "note": ""}, [USER | {"name": "Ada", "id": 3}]),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "add", "arguments": '{"x": 1}'}}],
            },
            [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
        (  # a null inside a value is meant; a key of the message itself that holds nothing is not there
            SILENT | {"tool_calls": [{"function": {"name": "add", "arguments": {"x": None}}}], "name": None},
            [SILENT | {"tool_calls": [{"function": {"name": "add", "arguments": {"x": None}}}]}],
        ),
        ({"role": "assistant", "tool_calls": json.dumps([CALL])}, [SILENT | {"tool_calls": [CALL]}]),
        # functions in older forms: ShareGPT's turns, OpenAI's key; with what they were as text
        (CALLED, [SILENT | {"tool_calls": [FUNCTION], "function_call": CALLED["value"]}]),
        (
            {"from": "tool_call", "value": f"[{CALLED['value']}, {CALLED['value']}]"},
            [SILENT | {"tool_calls": [FUNCTION] * 2, "function_call": f"[{CALLED['value']}, {CALLED['value']}]"}],
        ),
        (
            CALLED | {"value": f"<think>\nhm\n</think>\n\n{CALLED['value']}"},
            [
                SILENT
                | {
                    "content": "<think>\nhm\n</think>",
                    "tool_calls": [FUNCTION],
                    "function_call": f"<think>\nhm\n</think>\n\n{CALLED['value']}",
                }
            ],
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"x": 1}'}},
            [
                SILENT
                | {"tool_calls": [FUNCTION], "function_call": json.dumps({"name": "add", "arguments": '{"x": 1}'})}
            ],
        ),
        (CALLED | {"value": "add(1)"}, [SILENT | {"content": "add(1)"}]),  # another language: text as it is
        (
            [{"from": "observation", "value": {"sum": 5}}, {"role": "tool", "content": [{"n": "ü"}]}],
            [{"role": "tool", "content": '{"sum": 5}'}, {"role": "tool", "content": '[{"n": "ü"}]'}],
        ),
    ],
)
def test_a_message_means_this(value, expected):
    assert messages_of(value, "messages") == expected


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (5, "column 'c' holds the number 5, not messages"),
        ([None], "a message in column 'c' is nothing, not an object"),
        ({"role": "user", "content": 5}, "the content of a message in column 'c' is the number 5, not text"),
        ({"role": "user", "content": None}, "the content of a message in column 'c' is nothing, not text"),
        (
            {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
            "a message in column 'c' has a part of type 'image', and only text is read",
        ),
        ({"role": "wizard", "content": "p"}, "column 'c' has the role 'wizard', and the roles are system,"),
        ({"role": "user"}, "a message in column 'c' has no role and content"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]},
            "the arguments of a tool call in column 'c' are text that is no JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}]},
            "text that is no JSON: the key 'x' stands twice",
        ),
        (
            '[{"role": "user", "content": "p", "content": "q"}]',
            "holds an object in which the key 'content' stands twice",
        ),
        ("[{'role': 'user', 'content': 'p', 'role': 'user'}]", "holds an object in which the key 'role' stands twice"),
        ({"role": "assistant", "function_call": "add(1)"}, "a call in column 'c' has no name and arguments"),
        (USER | {"weight": 60}, "a message's weight is 1 or 0 (learn it or not), and column 'c' has 60"),
    ],
)
def test_a_sentence_says_what_is_wrong(value, sentence):
    with pytest.raises(Rejected) as refused:
        messages_of(value, "c")
    assert sentence in str(refused.value)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
conversations = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}),
    min_size=1,
    max_size=3,
)


@given(conversations)
def test_a_list_of_messages_is_read_from_a_text(conversation):
    """As JSON, as Python writes it, and as numpy prints it."""
    by_numpy = "[" + "\n ".join(map(repr, conversation)) + "]"
    for written in (json.dumps(conversation), repr(conversation), f"array({conversation!r}, dtype=object)"):
        assert text_of(written, "c") == conversation
    if not any("}" in message["content"] for message in conversation):
        assert text_of(by_numpy, "c") == conversation


@given(texts)
def test_other_text_stays_as_it_is(text):
    for plain in (text, f"[{text}", f"[1, {text!r}]", json.dumps({"role": text})):
        assert text_of(plain, "c") == plain


@given(st.sampled_from(TRAIN_KEYS), st.sampled_from([0, 1, True, False, None, 1.0]))
def test_a_message_says_whether_it_is_learnt(key, value):
    [message] = messages_of(USER | {key: value}, "c")
    assert learned(message) is (value is None or bool(value))


def test_every_role_is_one_that_templates_know():
    assert set(ROLES.values()) == {"system", "developer", "user", "assistant", "tool"}
