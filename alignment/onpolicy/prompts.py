"""The prompts that the policy answers in rounds, and the order in which they come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from alignment.data.conversations.trajectories import readable
from alignment.data.rows.row import Row
from alignment.data.rows.sequences import Picked
from alignment.evaluation.judges.base import Item
from alignment.types import Group, MadeOnDemand


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt of the training data.

    Attributes:
        group: the first group of the data with this prompt.
        row: the row that the group was made of.
    """

    group: Group
    row: Row

    @property
    def gold(self) -> np.ndarray | None:
        """(G,) int32, the data's own answer to it; None where that is an undesirable one."""
        labels = self.group.labels
        return self.group.completions[0] if labels is None or labels[0] else None

    def item(self, *answers: str) -> Item:
        """What a judge is asked of these answers."""
        return Item(readable(self.row.prompt), answers, self.row.meta, self.row.source)


class Prompts(MadeOnDemand[Prompt]):
    """The different prompts of the training groups, in their order; their texts are read when they are asked for.

    Args:
        groups: of the training.
        rows: that these were made of.

    Attributes:
        groups: the first one with each prompt.
    """

    def __init__(self, groups: Sequence[Group], rows: Sequence[Row]) -> None:
        first: dict[bytes, int] = {}
        for place, group in enumerate(groups):
            first.setdefault(hashlib.blake2b(group.prompt.tobytes(), digest_size=16).digest(), place)
        self.groups = Picked(groups, [*first.values()])
        places = {row.source: place for place, row in enumerate(rows)}
        self._rows = Picked(rows, [places[group.source] for group in self.groups])

    def __len__(self) -> int:
        return len(self.groups)

    def item(self, place: int) -> Prompt:
        """See `MadeOnDemand`."""
        return Prompt(self.groups[place], self._rows[place])


def shuffled(count: int, seed: int, position: int) -> Iterator[tuple[int, int]]:
    """Numbers below `count` from a position of an endless order on, each once, with the position behind it.

    The endless order has all numbers in one random order, then in another one, and so on. What comes again where two of
    them meet is passed over.
    """
    met: set[int] = set()
    while len(met) < count:
        epoch, place = divmod(position, count)
        for number in np.random.default_rng((seed, epoch)).permutation(count)[place:].tolist():
            position += 1
            if number not in met:
                met.add(number)
                yield number, position
