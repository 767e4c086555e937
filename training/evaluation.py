"""Metrics of held-out pairs with 95% intervals, conditioned and from the prompt alone; warnings; sample answers.

Every run, plain ones included, is scored in the conditioned layout. Its two sequences give both kinds of log-probs, so
runs with and without conditioning are compared on the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import inspo_kernels as ik

from .answers import answer_text, continue_prompts
from .config import TrainConfig
from .errors import InputError, Log
from .pairs import Pair
from .scoring import TIE, PairModel, Scores, correct, pair_metrics

Z95 = 1.959964
# Nats per token: below it, responses are clearly less likely after the other response than after the prompt.
CONDITIONING_GAP_WARNING = -0.25
FALL = -0.1  # nats per token that both responses lose
TOGETHER = 0.5  # share of the rejected responses' fall by which the chosen ones fall, too
PREFERENCE = 0.15  # share of pairs by which longer responses win more often than they are the chosen ones
REMEDY = "Lower learning_rate, or set marginal_weight (0.1 to 1)."


def evaluate(
    scores: Scores,
    ref_logps: Tensor | None,
    pairs: Sequence[Pair],
    config: TrainConfig,
) -> dict[str, Any]:
    """Compute the metrics of conditioned ``scores``: those of training, and those of inference (``marginal``).

    ``ref_logps`` (2, n) are the reference log-probs of the run. If they are conditioned, two more rows hold those given
    the prompt alone.

    Keys: ``eval_loss`` (the run's own loss), and for layout in ``conditioned``, ``marginal``:
    ``eval_LAYOUT/rewards/{chosen,rejected,accuracies,margins}``, ``eval_LAYOUT/logps/{chosen,rejected}`` and, in nats
    per token, ``eval_LAYOUT/logps_per_token/{chosen,rejected}``. Accuracies, margins and log-probs per token have a 95%
    interval under the same name + ``_ci``, in which pairs that share a prompt are one cluster. Accuracy counts ties as
    half.

    ``eval_marginal/longer_preferred`` (+ ``_ci``): the share of pairs whose longer response has the larger reward;
    ``eval_longer_chosen``: the share whose longer response is the chosen one. Both are absent if all lengths are equal.
    """
    assert scores.marginal_logps is not None
    refs = (None, None) if ref_logps is None else (ref_logps[:2], ref_logps[-2:])
    both, alone = _sums(scores, scores.logps, refs[0]), _sums(scores, scores.marginal_logps, refs[1])
    objective = config.make_objective()
    losses = objective(both if config.sees_alternative else alone)
    if config.marginal_weight:
        losses = losses + config.marginal_weight * objective(alone)
    metrics: dict[str, Any] = {"eval_loss": losses.mean().item()}

    prompts: dict[tuple[int, ...], int] = {}
    groups = torch.tensor([prompts.setdefault(tuple(p.prompt), len(prompts)) for p in pairs])
    for layout, sums in (("conditioned", both), ("marginal", alone)):
        columns = pair_metrics(*objective.rewards(sums), sums.chosen, sums.rejected) | {
            "logps_per_token/chosen": sums.chosen / sums.chosen_len,
            "logps_per_token/rejected": sums.rejected / sums.rejected_len,
        }
        for name, values in columns.items():
            metrics[f"eval_{layout}/{name}"] = values.mean().item()
            if name in INTERVALS:
                metrics[f"eval_{layout}/{name}_ci"] = INTERVALS[name](values, groups)
    longer = (scores.lengths[0] - scores.lengths[1]).sign()
    if (unequal := longer != 0).any():
        preferred = correct(columns["rewards/margins"] * longer)[unequal]  # of the marginal layout, the last one
        metrics["eval_marginal/longer_preferred"] = preferred.mean().item()
        metrics["eval_marginal/longer_preferred_ci"] = proportion_interval(preferred, groups[unequal])
        metrics["eval_longer_chosen"] = (longer[unequal] > 0).double().mean().item()
    return metrics


def _sums(scores: Scores, logps: Tensor, ref_logps: Tensor | None) -> ik.PairSums:
    """Return what an objective takes; the marginal log-probs are there in any case."""
    assert scores.marginal_logps is not None
    ref_chosen, ref_rejected = (None, None) if ref_logps is None else ref_logps
    return ik.PairSums(
        chosen=logps[0],
        rejected=logps[1],
        chosen_len=scores.lengths[0],
        rejected_len=scores.lengths[1],
        index=torch.arange(logps.shape[1]),
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        marginal_chosen=scores.marginal_logps[0],
        marginal_rejected=scores.marginal_logps[1],
        marginal_chosen_len=scores.lengths[0],
        marginal_rejected_len=scores.lengths[1],
    )


def is_better(row: dict[str, Any], best: dict[str, Any] | None) -> bool:
    """Return whether an evaluation beats the best one so far: by accuracy from the prompt alone, then by margin.

    The loss and the conditioned metrics do not count: they can look perfect while answers from the prompt alone get
    worse. Accuracy comes first because it is bounded: a few pairs with huge margins cannot decide. The untrained model
    is no candidate.
    """
    keys = ("eval_marginal/rewards/accuracies", "eval_marginal/rewards/margins")
    return row["step"] > 0 and (best is None or [row[key] for key in keys] > [best[key] for key in keys])


def conditioning_gap(scores: Scores) -> tuple[float, float]:
    """Return the mean of (log pi(y|x,other) - log pi(y|x)) / |y|, nats per token, of chosen and rejected responses."""
    assert scores.marginal_logps is not None
    chosen, rejected = ((scores.logps - scores.marginal_logps) / scores.lengths).mean(1).tolist()
    return chosen, rejected


def sample_answers(
    module: PairModel,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: set[int],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Answer each prompt (token ids) greedily, up to an id in ``ends``: texts, length in tokens, whether it ended.

    All ranks call this with the same prompts and do the same work: sharded weights are gathered layer by layer.
    """
    positions = getattr(module.config, "max_position_embeddings", None) or math.inf
    samples = []
    for prompt in prompts:  # one at a time: a handful needs no padding
        most = int(min(max_new_tokens, positions - len(prompt)))
        (answer,) = continue_prompts(module.model, [prompt], ends, most, generate=module.generate)
        asked, said = (answer_text(ids, tokenizer) for ids in (prompt, answer))
        samples.append({"prompt": asked, "answer": said, "tokens": len(answer), "ended": answer[-1] in ends})
    return samples


def mean_interval(values: Tensor, groups: Tensor) -> list[float] | None:
    """Return the 95% interval of a mean, robust to dependence within groups; None if there is one group."""
    if len(groups.unique()) < 2:
        return None
    mean, half = values.mean().item(), Z95 * math.sqrt(_variance_of_mean(values, groups))
    return [mean - half, mean + half]


def proportion_interval(right: Tensor, groups: Tensor) -> list[float]:
    """Return the 95% Wilson interval of a share; dependence within groups reduces the observations it counts."""
    p, size = right.mean().item(), float(len(right))
    count = len(groups.unique())
    if count < 2 or p in (0.0, 1.0):
        size = count  # how much more than one observation a group is worth is unknown
    elif (variance := _variance_of_mean(right, groups)) > p * (1 - p) / size:
        size = p * (1 - p) / variance
    scale = 1 + Z95**2 / size
    middle = (p + Z95**2 / (2 * size)) / scale
    half = Z95 / scale * math.sqrt(p * (1 - p) / size + Z95**2 / (4 * size**2))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def _variance_of_mean(values: Tensor, groups: Tensor) -> float:
    _, numbers = groups.unique(return_inverse=True)
    count = int(numbers.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, numbers, values - values.mean())
    return (sums.square().sum() / len(values) ** 2 * count / (count - 1)).item()


INTERVALS: dict[str, Callable[[Tensor, Tensor], list[float] | None]] = {
    "rewards/accuracies": proportion_interval,
    "rewards/margins": mean_interval,
    "logps_per_token/chosen": mean_interval,
    "logps_per_token/rejected": mean_interval,
}


def starting_report(
    scores: Scores, ref_logps: Tensor | None, config: TrainConfig, log: Log, *, coarse: bool = False
) -> None:
    """Report how the untrained model takes the conditioned layout, from its ``scores`` of the first pairs.

    Raises InputError if ``ref_logps`` (2, n) are not this model's own. ``coarse``: they are rounded as in bfloat16.
    """
    assert scores.marginal_logps is not None
    if ref_logps is not None:
        expected = scores.logps if config.reference_sees_alternative else scores.marginal_logps
        drift = ((expected - ref_logps) / scores.lengths).abs().max().item()
        if not drift < (0.05 if coarse or config.bf16 else 1e-3):
            raise InputError(
                f"the reference differs from the model by {drift:.2g} nats a token; delete the file reference-*"
            )
    if not config.sees_alternative:
        return
    chosen, rejected = conditioning_gap(scores)
    log(f"before step 1, log pi(y|x,other) - log pi(y|x) per token: chosen {chosen:+.3f}, rejected {rejected:+.3f}")
    if ref_logps is not None and not config.reference_sees_alternative:
        log("the reference does not see the other response, so the first loss is not that of identical models")
    if min(chosen, rejected) < CONDITIONING_GAP_WARNING:
        log(
            "WARNING: the model finds a response less likely after the other response than right after the prompt.\n"
            "What it learns there may fail to improve answers from the prompt alone, or make them worse. Watch the\n"
            "metrics of the prompt alone. Set marginal_weight, or first fit the model to prompt + draft + answer."
        )


def warnings(row: dict[str, Any], first: dict[str, Any]) -> dict[str, str]:
    """Return signs that answers from the prompt alone get worse, by kind, each beyond the noise of its interval.

    ``row`` is an evaluation, ``first`` the evaluation before step 1.
    """
    found = {"opposite": _opposite_margins(row), "falling": _falling(row, first)}
    found["longer preferred"] = _longer_preferred(row, first)
    return {kind: text for kind, text in found.items() if text}


def _opposite_margins(row: dict[str, Any]) -> str | None:
    """Warn if the conditioned margin is positive and the margin from the prompt alone negative."""
    conditioned, alone = (f"eval_{layout}/rewards/margins" for layout in ("conditioned", "marginal"))
    around, around_alone = row.get(f"{conditioned}_ci"), row.get(f"{alone}_ci")
    if not around or not around_alone or not (around[0] > TIE and around_alone[1] < -TIE):
        return None
    return (
        f"given the other response the margin is {row[conditioned]:+.3f}, but from the prompt alone, which\n"
        f"inference uses, it is {row[alone]:+.3f}: there the model prefers the rejected responses. {REMEDY}\n"
        "Or fit the base to prompt + draft + answer sequences first."
    )


def _falling(row: dict[str, Any], first: dict[str, Any]) -> str | None:
    """Warn if both responses' log-probs from the prompt alone have fallen since the start."""
    name = "eval_marginal/logps_per_token/"
    now, then = row.get(f"{name}chosen_ci"), first.get(f"{name}chosen_ci")
    if not now or not then or now[1] >= then[0]:
        return None
    chosen, rejected = (row[name + kind] - first[name + kind] for kind in ("chosen", "rejected"))
    if max(chosen, rejected) >= FALL or chosen > TOGETHER * rejected:
        return None
    return (
        "from the prompt alone, the log-probs of both responses fall together (held-out pairs, nats per token\n"
        f"since the start: chosen {chosen:+.3f}, rejected {rejected:+.3f}): probability goes to answers that are\n"
        f"neither. {REMEDY}"
    )


def _longer_preferred(row: dict[str, Any], first: dict[str, Any]) -> str | None:
    """Warn if longer responses win clearly more often than they are chosen, and than before training."""
    name = "eval_marginal/longer_preferred"
    if name not in row or row["step"] == first["step"]:
        return None
    expected = max(row["eval_longer_chosen"], first[name])
    if row[name] < expected + PREFERENCE or row[f"{name}_ci"][0] < expected:
        return None
    return (
        f"from the prompt alone, the model prefers the longer response in {row[name]:.0%} of the held-out\n"
        f"pairs, but it is the chosen one in {row['eval_longer_chosen']:.0%} (before training preferred in "
        f"{first[name]:.0%}): it may be\nlearning length. Objectives that account for it are simpo and rdpo."
    )
