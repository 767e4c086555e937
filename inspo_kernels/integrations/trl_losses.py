"""Turn TRL's loss options into this package's objectives."""

from __future__ import annotations

from typing import Any

from ..objectives import SFT, Mixture, Objective, make_objective

# TRL's loss_type -> name of the objective, where the two differ.
_NAMES = {"sigmoid": "dpo", "ipo": "ipo_mean"}
_OPTIONS = {
    "sigmoid": ("beta", "divergence"),
    "hinge": ("beta", "divergence"),
    "ipo": ("tau", "divergence"),
    "exo_pair": ("beta", "label_smoothing", "divergence"),
    "nca_pair": ("beta",),
    "robust": ("beta", "label_smoothing", "divergence"),
    "bco_pair": ("beta",),
    "sppo_hard": ("beta",),
    "aot": ("beta", "label_smoothing"),
    "aot_unpaired": ("beta", "label_smoothing"),
    "apo_zero": ("beta",),
    "apo_down": ("beta",),
    "discopop": ("beta", "discopop_tau", "divergence"),
    "sft": (),
    "sigmoid_norm": ("beta", "divergence"),
}
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
    if loss_type not in _OPTIONS:
        raise ValueError(f"loss_type {loss_type!r} has no fused objective; there are {', '.join(_OPTIONS)}")
    if args.f_divergence_type not in _DIVERGENCES:
        raise ValueError(f"f_divergence_type {args.f_divergence_type!r}: must be one of {', '.join(_DIVERGENCES)}")
    values = {
        "beta": {"beta": args.beta},
        "tau": {"tau": args.beta},
        "discopop_tau": {"tau": args.discopop_tau},
        "label_smoothing": {"label_smoothing": args.label_smoothing},
        "divergence": {
            "divergence": _DIVERGENCES[args.f_divergence_type],
            "divergence_alpha": args.f_alpha_divergence_coef,
        },
    }
    parameters: dict[str, Any] = {}
    for option in _OPTIONS[loss_type]:
        parameters |= values[option]
    return make_objective(_NAMES.get(loss_type, loss_type), **parameters)
