"""How the scored tokens of several groups are laid end to end, in a pass and in a whole step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alignment.types import Group, RaggedLogps, to_device


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """The position of each scored token: all completions in group order, then all prompts where they are scored.

    Attributes:
        offsets: (S + 1,) int64 on the CPU, of the completions' tokens.
        prompt_offsets: (groups + 1,) int64 on the CPU, of the prompts' tokens but the first of each; the first entry
            is the last of `offsets`. None where prompts are not scored.
        first_sequences: (groups + 1,) int64 on the CPU: the sequences of group i begin at number i.
    """

    offsets: Tensor
    prompt_offsets: Tensor | None
    first_sequences: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], prompts: bool = False, ends: bool = False) -> TokenPlan:
        """The plan of these groups; with `ends`, of one number for each completion."""
        offsets = _offsets(1 if ends else n for g in groups for n in g.scored_lengths)
        return cls(
            offsets,
            _offsets(len(g.prompt) - 1 for g in groups) + offsets[-1] if prompts else None,
            _offsets(len(g.completions) for g in groups),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of completions and prompts together."""
        return int(self.offsets[-1] if self.prompt_offsets is None else self.prompt_offsets[-1])

    def columns(self, indices: Sequence[int]) -> Tensor:
        """(tokens,) int64: the positions in this plan of the tokens of a pass over these groups."""
        spans = [(self.first_sequences[i], self.first_sequences[i + 1]) for i in indices]
        ranges = [torch.arange(int(self.offsets[a]), int(self.offsets[b])) for a, b in spans]
        if self.prompt_offsets is not None:
            bounds = self.prompt_offsets
            ranges += [torch.arange(int(bounds[i]), int(bounds[i + 1])) for i in indices]
        return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)

    def policy(self, values: Tensor) -> RaggedLogps:
        """The completions' part of (tokens,) values."""
        return RaggedLogps(values[: int(self.offsets[-1])], to_device(self.offsets, values.device))

    def prompts(self, values: Tensor) -> RaggedLogps | None:
        """The prompts' part of (tokens,) values."""
        if self.prompt_offsets is None:
            return None
        start = self.offsets[-1]
        return RaggedLogps(values[int(start) :], to_device(self.prompt_offsets - start, values.device))


def _offsets(lengths: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int64))
