"""Loss, reward accuracy and margin on pairs, conditioned and given the prompt alone, with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import inspo_kernels as ik

from .config import InputError, TrainConfig
from .data import Pair
from .scoring import Scores, correct

Z95 = 1.959964
# Nats per token: below it, the model takes responses noticeably worse after the other one than right after the prompt.
CONDITIONING_GAP_WARNING = -0.25


def evaluate(
    scores: Scores, ref_logps: Tensor | None, pairs: Sequence[Pair], objective: ik.Objective, *, conditioned: bool,
    marginal_weight: float,
) -> dict[str, Any]:  # fmt: skip
    """Metrics of conditioned ``scores``: what is trained, and what inference uses (``marginal``), for any run.

    Keys: ``eval_loss`` (the run's own loss), and for layout in ``conditioned``, ``marginal``:
    ``eval_LAYOUT/rewards/{chosen,rejected,accuracies,margins}``, ``eval_LAYOUT/logps/{chosen,rejected}``. Accuracies
    and margins have a 95% interval under the same name + ``_ci``, in which pairs that share a prompt are one cluster.
    Accuracy counts ties as half.
    """
    assert scores.marginal_logps is not None
    ref_chosen, ref_rejected = (None, None) if ref_logps is None else ref_logps
    both = ik.PairSums(
        chosen=scores.logps[0], rejected=scores.logps[1],
        chosen_len=scores.lengths[0], rejected_len=scores.lengths[1], index=torch.arange(len(pairs)),
        ref_chosen=ref_chosen, ref_rejected=ref_rejected,
        marginal_chosen=scores.marginal_logps[0], marginal_rejected=scores.marginal_logps[1],
        marginal_chosen_len=scores.lengths[0], marginal_rejected_len=scores.lengths[1],
    )  # fmt: skip
    losses = objective(both if conditioned else both.on_marginals())
    if marginal_weight:
        losses = losses + marginal_weight * objective(both.on_marginals())
    metrics: dict[str, Any] = {"eval_loss": losses.mean().item()}

    prompts: dict[tuple[int, ...], int] = {}
    groups = torch.tensor([prompts.setdefault(tuple(p.prompt), len(prompts)) for p in pairs])
    for layout, sums in (("conditioned", both), ("marginal", both.on_marginals())):
        chosen, rejected = objective.rewards(sums)
        margins = chosen - rejected
        right = correct(margins)
        name = f"eval_{layout}/"
        metrics |= {name + "rewards/chosen": chosen.mean().item(), name + "rewards/rejected": rejected.mean().item()}
        metrics[name + "rewards/accuracies"] = right.mean().item()
        metrics[name + "rewards/accuracies_ci"] = proportion_interval(right, groups)
        metrics[name + "rewards/margins"] = margins.mean().item()
        metrics[name + "rewards/margins_ci"] = mean_interval(margins, groups)
        metrics[name + "logps/chosen"] = sums.chosen.mean().item()
        metrics[name + "logps/rejected"] = sums.rejected.mean().item()
    return metrics


def mean_interval(values: Tensor, groups: Tensor) -> list[float] | None:
    """95% interval of a mean, normal, robust to dependence within groups; None where all values are of one group."""
    if len(groups.unique()) < 2:
        return None
    mean, half = values.mean().item(), Z95 * math.sqrt(_variance_of_mean(values, groups))
    return [mean - half, mean + half]


def proportion_interval(right: Tensor, groups: Tensor) -> list[float]:
    """95% Wilson interval of a share; dependence within groups reduces the number of observations it counts."""
    p, size = right.mean().item(), float(len(right))
    count = len(groups.unique())
    if count < 2 or p in (0.0, 1.0):
        size = count  # nothing tells how much more than one observation a group is worth
    elif (variance := _variance_of_mean(right, groups)) > p * (1 - p) / size:
        size = p * (1 - p) / variance
    scale = 1 + Z95**2 / size
    middle = (p + Z95**2 / (2 * size)) / scale
    half = Z95 / scale * math.sqrt(p * (1 - p) / size + Z95**2 / (4 * size**2))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def _variance_of_mean(values: Tensor, groups: Tensor) -> float:
    count = len(groups.unique())
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, values - values.mean())
    return (sums.square().sum() / len(values) ** 2 * count / (count - 1)).item()


def starting_report(scores: Scores, ref_logps: Tensor | None, config: TrainConfig, log: Callable[[str], None]) -> None:
    """From the untrained model's conditioned ``scores`` of the first pairs: how it takes the conditioned layout.

    Raises InputError if ``ref_logps`` (2, n) are not this model's own.
    """
    assert scores.marginal_logps is not None
    given_other, alone, lengths = scores.logps, scores.marginal_logps, scores.lengths
    if ref_logps is not None:
        expected = given_other if config.reference_conditioned else alone
        drift = ((expected - ref_logps[:, : expected.shape[1]]) / lengths).abs().max().item()
        if not drift < (1e-3 if config.mixed_precision == "no" else 0.05):
            raise InputError(
                f"the reference log-probs differ from the model's by {drift:.2g} a token; delete the file reference-*"
            )
    if not config.conditioned:
        return
    chosen, rejected = ((given_other - alone) / lengths).mean(1).tolist()
    log(f"before step 1, log pi(y|x,other) - log pi(y|x) per token: chosen {chosen:+.3f}, rejected {rejected:+.3f}")
    if ref_logps is not None and not config.reference_conditioned:
        log("the reference does not see the other response, so the first loss differs from that of equal policies")
    if min(chosen, rejected) < CONDITIONING_GAP_WARNING:
        log(
            "WARNING: the model finds a response less likely after the other one than right after the prompt. What it\n"
            "learns there may not carry over to answering from the prompt alone, or hurt it: watch the prompt-alone\n"
            "metrics, fit the model to sequences of the form prompt + draft + answer first, or set marginal_weight."
        )
