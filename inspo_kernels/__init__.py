"""inspo_kernels: fused log-probs and pairwise preference losses, each response conditioned on the other one.

``fused_inspo_loss`` turns hidden states and an LM head into a loss, ``linear_logps`` into per-token log-probs,
``condition_pairs`` lays out the sequences, ``hidden_and_head`` takes a transformers model apart. ``reference`` holds
the same mathematics in plain torch.
"""

from . import reference
from .conditioning import condition_pairs
from .fused_loss import InSPOLoss, fused_inspo_loss
from .logps import linear_logps
from .models import hidden_and_head
from .objectives import DPO, IPO, ORPO, RDPO, Hinge, Objective, OneSided, PairSums, SimPO
from .pair_loss import InSPOOutput
from .tree import tree_attention_mask, tree_unsupported

__version__ = "0.1.0"

__all__ = [
    "DPO",
    "IPO",
    "ORPO",
    "RDPO",
    "Hinge",
    "InSPOLoss",
    "InSPOOutput",
    "Objective",
    "OneSided",
    "PairSums",
    "SimPO",
    "condition_pairs",
    "fused_inspo_loss",
    "hidden_and_head",
    "linear_logps",
    "reference",
    "tree_attention_mask",
    "tree_unsupported",
]
