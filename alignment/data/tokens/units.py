"""The unit that a loss takes: ranked lists as pairs, pairs as labelled rows, and prompts picked evenly.

A unit is a `Group`: one prompt with all completions of a list, with the two of a pair, or with one labelled completion.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from alignment.config.data import ListPairs
from alignment.data.rows.sequences import Picked
from alignment.data.tokens.token_store import Stored
from alignment.types import Group, MadeOnDemand, rows_from_pairs


def spread_prompts(groups: Sequence[Group], count: int) -> list[int]:
    """Indices of groups with `count` different prompts, spread evenly over the data; all prompts if there are fewer.

    Several pairs of one list have the same prompt, and only the first of them is picked.
    """
    first_of_prompt = list({group.prompt.tobytes(): i for i, group in reversed(list(enumerate(groups)))}.values())[::-1]
    count = min(len(first_of_prompt), count)
    return [first_of_prompt[i * len(first_of_prompt) // count] for i in range(count)]


def each_prompt(groups: Sequence[Group]) -> Sequence[Group]:
    """Every different prompt once, in the order of the data, as a desirable row of its first completion."""
    first = np.array(spread_prompts(groups, len(groups)), dtype=np.int64)
    return _Derived(groups, np.stack([first, np.zeros_like(first)], axis=1), _row).of(groups)


def sizes(groups: Sequence[Group]) -> np.ndarray:
    """(groups,) how many completions each has."""
    if isinstance(groups, Stored):
        return groups.counts("completions")
    return np.array([len(group.completions) for group in groups], dtype=np.int64)


def are_lists(groups: Sequence[Group]) -> bool:
    """Whether any group has more than two completions: then all of them are ranked lists, shorter ones too."""
    return bool((sizes(groups) > 2).any())


class _Derived(MadeOnDemand[Group]):
    """Groups that are made of others when they are asked for.

    Args:
        indices: (groups, n) of the group that each is made of, and n - 1 numbers for `make`.
    """

    def __init__(self, groups: Sequence[Group], indices: np.ndarray, make: Callable[..., Group]) -> None:
        self._groups = groups
        self._indices = indices
        self._make = make

    def __len__(self) -> int:
        return len(self._indices)

    def item(self, place: int) -> Group:
        """See `MadeOnDemand`."""
        group, *numbers = self._indices[place].tolist()
        return self._make(self._groups[group], *numbers)

    def of(self, groups: Sequence[Group]) -> Sequence[Group]:
        """Itself, or all of them where what they are made of is a list as well."""
        return list(self) if isinstance(groups, list) else self


def as_pairs(groups: Sequence[Group], how: ListPairs) -> Sequence[Group]:
    """Pairs from ranked lists, list by list: the better completion first, with the weight of the list.

    Completions with equal scores make no pair, so a list can yield none.
    """
    found = array("q")
    for place, group in enumerate(groups):
        for i, j in index_pairs(len(group.completions), how):
            if group.scores is None or group.scores[i] > group.scores[j]:
                found.extend((place, i, j))
    return _Derived(groups, np.array(found, dtype=np.int64).reshape(-1, 3), _pair).of(groups)


def _pair(group: Group, i: int, j: int) -> Group:
    scores = None if group.scores is None else (group.scores[i], group.scores[j])
    pair = replace(group.only(i, j), scores=scores, weight=group.weight)
    return replace(pair, source=group.source, dataset=group.dataset)


def with_gap(pairs: Sequence[Group], gap: float) -> Sequence[Group]:
    """The pairs whose chosen answer is scored higher than the rejected one by at least `gap`."""
    apart = [i for i, pair in enumerate(pairs) if pair.scores is not None and pair.scores[0] - pair.scores[1] >= gap]
    return [pairs[i] for i in apart] if isinstance(pairs, list) else Picked(pairs, apart)


def index_pairs(size: int, how: ListPairs) -> list[tuple[int, int]]:
    """The places of the better and the worse completion of each pair, in a ranked list of at least two."""
    if how is ListPairs.best_vs_worst:
        return [(0, size - 1)]
    if how is ListPairs.best_vs_rest:
        return [(0, j) for j in range(1, size)]
    return list(combinations(range(size), 2))


def as_rows(groups: Sequence[Group]) -> Sequence[Group]:
    """One labelled row per completion, in the order of `rows_from_pairs`. Labelled rows stay as they are, in front."""
    if isinstance(groups, Stored):
        is_labelled = groups.counts("labels") > 0
    else:
        is_labelled = np.array([group.labels is not None for group in groups], dtype=bool)
    if is_labelled.all():
        return groups
    (labelled,), (pairs,) = np.nonzero(is_labelled), np.nonzero(~is_labelled)
    order = np.array(rows_from_pairs(len(pairs)), dtype=np.int64)
    as_they_are = np.stack([labelled, np.full(len(labelled), -1)], axis=1)
    split = np.stack([pairs[order // 2], order % 2], axis=1)
    return _Derived(groups, np.concatenate([as_they_are, split]), _row).of(groups)


def _row(group: Group, k: int) -> Group:
    if k < 0:
        return group
    row = replace(group.only(k), labels=(k == 0,), weight=group.weight)
    return replace(row, source=group.source, dataset=group.dataset)
