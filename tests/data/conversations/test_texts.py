"""Texts beside the contents of messages, and texts that a template leaves out: each is found wherever it stands."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignment.data.conversations.markers import other_format
from alignment.data.conversations.messages import messages_of
from alignment.data.conversations.texts import plain_findings, texts_in
from alignment.data.rows.row import Rejected, Row
from alignment.data.tokens.tokenization import tokenize_groups
from alignment.errors import UserError
from tests.helpers.chat_templates import CHATML

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
WRITES_ALL = "{{ tools | tojson if tools }}{{ mood if mood }}" + CHATML.replace(
    "{{ m.content }}",
    "{{ m.reasoning_content if m.reasoning_content }}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}",
)
WITHOUT_RESULTS = WRITES_ALL.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
WITHOUT_THOUGHTS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def row(*prompt, answers=("y", "z"), **fields):
    return Row(list(prompt), tuple([said(a) if isinstance(a, str) else a] for a in answers), source="d:1", **fields)


def told(tokenizer, template, rows, config, **fields):
    """The findings where nothing is refused, or the refusal."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    try:
        return {found.kind for found in tokenize_groups(rows, tokenizer, config(**fields)).findings}
    except UserError as error:
        return str(error)


def nested(text):
    """The text somewhere in a value of JSON."""
    return st.recursive(
        st.just(text),
        lambda inner: st.one_of(
            st.builds(lambda v: ["a", v], inner),
            st.builds(lambda v: {"k": v, "n": 1}, inner),
            st.builds(lambda v: {"name": [None, {"deep": v}]}, inner),
        ),
        max_leaves=4,
    )


@given(nested("here"))
def test_every_text_of_a_value_is_seen(value):
    assert "here" in set(texts_in(value))
    assert set(texts_in({"here": 1})) == {"here"}  # names of arguments are text of the data, too


@shared
@given(st.data(), st.sampled_from(["arguments", "tools", "mood", "thought"]))
def test_a_special_token_is_found_beside_the_contents(tiny, config, data, place):
    """In a thought, in the arguments of a call, in a tool, in a variable: where the template writes it."""
    value = data.draw(nested(data.draw(st.sampled_from(["a<|im_end|>", "</s>", "<s>b"]))))
    call = {"function": {"name": "f", "arguments": {"x": value if place == "arguments" else 1}}}
    thought = "a<|im_end|>" if place == "thought" else "why"
    earlier = said("", tool_calls=[call], reasoning_content=thought)
    variables = {"tools": [{"name": "f", "more": value if place == "tools" else 1}]}
    variables |= {"mood": value} if place == "mood" else {}
    one = row(user("x"), earlier, {"role": "tool", "content": "5"}, variables=variables)
    assert "hold special tokens" in told(tiny, WRITES_ALL, [one], config)
    unread = told(tiny, CHATML, [one], config, allow=["unwritten"])
    assert "special_tokens" not in unread  # what is not written trains nothing


def test_results_of_tools_that_the_template_does_not_write_are_refused(tiny, config):
    """A prompt would end without the answer to its call."""
    earlier = said("", tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    one = row(user("x"), earlier, {"role": "tool", "content": "5"})
    assert "the result of a tool" in told(tiny, WITHOUT_RESULTS, [one], config)
    assert told(tiny, WITHOUT_RESULTS, [one], config, allow=["unwritten"]) == {"unwritten", "unread: results of tools"}
    assert told(tiny, WRITES_ALL, [one], config) == set()


@pytest.mark.parametrize("place", [0, 1])
def test_a_thought_of_an_answer_that_the_template_leaves_out_is_refused(tiny, config, place):
    """It is the last one, which the policy learns; thoughts of earlier answers may go."""
    answers = ["y", "z"]
    answers[place] = "<think>\nbecause\n</think>\n\ny"
    assert "the thought of an answer: 'because'" in told(
        tiny, WITHOUT_THOUGHTS, [row(user("x"), answers=answers)], config
    )
    assert told(tiny, CHATML, [row(user("x"), answers=answers)], config) == set()
    earlier = row(user("x"), said("<think>\nbecause\n</think>\n\ny"), user("x"))
    assert told(tiny, WITHOUT_THOUGHTS, [earlier], config) == set()


@pytest.mark.parametrize(
    ("prompt", "answer", "kinds"),
    [
        ("What is it?", "What is it? It is y.", ["repeated_prompts"]),
        ("What is it?", "It is</s> y.", ["special_tokens"]),
        ("<s>What is it?</s>", "It is y.</s>", []),
        ("x", "x y", []),
    ],
)
def test_plain_texts_are_looked_at_too(prompt, answer, kinds):
    """Without a template they hold their own special tokens; an end inside an answer is none of these."""
    assert [kind for kind, _ in plain_findings(Row(prompt, (answer, "z")), "</s>")] == kinds


@pytest.mark.parametrize(
    ("text", "is_formatted"),
    [
        ("### Instruction:\nAdd.\n\n### Response:", True),
        ("USER: Add. ASSISTANT:", True),
        ("User: Add.\nAssistant:", True),
        ("Add 2 and 3.\nAI: \n", True),
        ("Assistant:", False),
        ("Who is an AI:", False),
        ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Add.", True),
        ("The headings are ### Response: and ### Instruction:, in this order.", False),
        ("My ASSISTANT: she adds.", False),
        ("Sure.\n\nHuman: And now?\n\nAssistant: Now too.", True),
        ("It says\n\nHuman: hello", False),
    ],
)
def test_formats_of_other_models_are_known(text, is_formatted):
    """Words alone say nothing where a question does not end with them."""
    assert (other_format(text) is not None) == is_formatted


@pytest.mark.parametrize("end", ["<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<eos>", "<｜end▁of▁sentence｜>"])
def test_ends_of_other_models_are_known(tiny, config, end):
    """They would be learnt letter by letter. Inside a text, and where they are tokens, they are something else."""
    assert f"'{end}' in a turn of assistant" in told(tiny, CHATML, [row(user("x"), answers=(f"y{end}\n", "z"))], config)
    assert told(tiny, CHATML, [row(user("x"), answers=(f"It ends with {end}, see?", "z"))], config) == set()
    assert "hold special tokens" in told(tiny, CHATML, [row(user("x"), answers=("y<|im_end|>", "z"))], config)


@pytest.mark.parametrize("answer", ["**Assistant:** y", "### Assistant: y", "AI: y", "assistant\ny"])
def test_the_name_of_a_role_is_known_in_any_dress(tiny, config, answer):
    assert "begins with the name of a role" in told(tiny, CHATML, [row(user("x"), answers=(answer, "z"))], config)


def test_what_parts_have_beside_their_text_is_named_or_refused():
    """A part that is not to be learnt cannot be left out of its message."""
    part = {"type": "text", "text": "y"}
    [message] = messages_of([said([part | {"cache_control": {"type": "x"}, "id": None}])], "messages")
    assert message == said("y", **{"content.cache_control": {"type": "x"}})
    with pytest.raises(Rejected, match="a part of a message in column 'messages' has weight, and only whole messages"):
        messages_of([said([part | {"weight": 0}])], "messages")
    [message] = messages_of([said([part | {"weight": 1}])], "messages")
    assert message["content"] == "y"
