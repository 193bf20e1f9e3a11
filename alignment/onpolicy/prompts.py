"""The prompts that the policy answers in rounds, and the order in which they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from alignment.data.conversations.trajectories import readable
from alignment.data.rows.row import Row
from alignment.errors import UserError
from alignment.evaluation.judges.base import Item
from alignment.types import Group


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


def prompts_of(groups: Sequence[Group], rows: Sequence[Row]) -> list[Prompt]:
    """The different prompts of the training groups, in their order.

    Raises:
        UserError: the rows are too many to be in memory.
    """
    by_source = {row.source: row for row in rows}
    found: dict[bytes, Prompt] = {}
    for group in groups:
        row = by_source.get(group.source)
        if row is None:
            raise UserError(
                "onpolicy reads the text of its prompts, and rows of a set as large as this one do not stay in "
                "memory: set data.limit to 8192 or less."
            )
        found.setdefault(group.prompt.tobytes(), Prompt(group, row))
    return list(found.values())


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
