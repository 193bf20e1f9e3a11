"""From rows to tokens: where the prompt ends, what is scored, what is cut.

Prompt and completion are rendered and tokenised together, because tokens may merge where they meet, and are split
afterwards. Nothing here looks for padding or end tokens by id to mask them: lengths say what is scored.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from alignment.config.data import DataConfig, Keep
from alignment.data.conversations.ends import special_ids
from alignment.data.conversations.turns import Span
from alignment.data.conversations.writer import Writer
from alignment.data.rows.findings import Found
from alignment.data.rows.row import BadRow, Rejected, Row
from alignment.data.rows.sequences import Picked
from alignment.data.tokens.batches import Batch, Tokenized, tokenize_rows
from alignment.data.tokens.encoding import BatchEncoder
from alignment.data.tokens.token_store import CONVERSATIONS, GROUPS, Conversation
from alignment.errors import UserError
from alignment.types import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUP_COUNTS = (
    *("truncated_prompts", "truncated_completions", "duplicate_completions"),
    *("seam_moves", "template_splits", "eos_appended", "several_turns"),
)
SFT_COUNTS = ("last_turn_only", "truncated", "eos_appended")


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """Groups, their rows in the same order, and what was left out.

    Attributes:
        rows: as they were read; a list's row still has the duplicates that its group lacks.
        drops: rows left out: template_error, template_not_prefix, no_prompt_tokens, no_completion_tokens,
            no_scored_tokens, nothing_to_learn, identical_after_tokenising.
        counts: groups; truncated_prompts and truncated_completions; duplicate_completions (left out of lists, which
            keep the better-placed one); seam_moves (tokens merged where prompt and completion meet, so the completion
            begins a few characters early); template_splits (after the prompt, the template writes one thing before an
            answer and another for a generation); eos_appended (by us); several_turns (completions with context between
            their scored turns).
        findings: what was found in the text of the rows, and which of their keys nothing reads.
        written: describes the files of the tokens, where they are in files.
    """

    groups: Sequence[Group]
    rows: Sequence[Row]
    drops: list[BadRow]
    counts: dict[str, int]
    findings: list[Found]
    written: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TokenizedSFT:
    """SFT sequences {"input_ids", "completion_mask"} (1: scored), their rows, and what was left out.

    Attributes:
        drops: rows left out: template_error, template_not_prefix, no_completion_tokens, completion_truncated_away.
        counts: sequences; truncated; eos_appended; last_turn_only (conversations of which only the last answer is
            scored, because the template writes earlier ones differently once more turns follow).
        findings: what was found in the text of the rows, and which of their keys nothing reads.
        written: describes the files of the tokens, where they are in files.
    """

    sequences: Sequence[Conversation]
    rows: Sequence[Row]
    drops: list[BadRow]
    counts: dict[str, int]
    findings: list[Found]
    written: dict[str, Any] | None = None


def tokenize_groups(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    day: datetime.date | None = None,
    folder: Path | None = None,
) -> TokenizedData:
    """Groups of token ids: one prompt and its completions.

    The prompt's tokens are the longest common prefix of the rendered prompt and of prompt plus completion, for all
    completions. The prompt is cut to `max_prompt_length` and keeps the end that `truncate_prompt` names (and its BOS).
    Then each completion is cut at its end to fit `max_length`; at least one token is left, because
    `max_prompt_length < max_length`. A cut completion has no EOS.

    A completion ends with its end-of-turn token, which is added if it is missing. What a template writes after it, like
    the line break of ChatML, is never generated and the same for every answer, so it is not scored. If a row has
    `steps`, they end its prompt, and a completion is one more step as written, without a token to end it.

    Of a completion with several turns the assistant's are scored, as `score` says; those of users and tools are
    context. It is cut behind its last scored token.

    With a chat template, only the template adds a BOS; plain text gets the BOS that the tokenizer adds.

    Args:
        day: the date that a template writes; None for today's.
        folder: for the tokens of many rows, which several processes make; None: they stay in memory.

    Raises:
        UserError: messages without a chat template, text without an EOS token, or no row is left.
    """
    found = tokenize_rows(rows, _GroupTokenizer(tokenizer, config, day), GROUPS, folder)
    counts = {"groups": len(found.items), **dict.fromkeys(GROUP_COUNTS, 0), **found.counts}
    return TokenizedData(found.items, _kept(rows, found), found.drops, counts, found.findings, found.written)


def tokenize_prompt(
    row: Row, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, day: datetime.date | None = None
) -> np.ndarray:
    """(tokens,) int32 of a row's prompt as for a generation, however long it is.

    Args:
        day: the date that a template writes; None for today's.

    Raises:
        Rejected: the chat template refuses it, or cannot write it.
        UserError: messages without a chat template.
    """
    writer = Writer(tokenizer, config, day=day)
    text = str(row.prompt) if writer.plain(row) else writer.render(writer.messages(row), True, row.variables)
    return next(_Encoder(tokenizer, writer.chat).encode([text]))


class _RowTokenizer:
    """What the makers of groups and of conversations have alike."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, writer: Writer) -> None:
        self.writer = writer
        self._encoder = _Encoder(tokenizer, writer.chat)

    def memory(self) -> dict[str, Any]:
        """What it remembers of the rows before, in JSON."""
        return {"writer": self.writer.memory(), "shares": self._encoder.batches.answer()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Remember what `memory` returned in another process."""
        self.writer.recall(memory["writer"])
        self._encoder.batches.take_answer(memory["shares"])


class _GroupTokenizer(_RowTokenizer):
    """Makes groups of rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, day: datetime.date | None) -> None:
        super().__init__(tokenizer, Writer(tokenizer, config, day=day))
        self._config = config

    def __call__(self, rows: Sequence[Row]) -> Batch[Group]:
        writer, encoder, done = self.writer, self._encoder, Batch[Group]()
        drafts = []
        for index, row in enumerate(rows):
            try:
                drafts.append((index, row, *writer.group_texts(row, encoder.answer_start)))
            except Rejected as rejected:
                done.drops.append(BadRow.of(row, rejected.reason, str(rejected)))
        ids = iter(encoder.encode([text for _, _, prompt, wholes, _ in drafts for text in (prompt, *wholes)]))
        texts = [(text, spans) for *_, wholes, turns in drafts for text, spans in zip(wholes, turns, strict=True)]
        offsets = encoder.encode_with_offsets([text for text, spans in texts if spans is not None])
        for index, row, prompt, wholes, turns in drafts:
            rendered, encoded = next(ids), list(islice(ids, len(wholes)))
            masks: list[np.ndarray | None] = [None] * len(wholes)
            for k, spans in enumerate(turns):
                if spans is not None:
                    encoded[k], places = next(offsets)
                    masks[k] = _answers(encoded[k], places, spans, encoder)[0]
            try:
                group, notes = _group(row, rendered, encoded, masks, encoder, self._config)
            except Rejected as rejected:
                done.drops.append(BadRow.of(row, rejected.reason, str(rejected)))
                continue
            if not all(whole.startswith(prompt) for whole in wholes):
                notes |= {"template_splits": 1, "seam_moves": 0}
            if _has_two_bos(rendered, encoder.tokenizer):
                writer.findings.note("double_bos", row)
            done.counts.update(notes)
            done.items.append(group)
            done.kept.append(index)
        return done


