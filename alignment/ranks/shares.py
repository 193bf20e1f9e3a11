"""How groups are shared among ranks: as even in tokens as can be, and the completions of a prompt together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alignment.types import Group


def families(groups: Sequence[Group]) -> list[tuple[int, list[int]]]:
    """(tokens, indices) of the groups with the same prompt, whose tokens count once; the largest first."""
    found: dict[bytes, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group.prompt.tobytes(), []).append(index)
    sized = [
        (len(groups[members[0]].prompt) + sum(len(c) for i in members for c in groups[i].completions), members)
        for members in found.values()
    ]
    return sorted(sized, key=lambda family: (-family[0], family[1]))


def evenly(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices for each of `count` ranks: the largest first, each to the rank with the least so far."""
    loads = [0] * count
    shares: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = min(range(count), key=lambda k: (loads[k], k))
        loads[rank] += sizes[index]
        shares[rank].append(index)
    return shares


def share_groups(groups: Sequence[Group], count: int) -> list[list[int]]:
    """For each of `count` ranks the indices of its groups, ascending; some shares may be empty."""
    found = families(groups)
    shares = evenly([tokens for tokens, _ in found], count)
    return [sorted(index for number in share for index in found[number][1]) for share in shares]


def in_rounds(groups: Sequence[Group], tokens: int) -> Iterator[list[int]]:
    """The groups in rounds of about so many tokens, families whole and of similar size, the largest first."""
    members: list[int] = []
    total = 0
    for size, family in families(groups):
        members += family
        total += size
        if total >= tokens:
            yield members
            members, total = [], 0
    if members:
        yield members


def largest_share(groups: int, count: int) -> int:
    """About how many of a step's groups one of `count` ranks has at most, where their lengths are not known."""
    return groups if count == 1 else min(groups, -(-groups // count) + 1)
