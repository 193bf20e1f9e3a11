"""Reference log-probs that rank 0 has, where another rank works on some of their groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from alignment.scoring.head import Likeliest
from alignment.types import Group, RaggedLogps

LOGPS, ENTROPIES = 0, 1
"""Rows of the values that are kept of a completion; the second only where entropies are asked for.

Where the likeliest tokens are, k rows with their log-probs follow the first one, and k rows with their ids.
"""


def likeliest_of(groups: Sequence[Group], values: Mapping[bytes, np.ndarray]) -> Likeliest:
    """The likeliest tokens at all tokens of the completions, in order.

    Args:
        values: (1 + 2 k, tokens) of each completion, by its key.
    """
    blocks = [values[key][1:] for group in groups for key in group.keys()]  # noqa: SIM118
    logps, ids = torch.from_numpy(np.concatenate(blocks, axis=1).T.copy()).chunk(2, dim=1)
    return Likeliest(ids.long(), logps)


class GivenReference:
    """Looks up what came with the groups.

    Attributes:
        values: (rows, tokens) of each completion, by its key.
    """

    def __init__(self) -> None:
        self.values: Mapping[bytes, np.ndarray] = {}

    def logps(self, groups: Sequence[Group]) -> RaggedLogps:
        """Log-probs of all completions, in order."""
        return self._known(groups, LOGPS)

    def entropies(self, groups: Sequence[Group]) -> RaggedLogps:
        """The same for entropies."""
        return self._known(groups, ENTROPIES)

    def likeliest(self, groups: Sequence[Group]) -> Likeliest:
        """The likeliest tokens at all tokens of the completions, in order."""
        return likeliest_of(groups, self.values)

    def _known(self, groups: Sequence[Group], row: int) -> RaggedLogps:
        keys = [key for group in groups for key in group.keys()]  # noqa: SIM118
        return RaggedLogps.from_sequences([torch.from_numpy(self.values[key][row]) for key in keys])
