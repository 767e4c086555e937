"""Refuse what fused gradients cannot do: second derivatives and the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def first_order_only(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorate ``backward`` so that differentiating its results raises instead of treating them as constants.

    torch's ``once_differentiable`` raises only if the upstream gradient requires grad, and that of a plain loss does
    not: a gradient penalty would silently lose its gradient. The forward pass must save one of its own differentiable
    outputs. That output connects the results to all inputs, so every second derivative reaches the error.

    ``backward`` is called with ctx, the saved tensors and the upstream gradients. It must not read
    ``ctx.saved_tensors`` itself: a checkpoint recomputes them for one reading only.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = backward(ctx, saved, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        anchor = next(t for t in saved if t is not None and t.requires_grad)
        return tuple(None if g is None else _NoSecondDerivative.apply(g, anchor) for g in gradients)

    return wrapper


def refuse_transforms(name: str) -> None:
    """Raise inside torch.func.grad, vmap and other transforms.

    The torch function is private, but ``torch.autograd.Function`` calls it, too. Without it, torch's own error appears.
    """
    if torch.compiler.is_compiling():
        return
    is_transformed = getattr(torch._C, "_are_functorch_transforms_active", None)
    if is_transformed is None or not is_transformed():
        return
    raise RuntimeError(
        f"{name} cannot be transformed by torch.func (grad, vmap, jvp, ...): use torch.autograd, or call "
        f"inspo_kernels.reference.{name}, which is plain torch"
    )


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "inspo_kernels computes first derivatives only: a second derivative (create_graph=True and a backward "
            'through the gradient) needs backend="reference"'
        )
