"""Weighted sums of objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..arguments import finite
from .base import Objective, PairSums
from .registry import evaluate, make_objective


@dataclass(frozen=True, init=False)
class Mixture(Objective):
    """Sum of weight * objective over ``parts``: ``Mixture([(DPO(), 0.8), ("bco_pair", 0.2), (SFT(), 1.0)])``.

    An objective is a name or an instance, your own included. The mixture needs what any of its parts needs, couples
    the batch if any part does, and reports the rewards of its first part. It corresponds to several entries of TRL's
    ``loss_type`` and ``loss_weights``. Raises ``ValueError`` without parts, or for a weight that is not finite.
    """

    parts: tuple[tuple[Objective, float], ...]

    def __init__(self, parts: Sequence[tuple[str | Objective, float]]) -> None:
        if isinstance(parts, str) or not isinstance(parts, Sequence) or not parts:
            raise ValueError(f"parts must be a list of at least one (objective, weight), got {parts!r}")
        checked = []
        for part in parts:
            if not isinstance(part, Sequence) or isinstance(part, str) or len(part) != 2:
                raise ValueError(f"parts must hold pairs (objective, weight), got {part!r}")
            objective, weight = part
            checked.append((make_objective(objective), finite("a weight in parts", weight)))
        object.__setattr__(self, "parts", tuple(checked))
        for name in ("needs_reference", "needs_marginals", "batch_coupled"):
            object.__setattr__(self, name, any(getattr(part, name) for part, _ in checked))
        fields = {field for part, _ in checked for field in part.gradient_fields}
        object.__setattr__(self, "gradient_fields", tuple(f for f in Objective.gradient_fields if f in fields))

    def differentiated(self, marginals: bool) -> tuple[str, ...]:
        fields = {field for part, _ in self.parts for field in part.differentiated(marginals)}
        return tuple(field for field in self.gradient_fields if field in fields)

    def __call__(self, s: PairSums) -> Tensor:
        first, *others = (weight * evaluate(part, s) for part, weight in self.parts)
        return sum(others, first)

    def rewards(self, s: PairSums) -> tuple[Tensor, Tensor]:
        return self.parts[0][0].rewards(s)
