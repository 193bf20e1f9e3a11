"""The layout of a reward model's passes: only the state at the last token of each completion is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from alignment.scoring.layout import BatchLayout, MicroBatch
from alignment.types import Group

_UNREAD = np.zeros(1, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class EndsLayout:
    """Lays groups out as another layout does, and scores one position of each completion: its last token.

    A completion that ends its turn is followed by what the chat template writes after that, as in the texts that other
    programs make with the template, whose last token they score. One that was cut ends where it was cut.

    Attributes:
        layout: of the passes.
        turn_end: ids of the tokens with which the chat template ends an answer: the end of turn and all after it; empty
            without a template.
    """

    layout: BatchLayout
    turn_end: tuple[int, ...] = ()

    def batches(self, groups: Sequence[Group], tokens_per_batch: int, prompts: bool = False) -> Iterator[MicroBatch]:
        """See `BatchLayout`; the only target of a completion is a token that is not run."""
        assert not prompts, "a reward model scores no prompt"
        for batch in self.layout.batches([self._ended(group) for group in groups], tokens_per_batch):
            yield replace(batch, num_tokens=batch.num_tokens - len(batch.targets))

    def whole(self, completion: np.ndarray) -> np.ndarray:
        """A completion's tokens with those that follow its end of turn."""
        if not self.turn_end or completion[-1] != self.turn_end[0]:
            return completion
        return np.concatenate([completion, np.array(self.turn_end[1:], dtype=np.int32)])

    def _ended(self, group: Group) -> Group:
        # A layout runs all tokens but the last, and reads the state before each token that is scored: so the state at
        # the last token of a completion is read for one more token.
        completions = tuple(np.concatenate([self.whole(tokens), _UNREAD]) for tokens in group.completions)
        last = tuple(np.arange(len(tokens)) == len(tokens) - 1 for tokens in completions)
        return Group(group.prompt, completions, scored=last)
