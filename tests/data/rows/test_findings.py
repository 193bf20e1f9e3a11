"""What the check of the rendered rows finds: all of it is counted, and what would spoil the training is refused."""

import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignment.data.conversations.ends import end_of_turn
from alignment.data.rows.row import Row
from alignment.data.tokens.tokenization import tokenize_groups, tokenize_sft
from alignment.errors import UserError
from tests.helpers.chat_templates import CHATML, LLAMA3, NO_END, QWEN3, R1

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
ADDS_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML
THINKS = CHATML.replace(
    "{{ m.content }}", "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
)
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
NO_GENERATION_PROMPT = CHATML.partition("{% if add")[0]
DATED = "Today: {{ strftime_now('%d %B %Y') }}\n" + CHATML


def message(role, text, **more):
    return {"role": role, "content": text, **more}


def row(prompt, *answers, number=1, **fields):
    """A row of a conversation; answers may be texts or messages."""
    prompt = [message("user", prompt)] if isinstance(prompt, str) else prompt
    made = tuple([message("assistant", a)] if isinstance(a, str) else [a] for a in answers)
    return Row(prompt, made, source=f"data.jsonl:{number}", **fields)


def found(tokenizer, rows, config, **fields):
    """Rows by kind of finding, where nothing is refused."""
    return {f.kind: f.rows for f in tokenize_groups(rows, tokenizer, config(**fields)).findings}


def refusal(tokenizer, rows, config, **fields):
    with pytest.raises(UserError) as refused:
        tokenize_groups(rows, tokenizer, config(**fields))
    return str(refused.value)


CASES = [
    ("special_tokens", CHATML, row("x", "y<|im_end|>", "z")),
    ("special_tokens", CHATML, row("x</s>", "y", "z")),
    ("formatted", CHATML, row("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n", "y", "z")),
    ("formatted", NO_END, row("user: hello there\nassistant: hi\nuser: x", "y", "z")),
    ("message_lists", CHATML, row('[{"role": "user", "content": "x"}, and so on', "y", "z")),
    ("role_names", CHATML, row("x", "Assistant: y", "z")),
    ("role_names", CHATML, row("x", "y", "assistant\nz")),
    ("missing_texts", CHATML, row("x", "nan", "z")),
    ("missing_texts", CHATML, row("x", "y", " #N/A\n")),
    ("missing_texts", CHATML, row("None", "y", "z")),
    ("missing_texts", None, Row("x", ("y", "NULL"), source="data.jsonl:1")),
    ("repeated_prompts", CHATML, row("What is it?", "What is it? y", "z")),
    ("unwritten", NO_SYSTEM, row([message("system", "Be brief."), message("user", "x")], "y", "z")),
    ("generation_prompt", NO_GENERATION_PROMPT, row("x", "y", "z")),
    ("double_bos", LLAMA3.replace("<s>", "<s><s>"), row("x", "y", "z")),
]


@pytest.mark.parametrize(("kind", "template", "bad"), CASES)
def test_a_finding_is_refused_unless_it_is_allowed(tiny, config, kind, template, bad):
    tiny.chat_template = template
    said = refusal(tiny, [bad], config)
    assert said.startswith("1 of 1 rows ") and "data.jsonl:1" in said
    assert f"data.allow=[{kind}]" in said
    assert found(tiny, [bad], config, allow=[kind])[kind] == 1


def test_sft_names_its_own_setting(tiny, config):
    tiny.chat_template = CHATML
    with pytest.raises(UserError, match=r"set sft\.data\.allow=\[special_tokens\]"):
        tokenize_sft([row("x", "y<|im_end|>")], tiny, config())


def test_few_of_many_rows_are_counted_and_trained(tiny, config):
    tiny.chat_template = CHATML
    rows = [row("x", "y", "z", number=i) for i in range(1, 40)]
    assert found(tiny, [*rows, row("x", "y</s>", "z", number=40)], config) == {"special_tokens": 1}


