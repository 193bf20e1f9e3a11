"""The unit that a loss takes: ranked lists as pairs, pairs as labelled rows, and prompts picked evenly.

A unit is a `Group`: one prompt with all completions of a list, with the two of a pair, or with one labelled completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from alignment.config.data import ListPairs
from alignment.types import Group, rows_from_pairs


def spread_prompts(groups: Sequence[Group], count: int) -> list[int]:
    """Indices of groups with `count` different prompts, spread evenly over the data; all prompts if there are fewer.

    Several pairs of one list have the same prompt, and only the first of them is picked.
    """
    first_of_prompt = list({group.prompt.tobytes(): i for i, group in reversed(list(enumerate(groups)))}.values())[::-1]
    count = min(len(first_of_prompt), count)
    return [first_of_prompt[i * len(first_of_prompt) // count] for i in range(count)]


def are_lists(groups: Sequence[Group]) -> bool:
    """Whether any group has more than two completions: then all of them are ranked lists, shorter ones too."""
    return any(len(group.completions) > 2 for group in groups)


def as_pairs(groups: Sequence[Group], how: ListPairs) -> list[Group]:
    """Pairs from ranked lists, list by list: the better completion first, with the weight of the list.

    Completions with equal scores make no pair, so a list can yield none.
    """
    pairs = []
    for group in groups:
        for i, j in _index_pairs(len(group.completions), how):
            scores = None if group.scores is None else (group.scores[i], group.scores[j])
            if scores is None or scores[0] > scores[1]:
                pairs.append(replace(group.only(i, j), scores=scores, weight=group.weight, source=group.source))
    return pairs


def with_gap(pairs: Sequence[Group], gap: float) -> list[Group]:
    """The pairs whose chosen answer is scored higher than the rejected one by at least `gap`."""
    return [pair for pair in pairs if pair.scores is not None and pair.scores[0] - pair.scores[1] >= gap]


def _index_pairs(size: int, how: ListPairs) -> list[tuple[int, int]]:
    if how is ListPairs.best_vs_worst:
        return [(0, size - 1)]
    if how is ListPairs.best_vs_rest:
        return [(0, j) for j in range(1, size)]
    return list(combinations(range(size), 2))


def as_rows(groups: Sequence[Group]) -> list[Group]:
    """One labelled row per completion, in the order of `rows_from_pairs`. Labelled rows stay as they are."""
    if any(group.labels is not None for group in groups):
        return list(groups)
    rows = []
    for sequence in rows_from_pairs(len(groups)):
        pair, k = divmod(sequence, 2)
        group = groups[pair]
        rows.append(replace(group.only(k), labels=(k == 0,), weight=group.weight, source=group.source))
    return rows
