"""From rows to tokens: where the prompt ends, what is scored, what is cut.

Prompt and completion are rendered and tokenised together, because tokens may merge where they meet, and are split
afterwards. Nothing here looks for padding or end tokens by id to mask them: lengths say what is scored.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jinja2 import TemplateError

from alignment.config.schema import DataConfig, Keep
from alignment.data.reasons import UnusableRows
from alignment.data.rows import BadRow, Message, Rejected, Row
from alignment.errors import UserError
from alignment.types import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_CALL = 1024
"""Rows per tokenizer call: enough for its threads, few enough that its encodings stay small."""

GROUP_COUNTS = (
    *("truncated_prompts", "truncated_completions", "duplicate_completions"),
    *("seam_moves", "template_splits", "eos_appended"),
)


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """Groups, their rows in the same order, and what was left out.

    Attributes:
        rows: as they were read; a list's row still has the duplicates that its group lacks.
        drops: rows left out: template_error, template_not_prefix, no_prompt_tokens, no_completion_tokens,
            identical_after_tokenising.
        counts: groups; truncated_prompts and truncated_completions; duplicate_completions (left out of lists, which
            keep the better-placed one); seam_moves (tokens merged where prompt and completion meet, so the completion
            begins a few characters early); template_splits (after the prompt, the template writes one thing before an
            answer and another for a generation); eos_appended (by us).
    """

    groups: list[Group]
    rows: list[Row]
    drops: list[BadRow]
    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class TokenizedSFT:
    """SFT sequences {"input_ids", "completion_mask"} (1: scored), their rows, and what was left out.

    Attributes:
        drops: rows left out: template_error, template_not_prefix, no_completion_tokens, completion_truncated_away.
        counts: sequences; truncated; eos_appended; last_turn_only (conversations of which only the last answer is
            scored, because the template writes earlier ones differently once more turns follow).
    """

    sequences: list[dict[str, list[int]]]
    rows: list[Row]
    drops: list[BadRow]
    counts: dict[str, int]


def tokenize_groups(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    day: datetime.date | None = None,
) -> TokenizedData:
    """Groups of token ids: one prompt and its completions.

    The prompt's tokens are the longest common prefix of the rendered prompt and of prompt plus completion, for all
    completions. The prompt is cut to `max_prompt_length` and keeps the end that `truncate_prompt` names (and its BOS).
    Then each completion is cut at its end to fit `max_length`; at least one token is left, because
    `max_prompt_length < max_length`. A cut completion has no EOS.

    A completion ends with its end-of-turn token, which is added if it is missing. What a template writes after it, like
    the line break of ChatML, is never generated and the same for every answer, so it is not scored. If a row has
    `steps`, they end its prompt, and a completion is one more step as written, without a token to end it.

    With a chat template, only the template adds a BOS; plain text gets the BOS that the tokenizer adds.

    Args:
        day: the date that a template writes; None for today's.

    Raises:
        UserError: messages without a chat template, text without an EOS token, or no row is left.
    """
    writer = _Writer(tokenizer, config, day)
    groups: list[Group] = []
    kept: list[Row] = []
    drops: list[BadRow] = []
    counts = Counter(dict.fromkeys(GROUP_COUNTS, 0))
    for batch in _batches(rows):
        drafts = []
        for row in batch:
            try:
                drafts.append((row, *writer.group_texts(row)))
            except Rejected as rejected:
                drops.append(BadRow.of(row, rejected.reason, str(rejected)))
        ids = iter(writer.encode([text for _, prompt, wholes in drafts for text in (prompt, *wholes)]))
        for row, prompt, wholes in drafts:
            rendered = next(ids)
            try:
                group, notes = _group(row, rendered, list(islice(ids, len(wholes))), writer, config)
            except Rejected as rejected:
                drops.append(BadRow.of(row, rejected.reason, str(rejected)))
                continue
            if not all(whole.startswith(prompt) for whole in wholes):
                notes |= {"template_splits": 1, "seam_moves": 0}
            counts.update(notes)
            groups.append(group)
            kept.append(row)
    _require_some(rows, groups, drops)
    return TokenizedData(groups, kept, drops, {"groups": len(groups), **counts})


def _group(
    row: Row, rendered: np.ndarray, wholes: list[np.ndarray], writer: _Writer, config: DataConfig
) -> tuple[Group, dict[str, int]]:
    boundary = min(_common_prefix(rendered, whole) for whole in wholes)
    if boundary == 0:
        raise Rejected("no_prompt_tokens", "no token of the prompt is left before the completions")
    prompt = _truncate_prompt(rendered[:boundary], config, writer.tokenizer.bos_token_id)
    room = config.max_length - len(prompt)
    notes = {"seam_moves": int(boundary < len(rendered)), "truncated_prompts": int(len(prompt) < boundary)}
    notes |= {"truncated_completions": 0, "eos_appended": 0}
    completions = []
    for whole in wholes:
        completion, appended = (whole[boundary:], 0) if row.steps is not None else writer.ended(whole[boundary:])
        if len(completion) == appended:
            raise Rejected("no_completion_tokens", "the chat template leaves nothing of the completion")
        notes["eos_appended"] += appended * writer.chat
        notes["truncated_completions"] += len(completion) > room
        completions.append(completion[:room])
    first = {completion.tobytes(): k for k, completion in reversed(list(enumerate(completions)))}
    if len(first) < min(2, len(completions)):
        raise Rejected("identical_after_tokenising", f"the completions agree in their first {room} tokens")
    notes["duplicate_completions"] = len(completions) - len(first)
    kept = sorted(first.values())
    scores = None if row.scores is None else tuple(row.scores[k] for k in kept)
    return Group(prompt, tuple(completions[k] for k in kept), row.labels, scores, row.weight, row.source), notes


def tokenize_sft(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    day: datetime.date | None = None,
) -> TokenizedSFT:
    """Whole conversations with the assistant's tokens marked, each answer with its end-of-turn token.

    Every assistant turn is scored if the template only appends as a conversation grows, otherwise only the last one.
    A token across the beginning of an answer counts as the answer's. The first `max_length` tokens are kept.

    Args:
        day: the date that a template writes; None for today's.

    Raises:
        UserError: messages without a chat template, text without an EOS token, or no row is left.
    """
    writer = _Writer(tokenizer, config, day)
    sequences: list[dict[str, list[int]]] = []
    kept: list[Row] = []
    drops: list[BadRow] = []
    counts: Counter[str] = Counter({"last_turn_only": 0, "truncated": 0, "eos_appended": 0})
    for batch in _batches(rows):
        drafts = []
        for row in batch:
            try:
                drafts.append((row, *writer.spans(row)))
            except Rejected as rejected:
                drops.append(BadRow.of(row, rejected.reason, str(rejected)))
        encoded = writer.encode_with_offsets([text for _, text, _, _ in drafts])
        for (row, _, spans, last_only), (ids, offsets) in zip(drafts, encoded, strict=True):
            ids, mask, appended = _scored(ids, offsets, spans, writer)
            truncated = len(ids) > config.max_length
            ids, mask = ids[: config.max_length], mask[: config.max_length]
            if not mask.any():
                message = f"the first {config.max_length} tokens hold no answer"
                drops.append(BadRow.of(row, "completion_truncated_away", message))
                continue
            counts.update(last_turn_only=last_only, truncated=truncated, eos_appended=appended * writer.chat)
            sequences.append({"input_ids": ids.tolist(), "completion_mask": mask.tolist()})
            kept.append(row)
    _require_some(rows, sequences, drops)
    return TokenizedSFT(sequences, kept, drops, {"sequences": len(sequences), **counts})


def _scored(
    ids: np.ndarray, offsets: np.ndarray, spans: list[tuple[int, int]], writer: _Writer
) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids up to the end of the last answer, their 0/1 mask, and how many EOS were appended."""
    mask = np.zeros(len(ids), dtype=np.int64)
    appended = 0
    for start, stop in spans:
        (inside,) = np.nonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
        first, last = inside[0], inside[-1] + 1
        answer, appended = writer.ended(ids[first:last])
        mask[first : first + len(answer) - appended] = 1
    ids = np.concatenate([ids[:first], answer])  # a missing end of turn is added to the last answer only
    mask = np.concatenate([mask, np.ones(appended, dtype=np.int64)])[: len(ids)]
    mask[0] = 0  # nothing predicts the first token
    return ids, mask, appended


