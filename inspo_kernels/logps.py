"""Where a log-prob is computed for users: ``linear_logps``, per token, differentiable with any upstream gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import compiled, reference
from .arguments import integer
from .first_order import first_order_only
from .gradients import Needs, dtypes_of
from .head import checked_head
from .scored_tokens import ScoredTokens


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
        backend: "auto", "triton", "torch" or "reference", as for ``fused_inspo_loss``.

    Returns:
        (...) log-probs in nats, float32 (float64 for float64 inputs), differentiable in hidden, weight and bias; a
        second derivative raises. Where weight and bias need no gradient (LoRA), d logp / d hidden is stored, one
        H-vector a token, and backward recomputes nothing: 4NHV operations for N scored tokens instead of 8NHV.
        Without gradients: 2NHV and no gradient buffers.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or target values that do not fit; the message says which.
    """
    ignore_index = integer("ignore_index", ignore_index)
    options: dict[str, Any] = {
        "bias": bias,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
    }
    if torch.compiler.is_compiling():
        return compiled.linear_logps(hidden, weight, targets, backend=backend, **options)
    head = checked_head(hidden, weight, bias, softcap, logit_scale)
    scored = ScoredTokens.find(hidden, targets, head.detach(), ignore_index, backend)
    if scored.backend is None:
        return reference.linear_logps(hidden, weight, targets.to(hidden.device), **options)
    logps = _LinearLogps.apply(scored.x, weight, bias, scored, Needs.of(hidden, head))
    return scored.scatter(logps, targets.shape)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scored: ScoredTokens, needs: Needs) -> Tensor:
        logps, dx = scored.forward(needs)
        ctx.scored, ctx.needs, ctx.dtype = replace(scored, x=x.new_empty(0)), needs, x.dtype
        if dx is not None:
            ctx.save_for_backward(dx)
        elif needs.any:
            ctx.save_for_backward(x, weight, bias)
        return logps

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs.head:
            (dx,) = ctx.saved_tensors
            return (dx * upstream.unsqueeze(1)).to(ctx.dtype), None, None, None, None
        x, weight, bias = ctx.saved_tensors
        scored = replace(ctx.scored, x=x, head=replace(ctx.scored.head, weight=weight, bias=bias))
        gradients = scored.backward(upstream, ctx.needs)
        return (*gradients.scaled(1.0, *dtypes_of(x, weight, bias)), None, None)
