"""The special tokens of a tokenizer, and those with which chat templates end an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignment.config.data import DataConfig
from alignment.data.conversations.writer import Writer
from alignment.data.rows.row import Message, Rejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of the tokens that are no text."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)


def ends_of_turn(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[int]:
    """The special tokens with which the chat templates of the data end an answer, each once."""
    found = (end_of_turn(tokenizer, part) for part in config.parts.values() or [config])
    return list(dict.fromkeys(end for end in found if end is not None))


def end_of_turn(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> int | None:
    """The same of one set of data; None where its template ends answers with none, and where there is no template."""
    return next(iter(turn_end(tokenizer, config)), None)


def turn_end(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> tuple[int, ...]:
    """All that the chat template writes after an answer, from its first special token on; empty where it has none."""
    mark = "Aa0aA"
    turns: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    if tokenizer.chat_template is None and config.chat_template is None:
        return ()
    try:
        tail = Writer(tokenizer, config).render(turns, False, {}).rpartition(mark)[2]
    except Rejected:  # a template that wants more than a question
        return ()
    special = special_ids(tokenizer)
    ids = tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
    return next((tuple(ids[place:]) for place, token in enumerate(ids) if token in special), ())
