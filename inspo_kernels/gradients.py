"""The gradients that a call needs, the two forms in which they wait for the upstream gradient, and their limits.

Second derivatives and the transforms of torch.func are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends import Backend
from .head import LMHead, plain_arithmetic

if TYPE_CHECKING:
    from .passes import HeadPass


@dataclass(frozen=True)
class GradMask:
    """The gradients that a call needs; no others are computed."""

    x: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias

    @property
    def any(self) -> bool:
        return self.x or self.head

    @classmethod
    def of(cls, hidden: Tensor, head: LMHead) -> GradMask:
        """Return what autograd will need. An op cannot see grad mode, so the public functions read it here."""
        enabled = torch.is_grad_enabled()
        bias = head.bias is not None and head.bias.requires_grad
        return cls(enabled and hidden.requires_grad, enabled and head.weight.requires_grad, enabled and bias)


@dataclass(frozen=True)
class Gradients:
    """Computed gradients: x (N, H), weight (V, H), bias (V,); None where not needed."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def empty(cls, head: LMHead, num_rows: int, needs: GradMask, weight_dtype: torch.dtype | None = None) -> Gradients:
        """Return uninitialised gradients in the accumulate dtype, or that of the weight in ``weight_dtype``."""

        def new(needed: bool, *shape: int, dtype: torch.dtype = head.accumulate_dtype) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=head.weight.device) if needed else None

        dtype = weight_dtype or head.accumulate_dtype
        weight = new(needs.weight, head.vocab_size, head.hidden_size, dtype=dtype)
        return cls(new(needs.x, num_rows, head.hidden_size), weight, new(needs.bias, head.vocab_size))

    @classmethod
    def zeros(cls, head: LMHead, num_rows: int, needs: GradMask) -> Gradients:
        """Return the gradients of a loss that depends on no row."""
        return cls(*(None if g is None else g.zero_() for g in cls.empty(head, num_rows, needs).tensors))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that must outlive the forward pass."""
        return self.x, self.weight, self.bias

    def replace_tensors(self, *tensors: Any) -> Gradients:
        """Return a copy with these tensors in place of ``self.tensors``."""
        return Gradients(*tensors)

    def scaled(
        self, scale: Tensor | None, *dtypes: torch.dtype | None, reads_last: bool = False
    ) -> tuple[Tensor | None, ...]:
        """Return (x, weight, bias) times ``scale`` in these dtypes, rounded once; unscaled if ``scale`` is None.

        If ``scale`` is None, tensors of the right dtype are returned as they are. With ``reads_last`` nobody reads
        ``self`` again, and such tensors are scaled in place. All other results are new tensors.
        """

        def one(g: Tensor, dtype: torch.dtype | None) -> Tensor:
            dtype = dtype or g.dtype
            if scale is None:
                return g.to(dtype)
            in_place = dtype == g.dtype and reads_last
            return torch.mul(g, scale, out=g if in_place else torch.empty_like(g, dtype=dtype))

        return tuple(None if g is None else one(g, dtype) for g, dtype in zip(self.tensors, dtypes))


@dataclass(frozen=True)
class DeferredGradients:
    """Gradients that are computed from kept rows once the upstream gradient is known.

    dX and dW are then written once, in their own dtypes, instead of being written in float32, read, scaled and written
    again. dW does not occupy memory at the same time as the workspace. The weight is no longer needed, so an engine
    may free it after the forward pass.

    ``x`` (n, H): gradients of the first n of num_rows log-probs, each with respect to its own row, or None.
    ``coefficients`` (n,): derivatives of the loss with respect to these log-probs. ``kept``: the tensors that their
    tile returned, none for a frozen head. The other rows get zero gradient. dX is summed over the ranks of ``run``
    while each rank computes its dW.
    """

    run: HeadPass
    needs: GradMask
    num_rows: int
    x: Tensor | None
    coefficients: Tensor
    kept: tuple[Tensor, ...] = ()

    @staticmethod
    def worth_deferring(backend: Backend, head: LMHead, rows: int, needs: GradMask) -> bool:
        """Return whether to keep ``rows`` rows: only if they take no more memory than the dW that they replace."""
        dweight_bytes = head.vocab_size * head.hidden_size * head.accumulate_dtype.itemsize
        return needs.weight and backend.kept_bytes(head, rows) <= dweight_bytes

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that must outlive the forward pass."""
        return self.x, self.coefficients, *self.kept

    def replace_tensors(self, *tensors: Any) -> DeferredGradients:
        """Return a copy with these tensors in place of ``self.tensors``."""
        x, coefficients, *kept = tensors
        return replace(self, x=x, coefficients=coefficients, kept=tuple(kept))

    def scaled(
        self, scale: Tensor | None, *dtypes: torch.dtype | None, reads_last: bool = False
    ) -> tuple[Tensor | None, ...]:
        """Return (x, weight, bias) times ``scale`` (None: 1) in these dtypes, rounded once.

        With ``reads_last`` nobody reads ``self`` again, and its memory may be reused. Otherwise they are new tensors.
        """
        coefficients = self.coefficients if scale is None else self.coefficients * scale
        x, wait = self._start_x(coefficients, dtypes[0], reads_last=reads_last)
        out = Gradients.empty(self.run.head, 0, replace(self.needs, x=False), dtypes[1])
        if self.needs.head:
            tile = self.run.open(len(coefficients))
            tile.restore(self.kept)
            with plain_arithmetic(coefficients.device):
                tile.head_gradients(coefficients, out)
            if reads_last:
                tile.release()
        wait()
        return x, out.weight, None if out.bias is None else out.bias.to(dtypes[2])

    def _start_x(
        self, coefficients: Tensor, dtype: torch.dtype | None, *, reads_last: bool
    ) -> tuple[Tensor | None, Callable[[], None]]:
        """Return the gradients of all rows, and a function that waits for the other ranks' parts of them."""
        if self.x is None:
            return None, lambda: None
        n, dtype = len(coefficients), dtype or self.x.dtype
        in_place = reads_last and dtype == self.x.dtype and n == self.num_rows
        out = self.x if in_place else self.x.new_empty(self.num_rows, self.x.shape[1], dtype=dtype)
        if n < self.num_rows:
            out[n:].zero_()
        if self.run.group is None:
            self.run.backend.scale_rows(self.x, coefficients, out[:n])
            return out, lambda: None
        dx = self.x if reads_last else torch.empty_like(self.x)
        self.run.backend.scale_rows(self.x, coefficients, dx)
        arrive = self.run.group.start_sum(dx)

        def wait() -> None:
            arrive()
            if dx is not out:
                out[:n] = dx

        return out, wait


def hooks_see_saved_tensors() -> bool:
    """Return whether a saved-tensor hook is active: it may return the same memory to several backward passes.

    The torch function is private. Without it, assume that there is a hook.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def graph_is_freed() -> bool:
    """Return whether this thread's backward pass frees what the forward pass saved (no ``retain_graph``).

    The torch function is private, but AOTAutograd calls it, too. Without it, assume that the graph is kept.
    """
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is not None and not keeps_graph()


def dtypes_of(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Return the dtypes of tensors that may be None."""
    return tuple(None if t is None else t.dtype for t in tensors)


def graph_leaves(tensor: Tensor) -> dict[int, Tensor]:
    """Return the tensors that a gradient of ``tensor`` would reach, by id."""
    found, waiting, seen = {}, [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting.extend(parent for parent, _ in node.next_functions)
    return found


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
