"""``fused_inspo_loss``: check, plan, one pass over the head, and a scalar that autograd understands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import layout, passes, reference
from .backends import Backend, resolve_backend
from .first_order import first_order_only
from .head import FLOATS, LMHead, checked_head
from .objectives import Objective, make_objective
from .pair_loss import InSPOOutput, PairTerms


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
    process_group: Any = None,
    max_workspace_bytes: int | None = None,
    backend: str = "auto",
) -> InSPOOutput:
    """Pairwise preference loss of B pairs from hidden states and the LM head, without the logits of all positions.

    Responses are scored conditioned on the other response (InSPO, arXiv 2512.23126) where the sequences are built that
    way, as ``condition_pairs`` does; on plain sequences the same call is DPO, SimPO, ... Only scored positions meet the
    head, losses and gradients come out of one pass over it (6NHV operations for N scored tokens), and memory is a
    workspace instead of the logits. Sums and objectives are float64.

    Three input forms, H the hidden size:

    - rows: hidden (2B, T, H), labels (2B, T). Rows 0..B-1 score the chosen, rows B..2B-1 the rejected responses.
    - packed: hidden (N, H), labels (N,), cu_seqlens (2B+1,) int32; the same 2B sequences one behind another.
    - compact: hidden (N, H) holds the scored rows in any order, labels (N,) their targets (never shifted), segment_ids
      (N,): 0..B-1 chosen, B..2B-1 rejected, 2B..3B-1 marginal chosen, 3B..4B-1 marginal rejected. B is ``num_pairs`` or
      half of ref_logps.

    Args:
        hidden: hidden states after the model's final norm, float16, bfloat16, float32 or float64.
        weight: (V, H) LM head, hidden's dtype (any under autocast, whose dtype the products then use) and device.
        labels: int64 token ids, ``ignore_index`` where not scored; may live on the CPU, which spares a synchronisation.
        objective: a name ("dpo", "one_sided", "ipo", "simpo", "rdpo", "orpo", "hinge") or an ``Objective`` instance.
        ref_logps: (2B,) summed reference log-probs in nats, log pi_ref(y_w | x) of each pair, then log pi_ref(y_l | x).
        bias, softcap, logit_scale: z = logit_scale * (hidden @ weight.T + bias), then softcap * tanh(z / softcap).
        shift: labels are aligned with input_ids: hidden[t] predicts labels[t+1] of the same sequence.
        marginal_labels: like labels, scoring the *other* response of each sequence, which gives log pi(y | x) for free.
        marginal_weight: adds this much of the same objective evaluated on the marginals, against the same ref_logps.
        pair_weights: (B,) factors of the pairs' losses.
        reduction: "mean" or "sum" over pairs.
        process_group: reserved; anything but None raises ``NotImplementedError``.
        max_workspace_bytes: bound on the logits workspace (at least one row). Results do not depend on it beyond
            rounding; the default follows from shapes and device alone.
        backend: "auto", "torch" (one pass, any device) or "reference" (plain torch, everything materialised).

    Returns:
        ``InSPOOutput``; its ``loss`` is differentiable in hidden, weight and bias, once. Only the gradients that
        autograd will ask for are computed, none under ``torch.no_grad()``.

    Raises:
        TypeError, ValueError: before any product runs; the message names the argument and what to change.
    """
    if process_group is not None:
        raise NotImplementedError("process_group is reserved for vocabulary-parallel heads: pass None")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    if max_workspace_bytes is not None and max_workspace_bytes < 1:
        raise ValueError(f"max_workspace_bytes must be a positive number of bytes or None, got {max_workspace_bytes!r}")
    head = checked_head(hidden, weight, bias, softcap, logit_scale)
    chosen_backend = resolve_backend(backend, head, hidden.device)
    objective = make_objective(objective)
    candidates = _candidates(
        hidden, labels, marginal_labels, cu_seqlens, segment_ids, num_pairs, ref_logps, shift, ignore_index
    )
    terms = PairTerms(
        objective=objective,
        ref_logps=_vector("ref_logps", ref_logps, 2 * candidates.num_pairs, hidden.device),
        pair_weights=_vector("pair_weights", pair_weights, candidates.num_pairs, hidden.device),
        marginal_weight=float(marginal_weight),
        mean=reduction == "mean",
    )
    if objective.needs_reference and ref_logps is None:
        raise ValueError(
            f"objective {type(objective).__name__} needs ref_logps: pass the reference model's summed log-probs, "
            "(2B,), or choose a reference-free objective (SimPO, ORPO)"
        )
    if terms.uses_marginals and marginal_labels is None and segment_ids is None:
        raise ValueError(
            (f"marginal_weight={marginal_weight}" if marginal_weight else f"objective {type(objective).__name__}")
            + " needs the marginals: pass marginal_labels (condition_pairs makes them; plain pairs have none)"
        )
    plan = layout.plan(
        candidates,
        vocab_size=head.vocab_size,
        gradient_kinds=terms.gradient_kinds,
        require_marginals=terms.uses_marginals,
        device=hidden.device,
    )
    if chosen_backend is None:
        terms.coefficients(torch.zeros(plan.lengths.shape).double(), plan.lengths.double(), 0, 1)
        return reference.fused_inspo_loss(
            hidden,
            weight,
            labels.to(hidden.device),
            objective=objective,
            ref_logps=ref_logps,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            shift=shift,
            cu_seqlens=cu_seqlens,
            segment_ids=None if segment_ids is None else segment_ids.to(hidden.device),
            num_pairs=num_pairs,
            marginal_labels=None if marginal_labels is None else marginal_labels.to(hidden.device),
            marginal_weight=marginal_weight,
            pair_weights=pair_weights,
            reduction=reduction,
        )
    x = hidden.reshape(-1, head.hidden_size).index_select(0, plan.rows)
    capacity = chosen_backend.capacity(head, hidden.device, max_workspace_bytes)
    loss, losses, sums = _FusedPairLoss.apply(
        x, weight, bias, head.detach(), chosen_backend, plan, terms, capacity, passes.Needs.of(hidden, head)
    )
    return InSPOOutput.build(loss, losses, sums, plan.lengths, terms)


class InSPOLoss(nn.Module):
    """``fused_inspo_loss`` with its options fixed: ``InSPOLoss("simpo", backend="torch")(hidden, weight, labels)``.

    What varies from batch to batch (ref_logps, bias, cu_seqlens, ...) goes to the call; the call wins over the options.
    """

    def __init__(self, objective: str | Objective = "dpo", **options: Any) -> None:
        super().__init__()
        known = set(fused_inspo_loss.__kwdefaults__ or ())
        for name in options:
            if name not in known:
                raise TypeError(f"InSPOLoss takes no {name!r}; its options are {', '.join(sorted(known))}")
        self.objective = make_objective(objective)
        self.options = options

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **inputs: Any) -> InSPOOutput:
        return fused_inspo_loss(hidden, weight, labels, **{"objective": self.objective, **self.options, **inputs})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.objective), *(f"{name}={value!r}" for name, value in self.options.items())])


class _FusedPairLoss(torch.autograd.Function):
    """Gradients are computed with the loss; backward only scales them by the upstream scalar, out of place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: LMHead,
        backend: Backend,
        plan: layout.ScoredRows,
        terms: PairTerms,
        capacity: int,
        needs: passes.Needs,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with passes.plain_arithmetic(x.device):
            losses, sums, gradients = passes.pair_losses(backend, head, x, plan, terms, capacity, needs)
        ctx.likes = [None if t is None else torch.empty(0, dtype=t.dtype) for t in (x, weight, bias)]
        ctx.save_for_backward(gradients.x, gradients.weight, gradients.bias)
        ctx.mark_non_differentiable(losses, sums)
        return terms.reduce(losses).to(head.accumulate_dtype), losses, sums

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*passes.Gradients(*ctx.saved_tensors).scaled(upstream, *ctx.likes), *(None,) * 6)


