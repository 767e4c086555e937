"""Turn TRL's loss options into this package's objectives."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..objectives import OBJECTIVES, SFT, DiscoPOP, Mixture, Objective

_NOT_IN_TRL = {"dpo", "one_sided", "ipo", "ipo_mean", "simpo", "rdpo", "orpo"}
# TRL's loss_type -> name of the objective.
LOSS_TYPES = {"sigmoid": "dpo", "ipo": "ipo_mean"} | {name: name for name in OBJECTIVES if name not in _NOT_IN_TRL}
_DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}


def objective_parts(args: Any) -> list[tuple[Objective, float]]:
    """Return the objective and the weight of each entry of a ``DPOConfig``'s ``loss_type``.

    Raises:
        ValueError: no objective takes the loss type or a value of its options.
    """
    loss_types = args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]
    weights = args.loss_weights or [1.0] * len(loss_types)
    return [(_objective(loss_type, args), weight) for loss_type, weight in zip(loss_types, weights)]


def objective_of(parts: list[tuple[Objective, float]]) -> Objective:
    """Return one objective for all ``parts``."""
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1.0 else Mixture(parts)


def fits_tokens(parts: list[tuple[Objective, float]]) -> bool:
    """Return whether a part is SFT, which fits log pi(y_w | x), the marginal of a conditioned pair."""
    return any(isinstance(objective, SFT) for objective, _ in parts)


def _objective(loss_type: str, args: Any) -> Objective:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type {loss_type!r} has no fused objective; choose from {', '.join(LOSS_TYPES)}")
    if args.f_divergence_type not in _DIVERGENCES:
        raise ValueError(f"f_divergence_type {args.f_divergence_type!r}: must be one of {', '.join(_DIVERGENCES)}")
    cls: Any = OBJECTIVES[LOSS_TYPES[loss_type]]
    values = {
        "beta": args.beta,
        "tau": args.discopop_tau if cls is DiscoPOP else args.beta,
        "label_smoothing": 0.0 if loss_type == "sigmoid" else args.label_smoothing,  # TRL's sigmoid ignores it
        "divergence": _DIVERGENCES[args.f_divergence_type],
        "divergence_alpha": args.f_alpha_divergence_coef,
    }
    return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})
