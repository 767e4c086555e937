"""From summed log-probs of a pair to its loss: every objective's mathematics, once.

An objective is plain torch on the float64 vectors of a :class:`PairSums`. Nothing here knows where the log-probs came
from: the same object serves the conditioned pair, its plain twin and the marginals, on every backend. To add one,
subclass :class:`Objective`; to give it a name, add the class to ``OBJECTIVES``.

Notation: L = log pi(y | x, other response) summed over the tokens of y, R = log pi_ref(y | x), |y| = scored tokens,
a = L - R, and the margin m = beta (a_chosen - a_rejected).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import finite, nearest


@dataclass(frozen=True)
class PairSums:
    """What an objective may look at: one entry per pair, every field of shape (pairs,), float64 on one device.

    ``chosen`` and ``rejected`` are summed log-probs, each conditioned on the other response; ``ref_*`` the reference
    model's (``None`` without ``ref_logps``); ``*_len`` counts of scored tokens; ``marginal_*`` the sums and counts for
    the same responses given the prompt alone (``None`` where no marginals are scored); ``index`` (int64) the pair's
    position in the batch.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor
    index: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    marginal_chosen: Tensor | None = None
    marginal_rejected: Tensor | None = None
    marginal_chosen_len: Tensor | None = None
    marginal_rejected_len: Tensor | None = None

    def on_marginals(self) -> PairSums:
        """The same pairs scored without the alternative: marginals take the place of ``chosen`` and ``rejected``."""
        assert self.marginal_chosen is not None and self.marginal_rejected is not None
        assert self.marginal_chosen_len is not None and self.marginal_rejected_len is not None
        return dataclasses.replace(
            self,
            chosen=self.marginal_chosen,
            rejected=self.marginal_rejected,
            chosen_len=self.marginal_chosen_len,
            rejected_len=self.marginal_rejected_len,
        )


# torch.compile's operators take no objects: they get an objective's id and find it here.
_LIVE: weakref.WeakValueDictionary[int, Objective] = weakref.WeakValueDictionary()


class Objective:
    """Base of all objectives: subclass it and write ``__call__(self, s: PairSums) -> losses`` of shape (pairs,).

    Each loss may depend on its own pair alone, because pairs arrive in several groups; set ``batch_coupled = True`` to
    get all pairs of the batch in one call instead. Class attributes say what the objective reads:

    - ``needs_reference``: ``ref_logps`` must be given.
    - ``needs_marginals``: ``marginal_labels`` (or marginal segments) must be given.
    - ``gradient_fields``: the sums that the loss is differentiated in. Sums left out are computed without gradient
      work; an objective that turns out to depend on one of them is an error, not a wrong gradient.

    Parameters of the objective itself get no gradient; one that requires it is an error.
    """

    needs_reference: bool = True
    needs_marginals: bool = False
    batch_coupled: bool = False
    gradient_fields: tuple[str, ...] = ("chosen", "rejected", "marginal_chosen", "marginal_rejected")

    def __new__(cls, *args: Any, **kwargs: Any) -> Objective:
        self = super().__new__(cls)
        _LIVE[id(self)] = self
        return self

    def __call__(self, s: PairSums) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, s: PairSums) -> losses (pairs,)")

    def rewards(self, s: PairSums) -> tuple[Tensor, Tensor]:
        """Implicit rewards of the chosen and rejected responses, (pairs,) each: beta (L - R), or beta L without R.

        ``beta`` is the objective's own attribute of that name, 1 if it has none.
        """
        beta = getattr(self, "beta", 1.0)
        if s.ref_chosen is None or s.ref_rejected is None:
            return beta * s.chosen, beta * s.rejected
        return beta * (s.chosen - s.ref_chosen), beta * (s.rejected - s.ref_rejected)

    def _advantages(self, s: PairSums) -> tuple[Tensor, Tensor]:
        """a_chosen and a_rejected, L - R each."""
        assert s.ref_chosen is not None and s.ref_rejected is not None
        return s.chosen - s.ref_chosen, s.rejected - s.ref_rejected


def _positive(name: str, value: float) -> None:
    if finite(name, value) <= 0:
        raise ValueError(f"{name} must be positive, got {value!r}")


def _at_least_zero(name: str, value: float) -> None:
    if finite(name, value) < 0:
        raise ValueError(f"{name} must be zero or positive, got {value!r}")


