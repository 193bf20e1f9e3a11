"""The registry of losses: name -> class."""

from alignment.losses.all_pairs import AllPairs
from alignment.losses.alpha_dpo import AlphaDPO
from alignment.losses.alphapo import AlphaPO
from alignment.losses.aot import AOT, AOTUnpaired
from alignment.losses.apo import APODown, APOZero
from alignment.losses.base import Loss, LossInputs, LossOutput, Requirements, StepTotals
from alignment.losses.bco import BCO
from alignment.losses.bco_pair import BCOPair
from alignment.losses.beta_dpo import BetaDPO
from alignment.losses.cal_dpo import CalDPO
from alignment.losses.cpo import CPO, CPOSimPO
from alignment.losses.discopop import DiscoPOP
from alignment.losses.dpo import DPO
from alignment.losses.dpop import DPOP
from alignment.losses.exo import EXO
from alignment.losses.f_dpo import FDPO
from alignment.losses.gpo import GPO, Hinge
from alignment.losses.infonca import InfoNCA, NCAList
from alignment.losses.ipo import IPO
from alignment.losses.kto import KTO
from alignment.losses.ld_dpo import LDDPO
from alignment.losses.lipo import LiPO
from alignment.losses.ln_dpo import LNDPO
from alignment.losses.mallows_po import MallowsPO
from alignment.losses.mixture import Mixture
from alignment.losses.nca import NCA
from alignment.losses.nll import NLL
from alignment.losses.odpo import ODPO
from alignment.losses.orpo import ORPO
from alignment.losses.plackett_luce import BestVsRest, PlackettLuce
from alignment.losses.r_dpo import RDPO
from alignment.losses.repo import RePO
from alignment.losses.robust_dpo import RobustDPO
from alignment.losses.rpo import RPO
from alignment.losses.sampo import SamPO
from alignment.losses.simpo import SimPO
from alignment.losses.slic_hf import SLiCHF
from alignment.losses.sppo import SPPO, SPPOSoft
from alignment.losses.tdpo import TDPO1, TDPO2
from alignment.losses.tpo import TPO, TPOL
from alignment.losses.wpo import WPO
from alignment.types import Quantity

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
    BCO,
    BetaDPO,
    AlphaDPO,
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
    NLL,
    CPO,
    CPOSimPO,
    RPO,
    TPO,
    TPOL,
    ODPO,
    MallowsPO,
    SPPOSoft,
    Mixture,
    PlackettLuce,
    BestVsRest,
    AllPairs,
    InfoNCA,
    NCAList,
    LiPO,
)

LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in _ALL}

__all__ = [
    "AOT",
    "BCO",
    "CPO",
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
    "NLL",
    "ODPO",
    "ORPO",
    "RDPO",
    "RPO",
    "SPPO",
    "TDPO1",
    "TDPO2",
    "TPO",
    "TPOL",
    "WPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "AllPairs",
    "AlphaDPO",
    "AlphaPO",
    "BCOPair",
    "BestVsRest",
    "BetaDPO",
    "CPOSimPO",
    "CalDPO",
    "DiscoPOP",
    "Hinge",
    "InfoNCA",
    "LiPO",
    "Loss",
    "LossInputs",
    "LossOutput",
    "MallowsPO",
    "Mixture",
    "NCAList",
    "PlackettLuce",
    "Quantity",
    "RePO",
    "Requirements",
    "RobustDPO",
    "SLiCHF",
    "SPPOSoft",
    "SamPO",
    "SimPO",
    "StepTotals",
]
