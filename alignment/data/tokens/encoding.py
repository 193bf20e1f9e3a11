"""Texts to token ids, many at once: what several texts begin with is tokenised once."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_AT_ONCE = 384
"""Texts per tokenizer call: enough for its threads, few enough that its encodings take little memory."""
_PROBED = 96
"""Texts of the first call that are tokenised whole, too: both ways must agree."""


@dataclass(slots=True)
class BatchEncoder:
    """Token ids of texts, without special tokens besides those in the text.

    A fast tokenizer looks for its added tokens first, and then tokenises what stands between two of them by itself. So
    a text may be cut where one begins. The prompt of a row is followed by each of its completions: its parts up to its
    last such token are tokenised once for all of them, and a part that many rows have, as a system text, once for all.

    The first texts are tokenised whole as well. If anything differs, texts stay whole from then on.
    """

    tokenizer: PreTrainedTokenizerBase
    _backend: Any = field(init=False, default=None)
    _token: re.Pattern[str] | None = field(init=False, default=None)
    _cuts: frozenset[str] = field(init=False, default=frozenset())
    _probed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if hasattr(backend, "encode_batch_fast") and not getattr(self.tokenizer, "split_special_tokens", False):
            self._backend = backend
            self._token, self._cuts = _cutting_tokens(self.tokenizer)

    @property
    def shares(self) -> bool:
        """Whether the tokenizer takes texts apart as expected, as far as it was asked."""
        return self._backend is not None

    def answer(self) -> bool | None:
        """What the tokenizer has shown about that; None as long as it was not asked."""
        return self.shares if self._probed else None

    def take_answer(self, shares: bool | None) -> None:
        """Know what `answer` gave in another process."""
        self._probed = shares is not None
        if shares is False:
            self._backend = None

    def encode(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        """The ids of each text."""
        if not texts:
            return
        if self.shares and not self._probed:
            self._probe(texts[:_PROBED])
        for start in range(0, len(texts), _AT_ONCE):
            some = texts[start : start + _AT_ONCE]
            yield from self._in_parts(some) if self.shares else self._whole(some)

    def _probe(self, texts: Sequence[str]) -> None:
        self._probed = True
        if [list(ids) for ids in self._in_parts(texts)] != [list(ids) for ids in self._whole(texts)]:
            self._backend = None
            log.info(
                "This tokenizer does not take texts apart at its special tokens: a prompt is tokenised several times."
            )

    def _whole(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        encoding = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoding["input_ids"]

    def _in_parts(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        """Every text is a beginning, which the texts after it may share, and the rest; equal parts are one."""
        parts: dict[str, int] = {}
        places = []
        cut, shared, beginning = 0, "", list[int]()
        for text in texts:
            if not cut or not text.startswith(shared):
                cuts, end = self._cuts_of(text)
                cut, shared = cuts[-1], text[:end]  # with the token: there the next text may be cut, too
                segments = (text[a:b] for a, b in pairwise(cuts))  # a system text is that of many rows
                beginning = [parts.setdefault(part, len(parts)) for part in segments]
            rest = text[cut:]
            places.append([*beginning, parts.setdefault(rest, len(parts))] if rest else beginning)
        self._backend.no_truncation()
        self._backend.no_padding()
        ids = [encoding.ids for encoding in self._backend.encode_batch_fast(list(parts), add_special_tokens=False)]
        for place in places:
            yield ids[place[0]] if len(place) == 1 else [token for part in place for token in ids[part]]

    def _cuts_of(self, text: str) -> tuple[list[int], int]:
        """0 and where the tokens begin at which the text may be cut, and where the last of these ends."""
        starts, end = [0], 0
        for match in self._token.finditer(text) if self._token is not None else ():
            if match[0] in self._cuts:
                starts += [match.start()] if match.start() else []
                end = match.end()
        return starts, end


def _cutting_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str] | None, frozenset[str]]:
    """A pattern of the added tokens as the tokenizer finds them, and those at which a text may be cut.

    At a token that takes the white space before it along, the text before it would be another. A token that wants to be
    a word of its own looks at its neighbours, so that nothing is cut where there is one.
    """
    added = [token for token in tokenizer.added_tokens_decoder.values() if not token.normalized and token.content]
    if not added or any(token.single_word for token in added):
        return None, frozenset()
    longest_first = sorted((token.content for token in added), key=len, reverse=True)  # of two the longer one is found
    # Without groups: they would keep the pattern from looking for the first characters of all tokens at once.
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    return pattern, frozenset(token.content for token in added if not token.lstrip)
