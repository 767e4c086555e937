"""The sums that every objective reads, its base class, and checks of its parameters."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..arguments import finite, positive


@dataclass(frozen=True)
class PairSums:
    """Hold the per-pair sums that an objective reads. Every field has shape (pairs,), float64, on the same device.

    - ``chosen``, ``rejected``: summed log-probs in nats, each conditioned on the other response.
    - ``ref_*``: the reference model's sums; None without ``ref_logps``.
    - ``*_len``: counts of scored tokens.
    - ``marginal_*``: sums and counts of the same responses given the prompt alone; None if no marginals are scored.
    - ``*_len_mean``: mean of that count over all pairs of the batch, the same number in every entry; None if the
      given pairs are the whole batch.
    - ``index`` (int64): the pair's position in the batch.
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
    chosen_len_mean: Tensor | None = None
    rejected_len_mean: Tensor | None = None
    marginal_chosen_len_mean: Tensor | None = None
    marginal_rejected_len_mean: Tensor | None = None

    def on_marginals(self) -> PairSums:
        """Return the sums given the prompt alone: marginals replace ``chosen`` and ``rejected``."""
        assert self.marginal_chosen is not None
        names = [f"{kind}{suffix}" for kind in ("chosen", "rejected") for suffix in ("", "_len", "_len_mean")]
        return dataclasses.replace(self, **{name: getattr(self, f"marginal_{name}") for name in names})

    def clone(self) -> PairSums:
        """Copy every tensor, still attached to the graph, so that writing to the copy changes nothing here."""
        copies = {name: value.clone() for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(self, **copies)


# The operators for torch.compile take no objects: they get an objective's id and look it up here.
LIVE: weakref.WeakValueDictionary[int, Objective] = weakref.WeakValueDictionary()


class Objective:
    """Base of all objectives: subclass it and write ``__call__(self, s: PairSums) -> losses`` of shape (pairs,).

    Each loss must depend on its own pair alone, because pairs arrive in several groups. Set ``batch_coupled = True`` to
    get all pairs of the batch in one call. Class attributes say what the objective reads:

    - ``needs_reference``: ``ref_logps`` must be given.
    - ``needs_marginals``: ``marginal_labels`` (or marginal segments) must be given.
    - ``gradient_fields``: the sums that the loss is differentiated in. Other sums are computed without gradient work.
      If the loss depends on such a sum, the call raises an error instead of returning a wrong gradient.

    A parameter inside the objective gets no gradient; if it requires a gradient, the call raises an error.
    """

    needs_reference: bool = True
    needs_marginals: bool = False
    batch_coupled: bool = False
    gradient_fields: tuple[str, ...] = ("chosen", "rejected", "marginal_chosen", "marginal_rejected")

    def __new__(cls, *args: Any, **kwargs: Any) -> Objective:
        self = super().__new__(cls)
        LIVE[id(self)] = self
        return self

    def __call__(self, s: PairSums) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, s: PairSums) -> losses (pairs,)")

    def rewards(self, s: PairSums) -> tuple[Tensor, Tensor]:
        """Return implicit rewards of chosen and rejected responses, (pairs,) each: beta (L - R), or beta L without R.

        ``beta`` is the objective's attribute of that name, or 1 if it has no such attribute.
        """
        beta = getattr(self, "beta", 1.0)
        chosen, rejected = (s.chosen, s.rejected) if s.ref_chosen is None else self._advantages(s)
        return beta * chosen, beta * rejected

    def differentiated(self, marginals: bool) -> tuple[str, ...]:
        """Return the ``gradient_fields`` that a call differentiates; ``marginals``: whether the call scores marginals.

        Marginals count only if the objective needs them. Override this if the objective chooses between two sums.
        """
        return tuple(f for f in self.gradient_fields if self.needs_marginals or not f.startswith("marginal_"))

    def _advantages(self, s: PairSums) -> tuple[Tensor, Tensor]:
        """Return a_chosen and a_rejected, each L - R."""
        assert s.ref_chosen is not None and s.ref_rejected is not None
        return s.chosen - s.ref_chosen, s.rejected - s.ref_rejected


class Preset(Objective):
    """Base of the named objectives: frozen dataclasses whose parameters are checked by their names."""

    gradient_fields: tuple[str, ...] = ("chosen", "rejected")
    # Allowed values of parameters, by name.
    _choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("beta", "tau"):
                positive(name, value)
            elif name in ("gamma", "alpha", "lam") and finite(name, value) < 0:
                raise ValueError(f"{name} must be zero or positive, got {value!r}")
            elif name == "label_smoothing" and not 0 <= finite(name, value) < 0.5:  # more would reverse the preference
                raise ValueError(f"{name} must be in [0, 0.5), got {value!r}")
            elif name == "divergence_alpha":
                finite(name, value)
            elif name in self._choices and value not in self._choices[name]:
                allowed = " or ".join(f'"{choice}"' for choice in self._choices[name])
                raise ValueError(f"{name}={value!r}: must be {allowed}")


def logistic(margin: Tensor, flipped: float = 0.0) -> Tensor:
    """Return -(1 - flipped) log sigma(margin) - flipped log sigma(-margin), as log sigma(-m) = log sigma(m) - m."""
    losses = -F.logsigmoid(margin)
    # Without the condition, 0 times the infinite margin of an impossible response would be NaN.
    return losses + flipped * margin if flipped else losses
