"""Objectives of the margin, the difference between the scores of the chosen and the rejected response."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import PairSums, Preset, logistic

# TRL's bound on the exponent: a larger coefficient would overflow float32.
_LARGEST_EXPONENT = 80.0


@dataclass(frozen=True, repr=False)
class Divergent(Preset):
    """Base of the objectives that can use another f-divergence from the reference (arXiv 2309.16240).

    f'(t) of t = pi / pi_ref then replaces log t = a = L - R, with alpha = ``divergence_alpha``:

    - "reverse_kl": a, the default
    - "forward_kl": 1 - exp(-a)
    - "js": log 2 + log sigma(a)
    - "alpha": (exp((alpha - 1) a) - 1) / (alpha - 1)

    ``divergence_alpha`` is TRL's ``f_alpha_divergence_coef``, which is 1 minus the paper's alpha. Exponents are clamped
    to 80, as in TRL for "alpha" (but not for "forward_kl"). Above that the loss is constant. Rewards stay beta (L - R).
    """

    divergence: str = field(default="reverse_kl", kw_only=True)
    divergence_alpha: float = field(default=0.5, kw_only=True)
    _choices: ClassVar = {"divergence": ("reverse_kl", "forward_kl", "js", "alpha")}

    def __repr__(self) -> str:
        shown = [f.name for f in dataclasses.fields(self) if not f.kw_only or getattr(self, f.name) != f.default]
        shown.sort(key=lambda name: name.startswith("divergence"))
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def _f_prime(self, log_ratio: Tensor) -> Tensor:
        if self.divergence == "js":
            return math.log(2) + F.logsigmoid(log_ratio)
        power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": self.divergence_alpha - 1}[self.divergence]
        if abs(power) < 1e-6:
            return log_ratio
        return torch.expm1((power * log_ratio).clamp(max=_LARGEST_EXPONENT)) / power

    def _difference(self, s: PairSums, *, per_token: bool = False) -> Tensor:
        """Return f'(pi / pi_ref) of the chosen response minus that of the rejected response, (pairs,)."""
        chosen, rejected = map(self._f_prime, self._advantages(s))
        return chosen / s.chosen_len - rejected / s.rejected_len if per_token else chosen - rejected


@dataclass(frozen=True, repr=False)
class DPO(Divergent):
    """-(1 - eps) log sigma(m) - eps log sigma(-m), m = beta (a_chosen - a_rejected), eps = ``label_smoothing``.

    Direct preference optimization (arXiv 2305.18290); on conditioned sequences, InSPO-DPO (arXiv 2512.23126).
    TRL's ``sigmoid`` is this objective without smoothing: it ignores ``label_smoothing``. Rewards: beta (L - R).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __call__(self, s: PairSums) -> Tensor:
        return logistic(self.beta * self._difference(s), self.label_smoothing)


@dataclass(frozen=True, repr=False)
class Robust(Divergent):
    """(-(1 - eps) log sigma(m) + eps log sigma(-m)) / (1 - 2 eps): robust DPO (arXiv 2403.00409).

    eps = ``label_smoothing`` is the probability that a label is flipped. If it is right, the loss is unbiased. The
    paper suggests 0.1. For eps > 0 the loss falls without bound as m grows. Rewards: beta (L - R).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __call__(self, s: PairSums) -> Tensor:
        eps = self.label_smoothing
        return logistic(self.beta * self._difference(s), -eps / (1 - 2 * eps))


@dataclass(frozen=True, repr=False)
class Hinge(Divergent):
    """max(0, 1 - m): the hinge of SLiC-HF (arXiv 2305.10425) on the DPO margin. Rewards: beta (L - R)."""

    beta: float = 0.1

    def __call__(self, s: PairSums) -> Tensor:
        return (1 - self.beta * self._difference(s)).relu()