@dataclass(frozen=True)
class DPO(Objective):
    """-(1 - eps) log sigma(m) - eps log sigma(-m), m = beta (a_chosen - a_rejected), eps = ``label_smoothing``.

    Direct preference optimization (arXiv 2305.18290); on conditioned sequences InSPO-DPO (arXiv 2512.23126).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        if not 0 <= finite("label_smoothing", self.label_smoothing) < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing!r}")

    def __call__(self, s: PairSums) -> Tensor:
        a_chosen, a_rejected = self._advantages(s)
        margin = self.beta * (a_chosen - a_rejected)
        losses = -F.logsigmoid(margin)
        if self.label_smoothing:  # else 0 times an infinite margin, of an impossible response, would be NaN
            losses = losses + self.label_smoothing * margin  # as log sigma(-m) = log sigma(m) - m
        return losses


@dataclass(frozen=True)
class OneSided(Objective):
    """-log sigma(-beta a_rejected): only the rejected response, given the chosen one (arXiv 2512.23126, formula 22)."""

    beta: float = 0.1
    gradient_fields = ("rejected", "marginal_rejected")

    def __post_init__(self) -> None:
        _positive("beta", self.beta)

    def __call__(self, s: PairSums) -> Tensor:
        _, a_rejected = self._advantages(s)
        return -F.logsigmoid(-self.beta * a_rejected)


@dataclass(frozen=True)
class IPO(Objective):
    """(a_chosen - a_rejected - 1/(2 tau))^2: identity PO (arXiv 2310.12036). Rewards: tau (L - R)."""

    tau: float = 0.1

    def __post_init__(self) -> None:
        _positive("tau", self.tau)

    @property
    def beta(self) -> float:
        return self.tau

    def __call__(self, s: PairSums) -> Tensor:
        a_chosen, a_rejected = self._advantages(s)
        return (a_chosen - a_rejected - 1 / (2 * self.tau)).square()


@dataclass(frozen=True)
class SimPO(Objective):
    """-log sigma(beta L_c/|c| - beta L_r/|r| - gamma), no reference (arXiv 2405.14734). Rewards: beta L/|y|."""

    beta: float = 2.0
    gamma: float = 1.0
    needs_reference = False

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _at_least_zero("gamma", self.gamma)

    def __call__(self, s: PairSums) -> Tensor:
        chosen, rejected = self.rewards(s)
        return -F.logsigmoid(chosen - rejected - self.gamma)

    def rewards(self, s: PairSums) -> tuple[Tensor, Tensor]:
        return self.beta * (s.chosen / s.chosen_len), self.beta * (s.rejected / s.rejected_len)


@dataclass(frozen=True)
class RDPO(Objective):
    """-log sigma(m + alpha (|c| - |r|)): length-regularised DPO (arXiv 2403.19159). Rewards: beta (L - R)."""

    beta: float = 0.1
    alpha: float = 0.01

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _at_least_zero("alpha", self.alpha)

    def __call__(self, s: PairSums) -> Tensor:
        a_chosen, a_rejected = self._advantages(s)
        margin = self.beta * (a_chosen - a_rejected)
        return -F.logsigmoid(margin + self.alpha * (s.chosen_len - s.rejected_len))


@dataclass(frozen=True)
class ORPO(Objective):
    """-SFT/|c| + lam (-log sigma(logit p_c - logit p_r)), log p = L/|y|, no reference (arXiv 2403.07691).

    SFT is log pi(y_c | x): the marginal (``sft="marginal"``), or L_c (``sft="chosen"``, the plain twin, which has no
    marginals). Rewards: lam L/|y|.
    """

    lam: float = 1.0
    sft: str = "marginal"
    needs_reference = False
    gradient_fields = ("chosen", "rejected", "marginal_chosen")

    def __post_init__(self) -> None:
        _at_least_zero("lam", self.lam)
        if self.sft not in ("marginal", "chosen"):
            raise ValueError(f'sft={self.sft!r}: must be "marginal" or "chosen"')

    @property
    def needs_marginals(self) -> bool:  # type: ignore[override]  # depends on the instance here
        return self.sft == "marginal"

    def __call__(self, s: PairSums) -> Tensor:
        sft = s.marginal_chosen if self.sft == "marginal" else s.chosen
        log_odds = self._logit(s.chosen / s.chosen_len) - self._logit(s.rejected / s.rejected_len)
        assert sft is not None
        return -sft / s.chosen_len - self.lam * F.logsigmoid(log_odds)

    def rewards(self, s: PairSums) -> tuple[Tensor, Tensor]:
        return self.lam * (s.chosen / s.chosen_len), self.lam * (s.rejected / s.rejected_len)

    @staticmethod
    def _logit(log_p: Tensor) -> Tensor:
        # log(p / (1 - p)); the clamp keeps p = 1 finite and far from where expm1 would lose its digits.
        return log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-12)))


@dataclass(frozen=True)
class Hinge(Objective):
    """max(0, 1 - m): the hinge of SLiC-HF (arXiv 2305.10425) on the DPO margin. Rewards: beta (L - R)."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        _positive("beta", self.beta)

    def __call__(self, s: PairSums) -> Tensor:
        a_chosen, a_rejected = self._advantages(s)
        return (1 - self.beta * (a_chosen - a_rejected)).relu()


OBJECTIVES: Mapping[str, type[Objective]] = {
    "dpo": DPO,
    "one_sided": OneSided,
    "ipo": IPO,
    "simpo": SimPO,
    "rdpo": RDPO,
    "orpo": ORPO,
    "hinge": Hinge,
}


def find_objective(name_or_id: str) -> Objective:
    """The objective of that name, or the live instance whose id this is, in digits."""
    return _LIVE[int(name_or_id)] if name_or_id.isdecimal() else make_objective(name_or_id)


def make_objective(objective: str | Objective, **parameters: Any) -> Objective:
    """The objective called ``objective`` (a key of ``OBJECTIVES``) with ``parameters``, or the instance itself.

    Raises ``ValueError`` for an unknown name or a parameter that the objective does not take, naming the nearest one.
    """
    if isinstance(objective, Objective):
        if parameters:
            raise ValueError("parameters go with an objective's name; an instance already has its own")
        fields, possible = objective.gradient_fields, Objective.gradient_fields
        if not isinstance(fields, tuple) or not set(fields) <= set(possible):
            names = ", ".join(map(repr, possible))
            raise ValueError(f"{type(objective).__name__}.gradient_fields must be a tuple of {names}; got {fields!r}")
        return objective
    if not isinstance(objective, str):
        raise TypeError(
            f"objective must be a name ({', '.join(OBJECTIVES)}) or an Objective instance, got {objective!r}"
            + (": call the class to make one" if isinstance(objective, type) else "")
        )
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}{nearest(objective, OBJECTIVES)}")
    cls = OBJECTIVES[objective]
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # every named one is a dataclass
    for name in parameters:
        if name not in known:
            raise ValueError(f"objective {objective!r} takes no {name!r}{nearest(name, known)}")
    return cls(**parameters)
