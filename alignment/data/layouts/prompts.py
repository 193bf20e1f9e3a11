"""Columns that belong to a prompt beside its text: a system text, earlier turns, and variables of the chat template."""

from __future__ import annotations

from typing import Any

from alignment.data.conversations.messages import asking, found, list_in, messages_of, read_written
from alignment.data.layouts.columns import Record
from alignment.data.rows.row import Message, Rejected

SYSTEMS = ("system", "system_prompt", "system_message")
VARIABLES = ("tools", "documents", "chat_template_kwargs")
"""Columns that the chat template reads, the last one as several variables by name."""
ASKED = (*SYSTEMS, "history", *VARIABLES)
"""With another value in one of these columns, something else is asked."""


def framed(prompt: list[Message], record: Record) -> tuple[list[Message], set[str]]:
    """A prompt with the system text and the earlier turns of its record, and the columns that these are from.

    Raises:
        Rejected: the system text is none, or another one than the prompt's own; earlier turns that are none.
    """
    name = next((name for name in SYSTEMS if record.get(name)), None)
    system, history = (record[name] if name else None), _history(record.get("history"))
    if system is not None and not isinstance(system, str):
        raise Rejected("wrong_type", f"column '{name}' holds {found(system)}, not text")
    own = prompt[:1] if prompt and prompt[0]["role"] in ("system", "developer") else []
    if system and own and system.strip() != own[0]["content"].strip():
        raise Rejected(
            "two_systems", f"column '{name}' and the first message are two system texts: leave one of them out"
        )
    first = own or ([{"role": "system", "content": system}] if system else [])
    earlier = history[:1] if history and history[0]["role"] in ("system", "developer") else []
    if earlier and first and earlier[0]["content"].strip() != first[0]["content"].strip():
        raise Rejected("two_systems", "column 'history' begins with another system text: leave one of them out")
    history = history[len(earlier) :] if first else history
    return [*first, *history, *prompt[len(own) :]], {*([name] if name else []), *(["history"] if history else [])}


def _history(value: Any) -> list[Message]:
    """Earlier turns: [[question, answer], ...], as LLaMA-Factory's Alpaca files have them, or messages.

    None where it is a text of its own, or nothing.

    Raises:
        Rejected: a list of something else.
    """
    turns = list_in(value, "history")
    if isinstance(turns, str):
        return asking(f"{turns.strip()}\n\nAssistant:") or []
    if not isinstance(turns, list | dict) or not turns:
        return []
    if isinstance(turns, dict) or all(isinstance(turn, dict) for turn in turns):
        return messages_of(turns, "history")
    pairs = [turn for turn in turns if isinstance(turn, list) and len(turn) == 2]
    if len(pairs) < len(turns) or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise Rejected(
            "wrong_type",
            "column 'history' holds a list that is neither messages nor pairs of a question and its answer; "
            "data.ignore=[history] leaves the column out",
        )
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def variables_of(record: Record) -> dict[str, Any]:
    """Variables of the chat template by name, from the columns that hold some."""
    variables: dict[str, Any] = {}
    for name in VARIABLES:
        value = record.get(name)
        left_out = f"data.ignore=[{name}] leaves the column out"
        if isinstance(value, str) and value.strip():
            try:
                value = read_written(value, name)
            except Rejected as rejected:
                raise Rejected(rejected.reason, f"{rejected}; {left_out}") from None
        if value in (None, "", [], {}):
            continue
        if name == "chat_template_kwargs":
            if not isinstance(value, dict):
                raise Rejected("wrong_type", f"column '{name}' holds {found(value)}, not variables by name; {left_out}")
            variables |= value
            continue
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list):
            raise Rejected("wrong_type", f"column '{name}' holds {found(value)}, not a list; {left_out}")
        if name == "tools":  # some sets hold each of them as a JSON text
            value = [read_written(tool, name) if isinstance(tool, str) else tool for tool in value]
        variables[name] = value
    return variables