@dataclass(frozen=True, repr=False)
class EXO(Divergent):
    """KL(p || q) of p = (sigma(m), sigma(-m)) and q = (1 - eps, eps), eps = ``label_smoothing``: EXO-pref for a pair.

    Efficient exact optimization (arXiv 2402.00856, equation 16). The default eps of 1e-3 is the paper's. TRL refuses
    its own default of 0, because q = 0 has no logarithm. Rewards: beta (L - R).
    """

    beta: float = 0.1
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing == 0:
            raise ValueError("label_smoothing must be above 0 for EXO, which takes its logarithm: 1e-3 is the paper's")

    def __call__(self, s: PairSums) -> Tensor:
        eps = self.label_smoothing
        m = (self.beta * self._difference(s)).clamp(-1e300, 1e300)  # 0 times an infinite logarithm would be NaN
        losses = torch.sigmoid(m) * (F.logsigmoid(m) - math.log1p(-eps))
        return losses + torch.sigmoid(-m) * (F.logsigmoid(-m) - math.log(eps))


@dataclass(frozen=True, repr=False)
class DiscoPOP(Divergent):
    """-(1 - k) log sigma(m) + k exp(-m), k = sigma(m / tau): the log-ratio modulated loss (arXiv 2406.08414).

    It is not monotone: with the default tau it rises for m between -0.12 and 0.07. ``tau`` is TRL's ``discopop_tau``.
    At large negative margins TRL multiplies infinity by 0; this class returns the limit. Rewards: beta (L - R).
    """

    beta: float = 0.1
    tau: float = 0.05

    def __call__(self, s: PairSums) -> Tensor:
        m = self.beta * self._difference(s)
        exponential = torch.exp(F.logsigmoid(m / self.tau) - m)
        return exponential - torch.sigmoid(-m / self.tau) * F.logsigmoid(m)


@dataclass(frozen=True, repr=False)
class SigmoidNorm(Divergent):
    """-log sigma(beta (a_chosen/|c| - a_rejected/|r|)): length-normalised DPO (Tulu 3, arXiv 2411.15124).

    Rewards: beta (L - R), not divided by the length, as TRL reports them.
    """

    beta: float = 0.1

    def __call__(self, s: PairSums) -> Tensor:
        return logistic(self.beta * self._difference(s, per_token=True))


@dataclass(frozen=True)
class IPO(Preset):
    """(a_chosen - a_rejected - 1/(2 tau))^2: identity PO (arXiv 2310.12036). Rewards: tau (L - R)."""

    tau: float = 0.1

    @property
    def beta(self) -> float:
        return self.tau

    def __call__(self, s: PairSums) -> Tensor:
        a_chosen, a_rejected = self._advantages(s)
        return (a_chosen - a_rejected - 1 / (2 * self.tau)).square()


@dataclass(frozen=True, repr=False)
class IPOMean(Divergent):
    """(a_chosen/|c| - a_rejected/|r| - 1/(2 tau))^2: TRL's ``ipo``, whose ``beta`` is tau. Rewards: tau (L - R).

    The IPO paper (arXiv 2310.12036) uses sums, as ``IPO`` does; the mean over tokens is TRL's choice.
    """

    tau: float = 0.1

    @property
    def beta(self) -> float:
        return self.tau

    def __call__(self, s: PairSums) -> Tensor:
        return (self._difference(s, per_token=True) - 1 / (2 * self.tau)).square()


@dataclass(frozen=True)
class RDPO(Preset):
    """-log sigma(m + alpha (|c| - |r|)): length-regularised DPO (arXiv 2403.19159). Rewards: beta (L - R)."""

    beta: float = 0.1
    alpha: float = 0.01

    def __call__(self, s: PairSums) -> Tensor:
        a_chosen, a_rejected = self._advantages(s)
        return logistic(self.beta * (a_chosen - a_rejected) + self.alpha * (s.chosen_len - s.rejected_len))


# Objectives that rank the pairs of a batch: each call gets all pairs (``batch_coupled``). The batch is the pairs of one
# call of the loss, as in TRL: one micro-batch of one rank. Equal values are ranked by their position.


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
