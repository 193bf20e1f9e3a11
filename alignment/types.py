"""What everybody names: groups of tokens, ragged log-probs, and what a loss may ask for beyond them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One tokenised prompt and its K >= 1 tokenised completions.

    A preference pair is K = 2 with the chosen completion first; a labelled (KTO) row is K = 1 with a label; a ranked
    list is K > 2, best first.

    Attributes:
        prompt: (P,) int32 token ids, with BOS where the tokenizer wants one; P >= 1.
        completions: K arrays (C_k,) int32, each with its end-of-turn tokens unless it was truncated; C_k >= 1.
        labels: K booleans (True: desirable), or None for data without labels.
        scores: K floats from the data (a judge, a reward model), or None.
        weight: factor of the group's loss, from the data.
        source: where the row came from, "file:row", for messages and samples.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    labels: tuple[bool, ...] | None = None
    scores: tuple[float, ...] | None = None
    weight: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        assert self.prompt.dtype == np.int32 and all(c.dtype == np.int32 for c in self.completions)
        assert len(self.prompt) >= 1, "a prompt has at least one token: it scores the first completion token"
        assert self.completions and all(len(c) >= 1 for c in self.completions)

    def key(self, index: int) -> bytes:
        """32-byte content hash of the prompt's and one completion's tokens, and of nothing else."""
        digest = hashlib.blake2b(digest_size=32)
        digest.update(len(self.prompt).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(self.prompt, dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(self.completions[index], dtype="<i4").tobytes())
        return digest.digest()

    def keys(self) -> list[bytes]:
        """The content hashes of all completions, in order."""
        return [self.key(i) for i in range(len(self.completions))]


class Quantity(Enum):
    """What a loss can ask for at every completion token beyond its log-prob, computed where the logits exist."""

    collision = "collision"
    """log sum_v p_v^2 of the policy's next-token distribution p, without gradient."""

    entropy = "entropy"
    """Entropy of the reference's next-token distribution over the logarithm of the vocabulary's size: 0 to 1."""

    divergence = "divergence"
    """KL(reference || policy) of the next-token distributions in nats, differentiable; needs a live reference."""


@dataclass(frozen=True, slots=True)
class RaggedLogps:
    """Log-probs of completion tokens of S sequences, laid end to end.

    Kept per token until a loss decides how to reduce them, so that sums, means and prefixes come from one source
    and one stored reference serves every loss.

    Attributes:
        values: (tokens,) float32 or float64, natural logarithms, one per completion token.
        offsets: (S + 1,) int64 on the device of `values`; sequence s holds `values[offsets[s]:offsets[s + 1]]`.
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        assert self.values.dim() == 1 and self.offsets.dim() == 1, "values and offsets are one-dimensional"
        assert self.offsets.dtype == torch.int64, "offsets are int64"

    @classmethod
    def from_sequences(cls, sequences: Sequence[Tensor]) -> RaggedLogps:
        """Join S one-dimensional tensors (kept differentiable) into one ragged tensor."""
        lengths = torch.tensor([0, *(len(s) for s in sequences)], dtype=torch.int64)
        values = torch.cat(list(sequences)) if sequences else torch.zeros(0)
        return cls(values, lengths.cumsum(0).to(values.device))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """(S,) int64, completion tokens per sequence."""
        return self.offsets.diff()

    def sums(self) -> Tensor:
        """(S,) sum of log-probs per sequence: log pi(y|x) in nats."""
        return torch.segment_reduce(self.values, "sum", offsets=self.offsets, axis=0)

    def means(self) -> Tensor:
        """(S,) mean log-prob per completion token. A sequence without tokens has no mean and is refused upstream."""
        return self.sums() / self.lengths

    def sequence(self, index: int) -> Tensor:
        """(length,) view of one sequence's values."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def select(self, indices: Sequence[int]) -> RaggedLogps:
        """The given sequences, in the given order."""
        return RaggedLogps.from_sequences([self.sequence(i) for i in indices])

    def detach(self) -> RaggedLogps:
        """The same log-probs without their graph."""
        return RaggedLogps(self.values.detach(), self.offsets)

    def to(self, device: torch.device | str) -> RaggedLogps:
        """The same log-probs on that device."""
        return RaggedLogps(self.values.to(device), self.offsets.to(device))
