"""A checked call of ``linear_logps``: which tokens are scored, and the passes over them, in eager mode and compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import passes
from .backends import Backend, resolve_backend
from .gradients import Gradients, Needs
from .head import LMHead, plain_arithmetic
from .scored_rows import checked_labels, scored_positions, to_device


@dataclass(frozen=True)
class ScoredTokens:
    """The scored tokens of a call: their positions (N,) among all targets, rows x (N, H) of hidden, targets (N,)."""

    head: LMHead
    backend: Backend | None
    index: Tensor
    x: Tensor
    targets: Tensor

    @classmethod
    def find(cls, hidden: Tensor, targets: Tensor, head: LMHead, ignore_index: int, backend: str) -> ScoredTokens:
        targets = checked_labels("targets", targets, hidden.shape[:-1], hidden.device)
        resolved = resolve_backend(backend, head, hidden.device)
        flat = targets.flatten()
        index = scored_positions(flat, ignore_index, head.vocab_size)
        flat, index = to_device(flat[index], hidden.device), to_device(index, hidden.device)
        return cls(head, resolved, index, hidden.reshape(-1, head.hidden_size).index_select(0, index), flat)

    def forward(self, needs: Needs) -> tuple[Tensor, Tensor | None]:
        """Log-probs (N,), and with a frozen head the gradient (N, H) of each in its own row."""
        assert self.backend is not None
        capacity = self.backend.capacity(self.head, self.x.device, None)
        with plain_arithmetic(self.x.device):
            if needs.x and not needs.head:
                return passes.unit_gradients(self.backend, self.head, self.x, self.targets, len(self.x), capacity)
            return passes.score(self.backend, self.head, self.x, self.targets, capacity), None

    def backward(self, upstream: Tensor, needs: Needs) -> Gradients:
        """Gradients of sum(upstream * log-probs), upstream (N,), the logits computed anew."""
        assert self.backend is not None
        capacity = self.backend.capacity(self.head, self.x.device, None)
        with plain_arithmetic(self.x.device):
            return passes.regradients(self.backend, self.head, self.x, self.targets, upstream, capacity, needs)

    def scatter(self, values: Tensor, shape: torch.Size) -> Tensor:
        """``values`` (N, ...) at the scored positions of a tensor of that shape, 0 elsewhere."""
        total = shape.numel() if values.dim() == 1 else shape[:-1].numel()
        return values.new_zeros(total, *values.shape[1:]).index_copy(0, self.index, values).view(shape)
