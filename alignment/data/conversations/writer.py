"""Rows as text, written by the chat template; what the template does not write, and what the text should not hold."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from alignment.config.data import DataConfig, ScoredTurns, TemplateText
from alignment.data.conversations.dialect import Dialect
from alignment.data.conversations.markers import other_edge, other_format, turn_markers
from alignment.data.conversations.messages import TRAIN_KEYS, WRITTEN_MESSAGES, asking, learned
from alignment.data.conversations.rendering import ChatTemplate, dated
from alignment.data.conversations.texts import missing_text, plain_findings, repeats, texts_in, unwritten_thought
from alignment.data.conversations.trajectories import shared_turns
from alignment.data.conversations.turns import Rendered, Span, marked_spans
from alignment.data.rows.findings import Findings, Found
from alignment.data.rows.row import Message, Rejected, Row
from alignment.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OURS = {"conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"}
"""Arguments of the rendering that no data may set."""
TRUTH_VALUES = {"yes", "no", "on", "off", "y", "n", "true", "false"}
TOOL_RESULTS = "results of tools"
MEANINGFUL = {
    *("tools", "documents", "tool_calls", TOOL_RESULTS, "reasoning_content", "reasoning", "thinking", "name"),
    *("refusal", "images", "audio", "prefix", "mask", "masks", "loss_mask", "loss_weight", "trainable", "learn"),
}
"""Keys whose loss changes what a row says, or what of it is learnt: it is warned of."""
ROLE_NAME = re.compile(r"[\s#*]*(assistant|user|human|system|ai|bot|gpt|model)\s*(:|\n)", re.IGNORECASE)
TRIES = 256
"""Rows in which a key may show that the template reads it."""


@dataclass(slots=True)
class _Use:
    """Rows with a key, and whether the text of one changes without it."""

    rows: int = 0
    read: bool = False
    last: Row | None = None

    def count(self, row: Row) -> None:
        self.rows += row is not self.last
        self.last = row


@dataclass(frozen=True, slots=True)
class WriterState:
    """What a writer knows of the template from the rows before: whether it reads a key, where that is known."""

    reads: dict[str, bool]
    headers_seen: int


@dataclass(frozen=True, slots=True)
class WriterNotes:
    """What a writer in another process has found in some rows: how many have a key, and the findings."""

    rows: dict[str, int]
    findings: tuple[Counter[str], dict[str, tuple[str, str]]]


@dataclass(slots=True)
class Writer:
    """Writes rows as text, and notes what is wrong with them.

    Args:
        supervised: for SFT, which reads the keys of messages that say what to learn.
        day: the date that a template is told; None: today.

    Attributes:
        template: that of the settings, or else the tokenizer's; None: rows are written as plain text.

    Raises:
        UserError: settings that the tokenizer cannot follow.
    """

    tokenizer: PreTrainedTokenizerBase
    config: DataConfig
    supervised: bool = False
    day: datetime.date | None = None
    findings: Findings = field(init=False)
    template: str | None = field(init=False, default=None)
    _renderer: ChatTemplate = field(init=False)
    _uses: dict[str, _Use] = field(init=False, default_factory=dict)
    _markers: list[str] = field(init=False, default_factory=list)
    _special: re.Pattern[str] | None = field(init=False, default=None)
    _headers_seen: int = field(init=False, default=0)
    _dialect: Dialect = field(init=False)
    _state: WriterState = field(init=False, default=WriterState({}, 0))

    def __post_init__(self) -> None:
        tokenizer, config = self.tokenizer, self.config
        taken = sorted(OURS & config.template_kwargs.keys())
        if taken:
            raise UserError(f"data.template_kwargs cannot set {', '.join(taken)}, only variables of the chat template.")
        for key, value in config.template_kwargs.items():
            # A mapping on the command line reads `no` as text, and any text switches a template's thinking on.
            if "thinking" in key and isinstance(value, str) and value.lower() in TRUTH_VALUES:
                raise UserError(f"data.template_kwargs.{key} must be true or false, not the text '{value}'.")
        self.findings = Findings("sft.data.allow" if self.supervised else "data.allow", config.allow)
        own = config.chat_template
        assert own is None or isinstance(own, TemplateText), "the settings name a template that nobody has read"
        text = tokenizer.chat_template if own is None else own
        if config.system is not None and text is None:
            raise UserError("data.system needs a tokenizer with a chat template: set model.chat_template.")
        if text is not None:
            self.template = str(text) if self.day is None else dated(str(text), self.day)
            self._renderer = ChatTemplate(tokenizer, self.template)
            special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
            special |= set(tokenizer.all_special_tokens)
            longest_first = sorted(special, key=len, reverse=True)
            self._special = re.compile("|".join(map(re.escape, longest_first))) if special else None
            self._markers = turn_markers(lambda messages: self.render(messages, False, {}), self._special)
            self._dialect = Dialect.of(self.template, lambda messages: self.render(messages, False, {}))

    @property
    def chat(self) -> bool:
        """Whether rows are written by a chat template, not as plain text."""
        return self.template is not None

    # Text

    def messages(self, row: Row) -> list[Message]:
        """The row's prompt as messages; if it has no system message, with that of the settings."""
        asked = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        prompt = self._dialect.write(self._dialogue(row) or asked)
        if self.config.system is not None and prompt[0]["role"] not in ("system", "developer"):
            return [{"role": "system", "content": self.config.system}, *prompt]
        return prompt

    def answers(self, row: Row) -> list[list[Message]]:
        """The turns of each completion."""
        in_dialogue = self._dialogue(row) is not None
        return [
            [{"role": "assistant", "content": answer.strip() if in_dialogue else answer}]
            if isinstance(answer, str)
            else self._dialect.write(answer)
            for answer in row.completions
        ]

    @staticmethod
    def _dialogue(row: Row) -> list[Message] | None:
        """The messages of a prompt that is a dialogue in one text."""
        return asking(row.prompt) if isinstance(row.prompt, str) else None

    def render(
        self, messages: list[Message], generation: bool, variables: Mapping[str, Any], without: str | None = None
    ) -> str:
        """The chat template's text; with the row's own variables, and without one of the settings if it is named."""
        given = {k: v for k, v in self.config.template_kwargs.items() if k != without} | dict(variables)
        taken = sorted(OURS & given.keys())
        if taken:
            raise Rejected("bad_variables", f"its variables of the chat template cannot set {', '.join(taken)}")
        try:
            return self._renderer.write(messages, generation, given)
        except TemplateError as error:
            hint = ""
            if messages[0]["role"] == "system" and self.config.system == messages[0]["content"]:
                hint = " (data.system=null leaves the system text of the settings out)"
            raise Rejected("template_error", f"the chat template refuses it: {str(error).rstrip('.')}{hint}") from None
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise Rejected("template_error", f"the chat template cannot write it: {str(error).rstrip('.')}") from None

    def plain(self, row: Row) -> bool:
        """Whether the row is written as plain text."""
        if not self.chat and not isinstance(row.prompt, str):
            raise UserError(
                f"Row {row.source} is a conversation, and the tokenizer has no chat template: set model.chat_template."
            )
        return not self.chat

    def group_texts(
        self, row: Row, answer_start: Callable[[str, str], int]
    ) -> tuple[str, list[str], list[list[Span] | None]]:
        """The prompt as for a generation, prompt plus completion for each completion, and what of these is scored.

        That is a whole completion (None), or spans of characters as `Rendered.scored` gives them.
        """
        everything: list[list[Span] | None] = [None] * len(row.completions)
        if (missing := missing_text(row)) is not None:
            self.findings.note("missing_texts", row, missing)
        if self.plain(row):
            self._inspect_plain(row)
            prompt = f"{row.prompt}{row.steps or ''}"
            return prompt, [f"{prompt}{completion}" for completion in row.completions], everything
        messages, answers = self.messages(row), self.answers(row)
        prompt = self.render(messages, True, row.variables)
        if row.steps is not None:
            prompt += row.steps
            self._inspect(row, messages, prompt, [], [prompt])
            return prompt, [prompt + answer[0]["content"] for answer in answers], everything
        wholes = [self._rendered([*messages, *answer], row, answer_start) for answer in answers]
        for whole in wholes:
            whole.require_prompt(len(messages), prompt)
        self._inspect(row, messages, prompt, answers, [whole.text for whole in wholes])
        first = len(messages)
        own = first + shared_turns(answers)
        spans = []
        for whole in wholes:
            if not (wanted := self._learned(whole.messages, own)):
                raise Rejected("nothing_to_learn", "its messages say that no turn of an answer is to be learnt")
            spans.append(None if len(whole.messages) == first + 1 else whole.scored(first, wanted))
        return prompt, [whole.text for whole in wholes], spans

    def spans(self, row: Row, answer_start: Callable[[str, str], int]) -> tuple[str, list[Span], bool]:
        """The whole text, the character spans of the scored answers, and whether only the last answer is scored.

        An answer is scored unless it is empty, or a key of its message says that it is not to be learnt.
        """
        if (missing := missing_text(row)) is not None:
            self.findings.note("missing_texts", row, missing)
        if self.plain(row):
            self._inspect_plain(row)
            text = f"{row.prompt}{row.completions[0]}"
            return text, [(len(row.prompt), len(text))], False
        whole = self._rendered([*self.messages(row), *self.answers(row)[0]], row, answer_start)
        *prompt, answer = whole.messages
        for_generation = self.render(prompt, True, row.variables)
        whole.require_prompt(len(prompt), for_generation)
        self._inspect(row, prompt, for_generation, [[answer]], [whole.text])
        last = whole.last(for_generation)
        if any(message["role"] == "assistant" and _is_empty(message) for message in prompt):
            self.findings.note("empty_turns", row)
        spans = []
        for index in self._learned(whole.messages, 0):
            span = last if index == len(prompt) else whole.turn(index)
            if span is None and learned(answer):
                return whole.text, [last], True
            if span is None:
                raise Rejected(
                    "template_not_prefix",
                    "only earlier answers are to be learnt, and the chat template writes them differently once more "
                    "turns follow",
                )
            spans.append(span)
        if not spans:
            raise Rejected("nothing_to_learn", "its messages say that none of its answers is to be learnt")
        return whole.text, spans, False

    def _learned(self, messages: list[Message], first: int) -> list[int]:
        """Which of the messages from the first on are answers to be scored, in order."""
        last = len(messages) - 1
        if self.config.score is ScoredTurns.last:
            first = last
        return [
            i
            for i in range(first, len(messages))
            if messages[i]["role"] == "assistant" and learned(messages[i]) and (i == last or not _is_empty(messages[i]))
        ]

    def _rendered(self, messages: list[Message], row: Row, answer_start: Callable[[str, str], int]) -> Rendered:
        template = self.template or ""
        variables = self.config.template_kwargs | row.variables
        return Rendered(
            messages,
            self.render(messages, False, row.variables),
            partial(self.render, variables=row.variables),
            lambda some: marked_spans(self.tokenizer, template, some, **variables),
            answer_start,
            self._special,
        )

    # What is wrong with it

    def _inspect(
        self,
        row: Row,
        prompt: list[Message],
        for_generation: str,
        answers: Sequence[list[Message]],
        wholes: Sequence[str],
    ) -> None:
        """Note what the row's text should not hold, and what of the row the template has not written."""
        for message in (*prompt, *(message for answer in answers for message in answer)):
            self._inspect_text(row, message["content"], f"a turn of {message['role']}")
            if WRITTEN_MESSAGES.match(message["content"]):
                self.findings.note("message_lists", row)
        question = prompt[-1]["content"].strip()
        for answer, whole in zip(answers, wholes, strict=False):
            texts = [message["content"].strip() for message in answer if message["role"] == "assistant"]
            for text in filter(ROLE_NAME.match, texts):
                self.findings.note("role_names", row, f"'{text[:30]}'")
            if repeats(texts[0], question):
                self.findings.note("repeated_prompts", row)
            self._inspect_written(row, [*prompt, *answer], whole)
            if self._headers_seen < TRIES and texts[-1]:
                self._headers_seen += 1
                before = [*prompt, *answer[:-1]]
                asked = for_generation if len(answer) == 1 else self.render(before, True, row.variables)
                bare = {key: answer[-1][key] for key in ("role", "content")}  # a thought would stand before the text
                alone = whole if answer[-1] == bare else self.render([*before, bare], False, row.variables)
                header = alone[len(asked) : max(alone.rfind(texts[-1]), 0)].strip()
                if header and alone.startswith(asked) and asked == self.render(before, False, row.variables):
                    self.findings.note("generation_prompt", row, f"'{header[:40]}'")
            if any(_is_empty(message) for message in answer if message["role"] == "assistant"):
                self.findings.note("empty_turns", row)
        if not answers:
            self._inspect_written(row, prompt, wholes[0])
        for key in self.config.template_kwargs:
            use = self._uses.setdefault(f"data.template_kwargs.{key}", _Use())
            use.count(row)
            if not use.read and use.rows <= TRIES:  # some say how a generation begins, some how an answer is written
                use.read = any(
                    self.render(messages, generation, row.variables)
                    != self.render(messages, generation, row.variables, without=key)
                    for messages, generation in ((prompt, True), ([*prompt, *(answers or [[]])[0]], False))
                )

    def _inspect_text(self, row: Row, text: str, place: str) -> None:
        marker = next((marker for marker in self._markers if marker in text), None) or other_format(text)
        if marker is None and self._special is not None and (token := self._special.search(text)):
            self.findings.note("special_tokens", row, f"{token[0]} in {place}")
        elif (marker := marker or other_edge(text)) is not None:
            self.findings.note("formatted", row, f"'{marker.strip()[:40]}' in {place}")

    def _inspect_written(self, row: Row, messages: list[Message], whole: str) -> None:
        """Every text in the order of the messages, and every other key of a message and variable of the row."""
        start = 0
        for message in messages:
            if message["role"] == "tool":  # templates write results in forms of their own
                others = [m | {"content": ""} if m["role"] == "tool" else m for m in messages]
                if not self._reads(row, TOOL_RESULTS, whole, others, row.variables):
                    self.findings.note("unwritten", row, "the result of a tool")
                continue
            if message is messages[-1] and (thought := unwritten_thought(message, whole)) is not None:
                self.findings.note("unwritten", row, f"the thought of an answer: '{thought[:40]}'")
            text = message["content"].strip()
            if message["role"] == "assistant":  # earlier thoughts are left out
                text = text.rpartition("</think>")[2].strip()
            place = whole.find(text, start)
            if place < 0:
                self.findings.note("unwritten", row, f"a turn of {message['role']}: '{text[:40]}'")
                break
            start = place + len(text)
        for key in dict.fromkeys(key for message in messages for key in message):  # in order, as the log names them
            if key in ("role", "content", *TRAIN_KEYS):
                continue
            bare = [{name: value for name, value in message.items() if name != key} for message in messages]
            if self._reads(row, key, whole, bare, row.variables):
                for text in texts_in([message.get(key) for message in messages]):
                    self._inspect_text(row, text, f"{key} of a turn")
            elif key == "tool_calls":
                self.findings.note("unwritten", row, "the tool calls of an answer")
        for key, value in row.variables.items():
            if self._reads(row, key, whole, messages, {k: v for k, v in row.variables.items() if k != key}):
                for text in texts_in(value):
                    self._inspect_text(row, text, key)

    def _reads(self, row: Row, key: str, whole: str, messages: list[Message], variables: Mapping[str, Any]) -> bool:
        """Whether the template reads a key, as far as is known: some row is written differently without it."""
        use = self._uses.setdefault(key, _Use())
        use.count(row)
        if not use.read and use.rows <= TRIES:
            try:
                use.read = self.render(messages, False, variables) != whole
                if not use.read and len(variables) < len(row.variables):  # some say only how a generation begins
                    before = messages[:-1] or messages
                    use.read = self.render(before, True, variables) != self.render(before, True, row.variables)
            except Rejected:  # it cannot do without
                use.read = True
        return use.read

    def _inspect_plain(self, row: Row) -> None:
        """Note what is wrong with a row of plain texts, and its variables, which nothing reads."""
        for kind, detail in plain_findings(row, self.tokenizer.eos_token):
            self.findings.note(kind, row, detail)
        for name in row.variables:
            self._uses.setdefault(name, _Use()).count(row)

    def settle(self, rows: int) -> list[Found]:
        """What was found in the rows, and what of them nothing reads.

        Raises:
            UserError: something that would spoil the training.
        """
        found = self.findings.settle(rows)
        reader = "the chat template" if self.chat else "plain text"
        for key, use in self._uses.items():
            if not use.read:
                quiet = key not in MEANINGFUL
                text = f"have {key}, and {reader} has no place for it: it is not read"
                found.append(Found(f"unread: {key}", use.rows, rows, text, quiet))
        return found

    # In several processes

    def state(self) -> WriterState:
        """What is known up to now, for a writer of later rows in another process."""
        known = {key: use.read for key, use in self._uses.items() if use.read or use.rows >= TRIES}
        return WriterState(known, self._headers_seen)

    def begin(self, state: WriterState) -> None:
        """Forget the rows before, but for what they have shown."""
        self._uses = {key: _Use(TRIES, read) for key, read in state.reads.items()}
        self._headers_seen = state.headers_seen
        self._state = state
        self.findings.take()

    def notes(self) -> WriterNotes | None:
        """What the rows since `begin` add; None where it depends on rows before in a way that `state` did not say."""
        known = self._state.reads
        if self._headers_seen != self._state.headers_seen or (self.chat and not self._uses.keys() <= known.keys()):
            return None
        rows = {key: use.rows - (TRIES if key in known else 0) for key, use in self._uses.items()}
        return WriterNotes(rows, self.findings.take())

    def add(self, notes: WriterNotes) -> None:
        """Add what the next rows have shown in another process."""
        for key, rows in notes.rows.items():
            self._uses.setdefault(key, _Use()).rows += rows
        self.findings.add(*notes.findings)

    # In a process that goes on where another was killed

    def memory(self) -> dict[str, Any]:
        """All that is known of the rows up to now, in JSON."""
        uses = {key: (use.rows, use.read) for key, use in self._uses.items()}
        return {"uses": uses, "headers": self._headers_seen, "findings": self.findings.found()}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Know what `memory` returned."""
        self._uses = {key: _Use(*use) for key, use in memory["uses"].items()}
        self._headers_seen = memory["headers"]
        self.findings.add(*memory["findings"])


def _is_empty(message: Message) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")
