"""Drawn answers in a few letters: each letter is a token, a capital Z at the end a stop token."""

from typing import Any

import numpy as np

from alignment.config.onpolicy import DropCut, PairChoice, PairsConfig
from alignment.evaluation.sampling.answer import Answer, Finish
from alignment.onpolicy.pairs import Drawn
from alignment.types import Group


def ids(text: str) -> np.ndarray:
    return np.array([ord(letter) for letter in text], dtype=np.int32)


def answer(text: str) -> Answer:
    """An answer that was cut, unless it ends with Z; its log-probs are minus its ids."""
    finish = Finish.stop if text.endswith("Z") else Finish.length
    return Answer(ids(text), -ids(text).astype(np.float32), finish)


def drawn(scores: dict[str, float | None] | None = None, *answers: str, prompt: str = "ask", **more: Any) -> Drawn:
    """Answers with their scores, or some without."""
    texts = list(answers) or list(scores or ())
    return Drawn(
        prompt=ids(prompt),
        answers=[answer(text) for text in texts],
        texts=[text.removesuffix("Z") for text in texts],
        scores=None if scores is None or answers else list(scores.values()),
        **more,
    )


def pairs_config(choice: str, **more: Any) -> PairsConfig:
    given = {"min_margin": 0.0, "max_length_gap": None, "drop_cut": DropCut.chosen, "threshold": None, **more}
    return PairsConfig(choice=PairChoice[choice], **given)


def words(group: Group) -> tuple[str, ...]:
    """The completions of a group as letters."""
    return tuple("".join(map(chr, tokens)) for tokens in group.completions)
