"""Compute fused log-probs and pairwise preference losses, with each response conditioned on the other response.

``fused_inspo_loss`` turns hidden states and an LM head into a loss, ``linear_logps`` into per-token log-probs.
``condition_pairs`` lays out the sequences. ``hidden_and_head`` returns a transformers model's hidden states and LM
head. ``reference`` holds the same mathematics in plain torch.
"""

from . import reference
from .fused_loss import InSPOLoss, fused_inspo_loss
from .groups import gathered
from .layouts.conditioning import condition_pairs
from .layouts.preference_batch import condition_batch
from .logps import linear_logps, pair_logps
from .memory import workspace_bytes
from .models import hidden_and_head
from .models.tree_models import tree_attention_mask, tree_unsupported
from .objectives import Mixture, Objective, PairSums
from .objectives.margin import AOT, DPO, EXO, IPO, RDPO, AOTUnpaired, DiscoPOP, Hinge, IPOMean, Robust, SigmoidNorm
from .objectives.pointwise import BCO, NCA, SPPO, APODown, APOZero, OneSided
from .objectives.reference_free import ORPO, SFT, SimPO
from .pair_loss import InSPOOutput
from .workspace import release_workspace

__version__ = "0.1.0"

__all__ = [
    "AOT",
    "BCO",
    "DPO",
    "EXO",
    "IPO",
    "NCA",
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
    "InSPOLoss",
    "InSPOOutput",
    "Mixture",
    "Objective",
    "OneSided",
    "PairSums",
    "Robust",
    "SigmoidNorm",
    "SimPO",
    "condition_batch",
    "condition_pairs",
    "fused_inspo_loss",
    "gathered",
    "hidden_and_head",
    "linear_logps",
    "pair_logps",
    "reference",
    "release_workspace",
    "tree_attention_mask",
    "tree_unsupported",
    "workspace_bytes",
]
