"""Completions of several turns: what several conversations share is their prompt, and each goes on by its own turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

from alignment.data.conversations.messages import meaning
from alignment.data.rows.row import Message, Rejected, Text


def require_answer(messages: Sequence[Message]) -> None:
    """Raise `Rejected` unless the assistant begins and ends these turns, and tools answer the assistant."""
    roles = [message["role"] for message in messages]
    for place, role in (("begins", roles[0]), ("ends", roles[-1])):
        if role != "assistant":
            raise Rejected(
                "bad_roles",
                f"an answer {place} with a turn of {role}, and the assistant's turns are its first and its last",
            )
    for previous, role in pairwise(roles):
        if role == "tool" and previous not in ("assistant", "tool"):
            raise Rejected("bad_roles", "a tool turn stands where no assistant turn is before it")


def shared_turns(completions: Sequence[list[Message]]) -> int:
    """How many turns all of two or more completions begin with alike; each has at least one of its own."""
    if len(completions) < 2:
        return 0
    count = 0
    first, *others = (meaning(completion) for completion in completions)
    while count < min(len(turns) for turns in (first, *others)) - 1:
        if any(turns[count] != first[count] for turns in others):
            break
        count += 1
    return count


def split_conversations(conversations: Sequence[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """The prompt that whole conversations share, and what each goes on with.

    The prompt ends where an answer is due, so the completions begin with the assistant. Where the first difference is
    a turn of the user or of a tool, they begin with the shared answer before it.

    Raises:
        Rejected: they share no question, or one of them is empty or does not end with the assistant.
    """
    for messages in conversations:
        if not messages:
            raise Rejected("empty_answer", "a conversation has no messages")
        if messages[-1]["role"] != "assistant":
            raise Rejected(
                "bad_roles",
                f"the conversation ends with a turn of {messages[-1]['role']}, and the last one must be the "
                f"assistant's",
            )
    for cut in range(shared_turns(conversations), 0, -1):
        answered = all(messages[cut]["role"] == "assistant" for messages in conversations)
        if answered and conversations[0][cut - 1]["role"] in ("user", "tool"):
            return conversations[0][:cut], [messages[cut:] for messages in conversations]
    raise Rejected("prompts_differ", "chosen and rejected differ before their first answer")


def readable(text: Text) -> str:
    """A text, a single question, or a conversation for people: its turns with their roles, and calls of tools."""
    if isinstance(text, str):
        return text
    turns = [message for message in text if message["role"] not in ("system", "developer")]
    if [message["role"] for message in turns] == ["user"]:
        return str(turns[0]["content"])
    return "\n\n".join(f"{message['role']}: {_said(message)}" for message in turns)


def _said(message: Message) -> str:
    calls = [call.get("function", call) for call in message.get("tool_calls", ())]
    written = [f"{call.get('name')}({json.dumps(call.get('arguments', {}), ensure_ascii=False)})" for call in calls]
    return "\n".join(filter(None, [message["content"], *written]))
