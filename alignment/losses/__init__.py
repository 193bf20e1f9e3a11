"""The registry of losses: name -> class."""

from alignment.losses.base import Loss, LossInputs, LossOutput

LOSSES: dict[str, type[Loss]] = {}

__all__ = ["LOSSES", "Loss", "LossInputs", "LossOutput"]
