"""Rows as the policy sees them: every token with its text, whether it is scored, and who wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from alignment.config.data import Keep
from alignment.data.rows.row import Message, Rejected, Row, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignment.data.conversations.writer import Writer
    from alignment.types import Group

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message whose text stands before its content."""


class Part(Enum):
    """What becomes of a token: the prompt and the context are read, what is scored is learnt, what is cut is gone."""

    prompt = "prompt"
    scored = "scored"
    context = "context"
    cut = "cut"


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a row.

    Attributes:
        text: what it adds to the text; empty for one that only begins a character.
        of_template: it holds nothing of the row's texts: the chat template, or a tokenizer's BOS and EOS, wrote it.
    """

    id: int
    text: str
    part: Part
    of_template: bool


@dataclass(frozen=True, slots=True)
class TokenView:
    """One row: its place, and its tokens by name: the prompt and each answer, or a whole conversation.

    Attributes:
        remark: its labels, scores and weight, where it has some.
    """

    source: str
    remark: str
    sequences: dict[str, list[Token]]

    @staticmethod
    def runs(tokens: Sequence[Token]) -> Iterator[tuple[Part, bool, list[Token]]]:
        """Neighbours that are alike, together: what becomes of them, whether the template wrote them, the tokens."""
        for (part, of_template), same in groupby(tokens, key=lambda token: (token.part, token.of_template)):
            yield part, of_template, list(same)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, end to end the text of all.

    A token that ends inside a character adds nothing; the one that completes the character adds it.
    """

    def decode(start: int, end: int) -> str:
        text = tokenizer.decode(list(ids[start:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast(str, text)

    found: list[str] = []
    start = done = 0  # some decoders write a token otherwise at the beginning of a text, so the one before goes along
    for end in range(1, len(ids) + 1):
        text = decode(start, end)
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(decode(start, done)) :])
        start, done = done, end
    return found


def view_group(
    row: Row, whole: Group, used: Group | None, writer: Writer, keep: Keep, names: Sequence[str]
) -> TokenView:
    """A row with a prompt and answers.

    Args:
        whole: its tokens without any limit of length.
        used: as they train; None where the row is left out, so that all of it is cut.
        keep: the end of a long prompt that stays.
        names: of the answers, in order.
    """
    prompt_cut = _cut_of_prompt(whole.prompt, used, writer, keep)
    different = [one for i, one in enumerate(row.completions) if one not in row.completions[:i]]
    sequences: dict[str, list[Token]] = {}
    for k, answer in enumerate(whole.completions):
        scored = np.ones(len(answer), dtype=bool) if whole.scored is None else whole.scored[k]
        kept = kept_tokens(answer, used)
        parts = [Part.cut if cut else Part.prompt for cut in prompt_cut]
        parts += [Part.cut if i >= kept else Part.scored if s else Part.context for i, s in enumerate(scored)]
        tokens = _tokens(row, writer, [*whole.prompt.tolist(), *answer.tolist()], parts, different[k])
        sequences.setdefault("prompt", tokens[: len(whole.prompt)])
        sequences[names[k]] = tokens[len(whole.prompt) :]
    return TokenView(row.source, _remark(row), sequences)


def view_conversation(row: Row, whole: dict[str, Any], used: dict[str, Any] | None, writer: Writer) -> TokenView:
    """A row of SFT: `input_ids` and `completion_mask` without any limit of length, and as they train."""
    kept = 0 if used is None else len(used["input_ids"])
    mask = list(whole["completion_mask"])
    first = mask.index(1)
    parts = [
        Part.cut if i >= kept else Part.scored if scored else Part.prompt if i < first else Part.context
        for i, scored in enumerate(mask)
    ]
    tokens = _tokens(row, writer, list(whole["input_ids"]), parts, row.completions[0])
    return TokenView(row.source, _remark(row), {"conversation": tokens})


def _cut_of_prompt(prompt: np.ndarray, used: Group | None, writer: Writer, keep: Keep) -> list[bool]:
    """Which tokens of a prompt are cut."""
    left = 0 if used is None else len(used.prompt)
    away = len(prompt) - left
    if keep is Keep.start or used is None:
        return [i >= left for i in range(len(prompt))]
    first = int(away > 0 and used.prompt[0] == prompt[0] == writer.tokenizer.bos_token_id)
    return [first <= i < first + away for i in range(len(prompt))]


def kept_tokens(answer: np.ndarray, used: Group | None) -> int:
    """How many tokens of an answer train: of the longest that it begins with, if several do."""
    ours = used.completions if used is not None else ()
    return max((len(one) for one in ours if np.array_equal(one, answer[: len(one)])), default=0)


def _tokens(row: Row, writer: Writer, ids: list[int], parts: list[Part], answer: Text) -> list[Token]:
    texts = pieces(writer.tokenizer, ids)
    ends = list(accumulate(map(len, texts)))
    own = _own_text("".join(texts), row, writer, answer)
    tokens = []
    for token, text, part, end in zip(ids, texts, parts, ends, strict=True):
        # A token without text of its own belongs to the character that follows.
        start, stop = (end - len(text), end) if text else (end, end + 1)
        tokens.append(Token(token, text, part, not any(own[start:stop])))
    return tokens


def _own_text(text: str, row: Row, writer: Writer, answer: Text) -> bytearray:
    """1 for each character of the text that stands in the row itself, else 0."""
    own = bytearray(len(text) + 1)
    start = 0
    for before, wanted in _texts(row, writer, answer):
        if text.startswith(before, start):
            start += len(before)
        for form in (wanted, wanted.strip(), wanted.rpartition("</think>")[2].strip()):  # as templates write it
            place = text.find(form, start)
            if form and place >= 0:
                start = place + len(form)
                own[place:start] = b"\1" * len(form)
                break
    return own


def _texts(row: Row, writer: Writer, answer: Text) -> list[tuple[str, str]]:
    """The row's texts in order, each with what the template writes before it, as far as that is known.

    The template is asked with a mark in place of each text. Calls of tools are written in its own form.
    """
    if not writer.chat:
        return [("", text) for text in (str(row.prompt), row.steps or "", str(answer)) if text]
    turns = writer.answers(row)[row.completions.index(answer)]
    messages = writer.messages(row) if row.steps is not None else [*writer.messages(row), *turns]
    texts: list[str] = []
    marked: list[Message] = []
    for message in messages:
        found = [key for key in (*THOUGHTS, "content") if isinstance(message.get(key), str) and message[key].strip()]
        marked.append(message | {key: f"Aa{len(texts) + i}aA" for i, key in enumerate(found)})
        texts += [message[key] for key in found]
    try:
        frame = writer.render(marked, row.steps is not None, row.variables)
    except Rejected:  # it looks into the texts
        return [("", text) for text in texts]
    parts = re.split(r"Aa(\d+)aA", frame)
    placed = [(before, texts[int(index)]) for before, index in zip(parts[::2], parts[1::2], strict=False)]
    if row.steps is not None:
        placed += [(parts[-1], row.steps), ("", turns[0]["content"])]
    return placed


def _remark(row: Row) -> str:
    said = [] if row.labels is None else ["desirable" if row.labels[0] else "undesirable"]
    said += [] if row.scores is None else ["scores " + ", ".join(f"{score:g}" for score in row.scores)]
    said += [] if row.weight == 1 else [f"weight {row.weight:g}"]
    return ", ".join(said)
