"""Every loss and every option of it, for the tests of what all losses promise."""

from alignment.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    DPOP,
    EXO,
    FDPO,
    GPO,
    IPO,
    KTO,
    LDDPO,
    LNDPO,
    NCA,
    NLL,
    ODPO,
    OPD,
    ORPO,
    RDPO,
    RPO,
    SPPO,
    TDPO1,
    TDPO2,
    TPO,
    TPOL,
    WPO,
    AllPairs,
    AlphaDPO,
    AlphaPO,
    AOTUnpaired,
    APODown,
    APOZero,
    APOZeroUnpaired,
    BCOPair,
    BestVsRest,
    BetaDPO,
    BradleyTerry,
    CalDPO,
    CPOSimPO,
    DiscoPOP,
    Hinge,
    InfoNCA,
    LiPO,
    MallowsPO,
    Mixture,
    NCAList,
    PlackettLuce,
    RePO,
    RobustDPO,
    SamPO,
    SimPO,
    SLiCHF,
    SPPOSoft,
    TrOPD,
)
from alignment.losses.f_dpo import Divergence
from alignment.losses.gpo import Shape
from alignment.losses.ipo import Reduction
from alignment.losses.nll import NLLReduction, NLLScope
from alignment.losses.opd import Credit
from alignment.losses.tropd import Outliers

TOKENS = {"nll_reduction": NLLReduction.token_mean, "nll_scope": NLLScope.response}
SEQUENCES = {"nll_reduction": NLLReduction.sequence_mean, "nll_scope": NLLScope.response}
WITH_PROMPTS = {"nll_reduction": NLLReduction.token_mean, "nll_scope": NLLScope.prompt_and_response}

