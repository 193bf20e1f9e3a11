"""Ragged per-token log-probs: what every loss reads and what the reference cache stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