@pytest.mark.parametrize("template", [CHATML, LLAMA3, QWEN3, R1, NO_END])
def test_sound_rows_have_no_finding(tiny, config, template):
    """In one turn and in several, whatever the template writes around them."""
    tiny.chat_template = template
    several = [message("user", "a"), message("assistant", "b"), message("user", "What now?")]
    rows = [row("x", "y", "z"), row(several, "What", "What now is this"), row("system", "user", "assistant")]
    rows.append(row([message("user", "a"), message("assistant", "None"), message("user", "nano?")], "None.", "nan 1"))
    assert found(tiny, rows, config) == {}
    assert not tokenize_sft(rows, tiny, config()).findings


@shared
@given(st.data())
def test_a_special_token_is_found_wherever_it_stands(tiny, config, data):
    tiny.chat_template = CHATML
    token = data.draw(st.sampled_from(["<s>", "</s>", "<|im_start|>", "<|im_end|>"]))
    before, after = (data.draw(st.text("abc \n", max_size=4)) for _ in range(2))
    texts = ["x", "y", "z"]
    place = data.draw(st.integers(0, 2))
    texts[place] = before + token + after
    counts = found(tiny, [row(*texts)], config, allow=["special_tokens", "formatted"])
    assert counts.get("special_tokens", 0) + counts.get("formatted", 0) == 1


keys = st.text("abcdefghijklmnop_", min_size=1, max_size=8).filter(lambda key: key not in ("role", "content"))


@shared
@given(keys, st.sampled_from([1, "text", ["a"], {"a": 1}, True]), st.booleans())
def test_every_key_of_a_message_is_read_or_reported(tiny, config, key, value, reads):
    """Whatever its name: by what the template writes, not by a list of names."""
    tiny.chat_template = CHATML.replace("m.content }}", f"m.content }}}}{{{{ m['{key}'] }}}}") if reads else CHATML
    counts = found(tiny, [row([message("user", "x", **{key: value})], "y", "z")], config)
    assert counts == ({} if reads else {f"unread: {key}": 1})


@pytest.mark.parametrize(
    ("template", "fields", "answer", "text", "unread"),
    [
        (ADDS_TOOLS, {"variables": {"tools": [{"name": "add"}]}}, {}, '{"name": "add"}', None),
        (CHATML, {"variables": {"tools": [{"name": "add"}]}}, {}, None, "tools"),
        (THINKS, {}, {"reasoning_content": "because"}, "(because)", None),
        (CHATML, {}, {"reasoning_content": "because"}, None, "reasoning_content"),
    ],
)
def test_tools_and_thoughts_reach_the_template_or_are_named(tiny, config, template, fields, answer, text, unread):
    tiny.chat_template = template
    data = tokenize_groups([row("x", message("assistant", "y", **answer), "z", **fields)], tiny, config())
    [group] = data.groups
    assert text is None or text in tiny.decode([*group.prompt, *group.completions[0]])
    assert [f.kind for f in data.findings] == ([f"unread: {unread}"] if unread else [])


def test_tool_calls_that_the_template_does_not_write_are_refused(tiny, config):
    tiny.chat_template = CHATML
    call = message("assistant", "", tool_calls=[{"function": {"name": "add", "arguments": {}}}])
    prompt = [message("user", "x"), call, message("tool", "5")]
    assert "the tool calls of an answer" in refusal(tiny, [row(prompt, "y", "z")], config)
    tiny.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}")
    assert found(tiny, [row(prompt, "y", "z")], config) == {}


def test_a_variable_of_the_settings_that_the_template_does_not_read_is_named(tiny, config):
    tiny.chat_template = QWEN3
    rows = [row("x", "y", "z")]
    assert found(tiny, rows, config, template_kwargs={"enable_thinking": False}) == {}
    assert found(tiny, rows, config, template_kwargs={"enable_thinkng": False}) == {
        "unread: data.template_kwargs.enable_thinkng": 1
    }


