"""Which token comes next: greedy, or drawn with random numbers that belong to the answer alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def answer_seed(prompt: np.ndarray, index: int, seed: int) -> int:
    """The seed of an answer's own random numbers: whatever else is drawn beside it leaves them as they are.

    Args:
        prompt: (tokens,) of any integer type.
        index: of the answer among those to this prompt.
        seed: of the whole draw.
    """
    digest = hashlib.blake2b(f"{seed}:{index}:".encode(), digest_size=8)
    digest.update(prompt.astype("<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")


def greedy(scores: Tensor, rows: Sequence[int]) -> Tensor:
    """The likeliest tokens: (rows,) int64 of (rows, V) scores."""
    return scores.argmax(-1)


class Drawn:
    """Draws from the scores' softmax: the largest sum of score and Gumbel noise (Maddison et al. 2014, section 2).

    Every token of the vocabulary has its own noise. A batch of other rows changes scores in their last bits; by the sum
    that changes a token about as often as it changes the distribution, while a number that is looked up in cumulated
    probabilities meets another token a thousand times more often.

    Args:
        seeds: by answer.
        device: of the scores. Each kind of device has random numbers of its own.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """One token of each row: (rows,) int64.

        Args:
            scores: (rows, V) fp32; -inf where a token is filtered out.
            rows: the answer of each row.
        """
        noise = torch.empty_like(scores)
        for row, answer in zip(noise, rows, strict=True):
            row.exponential_(generator=self._generators[answer])
        return torch.sub(scores, noise.log_(), out=noise).argmax(-1)
