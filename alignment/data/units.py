"""Pairs from ranked lists, for losses that compare two completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from alignment.config.schema import ListPairs
from alignment.types import Group


def spread_prompts(groups: Sequence[Group], count: int) -> list[int]:
    """Groups with `count` different prompts (or all, where there are fewer), spread evenly over all of them."""
    # Several pairs of one list ask the same question.
    asked = list({group.prompt.tobytes(): i for i, group in reversed(list(enumerate(groups)))}.values())[::-1]
    count = min(len(asked), count)
    return [asked[i * len(asked) // count] for i in range(count)]


def are_lists(groups: Sequence[Group]) -> bool:
    """Whether some group has more than two completions: then all are lists, shorter ones too."""
    return any(len(group.completions) > 2 for group in groups)


def as_pairs(groups: Sequence[Group], how: ListPairs) -> list[Group]:
    """Groups of two completions from ranked lists, the better one first, list by list, each with its list's weight.

    Completions with equal scores are no pair, so that a list can yield none.
    """
    pairs = []
    for group in groups:
        for i, j in _places(len(group.completions), how):
            scores = None if group.scores is None else (group.scores[i], group.scores[j])
            if scores is None or scores[0] > scores[1]:
                two = (group.completions[i], group.completions[j])
                pairs.append(replace(group, completions=two, scores=scores))
    return pairs


def _places(size: int, how: ListPairs) -> list[tuple[int, int]]:
    if how is ListPairs.best_vs_worst:
        return [(0, size - 1)]
    if how is ListPairs.best_vs_rest:
        return [(0, j) for j in range(1, size)]
    return list(combinations(range(size), 2))


def as_rows(groups: Sequence[Group]) -> list[Group]:
    """One labelled row per completion: all chosen ones, then all rejected ones. Labelled rows stay as they are.

    In this order the neighbour of a row answers another prompt, which a mismatched baseline (KTO) relies on.
    """
    if any(group.labels is not None for group in groups):
        return list(groups)
    return [
        Group(group.prompt, (group.completions[k],), labels=(k == 0,), weight=group.weight, source=group.source)
        for k in range(2)
        for group in groups
    ]
