"""Compute the public functions in plain torch; read this first. It materialises all logits and uses torch's gradients.

This is the oracle of the tests: given float64 inputs it computes in float64 throughout (float32 for all others). It
shares with the fast path only ``objectives`` and ``pair_loss``, which turn sums into a loss. Sequences are processed
one by one, and nothing is planned, grouped or reused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .objectives import Objective, make_objective
from .pair_loss import InSPOOutput, PairTerms
from .row_sums import checked_statistics


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    temperature: float = 1.0,
    statistics: Iterable[str] = (),
) -> Any:
    """Return per-token log-probs: hidden (..., H), weight (V, H), targets (...) -> (...), 0 where ignored.

    With ``statistics``, return a pair: the log-probs and {name: (...)}, detached.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        scored = targets != ignore_index
        # Positions that are not scored must not matter, even if they hold NaN.
        logits = hidden.to(dtype).masked_fill(~scored.unsqueeze(-1), 0.0) @ weight.to(dtype).T
        if bias is not None:
            logits = logits + bias.to(dtype)
        logits = logit_scale * logits
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        labels = targets.masked_fill(~scored, 0)
        logps = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        logps = torch.where(scored, logps, 0.0)
        if not (names := checked_statistics(statistics)):
            return logps
        found = {name: _statistic(name, logits.detach(), labels).masked_fill(~scored, 0) for name in names}
        return logps, found


def _statistic(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    if name == "entropy":
        return torch.special.entr(logits.softmax(-1)).sum(-1)
    if name == "mean_logit":
        return logits.mean(-1)
    if name == "is_top1":
        return (logits == logits.amax(-1, keepdim=True)).int().argmax(-1) == labels
    if name == "logsumexp":
        return logits.logsumexp(-1)
    return (2 * logits.log_softmax(-1)).logsumexp(-1)  # log_sum_sq_probs


def pair_sums(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ref_logps: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_pairs: int | None = None,
    marginal_labels: Tensor | None = None,
    statistics: Iterable[str] = (),
    **head: Any,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return tables (kinds, B): summed log-probs in float64, scored tokens, and summed statistics by name.

    ``head``: bias, softcap and logit_scale, as for ``linear_logps``.
    """
    names = checked_statistics(statistics)
    if segment_ids is None:
        sequences: list[Any] = list(range(len(hidden)))
        if cu_seqlens is not None:
            bounds = cu_seqlens.tolist()
            sequences = [slice(start, stop) for start, stop in zip(bounds, bounds[1:])]
        count, has_marginals = len(sequences) // 2, marginal_labels is not None
    else:
        if num_pairs is None:
            assert ref_logps is not None
            num_pairs = len(ref_logps) // 2
        count = num_pairs
        has_marginals = bool(((segment_ids >= 2 * count) & (labels != ignore_index)).any())

    def rows_of(kind: int, pair: int) -> tuple[Tensor, Tensor]:
        """Return hidden states and labels of a segment; kinds are numbered as in ``pair_loss.KINDS``."""
        if segment_ids is not None:
            own = segment_ids == kind * count + pair
            return hidden[own], labels[own]
        # The alternative of the rejected response's sequence is y_w, and the other way round.
        sequence = sequences[pair + count * (kind in (1, 2))]
        scored = labels if kind < 2 or marginal_labels is None else marginal_labels
        h, y = hidden[sequence], scored[sequence]
        return (h[:-1], y[1:]) if shift else (h, y)

    def columns(hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of log-probs, the number of scored tokens, and the sum of each statistic."""
        options: dict[str, Any] = {"ignore_index": ignore_index, "statistics": names or ("logsumexp",)}
        logps, found = linear_logps(hidden, weight, labels, **options, **head)
        return torch.stack([c.double().sum() for c in (logps, labels != ignore_index, *(found[n] for n in names))])

    table = [
        torch.stack([columns(*rows_of(kind, pair)) for pair in range(count)])
        for kind in range(4 if has_marginals else 2)
    ]
    sums, lengths, *found = torch.stack(table).unbind(-1)
    return sums, lengths.detach().long(), dict(zip(names, (one.detach() for one in found)))


def fused_inspo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: str | Objective = "dpo",
    ref_logps: Tensor | None = None,
    marginal_weight: float = 0.0,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
    **inputs: Any,
) -> InSPOOutput:
    """Compute ``inspo_kernels.fused_inspo_loss`` without its checks and speed options: same output, nothing fused.

    ``inputs``: the other arguments of ``pair_sums``.
    """
    sums, lengths, statistics = pair_sums(hidden, weight, labels, ref_logps=ref_logps, **inputs)
    terms = PairTerms(
        objective=make_objective(objective),
        ref_logps=None if ref_logps is None else ref_logps.detach().to(sums.device, torch.float64),
        pair_weights=None if pair_weights is None else pair_weights.detach().to(sums.device, torch.float64),
        marginal_weight=marginal_weight,
        mean=reduction == "mean",
    )
    losses = terms.losses(terms.sums(sums, lengths.double()))
    loss = terms.reduce(losses).to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return InSPOOutput.build(loss, losses.detach(), sums.detach(), lengths, terms, statistics)
