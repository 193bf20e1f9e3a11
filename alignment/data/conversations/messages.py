"""Messages as data sets write them: names of roles and keys, contents in parts, lists of messages written as text."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from typing import Any

from alignment.data.conversations.tool_calls import read_calls, with_objects
from alignment.data.rows.row import Message, Rejected, Text
from alignment.data.rows.twins import KeyTwice, parse, without_twins

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a content that are text."""
CALLS = ("function_call", "tool_call")
"""Roles whose content is a call, or a list of them."""
TRAIN_KEYS = ("train", "training", "weight", "loss")
"""Keys of a message that say whether it is learnt: true or false, 1 or 0."""
WRITTEN_MESSAGES = re.compile(r"(array\()?\s*\[?\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
"""The beginning of a text that is a list of messages."""
TURN = re.compile(r"\n\n(Human|Assistant):")
_ASKS = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)
"""A dialogue as one text that ends where the answer is due."""
_STRINGS = re.compile(r"""(?<=['"])\s+['"]""")


def found(value: Any) -> str:
    """A value as a sentence names it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"the value {value}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def messages_of(value: Any, column: str) -> list[Message]:
    """Messages {role, content, ...}, from one message or a list of them, also where they are written as text.

    Accepted are the keys role and content, and ShareGPT's from and value. All other keys stay with all that they hold,
    because a chat template may read them. A key of a message itself that holds nothing is taken for absent, as
    transformers does with null.
    """
    if isinstance(value, str):
        value = read_written(value, column)
    if isinstance(value, dict):
        value = _rows_of(value) or [value]
    if not isinstance(value, list):
        raise Rejected("wrong_type", f"column '{column}' holds {found(value)}, not messages")
    return [_message(item, column) for item in value]


def _rows_of(table: dict[str, Any]) -> list[Any]:
    """Messages from columns, {"role": [...], "content": [...]}, as older versions of datasets hold them."""
    columns = list(table.values())
    if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return []
    return [dict(zip(table, row, strict=True)) for row in zip(*columns, strict=True)]


def _message(item: Any, column: str) -> Message:
    if not isinstance(item, dict):
        raise Rejected("wrong_type", f"a message in column '{column}' is {found(item)}, not an object")
    role = "role" if "role" in item else "from"
    content = "value" if "value" in item and "content" not in item else "content"
    more = {key: value for key, value in item.items() if key not in (role, content) and value not in (None, "", [], {})}
    if role not in item or (content not in item and not {"tool_calls", "function_call"} & more.keys()):
        raise Rejected("missing_field", f"a message in column '{column}' has no role and content")
    more |= _beside_parts(item.get(content), column)
    known = ROLES.get(str(item[role]).lower())
    if known is None:
        raise Rejected(
            "bad_roles", f"column '{column}' has the role {item[role]!r}, and the roles are {', '.join(ROLES)}"
        )
    if "tool_calls" in more:
        more["tool_calls"] = _tool_calls(more["tool_calls"], column)
    for key in TRAIN_KEYS:
        if key in more and more[key] not in (0, 1):
            raise Rejected(
                "bad_weight", f"a message's {key} is 1 or 0 (learn it or not), and column '{column}' has {more[key]!r}"
            )
    older = more.pop("function_call", None)
    is_call = str(item[role]).lower() in CALLS
    empty_is_fine, objects = "tool_calls" in more or older is not None, is_call or known == "tool"
    read = {"role": known, "content": _content(item.get(content), column, empty_is_fine, objects), **more}
    if "tool_calls" in more:
        return read
    return _called(read, read["content"] if is_call else older, column)


def _beside_parts(content: Any, column: str) -> dict[str, Any]:
    """What the parts of a content have beside their text, to be read by the template or named."""
    parts = [p for p in content if isinstance(p, dict) and "text" in p] if isinstance(content, list) else []
    found = {key: value for part in parts for key, value in part.items() if key not in ("type", "text")}
    for key in TRAIN_KEYS:
        if found.get(key, 1) != 1:
            raise Rejected(
                "bad_weight", f"a part of a message in column '{column}' has {key}, and only whole messages can have it"
            )
    return {f"content.{key}": value for key, value in found.items() if value not in (None, "", [], {})}


def _content(value: Any, column: str, empty_is_fine: bool, objects: bool) -> str:
    """The text of a message: a string, or parts of type text; where `objects` are fine, their JSON."""
    if value is None and empty_is_fine:
        return ""
    if isinstance(value, list):
        for part in value:
            if isinstance(part, dict) and part.get("type", "text") not in TEXT_PARTS:
                raise Rejected(
                    "not_text",
                    f"a message in column '{column}' has a part of type {part['type']!r}, and only text is read",
                )
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    if objects and isinstance(value, dict | list | int | float):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise Rejected("wrong_type", f"the content of a message in column '{column}' is {found(value)}, not text")
    return value


def _tool_calls(calls: Any, column: str) -> list[Any]:
    if isinstance(calls, str):
        calls = read_written(calls, column)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Rejected("wrong_type", f"the tool_calls of a message in column '{column}' are {found(calls)}, not calls")
    return with_objects(calls, column)


def _called(message: Message, calls: Any, column: str) -> Message:
    """A turn that calls functions in an older form: with its calls, and as the text that it was. Others stay."""
    read = None if calls is None else read_calls(calls)
    if read is not None:
        thought, tool_calls = read
        text = calls if isinstance(calls, str) else json.dumps(calls, ensure_ascii=False)
        content = thought if message["content"] == calls else message["content"]
        return message | {"content": content, "tool_calls": tool_calls, "function_call": text}
    if not message["content"] and calls is not None:
        raise Rejected("bad_tool_call", f"a call in column '{column}' has no name and arguments")
    return message


def learned(message: Message) -> bool:
    """Whether SFT learns this message, by its own keys."""
    return all(message.get(key, 1) for key in TRAIN_KEYS)


def meaning(messages: list[Message]) -> list[tuple[Any, ...]]:
    """What makes two conversations the same: the keys with ids and times of a message do not count."""
    said = ("role", "content", "tool_calls", "name", "reasoning_content", "reasoning", "thinking")
    return [tuple(message.get(key) for key in said) for message in messages]


def read_written(text: str, column: str) -> Any:
    """The value of a text that is JSON or a Python literal, as cells of a table hold lists.

    Raises:
        Rejected: it is neither.
    """
    text = text.strip()
    inside = re.fullmatch(r"array\((.*?)(,\s*dtype=\w+)?\)", text, re.DOTALL)
    text = inside[1] if inside else text
    for candidate in (text, re.sub(r"\}\s*\n?\s*\{", "}, {", text)):  # arrays of numpy are printed without commas
        for read in (parse, _literal):
            try:
                return read(candidate)
            except KeyTwice as error:
                raise Rejected("wrong_type", f"column '{column}' holds an object in which {error}") from None
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue
    raise Rejected("wrong_type", f"column '{column}' holds text that is neither JSON nor a Python literal")


def _literal(text: str) -> Any:
    """The value of a Python literal. Texts side by side, as numpy prints a list, would become one text."""
    tree = ast.parse(text, mode="eval")
    if _STRINGS.search(text):
        strings = sum(token.type == tokenize.STRING for token in tokenize.generate_tokens(io.StringIO(text).readline))
        constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        if strings != sum(isinstance(value, str) for value in constants):
            raise ValueError("texts without commas between them")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys: list[Any] = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            without_twins([(key, None) for key in keys])
    return ast.literal_eval(tree)


def list_in(value: Any, column: str) -> Any:
    """A list that is written as text, as cells of a table hold it, read; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "array([")):
        return value
    try:
        read = read_written(value, column)
    except Rejected:
        return value
    return read if isinstance(read, list) else value


