"""Objectives that compare each response with the reference by itself: beta a, a = L - R, is its reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import PairSums, Preset


@dataclass(frozen=True)
class OneSided(Preset):
    """-log sigma(-beta a_rejected): only the rejected response, given the chosen one (arXiv 2512.23126, formula 22)."""

    beta: float = 0.1
    gradient_fields = ("rejected",)

    def __call__(self, s: PairSums) -> Tensor:
        _, a_rejected = self._advantages(s)
        return -F.logsigmoid(-self.beta * a_rejected)


@dataclass(frozen=True)
class NCA(Preset):
    """-log sigma(beta a_chosen) - 1/2 log sigma(-beta a_chosen) - 1/2 log sigma(-beta a_rejected).

    Noise contrastive alignment with two responses (arXiv 2402.05369). Rewards: beta (L - R).
    """

    beta: float = 0.1

    def __call__(self, s: PairSums) -> Tensor:
        chosen, rejected = self.rewards(s)
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@dataclass(frozen=True)
class BCO(Preset):
    """-log sigma(beta a_chosen) - log sigma(-beta a_rejected): binary classifier optimization (arXiv 2404.04656).

    The paper subtracts delta, a running mean of the rewards, from both rewards. Like TRL's ``bco_pair``, this class
    has no delta, so it has no state and does not couple pairs. Rewards: beta (L - R).
    """

    beta: float = 0.1

    def __call__(self, s: PairSums) -> Tensor:
        chosen, rejected = self.rewards(s)
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@dataclass(frozen=True)
class SPPO(Preset):
    """(a_chosen - 1/(2 beta))^2 + (a_rejected + 1/(2 beta))^2: self-play preference optimization (arXiv 2405.00675).

    The paper estimates each response's probability of winning. This class is the hard form, TRL's ``sppo_hard``: the
    probability is 1 for the chosen and 0 for the rejected response. Rewards: beta (L - R).
    """

    beta: float = 0.1

    def __call__(self, s: PairSums) -> Tensor:
        a_chosen, a_rejected = self._advantages(s)
        return (a_chosen - 0.5 / self.beta).square() + (a_rejected + 0.5 / self.beta).square()


@dataclass(frozen=True)
class APOZero(Preset):
    """1 - sigma(beta a_chosen) + sigma(beta a_rejected): anchored PO (arXiv 2408.06266, equation 7).

    Raises the chosen and lowers the rejected response. Use it if the chosen responses are better than the model's own.
    The constant 1 is TRL's, not the paper's; it does not change gradients. Rewards: beta (L - R).
    """

    beta: float = 0.1

    def __call__(self, s: PairSums) -> Tensor:
        chosen, rejected = self.rewards(s)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@dataclass(frozen=True)
class APODown(Preset):
    """sigma(beta a_chosen) + 1 - sigma(beta (a_chosen - a_rejected)): anchored PO (arXiv 2408.06266, equation 8).

    Lowers both responses, and the rejected response more. Use it if the chosen responses are worse than the model's
    own. The constant 1 is TRL's, not the paper's; it does not change gradients. Rewards: beta (L - R).
    """

    beta: float = 0.1

    def __call__(self, s: PairSums) -> Tensor:
        chosen, rejected = self.rewards(s)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
