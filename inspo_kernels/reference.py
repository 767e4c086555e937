"""The same mathematics in plain torch, to be read first: every logit materialised, every gradient torch's own.

This is the oracle of the tests: given float64 inputs it computes in float64 throughout (float32 for all others). It
shares what turns sums into a loss with the fast path (``objectives`` and ``pair_loss``) and nothing else: sequences are
cut out one by one, and nothing is planned, grouped or reused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .objectives import Objective, make_objective
from .pair_loss import InSPOOutput, PairTerms


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Per-token log-probs: hidden (..., H), weight (V, H), targets (...) -> (...), 0 where ignored."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        scored = targets != ignore_index
        # What lies elsewhere must not matter, not even NaN.
        logits = hidden.to(dtype).masked_fill(~scored.unsqueeze(-1), 0.0) @ weight.to(dtype).T
        if bias is not None:
            logits = logits + bias.to(dtype)
        logits = logit_scale * logits
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        labels = targets.masked_fill(~scored, 0)
        logps = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return torch.where(scored, logps, 0.0)


def fused_inspo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: str | Objective = "dpo",
    ref_logps: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_pairs: int | None = None,
    marginal_labels: Tensor | None = None,
    marginal_weight: float = 0.0,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
) -> InSPOOutput:
    """``inspo_kernels.fused_inspo_loss`` without its checks and its options of speed: same output, nothing fused."""

    def logps_of(hidden: Tensor, labels: Tensor) -> Tensor:
        return linear_logps(
            hidden, weight, labels, bias=bias, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index
        )

    # table[kind][pair] = (sum of log-probs, scored tokens); kinds: chosen, rejected, marginal chosen, marginal rejected
    if segment_ids is not None:
        if num_pairs is None:
            assert ref_logps is not None
            num_pairs = len(ref_logps) // 2
        logps = logps_of(hidden, labels)
        has_marginals = bool(((segment_ids >= 2 * num_pairs) & (labels != ignore_index)).any())
        table = []
        for kind in range(4 if has_marginals else 2):
            members = [segment_ids == kind * num_pairs + pair for pair in range(num_pairs)]
            table.append([(logps[m].double().sum(), (labels[m] != ignore_index).sum()) for m in members])
    else:
        if cu_seqlens is None:
            cut: list[int | slice] = list(range(len(hidden)))
        else:
            bounds = cu_seqlens.tolist()
            cut = [slice(start, stop) for start, stop in zip(bounds, bounds[1:])]
        num_pairs = len(cut) // 2

        def sequence(index: int, labels: Tensor) -> tuple[Tensor, Tensor]:
            h, y = hidden[cut[index]], labels[cut[index]]
            if shift:
                h, y = h[:-1], y[1:]
            return logps_of(h, y).double().sum(), (y != ignore_index).sum()

        pairs = range(num_pairs)
        table = [[sequence(p, labels) for p in pairs], [sequence(num_pairs + p, labels) for p in pairs]]
        if marginal_labels is not None:
            # The alternative of the rejected response's sequence is y_w, and the other way round.
            table.append([sequence(num_pairs + p, marginal_labels) for p in pairs])
            table.append([sequence(p, marginal_labels) for p in pairs])

    sums = torch.stack([torch.stack([logp for logp, _ in row]) for row in table])
    lengths = torch.stack([torch.stack([count for _, count in row]) for row in table])
    terms = PairTerms(
        objective=make_objective(objective),
        ref_logps=None if ref_logps is None else ref_logps.detach().to(sums.device, torch.float64),
        pair_weights=None if pair_weights is None else pair_weights.detach().to(sums.device, torch.float64),
        marginal_weight=marginal_weight,
        mean=reduction == "mean",
    )
    losses = terms.losses(terms.sums(sums, lengths.double()))
    loss = terms.reduce(losses).to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return InSPOOutput.build(loss, losses.detach(), sums.detach(), lengths, terms)
