"""Objectives by name, the function that calls any of them, and weighted sums of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..arguments import choice, finite, nearest
from .base import LIVE, Objective, PairSums
from .margin import AOT, DPO, EXO, IPO, RDPO, AOTUnpaired, DiscoPOP, Hinge, IPOMean, Robust, SigmoidNorm
from .pointwise import BCO, NCA, SPPO, APODown, APOZero, OneSided
from .reference_free import ORPO, SFT, SimPO

OBJECTIVES: Mapping[str, type[Objective]] = {
    "dpo": DPO,
    "one_sided": OneSided,
    "ipo": IPO,
    "simpo": SimPO,
    "rdpo": RDPO,
    "orpo": ORPO,
    "hinge": Hinge,
    # TRL's names, except ipo_mean, which is TRL's "ipo", and dpo, which is TRL's "sigmoid"
    "robust": Robust,
    "exo_pair": EXO,
    "nca_pair": NCA,
    "sppo_hard": SPPO,
    "bco_pair": BCO,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "discopop": DiscoPOP,
    "sft": SFT,
    "sigmoid_norm": SigmoidNorm,
    "ipo_mean": IPOMean,
}


# TRL's loss types that have another name here.
_TRL_NAMES = {"sigmoid": "dpo"}


def find_objective(name_or_id: str) -> Objective:
    """Return the objective of that name, or the live instance whose id the digits give."""
    return LIVE[int(name_or_id)] if name_or_id.isdecimal() else make_objective(name_or_id)


def make_objective(objective: str | Objective, **parameters: Any) -> Objective:
    """Return the objective named ``objective`` (a key of ``OBJECTIVES``) with ``parameters``, or the instance itself.

    Raises ``ValueError`` for an unknown name or parameter; the message gives the nearest known name.
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
    if objective in _TRL_NAMES:
        raise ValueError(f"unknown objective {objective!r}: TRL's {objective!r} is {_TRL_NAMES[objective]!r} here")
    cls = OBJECTIVES[choice("objective", objective, OBJECTIVES)]
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # every named one is a dataclass
    for name in parameters:
        if name not in known:
            raise ValueError(f"objective {objective!r} takes no {name!r}{nearest(name, known)}")
    return cls(**parameters)


def evaluate(objective: Objective, s: PairSums) -> Tensor:
    """Return losses (pairs,) in the sums' dtype; raise ``ValueError`` unless there is one number per pair."""
    if not type(objective).__module__.startswith(f"{__package__}."):
        s = s.clone()  # the user's code may write to its input, which must not change the report or the next call
    losses = objective(s)
    if not is_vector(losses, s):
        raise ValueError(
            f"objective {type(objective).__name__} must return one loss per pair, a floating-point tensor of "
            f"shape {tuple(s.chosen.shape)}; got {kind_of(losses)}"
        )
    return losses.to(s.chosen.dtype)


def is_vector(value: Any, s: PairSums) -> bool:
    """Return whether ``value`` is a floating-point tensor with one entry per pair."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == s.chosen.shape


def kind_of(value: Any) -> str:
    """Describe a value in an error message: dtype and shape of a tensor, the type of anything else."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


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
