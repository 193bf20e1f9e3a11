"""Named access to what scoring gives per token: the log-probs and the quantities that a loss asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignment.types import Quantity, to_device


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per-token results as rows of one tensor, so that one pass and one backward pass serve them all.

    Only this class knows which row holds what: first the log-probs, then each quantity in the order of `Quantity`. A
    divergence comes last and brings one more row, the other model's log-probs of the targets. The named fields are
    views: reading one copies nothing.

    Attributes:
        values: (rows, tokens) fp32 or fp64, natural logarithms.
        quantities: the quantities that have a row.
    """

    values: Tensor
    quantities: frozenset[Quantity] = frozenset()

    @classmethod
    def stack(
        cls, logps: Tensor, quantities: Mapping[Quantity, Tensor] | None = None, other_logps: Tensor | None = None
    ) -> TokenScores:
        """Scores from (tokens,) rows; `other_logps` exactly where a divergence is among the quantities."""
        quantities = quantities or {}
        assert (other_logps is not None) == (Quantity.divergence in quantities), "both come from one other model"
        rows = [logps, *(quantities[quantity] for quantity in _ordered(frozenset(quantities)))]
        if other_logps is not None:
            rows.append(other_logps)
        return cls(torch.stack(rows) if len(rows) > 1 else logps[None], frozenset(quantities))

    @property
    def logps(self) -> Tensor:
        """(tokens,) log-probs of the targets."""
        return self.values[0]

    def __getitem__(self, quantity: Quantity) -> Tensor:
        """(tokens,) values of one quantity."""
        return self.values[self._row(quantity)]

    @property
    def other_logps(self) -> Tensor:
        """(tokens,) log-probs of the targets under the model that the divergence is from."""
        return self.values[self._row(Quantity.divergence) + 1]

    def by_quantity(self) -> dict[Quantity, Tensor]:
        """Every quantity with its (tokens,) values."""
        return {quantity: self[quantity] for quantity in _ordered(self.quantities)}

    def select(self, quantities: frozenset[Quantity]) -> TokenScores:
        """The log-probs and only these of the quantities; itself where that is all of them."""
        if quantities == self.quantities:
            return self
        rows = [0, *(self._row(quantity) for quantity in _ordered(quantities))]
        if Quantity.divergence in quantities:
            rows.append(rows[-1] + 1)
        return TokenScores(self.values[rows], quantities)

    def split(self, lengths: Sequence[int]) -> list[TokenScores]:
        """Consecutive ranges of the tokens, as views."""
        return [replace(self, values=values) for values in self.values.split(list(lengths), dim=1)]

    def to(self, device: torch.device | str) -> TokenScores:
        """The same scores on that device."""
        return replace(self, values=to_device(self.values, device))

    def _row(self, quantity: Quantity) -> int:
        return 1 + _ordered(self.quantities).index(quantity)


def _ordered(quantities: frozenset[Quantity]) -> list[Quantity]:
    """In the order in which `Quantity` lists them, the divergence last."""
    return [quantity for quantity in Quantity if quantity in quantities]