def _kept(rows: Sequence[Row], found: Tokenized[Any]) -> Sequence[Row]:
    """The rows of the items."""
    return Picked(rows, found.kept) if found.written is not None else [rows[index] for index in found.kept]


def _group(
    row: Row,
    rendered: np.ndarray,
    wholes: list[np.ndarray],
    masks: list[np.ndarray | None],
    encoder: _Encoder,
    config: DataConfig,
) -> tuple[Group, dict[str, int]]:
    boundary = min(_common_prefix(rendered, whole) for whole in wholes)
    if boundary == 0:
        raise Rejected("no_prompt_tokens", "no token of the prompt is left before the completions")
    prompt = _truncate_prompt(rendered[:boundary], config, encoder.tokenizer.bos_token_id)
    room = config.max_length - len(prompt)
    notes = {"seam_moves": int(boundary < len(rendered)), "truncated_prompts": int(len(prompt) < boundary)}
    notes |= {"truncated_completions": 0, "eos_appended": 0}
    completions: list[np.ndarray] = []
    scored: list[np.ndarray | None] = []  # None: all of it
    for whole, mask in zip(wholes, masks, strict=True):
        completion, appended = (whole[boundary:], 0) if row.steps is not None else encoder.ended(whole[boundary:])
        if len(completion) == appended:
            raise Rejected("no_completion_tokens", "the chat template leaves nothing of the completion")
        notes["eos_appended"] += appended * encoder.chat
        notes["truncated_completions"] += len(completion) > room
        if mask is None:
            completions.append(completion[:room])
            scored.append(None)
            continue
        # A missing end of turn belongs to the last turn.
        ones = np.append(mask[boundary : boundary + len(completion) - appended], mask[-1:].repeat(appended))[:room]
        if not ones.any():
            raise Rejected("no_scored_tokens", f"the first {config.max_length} tokens hold none of its scored turns")
        last = int(np.nonzero(ones)[0][-1]) + 1
        completions.append(completion[:last])
        scored.append(None if ones[:last].all() else ones[:last].astype(np.bool_))
    texts = [(c.tobytes(), None if m is None else m.tobytes()) for c, m in zip(completions, scored, strict=True)]
    first = {text: k for k, text in reversed(list(enumerate(texts)))}
    if len(first) < min(2, len(completions)):
        raise Rejected("identical_after_tokenising", f"the completions agree in their first {room} tokens")
    notes["duplicate_completions"] = len(completions) - len(first)
    kept = sorted(first.values())
    notes["several_turns"] = sum(scored[k] is not None for k in kept)
    group = Group(
        prompt,
        tuple(completions[k] for k in kept),
        labels=row.labels,
        scores=None if row.scores is None else tuple(row.scores[k] for k in kept),
        weight=row.weight,
        source=row.source,
        scored=_masks(completions, scored, kept) if notes["several_turns"] else None,
    )
    return group, notes


