"""The registry of losses: one line per loss, in the order in which lists, tables and pages show them."""

from alignment.losses.base import Loss as Loss
from alignment.losses.base import LossInputs as LossInputs
from alignment.losses.base import LossOutput as LossOutput
from alignment.losses.base import Requirements as Requirements
from alignment.losses.base import StepTotals as StepTotals
from alignment.types import Quantity as Quantity

# isort: off
# `import X as X` tells type checkers that X is meant for you. To add a loss, add its line here.
from alignment.losses.dpo import DPO as DPO
from alignment.losses.ipo import IPO as IPO
from alignment.losses.simpo import SimPO as SimPO
from alignment.losses.orpo import ORPO as ORPO
from alignment.losses.kto import KTO as KTO
from alignment.losses.robust_dpo import RobustDPO as RobustDPO
from alignment.losses.gpo import Hinge as Hinge
from alignment.losses.gpo import GPO as GPO
from alignment.losses.ln_dpo import LNDPO as LNDPO
from alignment.losses.r_dpo import RDPO as RDPO
from alignment.losses.dpop import DPOP as DPOP
from alignment.losses.cal_dpo import CalDPO as CalDPO
from alignment.losses.f_dpo import FDPO as FDPO
from alignment.losses.discopop import DiscoPOP as DiscoPOP
from alignment.losses.exo import EXO as EXO
from alignment.losses.nca import NCA as NCA
from alignment.losses.sppo import SPPO as SPPO
from alignment.losses.apo import APOZero as APOZero
from alignment.losses.apo import APODown as APODown
from alignment.losses.apo import APOZeroUnpaired as APOZeroUnpaired
from alignment.losses.bco_pair import BCOPair as BCOPair
from alignment.losses.bco import BCO as BCO
from alignment.losses.beta_dpo import BetaDPO as BetaDPO
from alignment.losses.alpha_dpo import AlphaDPO as AlphaDPO
from alignment.losses.alphapo import AlphaPO as AlphaPO
from alignment.losses.repo import RePO as RePO
from alignment.losses.slic_hf import SLiCHF as SLiCHF
from alignment.losses.ld_dpo import LDDPO as LDDPO
from alignment.losses.sampo import SamPO as SamPO
from alignment.losses.tdpo import TDPO1 as TDPO1
from alignment.losses.tdpo import TDPO2 as TDPO2
from alignment.losses.wpo import WPO as WPO
from alignment.losses.aot import AOT as AOT
from alignment.losses.aot import AOTUnpaired as AOTUnpaired
from alignment.losses.nll import NLL as NLL
from alignment.losses.cpo import CPO as CPO
from alignment.losses.cpo import CPOSimPO as CPOSimPO
from alignment.losses.rpo import RPO as RPO
from alignment.losses.tpo import TPO as TPO
from alignment.losses.tpo import TPOL as TPOL
from alignment.losses.odpo import ODPO as ODPO
from alignment.losses.mallows_po import MallowsPO as MallowsPO
from alignment.losses.sppo import SPPOSoft as SPPOSoft
from alignment.losses.mixture import Mixture as Mixture
from alignment.losses.plackett_luce import PlackettLuce as PlackettLuce
from alignment.losses.plackett_luce import BestVsRest as BestVsRest
from alignment.losses.all_pairs import AllPairs as AllPairs
from alignment.losses.infonca import InfoNCA as InfoNCA
from alignment.losses.infonca import NCAList as NCAList
from alignment.losses.lipo import LiPO as LiPO
from alignment.losses.bradley_terry import BradleyTerry as BradleyTerry
from alignment.losses.opd import OPD as OPD
from alignment.losses.tropd import TrOPD as TrOPD
# isort: on

LOSSES: dict[str, type[Loss]] = {
    value.name: value
    for value in tuple(globals().values())
    if isinstance(value, type) and issubclass(value, Loss) and "name" in vars(value)
}
"""Key in configurations -> class."""

_MIXTURE_TITLES = {"mpo": "MPO"}


def title(key: str) -> str:
    """The name to show for a loss: as its paper writes it (`simpo`: SimPO); for a loss of your own, the key."""
    return LOSSES[key].title if key in LOSSES else _MIXTURE_TITLES.get(key, key)
