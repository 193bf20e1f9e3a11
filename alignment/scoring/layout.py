"""How groups become model inputs.

A layout turns groups into `MicroBatch`es: token ids for one forward pass, and for every scored token the position of
the hidden state that scores it. Later steps do not depend on how the rows were laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from alignment.kernels.attention import PromptSpan, SharedRow, longest_sequence, parts_of, position_ids
from alignment.scoring.states import Fork
from alignment.types import Group, to_device


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The inputs of one forward pass.

    Attributes:
        indices: which of the given groups it has, in the order of the ragged result.
        input_ids: (rows, width) int64.
        score_positions: (tokens,) int64, for each scored token the index, in the flattened (rows * width) hidden
            states, of the state that predicts it: the position just before it. Those of a fork follow.
        targets: (tokens,) int64, the scored tokens.
        offsets: (S + 1,) int64, where each sequence's tokens start; sequences in group order, completions within.
            Where prompts are scored too, their tokens follow those of all completions, in group order.
        num_tokens: tokens of all sequences. Prompts count once per completion and padding never, so the number is the
            same for every layout.
        shared_row: the spans of the one row in which prompts are shared; None if every row holds one completion.
        position_ids: (1, width) int64 of a shared row, (rows, width) of a fork's prompts, else None.
        fork: the completions, where `input_ids` are prompts whose states they go on from; else None.
    """

    indices: tuple[int, ...]
    input_ids: Tensor
    score_positions: Tensor
    targets: Tensor
    offsets: Tensor
    num_tokens: int
    shared_row: SharedRow | None = None
    position_ids: Tensor | None = None
    fork: Fork | None = None

    @property
    def positions(self) -> int:
        """Positions that the pass runs, padding included."""
        return self.input_ids.numel() + (0 if self.fork is None else self.fork.input_ids.numel())

    @property
    def longest(self) -> int:
        """Positions that the last token of the longest row sees, at the most."""
        if self.shared_row is not None:
            return longest_sequence(self.shared_row)
        return self.input_ids.shape[1] + (0 if self.fork is None else self.fork.input_ids.shape[1])

    @property
    def keys(self) -> int:
        """Keys that the attention of a GPU is given: those of a shared prompt once for every completion."""
        if self.fork is not None:
            return self.positions + len(self.fork.input_ids) * self.input_ids.shape[1]
        if self.shared_row is not None:
            return sum(len(own) + len(prompt) for own, prompt in parts_of(self.shared_row))
        return self.positions

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch with its tensors on that device."""
        return replace(
            self,
            input_ids=to_device(self.input_ids, device),
            score_positions=to_device(self.score_positions, device),
            targets=to_device(self.targets, device),
            offsets=to_device(self.offsets, device),
            position_ids=None if self.position_ids is None else to_device(self.position_ids, device),
            fork=None if self.fork is None else self.fork.to(device),
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
LEAST_GAIN = 1.4
"""Positions of flat rows for each of a fork from which on forking is faster: docs/families.md has the times."""
_LEAST_WIDTH = 2
"""Of a row of completions: see `Fork`."""


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
        families = _families(
            groups, tokens_per_batch, lambda family: len(groups[family[0]].prompt) + sum(_own_lengths(groups, family))
        )
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


class ForkedLayout:
    """Prompts run once, in rows of their own, and their completions go on from the states that they leave.

    Prompts are padded on the left, so that each state is that of a prompt's end, and completions on the right. Groups
    with equal prompts share one. Where too little is saved, groups are laid out flat. The model must have passed
    `prompt_sharing.choose_layout`.

    Args:
        pass_cost: at most this many positions of padding in one batch, as in the flat layout. The second call of the
            decoder is worth as many.
        least_gain: fork where flat rows would have this many times the positions.
    """

    def __init__(self, pass_cost: int = PASS_COST["cpu"], least_gain: float = LEAST_GAIN) -> None:
        self._flat = FlatLayout(pass_cost)
        self._pass_cost = pass_cost
        self._least_gain = least_gain

    def batches(self, groups: Sequence[Group], tokens_per_batch: int, prompts: bool = False) -> Iterator[MicroBatch]:
        """Longest prompts first; groups that are laid out flat come last."""
        families = _families(groups, tokens_per_batch, lambda family: _sizes(groups, [family])[0])
        forked = [family for _, family in families if self._gains(groups, [family], 0)]
        flat = [index for _, family in families if not self._gains(groups, [family], 0) for index in family]
        for members in self._packed(groups, forked, tokens_per_batch):
            if self._gains(groups, members, self._pass_cost):
                yield self._build(groups, members, prompts)
            else:
                flat += [index for family in members for index in family]
        for batch in self._flat.batches([groups[i] for i in flat], tokens_per_batch, prompts):
            yield replace(batch, indices=tuple(flat[i] for i in batch.indices))

    def _gains(self, groups: Sequence[Group], families: Sequence[Sequence[int]], cost: int) -> bool:
        forked, flat = _sizes(groups, families)
        return flat >= self._least_gain * (forked + cost)

    def _packed(
        self, groups: Sequence[Group], families: Sequence[list[int]], tokens_per_batch: int
    ) -> Iterator[list[list[int]]]:
        """Families that run together, those with the longest prompts first."""
        members: list[list[int]] = []
        needed = 0
        for family in sorted(families, key=lambda f: (-len(groups[f[0]].prompt), f[0])):
            total, own = (_sizes(groups, some)[0] for some in ([*members, family], [family]))
            if members and (total > tokens_per_batch or total - needed - own > self._pass_cost):
                yield members
                members, needed = [], 0
            members.append(family)
            needed += own
        if members:
            yield members

    @staticmethod
    def _build(groups: Sequence[Group], families: Sequence[Sequence[int]], prompts: bool) -> MicroBatch:
        # Prompts, each at the right end of its row
        texts = [groups[family[0]].prompt for family in families]
        length = max(len(prompt) for prompt in texts)
        ends = length * np.arange(1, len(texts) + 1)
        input_ids, mask = np.zeros((2, len(texts), length), dtype=np.int64)
        for row, prompt in enumerate(texts):
            input_ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1

        # Completions, one a row. The last token of each predicts nothing that is scored, so it is left out.
        rows = [
            (f, groups[i], k)
            for f, family in enumerate(families)
            for i in family
            for k in range(len(groups[i].completions))
        ]
        width = max(_LEAST_WIDTH, max(len(group.completions[k]) - 1 for _, group, k in rows))
        completion_ids = np.zeros((len(rows), width), dtype=np.int64)
        positions, targets = [], []
        for row, (f, group, k) in enumerate(rows):
            own = group.completions[k][:-1]
            completion_ids[row, : len(own)] = own
            before = np.concatenate([[ends[f] - 1], ends[-1] + row * width + np.arange(len(own))])
            positions.append(before[_scored_places(group, k)])
            targets.append(group.scored_tokens(k))
        offsets = np.cumsum([0, *(len(tokens) for tokens in targets)])
        if prompts:
            for f, family in enumerate(families):
                positions += [np.arange(ends[f] - len(texts[f]), ends[f] - 1)] * len(family)
                targets += [texts[f][1:]] * len(family)
        prompt_rows = np.array([f for f, _, _ in rows])
        return MicroBatch(
            indices=tuple(index for family in families for index in family),
            input_ids=torch.from_numpy(input_ids),
            score_positions=torch.from_numpy(np.concatenate(positions)),
            targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
            offsets=torch.from_numpy(offsets),
            num_tokens=sum(len(texts[f]) + len(group.completions[k]) for f, group, k in rows),
            position_ids=torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0)),
            fork=Fork(
                input_ids=torch.from_numpy(completion_ids),
                position_ids=torch.from_numpy(mask.sum(1)[prompt_rows, None] + np.arange(width)),
                prompts=torch.from_numpy(prompt_rows),
                mask=None if mask.all() else torch.from_numpy(mask),
            ),
        )


def _sizes(groups: Sequence[Group], families: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Positions of these families in one fork, and as flat rows that are padded within each family alone."""
    prompts = [len(groups[family[0]].prompt) for family in families]
    own = [_own_lengths(groups, family) for family in families]
    width = max(_LEAST_WIDTH, *map(max, own))
    flat = sum(len(lengths) * (prompt + max(lengths)) for prompt, lengths in zip(prompts, own, strict=True))
    return len(prompts) * max(prompts) + sum(map(len, own)) * width, flat


def _families(
    groups: Sequence[Group], tokens_per_batch: int, size: Callable[[list[int]], int]
) -> list[tuple[int, list[int]]]:
    """(positions, groups) of groups with one prompt, split where they would not fit a batch together."""
    families: list[tuple[int, list[int]]] = []
    open_family: dict[bytes, int] = {}
    for index, group in enumerate(groups):
        prompt = group.prompt.tobytes()
        slot = open_family.get(prompt)
        if slot is not None:
            together = [*families[slot][1], index]
            if (positions := size(together)) <= tokens_per_batch:
                families[slot] = (positions, together)
                continue
        open_family[prompt] = len(families)
        families.append((size([index]), [index]))
    return families


def _own_lengths(groups: Sequence[Group], family: Sequence[int]) -> list[int]:
    """How many tokens of each completion of these groups are run."""
    return [len(completion) - 1 for index in family for completion in groups[index].completions]


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
    batches = list(layout.batches(longest, 2**62))
    return sum(batch.keys for batch in batches) / sum(batch.positions for batch in batches)
