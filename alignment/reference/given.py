"""Reference log-probs that rank 0 has, where another rank works on some of their groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from alignment.types import Group, RaggedLogps

LOGPS, ENTROPIES = 0, 1
"""Rows of the values that are kept of a completion; the second only where entropies are asked for."""


class GivenReference:
    """Looks up what came with the groups.

    Attributes:
        values: (1 or 2, tokens) of each completion, by its key.
    """

    def __init__(self) -> None:
        self.values: Mapping[bytes, np.ndarray] = {}

    def logps(self, groups: Sequence[Group]) -> RaggedLogps:
        """Log-probs of all completions, in order."""
        return self._known(groups, LOGPS)

    def entropies(self, groups: Sequence[Group]) -> RaggedLogps:
        """The same for entropies."""
        return self._known(groups, ENTROPIES)

    def _known(self, groups: Sequence[Group], row: int) -> RaggedLogps:
        keys = [key for group in groups for key in group.keys()]  # noqa: SIM118
        return RaggedLogps.from_sequences([torch.from_numpy(self.values[key][row]) for key in keys])