def _masks(completions: list[np.ndarray], scored: list[np.ndarray | None], kept: list[int]) -> tuple[np.ndarray, ...]:
    found = ((completions[k], scored[k]) for k in kept)
    return tuple(np.ones(len(tokens), dtype=np.bool_) if mask is None else mask for tokens, mask in found)


def tokenize_sft(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    day: datetime.date | None = None,
    folder: Path | None = None,
) -> TokenizedSFT:
    """Whole conversations with the assistant's tokens marked, each answer with its end-of-turn token.

    Every assistant turn is scored if the template only appends as a conversation grows, otherwise only the last one.
    A token across the beginning of an answer counts as the answer's. The first `max_length` tokens are kept.

    Args:
        day: the date that a template writes; None for today's.
        folder: for the tokens of many rows, which several processes make; None: they stay in memory.

    Raises:
        UserError: messages without a chat template, text without an EOS token, or no row is left.
    """
    found = tokenize_rows(rows, _ConversationTokenizer(tokenizer, config, day), CONVERSATIONS, folder)
    counts = {"sequences": len(found.items), **dict.fromkeys(SFT_COUNTS, 0), **found.counts}
    return TokenizedSFT(found.items, _kept(rows, found), found.drops, counts, found.findings, found.written)


class _ConversationTokenizer(_RowTokenizer):
    """Makes SFT sequences of rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, day: datetime.date | None) -> None:
        super().__init__(tokenizer, Writer(tokenizer, config, supervised=True, day=day))
        self._max_length = config.max_length

    def __call__(self, rows: Sequence[Row]) -> Batch[Conversation]:
        writer, encoder, done = self.writer, self._encoder, Batch[Conversation]()
        drafts = []
        for index, row in enumerate(rows):
            try:
                drafts.append((index, row, *writer.spans(row, encoder.answer_start)))
            except Rejected as rejected:
                done.drops.append(BadRow.of(row, rejected.reason, str(rejected)))
        encoded = encoder.encode_with_offsets([text for _, _, text, _, _ in drafts])
        for (index, row, _, spans, last_only), (ids, offsets) in zip(drafts, encoded, strict=True):
            ids, mask, appended = _scored(ids, offsets, spans, encoder)
            truncated = len(ids) > self._max_length
            ids, mask = ids[: self._max_length], mask[: self._max_length]
            if not mask.any():
                message = f"the first {self._max_length} tokens hold no answer"
                done.drops.append(BadRow.of(row, "completion_truncated_away", message))
                continue
            done.counts.update(last_turn_only=last_only, truncated=truncated, eos_appended=appended * writer.chat)
            if _has_two_bos(ids, encoder.tokenizer):
                writer.findings.note("double_bos", row)
            done.items.append({"input_ids": ids.tolist(), "completion_mask": mask.tolist()})
            done.kept.append(index)
        return done


def _scored(
    ids: np.ndarray, offsets: np.ndarray, spans: list[Span], encoder: _Encoder
) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids up to the end of the last answer, their 0/1 mask, and how many EOS were appended."""
    mask, first, (answer, appended) = _answers(ids, offsets, spans, encoder)
    ids = np.concatenate([ids[:first], answer])  # a missing end of turn is added to the last answer only
    mask = np.concatenate([mask, np.ones(appended, dtype=np.int64)])[: len(ids)]
    mask[0] = 0  # nothing predicts the first token
    return ids, mask, appended


