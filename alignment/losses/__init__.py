"""The registry of losses: name -> class."""

from alignment.losses.alphapo import AlphaPO
from alignment.losses.aot import AOT, AOTUnpaired
from alignment.losses.apo import APODown, APOZero
from alignment.losses.base import Loss, LossInputs, LossOutput, Quantity, Requirements, StepTotals
from alignment.losses.bco_pair import BCOPair
from alignment.losses.cal_dpo import CalDPO
from alignment.losses.discopop import DiscoPOP
from alignment.losses.dpo import DPO
from alignment.losses.dpop import DPOP
from alignment.losses.exo import EXO
from alignment.losses.f_dpo import FDPO
from alignment.losses.gpo import GPO, Hinge
from alignment.losses.ipo import IPO
from alignment.losses.kto import KTO
from alignment.losses.ld_dpo import LDDPO
from alignment.losses.ln_dpo import LNDPO
from alignment.losses.mixture import Mixture
from alignment.losses.nca import NCA
from alignment.losses.orpo import ORPO
from alignment.losses.r_dpo import RDPO
from alignment.losses.repo import RePO
from alignment.losses.robust_dpo import RobustDPO
from alignment.losses.sampo import SamPO
from alignment.losses.simpo import SimPO
from alignment.losses.slic_hf import SLiCHF
from alignment.losses.sppo import SPPO
from alignment.losses.tdpo import TDPO1, TDPO2
from alignment.losses.wpo import WPO

_ALL: tuple[type[Loss], ...] = (
    DPO,
    IPO,
    SimPO,
    ORPO,
    KTO,
    RobustDPO,
    Hinge,
    GPO,
    LNDPO,
    RDPO,
    DPOP,
    CalDPO,
    FDPO,
    DiscoPOP,
    EXO,
    NCA,
    SPPO,
    APOZero,
    APODown,
    BCOPair,
    AlphaPO,
    RePO,
    SLiCHF,
    LDDPO,
    SamPO,
    TDPO1,
    TDPO2,
    WPO,
    AOT,
    AOTUnpaired,
)

LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in _ALL}

__all__ = [
    "AOT",
    "DPO",
    "DPOP",
    "EXO",
    "FDPO",
    "GPO",
    "IPO",
    "KTO",
    "LDDPO",
    "LNDPO",
    "LOSSES",
    "NCA",
    "ORPO",
    "RDPO",
    "SPPO",
    "TDPO1",
    "TDPO2",
    "WPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "AlphaPO",
    "BCOPair",
    "CalDPO",
    "DiscoPOP",
    "Hinge",
    "Loss",
    "LossInputs",
    "LossOutput",
    "Mixture",
    "Quantity",
    "RePO",
    "Requirements",
    "RobustDPO",
    "SLiCHF",
    "SamPO",
    "SimPO",
    "StepTotals",
]