def asking(text: str) -> list[Message] | None:
    """The messages of a prompt that is a dialogue in one text, up to "\\n\\nAssistant:"; None where it is none."""
    return dialogue_of(f"\n\n{text.strip()}", "prompt")[:-1] if _ASKS.fullmatch(text) else None


def text_of(value: Any, column: str) -> Text:
    """A string as it is, anything else as messages; a string that is a list of messages is read as one."""
    if not isinstance(value, str):
        if isinstance(value, dict | list):
            return messages_of(value, column)
        raise Rejected("wrong_type", f"column '{column}' holds {found(value)}, not text or messages")
    written = _written_messages(value, column) if WRITTEN_MESSAGES.match(value) else None
    return value if written is None else messages_of(written, column)


def _written_messages(text: str, column: str) -> list[Any] | None:
    """The messages that a text is; None where it only begins like them."""
    try:
        read = read_written(text, column)
    except Rejected:
        return None
    read = [read] if isinstance(read, dict) else read
    pairs = ({"role", "content"}, {"from", "value"})
    are_messages = isinstance(read, list) and all(
        isinstance(m, dict) and any(p <= m.keys() for p in pairs) for m in read
    )
    return read if are_messages else None


def dialogue_of(text: Any, column: str) -> list[Message]:
    """Messages from one string with the turns "\\n\\nHuman:" and "\\n\\nAssistant:", as in Anthropic HH."""
    if not isinstance(text, str):
        raise Rejected("wrong_type", f"column '{column}' holds {found(text)}, not a dialogue in one string")
    before, *turns = TURN.split(text)
    if before.strip() or not turns:
        raise Rejected("bad_roles", f"column '{column}' does not begin with '\\n\\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()} for role, content in zip(turns[::2], turns[1::2], strict=True)
    ]