def test_a_header_that_would_be_scored_is_found_before_answers_with_thoughts_too(tiny, config):
    """The thought is no header: a template that needs none is fine with it."""
    thoughts = [message("assistant", text, reasoning_content="hm") for text in ("y", "z")]
    tiny.chat_template = THINKS.partition("{% if add")[0]
    assert "1 of 1 rows get a header before their answer" in refusal(tiny, [row("x", *thoughts)], config)
    tiny.chat_template = "{% for m in messages %}{{ m.reasoning_content }}{{ m.content }}</s>{% endfor %}"
    assert found(tiny, [row("x", *thoughts)], config) == {}


def test_a_variable_of_a_row_may_say_only_how_a_generation_begins(tiny, config):
    """It decides what of the answer is the prompt's, so it is read; a misspelt one is named."""
    tiny.chat_template = QWEN3
    switched, misspelt = (row("x", "y", "z", variables={name: False}) for name in ("enable_thinking", "enable_thinkng"))
    assert found(tiny, [switched], config) == {}
    assert found(tiny, [misspelt], config) == {"unread: enable_thinkng": 1}


def test_a_kind_that_does_not_exist_is_refused(tiny, config):
    assert "no kind 'special_token' (did you mean special_tokens?)" in refusal(
        tiny, [row("x", "y", "z")], config, allow=["special_token"]
    )


def test_messages_say_what_sft_learns(tiny, config):
    """Turns that are not to be learnt and empty ones are not scored; a first turn of the assistant is."""
    tiny.chat_template = CHATML
    greeting = [message("assistant", "h"), message("user", "a"), message("assistant", "b", weight=0)]
    greeting += [message("user", "c"), message("assistant", ""), message("user", "x")]
    data = tokenize_sft([row(greeting, "y")], tiny, config())
    [sequence] = data.sequences
    scored = [token for token, mask in zip(sequence["input_ids"], sequence["completion_mask"], strict=True) if mask]
    assert tiny.convert_ids_to_tokens(scored) == ["h", "<|im_end|>", "y", "<|im_end|>"]
    assert [f.kind for f in data.findings] == ["empty_turns"]
    none = row([message("user", "x")], message("assistant", "y", train=False))
    assert [drop.reason for drop in tokenize_sft([row("x", "y"), none], tiny, config()).drops] == ["nothing_to_learn"]


def test_a_developer_is_a_system_turn_where_the_template_does_not_know_it(tiny, config):
    prompt = [message("developer", "s"), message("user", "x")]
    for template, role in ((CHATML, "system"), ("{# developer #}" + CHATML, "developer")):
        tiny.chat_template = template
        [group] = tokenize_groups([row(prompt, "y", "z")], tiny, config()).groups
        assert f"<|im_start|>{role}\ns" in tiny.decode(group.prompt)


def test_a_template_that_refuses_the_system_text_of_the_settings_says_how_to_leave_it_out(tiny, config):
    tiny.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system here.') }}{% endif %}" + CHATML
    )
    assert "No system here (data.system=null leaves" in refusal(tiny, [row("x", "y", "z")], config, system="s")


def test_the_date_that_a_template_writes_is_held(tiny, config):
    """The template may say it in any form; it is the day that the run has been given."""
    tiny.chat_template = DATED
    [group] = tokenize_groups([row("x", "y", "z")], tiny, config(), day=datetime.date(2020, 2, 3)).groups
    assert "Today: 03 February 2020" in tiny.decode(group.prompt)


@pytest.mark.parametrize(
    ("template", "token"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|im_end|>"), (R1, "</s>"), (NO_END, None), (None, None)]
)
def test_the_end_of_a_turn_is_read_off_the_template(tiny, config, template, token):
    tiny.chat_template = template
    assert end_of_turn(tiny, config()) == (token and tiny.convert_tokens_to_ids(token))


def test_variables_of_a_row_cannot_break_the_rendering(tiny, config):
    tiny.chat_template = CHATML
    bad = row("x", "y", "z", number=2, variables={"tokenize": True})
    data = tokenize_groups([row("x", "y", "z"), bad], tiny, config())
    assert [(drop.row, drop.message) for drop in data.drops] == [
        (2, "its variables of the chat template cannot set tokenize")
    ]
