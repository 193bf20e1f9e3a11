"""Calls of tools in one form: {"type": "function", "function": {"name": ..., "arguments": {...}}}."""

from __future__ import annotations

import json
import re
from typing import Any

from alignment.data.rows.row import Rejected
from alignment.data.rows.twins import KeyTwice, parse

_THOUGHT = re.compile(r"\s*(<think>.*?</think>)?\s*(.*)", re.DOTALL)


def with_objects(calls: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """The calls with their arguments as objects: chat templates write these, and would quote a JSON text once more."""
    read = []
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = function["arguments"]
                function = function | {"arguments": parse(arguments) if arguments.strip() else {}}
            except ValueError as error:
                why = f": {error}" if isinstance(error, KeyTwice) else ""
                raise Rejected(
                    "bad_tool_call", f"the arguments of a tool call in column '{column}' are text that is no JSON{why}"
                ) from None
        read.append(call | {"function": function} if "function" in call else function)
    return read


def read_calls(written: Any) -> tuple[str, list[dict[str, Any]]] | None:
    """The thought and the calls of a function-calling turn: an object with name and arguments, or a list of them.

    They may be JSON text, with a thought in front of them. None: it is something else, and stays text.
    """
    thought = ""
    if isinstance(written, str):
        [(thought, text)] = [match.groups(default="") for match in _THOUGHT.finditer(written)][:1]
        try:
            written = parse(text)
        except ValueError:
            return None
    calls = [written] if isinstance(written, dict) else written
    if not isinstance(calls, list) or not calls:
        return None
    read = []
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = parse(arguments)
            except ValueError:
                return None
        read.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return thought, read


def with_texts(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls with their arguments as JSON text, for templates that join them to other text."""
    written = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function.get("arguments", ""), str):
            function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        written.append(call | {"function": function} if "function" in call else function)
    return written