@dataclass(slots=True)
class _Writer:
    """Writes rows as text and tokenises them, by the tokenizer and the settings."""

    tokenizer: PreTrainedTokenizerBase
    config: DataConfig
    day: datetime.date | None
    chat: bool = field(init=False)
    bos: list[int] = field(init=False)
    special: set[int] = field(init=False)
    blank: dict[int, bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        tokenizer, kwargs = self.tokenizer, self.config.template_kwargs
        taken = sorted({"conversation", "chat_template", "tokenize", "add_generation_prompt"} & kwargs.keys())
        if taken:
            raise UserError(f"data.template_kwargs cannot set {', '.join(taken)}, only variables of the chat template.")
        self.chat = tokenizer.chat_template is not None
        if self.config.system is not None and not self.chat:
            raise UserError("data.system needs a tokenizer with a chat template: set model.chat_template.")
        added = tokenizer("a", verbose=False)["input_ids"][:1]
        self.bos = added if not self.chat and added == [tokenizer.bos_token_id] else []
        marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = marked | set(tokenizer.all_special_ids)

    def messages(self, row: Row) -> list[Message]:
        """The row's prompt as messages; if it has no system message, with that of the settings."""
        prompt = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        if self.config.system is not None and prompt[0]["role"] != "system":
            return [{"role": "system", "content": self.config.system}, *prompt]
        return prompt

    def render(self, messages: list[Message], generation: bool) -> str:
        """The chat template's text."""
        kwargs: dict[str, Any] = self.config.template_kwargs
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **kwargs
            )
            return cast(str, text)
        except TemplateError as error:
            raise Rejected("template_error", f"the chat template refuses it: {error}") from None

    def plain(self, row: Row) -> bool:
        """Whether the row is written as plain text."""
        if not self.chat and not isinstance(row.prompt, str):
            raise UserError(
                f"Row {row.source} is a conversation, and the tokenizer has no chat template: set model.chat_template."
            )
        return not self.chat

    def group_texts(self, row: Row) -> tuple[str, list[str]]:
        """The prompt as for a generation, and prompt plus completion for each completion."""
        if row.steps is not None:
            prompt = (str(row.prompt) if self.plain(row) else self.render(self.messages(row), True)) + row.steps
            return prompt, [prompt + _answer(completion)[0]["content"] for completion in row.completions]
        if self.plain(row):
            return str(row.prompt), [f"{row.prompt}{completion}" for completion in row.completions]
        messages = self.messages(row)
        prompt = self.render(messages, True)
        wholes = [self.render([*messages, *_answer(completion)], False) for completion in row.completions]
        for whole in wholes:
            self.require_same_prompt(messages, prompt, whole)
        return prompt, wholes

    def require_same_prompt(self, messages: list[Message], prompt: str, whole: str) -> None:
        """Refuse a row whose prompt the template writes differently once an answer follows.

        For a generation, thinking templates may add something after the prompt that they leave out before a given
        answer. That is fine as long as the prompt's messages are written the same.
        """
        if not whole.startswith(prompt) and not whole.startswith(self.render(messages, False)):
            raise Rejected(
                "template_not_prefix",
                "the chat template writes the prompt differently once an answer follows; data.template_kwargs may help",
            )

    def answer_start(self, prompt: str, whole: str) -> int:
        """Where the answer begins in `whole`, in characters: after `prompt`, or after the tokens that both share."""
        if whole.startswith(prompt):
            return len(prompt)
        (rendered, _), (ids, offsets) = self.encode_with_offsets([prompt, whole])
        shared = _common_prefix(rendered, ids)
        return int(offsets[shared, 0]) if shared < len(ids) else len(whole)

    def spans(self, row: Row) -> tuple[str, list[tuple[int, int]], bool]:
        """The whole text, the character spans of the scored answers, and whether only the last answer is scored."""
        if self.plain(row):
            text = f"{row.prompt}{row.completions[0]}"
            return text, [(len(row.prompt), len(text))], False
        prompt = self.messages(row)
        messages = [*prompt, *_answer(row.completions[0])]
        whole = self.render(messages, False)
        for_generation = self.render(prompt, True)
        self.require_same_prompt(prompt, for_generation, whole)
        last = (self.answer_start(for_generation, whole), len(whole))
        if last[0] == last[1]:
            raise Rejected("no_completion_tokens", "the chat template leaves nothing of the completion")
        spans = []
        for index in [i for i, message in enumerate(prompt) if message["role"] == "assistant"]:
            before, after = self.render(messages[:index], True), self.render(messages[: index + 1], False)
            if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
                return whole, [last], True
            spans.append((len(before), len(after)))
        return whole, [*spans, last], False

    def encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        """(tokens,) int32 per text, with a BOS if the text is plain and the tokenizer adds one."""
        for ids in self.call(texts)["input_ids"] if texts else ():
            yield np.array(self.with_bos(ids), dtype=np.int32)

    def encode_with_offsets(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same, each with the (tokens, 2) character spans of its tokens."""
        encoding = self.call(texts, return_offsets_mapping=True) if texts else {"input_ids": [], "offset_mapping": []}
        for ids, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            full = self.with_bos(ids)
            pad = [(0, 0)] * (len(full) - len(ids))
            yield np.array(full, dtype=np.int32), np.array([*pad, *offsets], dtype=np.int64)

    def call(self, texts: list[str], **kwargs: Any) -> Any:
        """One tokenizer call for many texts: no special tokens besides those in the text, no padding, no truncation."""
        kwargs |= {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return self.tokenizer(texts, add_special_tokens=False, **kwargs)

    def with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == self.bos else self.bos + ids

    def ended(self, answer: np.ndarray) -> tuple[np.ndarray, int]:
        """The answer up to its end-of-turn token, and 1 if that was missing and EOS was appended, else 0."""
        end = len(answer)
        while self.chat and end and self.is_blank(int(answer[end - 1])):
            end -= 1
        ends = self.special if self.chat else {self.tokenizer.eos_token_id}
        if end and int(answer[end - 1]) in ends:
            return answer[:end], 0
        if self.tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no EOS token, and its answers need one to end with.")
        return np.append(answer, np.int32(self.tokenizer.eos_token_id)), 1

    def is_blank(self, index: int) -> bool:
        """Whether a token is nothing but white space."""
        if index not in self.blank:
            self.blank[index] = index not in self.special and not cast(str, self.tokenizer.decode([index])).strip()
        return self.blank[index]


def _answer(completion: Any) -> list[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), ROWS_PER_CALL):
        yield rows[start : start + ROWS_PER_CALL]


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    (different,) = np.nonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _truncate_prompt(prompt: np.ndarray, config: DataConfig, bos: int | None) -> np.ndarray:
    if len(prompt) <= config.max_prompt_length:
        return prompt
    if config.truncate_prompt is Keep.start:
        return prompt[: config.max_prompt_length]
    kept = int(bos is not None and prompt[0] == bos)
    return np.concatenate([prompt[:kept], prompt[len(prompt) - config.max_prompt_length + kept :]])


def _require_some(rows: Sequence[Row], done: Sequence[Any], drops: list[BadRow]) -> None:
    if rows and not done:
        raise UnusableRows(f"None of the {len(rows)} rows can be tokenised", drops, "")
