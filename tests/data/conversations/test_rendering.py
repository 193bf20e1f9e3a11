"""Messages written by the compiled template itself are what `apply_chat_template` writes, or it is asked."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.data.conversations import rendering
from alignment.data.conversations.rendering import ChatTemplate
from tests.helpers.chat_templates import CHATML

QUESTION = {"role": "user", "content": " What? "}
ANSWER = {"role": "assistant", "content": "That."}
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool }}{% endfor %}{{ eos_token }}{{ tone }}" + CHATML


@pytest.mark.parametrize(
    ("messages", "variables"),
    [
        ([QUESTION], {}),
        ([QUESTION, ANSWER], {"tone": "soft"}),
        ([QUESTION, ANSWER | {"reasoning_content": "Hm."}], {}),
        ([QUESTION | {"name": None}], {}),
        ([QUESTION], {"tools": [{"name": "search"}]}),
    ],
)
def test_the_text_is_that_of_apply_chat_template(messages: Any, variables: Any, tiny: Any) -> None:
    """Also where something is there that transformers changes on the way: missing values, thoughts, tools."""
    tiny.chat_template = WITH_TOOLS
    template = ChatTemplate(tiny, None)
    for generation in (False, True):
        expected = tiny.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **variables)
        for _ in range(rendering._PROBED + 1):
            assert template.write(messages, generation, variables) == expected


def test_plain_messages_are_asked_the_usual_way_only_at_first(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After texts that agree, `apply_chat_template` is not called any more; where one differs, always."""
    tiny.chat_template = CHATML
    usual = ChatTemplate._usual
    asked: list[str] = []

    def noted(self: ChatTemplate, *args: Any) -> str:
        asked.append(usual(self, *args))
        return asked[-1]

    monkeypatch.setattr(ChatTemplate, "_usual", noted)
    template = ChatTemplate(tiny, None)
    for _ in range(2 * rendering._PROBED):
        template.write([QUESTION], True, {})
    assert len(asked) == rendering._PROBED

    other = ChatTemplate(tiny, None)
    other._constants["eos_token"] = "another"
    tiny.chat_template = "{{ eos_token }}" + CHATML
    other._compiled = rendering._compiled(tiny, None)
    asked.clear()
    for _ in range(3):
        assert other.write([QUESTION], True, {}) == asked[-1]
    assert len(asked) == 3


def test_a_template_that_cannot_be_read_is_said_when_it_is_asked(tiny: Any) -> None:
    """Not when the settings are read, where nobody knows yet whether there are messages."""
    tiny.chat_template = "{% if %}"
    with pytest.raises(rendering.TemplateError):
        ChatTemplate(tiny, None).write([QUESTION], True, {})
