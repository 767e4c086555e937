"""Objectives that rank the pairs of a batch: each call gets all pairs (``batch_coupled``).

The batch is the pairs of one call of the loss, as in TRL: one micro-batch of one rank. Equal values are ranked by
their position.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import PairSums, Preset, logistic


@dataclass(frozen=True)
class AOT(Preset):
    """-(1 - eps) log sigma(beta (u - v)) - eps log sigma(-beta (u - v)), eps = ``label_smoothing``.

    u = L_c - L_r of the pair. v is the value R_c - R_r whose rank among all pairs equals the rank of this pair's u.
    Alignment via optimal transport, paired (arXiv 2406.05882). TRL orders the same losses by rank. Here each loss
    keeps its pair's position, so that ``pair_weights`` weigh the right pairs. Rewards: beta (L - R).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    batch_coupled = True

    def __call__(self, s: PairSums) -> Tensor:
        assert s.ref_chosen is not None and s.ref_rejected is not None
        margins = s.chosen - s.rejected
        matched = _of_same_rank(s.ref_chosen - s.ref_rejected, margins)
        return logistic(self.beta * (margins - matched), self.label_smoothing)


@dataclass(frozen=True)
class AOTUnpaired(Preset):
    """-(1 - eps) log sigma(beta (a_c - a'_r)) - eps log sigma(-beta (a_c - a'_r)), eps = ``label_smoothing``.

    a'_r is the value L_r - R_r whose rank among the rejected responses equals the rank of this pair's a_c among the
    chosen responses. Alignment via optimal transport, unpaired (arXiv 2406.05882). Each loss has the position of its
    chosen response's pair. Rewards: beta (L - R).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    batch_coupled = True

    def __call__(self, s: PairSums) -> Tensor:
        a_chosen, a_rejected = self._advantages(s)
        return logistic(self.beta * (a_chosen - _of_same_rank(a_rejected, a_chosen)), self.label_smoothing)


def _of_same_rank(values: Tensor, ranked: Tensor) -> Tensor:
    """Return, for each entry of ``ranked``, the entry of ``values`` of the same rank; differentiable in ``values``."""
    ranks = ranked.argsort(stable=True).argsort()
    return values.sort(stable=True).values[ranks]