EXAMPLES = {
    "dpo": DPO(beta=0.1, label_smoothing=0.0),
    "cdpo": DPO(beta=0.1, label_smoothing=0.1),
    "ipo_mean": IPO(tau=0.1, reduction=Reduction.mean),
    "ipo_sum": IPO(tau=0.1, reduction=Reduction.sum),
    "simpo": SimPO(beta=2.0, gamma_beta_ratio=0.55),
    **{
        f"orpo_{reduction.name}_{scope.name}": ORPO(lam=0.1, nll_reduction=reduction, nll_scope=scope)
        for reduction in NLLReduction
        for scope in NLLScope
    },
    **{
        f"nll_{reduction.name}_{scope.name}": NLL(nll_reduction=reduction, nll_scope=scope)
        for reduction in NLLReduction
        for scope in NLLScope
    },
    "cpo": CPO(beta=0.1, lam=1.0, label_smoothing=0.0, **TOKENS),
    "cpo_smoothed": CPO(beta=0.1, lam=1.0, label_smoothing=0.1, **WITH_PROMPTS),
    "cpo_simpo": CPOSimPO(beta=10.0, gamma_beta_ratio=0.54, alpha=0.05, **TOKENS),
    "cpo_simpo_prompts": CPOSimPO(beta=10.0, gamma_beta_ratio=0.54, alpha=0.05, **WITH_PROMPTS),
    "rpo": RPO(beta=0.1, alpha=1.0, **TOKENS),
    "rpo_prompts": RPO(beta=0.1, alpha=1.0, **WITH_PROMPTS),
    "tpo": TPO(beta=0.1, alpha=1.0, **TOKENS),
    "tpo_prompts": TPO(beta=0.1, alpha=1.0, **WITH_PROMPTS),
    "tpo_l": TPOL(beta=2.0, gamma_beta_ratio=0.8, alpha=0.05, **TOKENS),
    "tpo_l_prompts": TPOL(beta=2.0, gamma_beta_ratio=0.8, alpha=0.05, **WITH_PROMPTS),
    "odpo": ODPO(beta=0.5, alpha=0.7),
    "mallows_po": MallowsPO(beta=0.1, dispersion=0.29),
    "sppo_soft": SPPOSoft(beta=1e-3, score_scale=1.5),
    "kto": KTO(beta=0.1, desirable_weight=1.33, undesirable_weight=0.7),
    "robust_dpo": RobustDPO(beta=0.1, flip_rate=0.2),
    "hinge": Hinge(beta=0.05),
    **{f"gpo_{shape.name}": GPO(beta=0.3, shape=shape) for shape in Shape},
    "ln_dpo": LNDPO(beta=5.0),
    "r_dpo": RDPO(beta=0.1, alpha=0.03),
    "dpop": DPOP(beta=0.3, lam=50.0),
    "cal_dpo": CalDPO(beta=0.05),
    **{
        f"f_dpo_{divergence.name}": FDPO(beta=0.1, divergence=divergence, alpha=None)
        for divergence in (Divergence.forward_kl, Divergence.jensen_shannon)
    },
    "f_dpo_alpha": FDPO(beta=0.1, divergence=Divergence.alpha, alpha=0.3),
    "discopop": DiscoPOP(beta=0.05, tau=0.05),
    "exo": EXO(beta=0.5, epsilon=1e-3),
    "nca": NCA(beta=0.1),
    "sppo": SPPO(beta=0.05),
    "apo_zero": APOZero(beta=0.1),
    "apo_down": APODown(beta=0.1),
    "apo_zero_unpaired": APOZeroUnpaired(beta=0.1, desirable_weight=1.33, undesirable_weight=0.7),
    "bco_pair": BCOPair(beta=0.1),
    "bco": BCO(beta=0.1, density_weights=False),
    "beta_dpo": BetaDPO(beta=0.1, alpha=0.6, dropped_share=0.4, decay=0.9),
    "beta_dpo_all_kept": BetaDPO(beta=0.1, alpha=0.6, dropped_share=0.0, decay=0.9),
    "alpha_dpo": AlphaDPO(beta=2.5, gamma_beta_ratio=0.6, alpha=0.2, decay=0.9),
    "alphapo": AlphaPO(beta=2.5, gamma_beta_ratio=0.1, alpha=0.25),
    "alphapo_0": AlphaPO(beta=2.5, gamma_beta_ratio=0.1, alpha=0.0),
    "repo": RePO(gamma=2.0),
    "slic_hf": SLiCHF(delta=50.0, lam=0.1),
    "ld_dpo": LDDPO(beta=0.1, alpha=0.5),
    "sampo": SamPO(beta=0.1),
    "tdpo1": TDPO1(beta=0.1),
    "tdpo2": TDPO2(beta=0.1, alpha=0.5),
    "wpo": WPO(beta=0.01),
    "aot": AOT(beta=0.1, label_smoothing=0.0),
    "aot_smoothed": AOT(beta=0.1, label_smoothing=0.1),
    "aot_unpaired": AOTUnpaired(beta=0.1, label_smoothing=0.0),
    "aot_unpaired_smoothed": AOTUnpaired(beta=0.1, label_smoothing=0.1),
    "plackett_luce": PlackettLuce(beta=0.1),
    "best_vs_rest": BestVsRest(beta=0.1),
    "all_pairs": AllPairs(beta=0.1),
    "infonca": InfoNCA(beta=0.1, alpha=0.3),
    "nca_list": NCAList(beta=0.1, alpha=0.3),
    "lipo": LiPO(beta=0.1, scale=2.0),
    "bradley_terry": BradleyTerry(centring=0.0, margin=0.0),
    "bradley_terry_margin": BradleyTerry(centring=0.0, margin=0.5),
    **{f"opd_{credit.name}": OPD(coef=0.7, credit=credit) for credit in Credit},
    **{f"tropd_{o.name}": TrOPD(coef=0.7, outliers=o, top_k=8, renormalise=False) for o in Outliers},
    "mixture": Mixture(
        weights={"dpo": 0.8, "kto": 0.3, "nll": 1.0},
        settings={
            "dpo": DPO(beta=0.1, label_smoothing=0.0),
            "kto": KTO(beta=0.1, desirable_weight=1.33, undesirable_weight=0.7),
            "nll": NLL(nll_reduction=NLLReduction.token_mean, nll_scope=NLLScope.prompt_and_response),
        },
    ),
    "mixture_of_rows": Mixture(
        weights={"nll": 0.0, "kto": 1.0},
        settings={
            "nll": NLL(nll_reduction=NLLReduction.sequence_mean, nll_scope=NLLScope.response),
            "kto": KTO(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
        },
    ),
    "mixture_of_a_step": Mixture(
        weights={"aot": 0.5, "bco": 0.2},
        settings={"aot": AOT(beta=0.1, label_smoothing=0.0), "bco": BCO(beta=0.1, density_weights=False)},
    ),
}
ENUMS = {
    "reduction": Reduction,
    "shape": Shape,
    "divergence": Divergence,
    "nll_reduction": NLLReduction,
    "nll_scope": NLLScope,
    "credit": Credit,
}
