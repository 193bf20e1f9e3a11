"""How groups become model inputs.

A layout turns groups into `MicroBatch`es: token ids for one forward pass, and for every completion token the flat
position of the hidden state that scores it. Nothing downstream knows how the rows were laid out, so another layout
(one that runs a shared prompt once) only has to fill the same fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from alignment.groups import Group


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The inputs of one forward pass.

    Attributes:
        indices: which of the given groups are in here, in the order of the ragged result.
        input_ids: (rows, width) int64.
        score_positions: (tokens,) int64, index into the flattened (rows * width) hidden states whose prediction each
            completion token is: the position just before it.
        targets: (tokens,) int64, the completion tokens.
        offsets: (S + 1,) int64, where each sequence's tokens start; sequences in group order, completions within.
        num_tokens: positions that hold a token, padding not counted.
    """

    indices: tuple[int, ...]
    input_ids: Tensor
    score_positions: Tensor
    targets: Tensor
    offsets: Tensor
    num_tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch with its tensors on that device."""
        return MicroBatch(
            self.indices,
            self.input_ids.to(device),
            self.score_positions.to(device),
            self.targets.to(device),
            self.offsets.to(device),
            self.num_tokens,
        )


class BatchLayout(Protocol):
    """Interface of a layout."""

    def batches(self, groups: Sequence[Group], tokens_per_batch: int) -> Iterator[MicroBatch]:
        """Every group in exactly one micro-batch of at most `tokens_per_batch` positions (or of that group alone)."""
        ...


PASS_COST = {"cpu": 32, "cuda": 1024}
"""Positions that a pass costs on top of its own, by device: next to nothing, or the launch of thousands of kernels."""


class FlatLayout:
    """One row per completion, its prompt repeated in front, padded on the right, rows of like length together.

    No attention mask is needed: under causal attention (and in a recurrence) a token sees only what stands before it,
    and padding stands after everything that is scored.

    Args:
        pass_cost: the most positions by which the groups of one batch are padded to the length of its longest one;
            beyond it, a pass of their own is cheaper.
    """

    def __init__(self, pass_cost: int = PASS_COST["cpu"]) -> None:
        self._pass_cost = pass_cost

    def batches(self, groups: Sequence[Group], tokens_per_batch: int) -> Iterator[MicroBatch]:
        """Longest groups first, so that the step with the largest memory is the first one."""
        widths = [len(g.prompt) + max(len(c) for c in g.completions) for g in groups]
        order = sorted(range(len(groups)), key=lambda i: (-widths[i], i))
        members: list[int] = []
        num_rows = padding = 0
        for index in order:
            rows = len(groups[index].completions)
            width = widths[members[0]] if members else widths[index]
            padding += rows * (width - widths[index])
            if (num_rows + rows) * width > tokens_per_batch or padding > self._pass_cost:
                if members:
                    yield self._build(groups, members)
                members, num_rows, padding = [], 0, 0
            members.append(index)
            num_rows += rows
        if members:
            yield self._build(groups, members)

    @staticmethod
    def _build(groups: Sequence[Group], members: Sequence[int]) -> MicroBatch:
        rows = [(groups[i].prompt, completion) for i in members for completion in groups[i].completions]
        # The last token of a row predicts nothing that is scored, so it need not be run.
        width = max(len(prompt) + len(completion) for prompt, completion in rows) - 1
        input_ids = np.zeros((len(rows), width), dtype=np.int64)
        positions = []
        for row, (prompt, completion) in enumerate(rows):
            start = len(prompt) - 1
            input_ids[row, : len(prompt)] = prompt
            input_ids[row, len(prompt) : start + len(completion)] = completion[:-1]
            positions.append(np.arange(row * width + start, row * width + start + len(completion)))
        lengths = [len(completion) for _, completion in rows]
        return MicroBatch(
            indices=tuple(members),
            input_ids=torch.from_numpy(input_ids),
            score_positions=torch.from_numpy(np.concatenate(positions)),
            targets=torch.from_numpy(np.concatenate([c for _, c in rows]).astype(np.int64)),
            offsets=torch.from_numpy(np.cumsum([0, *lengths])),
            num_tokens=sum(len(prompt) + len(completion) - 1 for prompt, completion in rows),
        )