def _candidates(
    hidden: Tensor,
    labels: Tensor,
    marginal_labels: Tensor | None,
    cu_seqlens: Tensor | None,
    segment_ids: Tensor | None,
    num_pairs: int | None,
    ref_logps: Tensor | None,
    shift: bool,
    ignore_index: int,
) -> layout.Candidates:
    """Recognise the input form, check its shapes and reduce it to candidates."""
    if cu_seqlens is not None and segment_ids is not None:
        raise ValueError("cu_seqlens (packed form) and segment_ids (compact form) exclude each other: pass one")
    if segment_ids is not None and marginal_labels is not None:
        raise ValueError("in the compact form marginals are segments 2B..4B-1 of segment_ids: omit marginal_labels")
    packed_or_compact = cu_seqlens is not None or segment_ids is not None
    if hidden.dim() != (2 if packed_or_compact else 3):
        raise ValueError(
            f"hidden must be {'(N, H) with cu_seqlens or segment_ids' if packed_or_compact else '(2B, T, H)'}, "
            f"got shape {tuple(hidden.shape)}"
            + ("" if packed_or_compact else "; for (N, H) pass cu_seqlens (packed) or segment_ids (compact)")
        )
    labels = layout.checked_labels("labels", labels, hidden.shape[:-1], hidden.device)
    if marginal_labels is not None:
        marginal_labels = layout.checked_labels("marginal_labels", marginal_labels, hidden.shape[:-1], hidden.device)
        marginal_labels = marginal_labels.to(labels.device)

    if segment_ids is not None:
        segment_ids = layout.checked_labels("segment_ids", segment_ids, labels.shape, hidden.device).to(labels.device)
        if num_pairs is None:
            if ref_logps is None:
                raise ValueError("the compact form needs num_pairs (or ref_logps, whose length is 2B) to know B")
            num_pairs = _even("ref_logps", len(ref_logps)) // 2
        if num_pairs < 1:
            raise ValueError(f"num_pairs must be at least 1, got {num_pairs}")
        return layout.from_compact(labels, segment_ids, num_pairs, ignore_index=ignore_index)

    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            raise ValueError("cu_seqlens must be a 1-D int32 tensor of 2B + 1 sequence boundaries")
        num_sequences, what = len(cu_seqlens) - 1, "sequences in cu_seqlens"
    else:
        num_sequences, what = len(hidden), "rows of hidden"
    if _even(what, num_sequences) < 2:
        raise ValueError(f"there must be at least one pair, got {num_sequences} {what}")
    if num_pairs is not None and 2 * num_pairs != num_sequences:
        raise ValueError(f"num_pairs={num_pairs} does not fit {num_sequences} {what}")
    if cu_seqlens is not None:
        return layout.from_packed(labels, marginal_labels, cu_seqlens, shift=shift, ignore_index=ignore_index)
    return layout.from_rows(labels, marginal_labels, shift=shift, ignore_index=ignore_index)


def _even(what: str, number: int) -> int:
    if number % 2:
        raise ValueError(
            f"{what}: got {number}, an odd number; the first half belongs to the chosen responses, the second to the "
            "rejected ones"
        )
    return number


def _vector(name: str, tensor: Tensor | None, length: int, device: torch.device) -> Tensor | None:
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if tensor.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}")
    return tensor.detach().to(device, torch.float64)
