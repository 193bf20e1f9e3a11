"""Which token comes next: greedy, or drawn with random numbers that belong to the answer alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


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


_GROUP = 256
"""Tokens of a group: about the square root of a vocabulary, so that an answer needs the fewest random numbers."""


class Drawn:
    """Draws from the scores' softmax: the largest sum of score and Gumbel noise (Maddison et al. 2014, section 2).

    First the group of 256 tokens that the token is in, by the groups' log-sum-exps, then the token among those of its
    group: the same distribution by a hundredth of the random numbers. A batch of other rows changes scores in their
    last bits; by the sum that changes a token about as often as it changes the distribution, while a number that is
    looked up in cumulated probabilities meets another token a thousand times more often.

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
        missing = -scores.shape[1] % _GROUP
        padded = F.pad(scores, (0, missing), value=-torch.inf) if missing else scores
        grouped = padded.view(len(scores), -1, _GROUP)
        noise = scores.new_empty(len(scores), grouped.shape[1] + _GROUP)
        for row, answer in zip(noise, rows, strict=True):
            row.exponential_(generator=self._generators[answer])
        of_groups, of_tokens = noise.log_().split([grouped.shape[1], _GROUP], dim=1)
        group = (grouped.logsumexp(-1) - of_groups).argmax(-1)
        tokens = grouped[torch.arange(len(scores), device=scores.device), group]
        return group * _GROUP + (tokens - of_tokens).argmax(-1)
