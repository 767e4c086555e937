"""A rank that shares a vocabulary-parallel head without any word of its own: it adds nothing, and joins every exchange.

Such ranks exist where the vocabulary is cut into equal blocks, the last of which may be empty: 5 words over 4 ranks
are 2, 2, 1 and 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..head import LMHead
from ..row_sums import RowSums
from .base import HeadTile


class TileWithoutWords(HeadTile):
    """Sums over no word, and gradients that are zero or empty; ``dx_rows`` as on the other ranks."""

    def __init__(self, head: LMHead, capacity: int, dx_rows: int) -> None:
        super().__init__(head, capacity)
        self.dx_rows = dx_rows
        self.dx: Tensor | None = None

    def stage(
        self, x: Tensor, targets: Tensor, *, dx: Tensor | None = None, parts: frozenset[str] = frozenset(), **_: Any
    ) -> RowSums:
        self.dx = dx

        def filled(value: float) -> Tensor:
            return torch.full((len(x),), value, dtype=torch.float64, device=x.device)

        optional = {name: filled(-torch.inf if name in ("before", "after") else 0.0) for name in parts}
        offset = filled(-1e30)  # below every other rank's
        return RowSums(offset, filled(0.0), filled(-torch.inf), **optional)

    def finish(self, sums: RowSums) -> None:
        if self.dx is not None:
            self.dx.zero_()

    def staged(self) -> tuple[Tensor, ...]:
        return ()

    def release(self) -> None:
        pass

    def restore(self, staged: tuple[Tensor, ...]) -> None:
        pass

    def head_gradients(self, coefficients: Tensor, **_: Any) -> None:
        pass

    def recompute_gradients(
        self, x: Tensor, targets: Tensor, sums: RowSums, coefficients: Tensor, *, dx: Tensor | None, **_: Any
    ) -> None:
        if dx is not None:
            dx.zero_()
