"""Alternative dropout in a run: which pairs of an epoch are laid out plain, and which runs can have such pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from inspo_kernels.layouts.alternative_dropout import checked_dropout, keeps_alternative
from inspo_kernels.objectives import Objective

from .errors import InputError

if TYPE_CHECKING:
    from .config import TrainConfig
    from .scoring import Conditioned


def check_dropout(config: TrainConfig, objective: Objective) -> None:
    """Raise InputError where the option is no probability, or the loss needs marginals, which plain pairs lack."""
    try:
        dropout = checked_dropout(config.alternative_dropout)
    except ValueError as error:
        raise InputError(str(error)) from None
    if not dropout:
        return
    if not config.conditioned:
        raise InputError("alternative_dropout needs conditioned=true: the plain baseline has nothing to drop")
    if config.marginal_weight or objective.needs_marginals:
        cause = "marginal_weight" if config.marginal_weight else f"objective {objective}"
        remedy = "marginal_weight=0" if config.marginal_weight else "sft=chosen or another objective"
        raise InputError(
            f"alternative_dropout: {cause} needs the log-probs given the prompt alone beside the conditioned ones, and "
            f"a dropped pair has no conditioned ones; set {remedy}, or alternative_dropout=0"
        )


def conditioned_pairs(config: TrainConfig, epoch: int, indices: Sequence[int]) -> Conditioned:
    """Return what ``condition_pairs`` takes as ``conditioned`` for the training pairs of ``indices`` in ``epoch``.

    A coin follows from the run's seed, the epoch and the pair: resuming and the number of processes change none.
    """
    if not 0 < config.alternative_dropout < 1:
        return config.sees_alternative
    return [keeps_alternative(config.alternative_dropout, config.seed, epoch, index) for index in indices]