def _answers(
    ids: np.ndarray, offsets: np.ndarray, spans: list[Span], encoder: _Encoder
) -> tuple[np.ndarray, int, tuple[np.ndarray, int]]:
    """The 0/1 mask of the answers in these spans, each to its end-of-turn token, and the last of them, as it ends."""
    mask = np.zeros(len(ids), dtype=np.int64)
    for start, stop in spans:
        (inside,) = np.nonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
        first, last = int(inside[0]), inside[-1] + 1
        answer, appended = encoder.ended(ids[first:last])
        mask[first : first + len(answer) - appended] = 1
    return mask, first, (answer, appended)


@dataclass(slots=True)
class _Encoder:
    """Tokenises the text of a writer, and knows how an answer ends."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    bos: list[int] = field(init=False)
    special: set[int] = field(init=False)
    batches: BatchEncoder = field(init=False)
    blank: dict[int, bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        added = self.tokenizer("a", verbose=False)["input_ids"][:1]
        self.bos = added if not self.chat and added == [self.tokenizer.bos_token_id] else []
        self.special = special_ids(self.tokenizer)
        self.batches = BatchEncoder(self.tokenizer)

    def answer_start(self, prompt: str, whole: str) -> int:
        """Where the answer begins in `whole`, in characters: after `prompt`, or after the tokens that both share."""
        if whole.startswith(prompt):
            return len(prompt)
        (rendered, _), (ids, offsets) = self.encode_with_offsets([prompt, whole])
        shared = _common_prefix(rendered, ids)
        return int(offsets[shared, 0]) if shared < len(ids) else len(whole)

    def encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        """(tokens,) int32 per text, with a BOS if the text is plain and the tokenizer adds one."""
        for ids in self.batches.encode(texts):
            yield np.array(self.with_bos(ids), dtype=np.int32)

    def encode_with_offsets(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same, each with the (tokens, 2) character spans of its tokens."""
        if texts and not self.tokenizer.is_fast:
            raise UserError(
                f"The tokenizer, a {type(self.tokenizer).__name__}, does not say where its tokens stand, and answers "
                f"of several turns need that: choose a model with a fast tokenizer, or give answers of one turn."
            )
        encoding = self.call(texts, return_offsets_mapping=True) if texts else {"input_ids": [], "offset_mapping": []}
        for ids, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            full = self.with_bos(ids)
            pad = [(0, 0)] * (len(full) - len(ids))
            yield np.array(full, dtype=np.int32), np.array([*pad, *offsets], dtype=np.int64)

    def call(self, texts: list[str], **kwargs: Any) -> Any:
        """One tokenizer call for many texts: no special tokens besides those in the text, no padding, no truncation."""
        kwargs |= {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return self.tokenizer(texts, add_special_tokens=False, **kwargs)

    def with_bos(self, ids: Sequence[int]) -> Sequence[int]:
        return ids if ids[:1] == self.bos else [*self.bos, *ids]

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


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    if a[:length].tobytes() == b[:length].tobytes():  # nearly always
        return length
    (different,) = np.nonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _truncate_prompt(prompt: np.ndarray, config: DataConfig, bos: int | None) -> np.ndarray:
    if len(prompt) <= config.max_prompt_length:
        return prompt
    if config.truncate_prompt is Keep.start:
        return prompt[: config.max_prompt_length]
    kept = int(bos is not None and prompt[0] == bos)
    return np.concatenate([prompt[:kept], prompt[len(prompt) - config.max_prompt_length + kept :]])


def _has_two_bos(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos
