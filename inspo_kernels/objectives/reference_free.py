"""Objectives that use the policy's log-probs alone and no reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import PairSums, Preset


@dataclass(frozen=True)
class SimPO(Preset):
    """-log sigma(beta L_c/|c| - beta L_r/|r| - gamma), no reference (arXiv 2405.14734). Rewards: beta L/|y|."""

    beta: float = 2.0
    gamma: float = 1.0
    needs_reference = False

    def __call__(self, s: PairSums) -> Tensor:
        chosen, rejected = self.rewards(s)
        return -F.logsigmoid(chosen - rejected - self.gamma)

    def rewards(self, s: PairSums) -> tuple[Tensor, Tensor]:
        return self.beta * (s.chosen / s.chosen_len), self.beta * (s.rejected / s.rejected_len)


@dataclass(frozen=True)
class ORPO(Preset):
    """-SFT/|c| + lam (-log sigma(logit p_c - logit p_r)), log p = L/|y|, no reference (arXiv 2403.07691).

    SFT is log pi(y_c | x): the marginal with ``sft="marginal"``, or L_c with ``sft="chosen"``. Plain rows have no
    marginals and need ``sft="chosen"``. Rewards: lam L/|y|.
    """

    lam: float = 1.0
    sft: str = "marginal"
    needs_reference = False
    gradient_fields = ("chosen", "rejected", "marginal_chosen")
    _choices: ClassVar = {"sft": ("marginal", "chosen")}

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
class SFT(Preset):
    """-S divided by the batch's mean |c|: fits the chosen response, S = log pi(y_c | x); no reference.

    As in TRL's ``sft``, the mean of these losses is the mean over all chosen tokens of the batch, not over responses.
    S is the marginal (``sft="marginal"``) or L_c (``sft="chosen"``). The default, "auto", takes the marginal if the
    call scores marginals, and L_c otherwise. Do not use "auto" if only some calls score marginals. ``beta`` affects
    the rewards only: beta (L - R), or beta L without a reference.
    """

    beta: float = 0.1
    sft: str = "auto"
    needs_reference = False
    gradient_fields = ("chosen", "marginal_chosen")
    _choices: ClassVar = {"sft": ("auto", "marginal", "chosen")}

    @property
    def needs_marginals(self) -> bool:  # type: ignore[override]  # depends on the instance here
        return self.sft == "marginal"

    def differentiated(self, marginals: bool) -> tuple[str, ...]:
        return ("marginal_chosen",) if self.sft == "marginal" or (self.sft == "auto" and marginals) else ("chosen",)

    def __call__(self, s: PairSums) -> Tensor:
        if self.sft == "marginal" or (self.sft == "auto" and s.marginal_chosen is not None):
            s = s.on_marginals()
        return -s.chosen / (s.chosen_len.mean() if s.chosen_len_mean is None else s.chosen_len_mean)
