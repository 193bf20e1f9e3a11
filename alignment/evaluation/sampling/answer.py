"""How answers are drawn, and what an answer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np

from alignment.errors import not_negative, require, within


class Finish(Enum):
    """Why an answer has ended: at a stop token, or cut after the largest number of tokens."""

    stop = "stop"
    length = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How answers are drawn.

    The filters act in the order in which transformers has them: temperature, top_k, top_p, min_p.

    Attributes:
        stops: the tokens that end an answer, at least one.
        max_new_tokens: after which an answer is cut.
        temperature: 0 for greedy answers, where no filter matters.
        top_k: only so many of the likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together have this probability; 1: all.
        min_p: only tokens with this share of the likeliest one's probability; 0: all.
        seed: of what is drawn. With it, the prompt's tokens and the answer's index decide an answer.
        presets: whether the model's own generation settings act, such as a repetition penalty; see `presets`.
    """

    stops: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presets: bool = False

    def __post_init__(self) -> None:
        require(len(self.stops) > 0, "An answer needs a token that ends it: give the tokenizer an EOS token.")
        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        require(self.top_k >= 0, f"top_k must be at least 0, not {self.top_k}.")
        not_negative("temperature", self.temperature)
        within("top_p", self.top_p, "(0, 1]")
        within("min_p", self.min_p, "[0, 1]")

    def decisive(self) -> dict[str, Any]:
        """What decides an answer, beside its prompt and index: greedy ones know neither seed nor filters."""
        found = asdict(self) | {"stops": sorted(self.stops)}
        idle = ("seed", "top_k", "top_p", "min_p") if self.temperature == 0 else ()
        return {key: value for key, value in found.items() if key not in idle}


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """An answer of a policy.

    Attributes:
        tokens: (tokens,) int32, up to and including the first stop token.
        logps: (tokens,) fp32, log-probs in nats under the policy itself: at temperature 1, before any filter.
        finish: why it ended.
    """

    tokens: np.ndarray
    logps: np.ndarray
    finish: Finish


Wanted = tuple[np.ndarray, Sequence[int]]
"""A prompt, (tokens,) int32, and the indices of the answers that are wanted of it."""


def stop_tokens(tokenizer: Any, ends: Sequence[int], own: Sequence[int]) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, the templates' ends of turn, and the model's own.

    A base model's EOS often differs from the end-of-turn token of its chat template. Nothing is learnt from the data,
    whose answers may be cut.

    Args:
        ends: the ends of turn of the chat templates that write the data.
        own: the EOS tokens of the model's generation settings.
    """
    return sorted({token for token in (tokenizer.eos_token_id, *ends, *own) if token is not None})


def as_text(tokenizer: Any, answer: Sequence[int], stops: Sequence[int]) -> str:
    """The answer's text, without its stop tokens."""
    return tokenizer.decode([token for token in answer if token not in stops], skip_special_tokens=True).strip()
