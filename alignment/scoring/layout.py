"""How groups become model inputs.

A layout turns groups into `MicroBatch`es: token ids for one forward pass, and for every scored token the position of
the hidden state that scores it. Later steps do not depend on how the rows were laid out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from alignment.kernels.attention import PromptSpan, SharedRow, parts_of, position_ids
from alignment.types import Group, to_device


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The inputs of one forward pass.

    Attributes:
        indices: which of the given groups it has, in the order of the ragged result.
        input_ids: (rows, width) int64.
        score_positions: (tokens,) int64, for each scored token the index, in the flattened (rows * width) hidden
            states, of the state that predicts it: the position just before it.
        targets: (tokens,) int64, the scored tokens.
        offsets: (S + 1,) int64, where each sequence's tokens start; sequences in group order, completions within.
            Where prompts are scored too, their tokens follow those of all completions, in group order.
        num_tokens: tokens of all sequences. Prompts count once per completion and padding never, so the number is the
            same for every layout.
        shared_row: the spans of the one row in which prompts are shared; None if every row holds one completion.
        position_ids: (1, width) int64 of a shared row, else None.
    """

    indices: tuple[int, ...]
    input_ids: Tensor
    score_positions: Tensor
    targets: Tensor
    offsets: Tensor
    num_tokens: int
    shared_row: SharedRow | None = None
    position_ids: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch with its tensors on that device."""
        return replace(
            self,
            input_ids=to_device(self.input_ids, device),
            score_positions=to_device(self.score_positions, device),
            targets=to_device(self.targets, device),
            offsets=to_device(self.offsets, device),
            position_ids=None if self.position_ids is None else to_device(self.position_ids, device),
        )


class BatchLayout(Protocol):
    """A way to lay out groups in micro-batches."""

    def batches(self, groups: Sequence[Group], tokens_per_batch: int, prompts: bool = False) -> Iterator[MicroBatch]:
        """Every group in exactly one micro-batch of at most `tokens_per_batch` positions (or of that group alone).

        With `prompts` the prompts' tokens are scored too, all but the first.
        """
        ...


PASS_COST = {"cpu": 32, "cuda": 1024}
"""Positions of padding that another pass is worth, by device: next to none on a CPU. A GPU waits for the host in a pass
of less than some thousand positions, so that padding costs it nothing there, and works while the host launches more."""


class FlatLayout:
    """One row per completion with its prompt in front, padded on the right; rows of similar length go together.

    No attention mask is needed: under causal attention (and in a recurrence) a token sees only what comes before it,
    and padding comes after everything that is scored.

    Args:
        pass_cost: at most this many positions of padding in one batch; beyond that, another pass is cheaper.
    """

    def __init__(self, pass_cost: int = PASS_COST["cpu"]) -> None:
        self._pass_cost = pass_cost

    def batches(self, groups: Sequence[Group], tokens_per_batch: int, prompts: bool = False) -> Iterator[MicroBatch]:
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
                    yield self._build(groups, members, prompts)
                members, num_rows, padding = [], 0, 0
            members.append(index)
            num_rows += rows
        if members:
            yield self._build(groups, members, prompts)

    @staticmethod
    def _build(groups: Sequence[Group], members: Sequence[int], prompts: bool) -> MicroBatch:
        rows = [(groups[i], k) for i in members for k in range(len(groups[i].completions))]
        texts = [(group.prompt, group.completions[k]) for group, k in rows]
        # The last token of a row predicts nothing that is scored, so it is left out.
        width = max(len(prompt) + len(completion) for prompt, completion in texts) - 1
        input_ids = np.zeros((len(rows), width), dtype=np.int64)
        positions = []
        for row, (prompt, completion) in enumerate(texts):
            start = len(prompt) - 1
            input_ids[row, : len(prompt)] = prompt
            input_ids[row, len(prompt) : start + len(completion)] = completion[:-1]
            positions.append(row * width + start + _scored_places(*rows[row]))
        targets = [group.scored_tokens(k) for group, k in rows]
        lengths = [len(tokens) for tokens in targets]
        if prompts:
            row = 0
            for prompt, num_rows in ((groups[i].prompt, len(groups[i].completions)) for i in members):
                positions.append(np.arange(row * width, row * width + len(prompt) - 1))
                targets.append(prompt[1:])
                row += num_rows
        return MicroBatch(
            indices=tuple(members),
            input_ids=torch.from_numpy(input_ids),
            score_positions=torch.from_numpy(np.concatenate(positions)),
            targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
            offsets=torch.from_numpy(np.cumsum([0, *lengths])),
            num_tokens=sum(len(prompt) + len(completion) for prompt, completion in texts),
        )


class SharedLayout:
    """One row of many prompts, each followed by its completions: no prompt runs twice and nothing is padded.

    Groups with equal prompts share one as well. The model must have passed `prompt_sharing.choose_layout`.
    """

    def batches(self, groups: Sequence[Group], tokens_per_batch: int, prompts: bool = False) -> Iterator[MicroBatch]:
        """Rows filled first-fit, longest prompts first, so that the step with the largest memory is the first one."""
        families = self._families(groups, tokens_per_batch)
        rows: list[tuple[int, list[list[int]]]] = []
        for length, family in sorted(families, key=lambda f: (-f[0], f[1][0])):
            for i, (filled, members) in enumerate(rows):
                if filled + length <= tokens_per_batch:
                    rows[i] = (filled + length, [*members, family])
                    break
            else:
                rows.append((length, [family]))
        for _, members in rows:
            yield self._build(groups, members, prompts)

    @staticmethod
    def _families(groups: Sequence[Group], tokens_per_batch: int) -> list[tuple[int, list[int]]]:
        """(positions, groups) of groups with one prompt, split where they would not fit a batch together."""
        families: list[tuple[int, list[int]]] = []
        open_family: dict[bytes, int] = {}
        for index, group in enumerate(groups):
            own = sum(len(c) - 1 for c in group.completions)
            prompt = group.prompt.tobytes()
            slot = open_family.get(prompt)
            if slot is not None and families[slot][0] + own <= tokens_per_batch:
                length, members = families[slot]
                families[slot] = (length + own, [*members, index])
            else:
                open_family[prompt] = len(families)
                families.append((len(group.prompt) + own, [index]))
        return families

    @staticmethod
    def _build(groups: Sequence[Group], families: Sequence[Sequence[int]], prompts: bool) -> MicroBatch:
        ids: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        spans: list[PromptSpan] = []
        start = num_tokens = 0
        for family in families:
            prompt = groups[family[0]].prompt
            members = [(groups[index], k) for index in family for k in range(len(groups[index].completions))]
            completions = [group.completions[k] for group, k in members]
            # The last token of a completion predicts nothing that is scored, so it is left out.
            span = PromptSpan(start, len(prompt), tuple(len(c) - 1 for c in completions))
            ids += [prompt, *(c[:-1] for c in completions)]
            for (group, k), (first, end) in zip(members, span.completion_ranges(), strict=True):
                targets.append(group.scored_tokens(k))
                before = np.concatenate([[span.prompt_end - 1], np.arange(first, end)])
                positions.append(before[_scored_places(group, k)])
            num_tokens += sum(len(prompt) + len(c) for c in completions)
            spans.append(span)
            start = span.end
        row = tuple(spans)
        offsets = np.cumsum([0, *(len(c) for c in targets)])
        if prompts:
            for family, span in zip(families, spans, strict=True):
                positions += [np.arange(span.start, span.prompt_end - 1)] * len(family)
                targets += [groups[family[0]].prompt[1:]] * len(family)
        return MicroBatch(
            indices=tuple(index for family in families for index in family),
            input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
            score_positions=torch.from_numpy(np.concatenate(positions)),
            targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
            offsets=torch.from_numpy(offsets),
            num_tokens=num_tokens,
            shared_row=row,
            position_ids=position_ids(row),
        )


def _scored_places(group: Group, index: int) -> np.ndarray:
    """(scored,) int64, which tokens of a completion are scored."""
    if group.scored is None:
        return np.arange(len(group.completions[index]))
    return np.nonzero(group.scored[index])[0]


_FIRST_PASS = 64
"""Groups that are more than the first pass of a step holds."""


def keys_per_position(layout: BatchLayout, groups: Sequence[Group]) -> float:
    """How many keys the attention of a GPU's largest pass is given for each position.

    Its kernel takes the keys and values of a shared prompt once for every completion, so a pair with a long prompt has
    nearly two for each position. Passes are filled from the longest prompts on.
    """
    longest = nlargest(_FIRST_PASS, groups, key=lambda group: len(group.prompt))
    rows = [batch.shared_row for batch in layout.batches(longest, 2**62) if batch.shared_row is not None]
    keys = sum(len(own) + len(prompt) for row in rows for own, prompt in parts_of(row))
    return keys / sum(row[-1].end for row in rows) if rows else 1.0
