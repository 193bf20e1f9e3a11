"""Where the turns of a conversation stand in its text, as a chat template writes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from alignment.data.rows.row import Message, Rejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""The first character, and the one after the last."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A whole conversation that ends with the assistant, and its text.

    Attributes:
        render: the text of messages, and whether the header of an answer is to follow them.
        marks: the spans of messages' text that the template marks as the assistant's, one for each of its turns; None
            where it marks them otherwise or not at all.
        answer_start: where the answer begins in a text, given the prompt as for a generation and the text.
        special: the tokenizer's special tokens; None where it has none.
    """

    messages: list[Message]
    text: str
    render: Callable[[list[Message], bool], str]
    marks: Callable[[list[Message]], list[Span] | None]
    answer_start: Callable[[str, str], int]
    special: re.Pattern[str] | None

    def require_prompt(self, count: int, prompt: str) -> None:
        """Refuse a conversation whose first messages the template writes differently once an answer follows.

        For a generation, thinking templates may add something after the prompt that they leave out before a given
        answer. That is fine as long as the prompt's messages are written the same.

        Args:
            count: of the messages before the answer.
            prompt: their text as for a generation.
        """
        if not self.text.startswith(prompt) and not self.text.startswith(self.render(self.messages[:count], False)):
            raise Rejected(
                "template_not_prefix",
                "the chat template writes the prompt differently once an answer follows; data.template_kwargs or "
                "another model.chat_template (training: TRL's for this model) may help",
            )

    def last(self, prompt: str) -> Span:
        """Where the last answer stands; `prompt` is the text of all before it as for a generation."""
        self.require_prompt(len(self.messages) - 1, prompt)
        start = self.answer_start(prompt, self.text)
        if start == len(self.text):
            raise Rejected("no_completion_tokens", "the chat template leaves nothing of the completion")
        return start, len(self.text)

    def turn(self, index: int) -> Span | None:
        """Where an answer before the last stands, with its end-of-turn token if that is the one of a last answer.

        Harmony, gpt-oss's template, ends a last answer with <|return|> and an earlier one with <|end|>, with which the
        policy ends no answer: it is scored without that token.

        None where the template writes it, or what is before it, otherwise than at the end of a shorter conversation:
        the policy would not say it like this. A template that marks answers has another chance: the answer must be the
        same, and what is before it may differ.
        """
        # No prompt stands before a first turn: it is learnt from its text on.
        before = (
            self.render(self.messages[:index], True)
            if index
            else self.text[: self.text.find(self.messages[0]["content"].strip())]
        )
        after = self.render(self.messages[: index + 1], False)
        if self.text.startswith(before) and self.text.startswith(after) and len(before) < len(after):
            return len(before), len(after)
        ends = list(self.special.finditer(after)) if self.special is not None else []
        if self.special is not None and ends and ends[-1].end() == len(after):
            stop = ends[-1].start()
            is_same = self.text.startswith(before) and self.text.startswith(after[:stop]) and len(before) < stop
            if is_same and self.special.match(self.text, stop) is not None:
                return len(before), stop
        return self._marked_turn(index, before, after)

    def _marked_turn(self, index: int, before: str, after: str) -> Span | None:
        """The same by the template's marks; `before` and `after` are the texts before and with the answer."""
        here, there = self.marks(self.messages), self.marks(self.messages[: index + 1])
        if here is None or there is None:
            return None
        (start, stop), (last_start, _) = here[len(there) - 1], there[-1]
        # What follows, as the end of a turn outside of the marks; some templates close a whole conversation besides.
        answer, rest = self.text[start:stop], after[last_start + stop - start :]
        if not after.startswith(answer, last_start):
            return None
        if self.text.startswith(rest, stop):
            stop += len(rest)
        elif not self.text.endswith(rest):
            return None
        header = max(0, self.answer_start(before, after) - last_start)
        return start + header, stop

    def scored(self, first: int, wanted: Sequence[int]) -> list[Span]:
        """Where the wanted turns of a completion stand that begins with message `first`.

        The first of them begins at 0 if the completion does: then all that follows the prompt's tokens is scored.
        """
        spans = []
        for index in wanted:
            if index == len(self.messages) - 1:
                span: Span | None = self.last(self.render(self.messages[:-1], True))
            else:
                span = self.turn(index)
            if span is None:
                raise Rejected(
                    "template_not_prefix",
                    "the chat template writes an answer differently once more turns follow: set data.score=last to "
                    "score last answers alone, or another model.chat_template (training: TRL's for this model)",
                )
            spans.append((0 if index == first else span[0], span[1]))
        return spans


def marked_spans(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[Message], **variables: Any
) -> list[Span] | None:
    """What a template puts between `{% generation %}` and `{% endgeneration %}`, as `Rendered.marks`."""
    if _GENERATION.search(template) is None:
        return None
    try:
        encoded = cast(
            Any,
            tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"return_offsets_mapping": True},
                **variables,
            ),
        )
    except (TypeError, ValueError, KeyError, NotImplementedError):  # a tokenizer that cannot tell
        return None
    spans: list[Span] = []
    inside = False
    for (start, stop), marked in zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True):
        if marked:
            spans = [*spans[:-1], (spans[-1][0], stop)] if inside else [*spans, (start, stop)]
        inside = bool(marked)
    answers = sum(message["role"] == "assistant" for message in messages)
    return spans if len(spans) == answers else None
