"""What a JSON file says of a row reaches the chat template unchanged, to the last null."""

import json

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from alignment.data.conversations.writer import Writer
from alignment.data.layouts.recognition import recognise, to_row
from alignment.data.rows.row import Row
from alignment.data.sources.formats import read_file

TEMPLATE = (
    "{{ {'messages': messages, 'tools': tools, 'documents': documents, 'mode': mode | default(none)} | tojson }}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS)
NESTED = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
OBJECTS = st.dictionaries(TEXTS, NESTED, max_size=3)


def called(arguments):
    return [{"type": "function", "id": "Aa0aA", "function": {"name": "look", "arguments": arguments}}]


def as_read(row, path, tokenizer, config):
    """What the template is given of a row, from its line in a file."""
    path.write_text(json.dumps(row) + "\n")
    [(_, record)] = list(read_file(path))
    read = to_row(record, recognise([record], {}, "preference", "f"), {}, "f", 1)
    assert isinstance(read, Row), read
    writer = Writer(tokenizer, config())
    messages = [*writer.messages(read), *writer.answers(read)[0]]
    return json.JSONDecoder().raw_decode(writer.render(messages, False, read.variables))[0]


@shared
@given(arguments=OBJECTS, tool=OBJECTS, document=OBJECTS, variable=NESTED)
@example(arguments={"at": None}, tool={"properties": {"at": {"default": None}}}, document={"x": None}, variable=None)
def test_nested_json_reaches_the_template_unchanged(tiny, config, tmp_path, arguments, tool, document, variable):
    """Arguments of calls, tools, documents, variables and keys of messages that only this template knows."""
    tiny.chat_template = TEMPLATE
    question = {"role": "user", "content": "?", "context": [document]}
    row = {
        "prompt": [question],
        "chosen": [{"role": "assistant", "content": "Wait.", "tool_calls": called(arguments)}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "tools": [tool],
        "documents": [document | {"text": "t"}],
        "chat_template_kwargs": {"mode": variable},
    }
    assert as_read(row, tmp_path / "row.jsonl", tiny, config) == {
        "messages": [question, *row["chosen"]],
        "tools": row["tools"],
        "documents": row["documents"],
        "mode": variable,
    }


@shared
@given(arguments=OBJECTS)
def test_arguments_and_tools_as_json_text_keep_their_nulls(tiny, config, tmp_path, arguments):
    """Text in a cell is read as a file is."""
    tiny.chat_template = TEMPLATE
    row = {
        "prompt": [{"role": "user", "content": "?"}],
        "chosen": [{"role": "assistant", "content": "Wait.", "tool_calls": called(json.dumps(arguments))}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "tools": json.dumps([{"name": "look", "default": arguments}]),
    }
    found = as_read(row, tmp_path / "row.jsonl", tiny, config)
    assert found["messages"][1]["tool_calls"] == called(arguments)
    assert found["tools"] == [{"name": "look", "default": arguments}]
