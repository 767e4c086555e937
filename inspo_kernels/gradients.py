"""Which gradients are asked for, and the two forms in which they wait for the upstream one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backends import Backend
from .head import LMHead, plain_arithmetic


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for; exactly those are computed."""

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
    def of(cls, hidden: Tensor, head: LMHead) -> Needs:
        """What autograd will ask for. Inside an op grad mode is invisible, so the public functions read it here."""
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
    def empty(cls, head: LMHead, num_rows: int, needs: Needs, *dtypes: torch.dtype | None) -> Gradients:
        """To be written, of these dtypes or the accumulate dtype."""

        def new(needed: bool, dtype: torch.dtype | None, *shape: int) -> Tensor | None:
            dtype = dtype or head.accumulate_dtype
            return torch.empty(shape, dtype=dtype, device=head.weight.device) if needed else None

        x, weight, bias = dtypes or (None, None, None)
        return cls(
            new(needs.x, x, num_rows, head.hidden_size),
            new(needs.weight, weight, head.vocab_size, head.hidden_size),
            new(needs.bias, bias, head.vocab_size),
        )

    @classmethod
    def zeros(cls, head: LMHead, num_rows: int, needs: Needs) -> Gradients:
        """Of a loss that depends on no row."""
        return cls(*(None if g is None else g.zero_() for g in cls.empty(head, num_rows, needs).tensors))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What must outlive the forward pass."""
        return self.x, self.weight, self.bias

    def holding(self, *tensors: Any) -> Gradients:
        """The same with these for ``tensors``."""
        return Gradients(*tensors)

    def computed(self) -> Gradients:
        """Themselves."""
        return self

    def scaled(self, scale: Tensor | float, *dtypes: torch.dtype | None) -> tuple[Tensor | None, ...]:
        """(x, weight, bias) times ``scale`` in these dtypes: new tensors, rounded once."""
        return tuple(
            None if g is None else torch.mul(g, scale, out=torch.empty_like(g, dtype=dtype))
            for g, dtype in zip(self.tensors, dtypes)
        )


@dataclass(frozen=True)
class StagedGradients:
    """Gradients not yet computed, of rows that lie staged in a workspace.

    Once the upstream gradient is known, dX and dW are written in their final scale and dtype. ``Gradients`` has dW
    written in float32, read again and written a second time: in bfloat16 10 bytes an element instead of 2 (1.0 of 33 ms
    at H = 4096, V = 128256, N = 8192 and 4.3 TB/s), and has it stand beside the workspace in memory. On a 2-core CPU
    (float32, H = 512, V = 32000) staged gradients take 0.83, 0.92 and 0.93 of the time for 128, 256 and 512 rows.

    ``coefficients`` (n,): dloss/dlogp of the staged rows, which are the first n of x; ``staged``: what their tile
    returned. The other rows of x, ``num_rows`` in all, get zero gradient.
    """

    backend: Backend
    head: LMHead
    needs: Needs
    num_rows: int
    coefficients: Tensor
    staged: tuple[Tensor, ...]

    @staticmethod
    def pay(backend: Backend, head: LMHead, rows: int, needs: Needs) -> bool:
        """Whether to keep so many rows: while they take no more memory than the dW that they stand for."""
        dweight_bytes = head.vocab_size * head.hidden_size * head.accumulate_dtype.itemsize
        return needs.weight and backend.staged_bytes(head, rows) <= dweight_bytes

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What must outlive the forward pass."""
        return self.head.weight, self.coefficients, *self.staged

    def holding(self, *tensors: Any) -> StagedGradients:
        """The same with these for ``tensors``."""
        weight, coefficients, *staged = tensors
        head = replace(self.head, weight=weight, bias=None)  # which only staging reads
        return replace(self, head=head, coefficients=coefficients, staged=tuple(staged))

    def computed(self) -> Gradients:
        """In the accumulate dtype."""
        return Gradients(*self.scaled(1.0, *(self.head.accumulate_dtype,) * 3))

    def scaled(self, scale: Tensor | float, *dtypes: torch.dtype | None) -> tuple[Tensor | None, ...]:
        """(x, weight, bias) times ``scale`` in these dtypes: new tensors, rounded once."""
        n = len(self.coefficients)
        out = Gradients.empty(self.head, self.num_rows, self.needs, *dtypes[:2], None)
        tile = self.backend.open_tile(self.head, n)
        tile.restore(self.staged)
        dx = None
        if out.x is not None:
            dx = out.x[:n]
            out.x[n:].zero_()
        with plain_arithmetic(self.coefficients.device):
            tile.gradients(self.coefficients * scale, dx=dx, dweight=out.weight, dbias=out.bias)
        return out.x, out.weight, None if out.bias is None else out.bias.to(dtypes[2])


def dtypes_of(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Dtypes of tensors that may be missing."""
    return tuple(None if t is None else t.dtype for t in tensors)
