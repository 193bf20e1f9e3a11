"""The registry of losses: name -> class."""

from alignment.losses.base import Loss, LossInputs, LossOutput
from alignment.losses.dpo import DPO
from alignment.losses.ipo import IPO
from alignment.losses.kto import KTO
from alignment.losses.orpo import ORPO
from alignment.losses.simpo import SimPO

LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (DPO, IPO, SimPO, ORPO, KTO)}

__all__ = ["DPO", "IPO", "KTO", "LOSSES", "ORPO", "Loss", "LossInputs", "LossOutput", "SimPO"]
