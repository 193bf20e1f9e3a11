"""What chat templates write between turns: a text that holds it was formatted before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from alignment.data.rows.row import Message, Rejected

HEADERS = re.compile(
    r"<\|im_start\|>(system|user|assistant)\b|<\|start_header_id\|>|<start_of_turn>(user|model)\b|\[/INST\]"
    r"|<\|(system|user|assistant)\|>|<\|start\|>(system|developer|user|assistant)\b|<\|turn>(user|model)\b"
    r"|<｜(User|Assistant)｜>|<\|(USER|CHATBOT|SYSTEM)_TOKEN\|>"
)
"""How the templates of well-known models begin a turn or, Llama 2's, an answer."""
_ASKS = re.compile(r"(\A|\n)### ?(Response|Assistant):\s*\Z|(?<!\w)ASSISTANT:\s*\Z|\n(Assistant|AI|Bot):\s*\Z")
"""How a question of Alpaca's or Vicuna's format ends, or one that asks for the next line of a dialogue."""
_ENDS = re.compile(
    r"(<\|(im_end|eot_id|eom_id|endoftext|end|return|end_of_text|END_OF_TURN_TOKEN)\|>|<end_of_turn>|<turn\|>|<eos>"
    r"|</s>|<｜end▁of▁sentence｜>)\s*\Z"
)
_BEGINS = re.compile(r"\s*(\[INST\]|<\|begin_of_text\|>|<bos>|<｜begin▁of▁sentence｜>)")
_EDGE = 48
"""Characters at an end of a text in which a sign of a format may stand."""


def other_format(text: str) -> str | None:
    """The sign that a text was formatted for turns of a model: the beginning of one, or turns in the text itself."""
    if (header := HEADERS.search(text)) is not None:
        return header[0]
    turn = text.find("\n\nHuman:")
    if turn >= 0 and text.find("\n\nAssistant:", turn) >= 0:
        return "Human:"
    asks = _ASKS.search(text[-_EDGE:])
    return None if asks is None else asks[0]


def other_edge(text: str) -> str | None:
    """The sign at an end of a text that another model's format put there. To this tokenizer it is letters."""
    found = _ENDS.search(text[-_EDGE:]) or _BEGINS.match(text[:_EDGE])
    return None if found is None else found[0]


def turn_markers(render: Callable[[list[Message]], str], special: re.Pattern[str] | None) -> list[str]:
    """How one template begins turns, the longest first; `render` raises `Rejected` where it refuses messages."""
    marks = ["Aa0aA", "Bb1bB", "Cc2cC"]
    turns: list[Message] = [
        {"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), marks, strict=True)
    ]
    try:
        whole = render(turns)
    except Rejected:  # a template of single questions
        return []
    between = re.fullmatch(f".*{marks[0]}(.*){marks[1]}(.*){marks[2]}.*", whole, re.DOTALL)
    found = {marker for part in (between.groups() if between else ()) for marker in _headers(part, special)}
    return sorted(found, key=len, reverse=True)


def _headers(part: str, special: re.Pattern[str] | None) -> Iterator[str]:
    """The beginnings of turns in what a template writes between two: special tokens with the words after them."""
    starts = [match.start() for match in special.finditer(part)] if special is not None else []
    for start, end in zip(starts, [*starts, len(part)][1:], strict=True):
        header = part[start:end].strip()
        if special is not None and special.sub("", header).strip():  # more than an end-of-turn token
            yield header
    if not starts and len(part.strip()) >= 4:
        yield part.strip()
