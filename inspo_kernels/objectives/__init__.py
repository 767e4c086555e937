"""Turn the summed log-probs of a pair into its loss.

An objective is plain torch on the float64 vectors of ``PairSums``. It does not know where the log-probs come from: the
same object serves conditioned pairs, plain pairs and marginals, on every backend. To add an objective, subclass
``Objective``. To give it a name, add the class to ``OBJECTIVES``.

Notation: L = log pi(y | x, other response) summed over the tokens of y, R = log pi_ref(y | x), |y| = scored tokens,
a = L - R, and the margin m = beta (a_chosen - a_rejected).
"""

from .base import Objective, PairSums
from .margin import AOT, DPO, EXO, IPO, RDPO, AOTUnpaired, DiscoPOP, Hinge, IPOMean, Robust, SigmoidNorm
from .pointwise import BCO, NCA, SPPO, APODown, APOZero, OneSided
from .reference_free import ORPO, SFT, SimPO
from .registry import OBJECTIVES, Mixture, make_objective

__all__ = [
    "AOT",
    "BCO",
    "DPO",
    "EXO",
    "IPO",
    "NCA",
    "OBJECTIVES",
    "ORPO",
    "RDPO",
    "SFT",
    "SPPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "DiscoPOP",
    "Hinge",
    "IPOMean",
    "Mixture",
    "Objective",
    "OneSided",
    "PairSums",
    "Robust",
    "SigmoidNorm",
    "SimPO",
    "make_objective",
]
