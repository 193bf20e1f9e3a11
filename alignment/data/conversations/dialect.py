"""What a chat template knows of messages; what it does not know is written in its terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alignment.data.conversations.messages import learned
from alignment.data.conversations.tool_calls import with_texts
from alignment.data.rows.row import Message, Rejected

_NAME = "Aa0aA"


@dataclass(frozen=True, slots=True)
class Dialect:
    """The abilities of one chat template.

    Attributes:
        developer: it knows the role developer, the newer name of system.
        calls: it writes `tool_calls`.
        text_arguments: it wants the arguments of a call as JSON text.
    """

    developer: bool
    calls: bool
    text_arguments: bool

    @classmethod
    def of(cls, template: str, render: Callable[[list[Message]], str]) -> Dialect:
        """By what the template makes of a call; `render` raises `Rejected` where it makes nothing of it."""
        arguments: dict[str, Any] = {"Bb1bB": 1}
        call = {"type": "function", "id": "Cc2cC3dD4", "function": {"name": _NAME, "arguments": arguments}}
        calls = text_arguments = False
        for in_text in (False, True):
            made = with_texts([call]) if in_text else [call]
            try:
                text = render(
                    [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": made}]
                )
            except Rejected:
                continue
            calls, text_arguments = _NAME in text, in_text
            break
        return cls("developer" in template, calls, text_arguments)

    def write(self, messages: list[Message]) -> list[Message]:
        """The messages in the template's terms.

        The calls of a turn `function_call` join the answer before it, as a policy says both in one turn. Where the
        template writes no calls, it stays the text that it was.
        """
        written: list[Message] = []
        for message in messages:
            if message["role"] == "developer" and not self.developer:
                message = message | {"role": "system"}
            if "function_call" in message:
                message, text = _without(message, "function_call"), message["function_call"]
                if not self.calls:
                    message = _without(message, "tool_calls") | {"content": text}
                elif written and _continues(written[-1], message):
                    before = written.pop()
                    text = "\n".join(filter(None, (before["content"], message["content"])))
                    together = [*before.get("tool_calls", ()), *message["tool_calls"]]
                    message = before | {"content": text, "tool_calls": together}
            if self.text_arguments and "tool_calls" in message:
                message = message | {"tool_calls": with_texts(message["tool_calls"])}
            written.append(message)
        return written


def _without(message: Message, key: str) -> Message:
    return {name: value for name, value in message.items() if name != key}


def _continues(before: Message, message: Message) -> bool:
    return before["role"] == "assistant" and learned(before) == learned(message)
