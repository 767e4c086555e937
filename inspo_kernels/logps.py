"""Where a log-prob is computed for users: ``linear_logps``, per token, differentiable with any upstream gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import passes, reference
from .backends import Backend, resolve_backend
from .first_order import first_order_only
from .head import LMHead, checked_head
from .layout import checked_labels, scored_positions


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Per-token log-probs log softmax(z)[target] without materialising the logits of all tokens.

    z = logit_scale * (hidden @ weight.T + bias), then softcap * tanh(z / softcap) where a soft-cap is given.

    Args:
        hidden: (..., H) hidden states after the model's final norm; float16, bfloat16, float32 or float64.
        weight: (V, H) LM head, hidden's dtype (any under autocast) and device.
        targets: (...) int64 token ids, *not* shifted: hidden[i] is scored on targets[i]. May live on the CPU.
        bias: (V,) or None. softcap: positive or None. logit_scale: finite.
        ignore_index: targets with this value are skipped: log-prob 0, no gradient, no head work.
        backend: "auto", "torch" or "reference".

    Returns:
        (...) log-probs in nats, float32 (float64 for float64 inputs), differentiable in hidden, weight and bias; a
        second derivative raises. Where weight and bias need no gradient (LoRA), d logp / d hidden is stored, one
        H-vector a token, and backward recomputes nothing: 4NHV operations for N scored tokens instead of 8NHV.
        Without gradients: 2NHV and no gradient buffers.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or target values that do not fit; the message says which.
    """
    head = checked_head(hidden, weight, bias, softcap, logit_scale)
    targets = checked_labels("targets", targets, hidden.shape[:-1], hidden.device)
    chosen_backend = resolve_backend(backend, head, hidden.device)
    flat = targets.flatten()
    index = scored_positions(flat, ignore_index, head.vocab_size)
    if chosen_backend is None:
        return reference.linear_logps(
            hidden,
            weight,
            targets.to(hidden.device),
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
        )
    index, flat = index.to(hidden.device), flat[index].to(hidden.device)
    x = hidden.reshape(-1, head.hidden_size).index_select(0, index)
    logps = _LinearLogps.apply(x, weight, bias, flat, head.detach(), chosen_backend, passes.Needs.of(hidden, head))
    return logps.new_zeros(targets.numel()).index_copy(0, index, logps).view(targets.shape)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: LMHead,
        backend: Backend,
        needs: passes.Needs,
    ) -> Tensor:
        ctx.head, ctx.backend, ctx.needs, ctx.x_dtype = head, backend, needs, x.dtype
        ctx.capacity = backend.capacity(head, x.device, None)
        with passes.plain_arithmetic(x.device):
            if needs.x and not needs.head:
                logps, dx = passes.unit_gradients(backend, head, x, targets, len(x), ctx.capacity)
                ctx.save_for_backward(dx)
                return logps
            if needs.any:
                ctx.save_for_backward(x, weight, bias, targets)
            return passes.score(backend, head, x, targets, ctx.capacity)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs.head:
            (dx,) = ctx.saved_tensors
            return ((dx * upstream.unsqueeze(1)).to(ctx.x_dtype), *(None,) * 6)
        x, weight, bias, targets = ctx.saved_tensors
        head = replace(ctx.head, weight=weight, bias=bias)
        with passes.plain_arithmetic(x.device):
            gradients = passes.regradients(ctx.backend, head, x, targets, upstream, ctx.capacity, ctx.needs)
        return (*gradients.scaled(1.0, x, weight, bias), *(None,) * 4)
