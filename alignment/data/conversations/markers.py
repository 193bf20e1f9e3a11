"""What chat templates write between turns: a text that holds it was formatted before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from alignment.data.rows.row import Message, Rejected

HEADERS = re.compile(
    r"<\|im_start\|>(system|user|assistant)\b|<\|start_header_id\|>|<start_of_turn>(user|model)\b|\[/INST\]"
    r"|<\|(system|user|assistant)\|>|<\|start\|>(system|developer|user|assistant)\b|<\|turn>(user|model)\b"
    r"|<｜(User|Assistant)｜>|<\|(USER|CHATBOT|SYSTEM)_TOKEN\|>"
    r"|(^|\n)### ?(Response|Assistant):\s*\Z|(?<!\w)ASSISTANT:\s*\Z|\n\nHuman:[\s\S]*\n\nAssistant:"
)
"""How the templates of well-known models begin a turn or an answer; Alpaca's and Vicuna's at the end of a question."""
ENDS = re.compile(
    r"(<\|(im_end|eot_id|eom_id|endoftext|end|return|end_of_text|END_OF_TURN_TOKEN)\|>|<end_of_turn>|<turn\|>|<eos>"
    r"|</s>|<｜end▁of▁sentence｜>)\s*\Z|\A\s*(\[INST\]|<\|begin_of_text\|>|<bos>|<｜begin▁of▁sentence｜>)"
)
"""How they end a text, and how they begin one. To another model's tokenizer these are letters."""


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
