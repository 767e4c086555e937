"""The interface of a backend: a workspace that reduces rows of logits to sums and turns them into gradients.

``passes`` drives every backend through these few methods. A backend therefore holds kernels, and knows nothing about
pairs, groups, objectives or autograd. To add a backend, subclass ``Backend`` and ``HeadTile`` in a new file and list
the class in ``backends/__init__.py``.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..head import LMHead
from ..row_sums import Parts, RowSums

if TYPE_CHECKING:
    from ..gradients import Gradients

_Cuttable = TypeVar("_Cuttable", Tensor, Tensor | None)


class HeadTile(ABC):
    """A workspace that is reused for one block of rows after another.

    ``stage`` reduces a block to its sums. ``finish`` then takes the sums over the whole vocabulary: the block's own
    sums, or the combined sums of ranks that hold different words. With ``keep``, at most ``capacity`` rows stay in the
    workspace for ``head_gradients`` until the next ``stage``. Without ``keep``, the number of rows is not limited.
    """

    # The most rows that one ``stage`` with ``dx`` can take.
    dx_rows: int = sys.maxsize

    def __init__(self, head: LMHead, capacity: int) -> None:
        self.head = head
        self.capacity = capacity

    @abstractmethod
    def stage(
        self, x: Tensor, targets: Tensor, *, keep: bool = False, dx: Tensor | None = None, parts: Parts = frozenset()
    ) -> RowSums:
        """Return the sums of hidden states ``x`` (n, H) and ``targets`` (n,), with optional ``parts`` of ``RowSums``.

        A target outside 0..V-1 is a word of another rank. ``finish`` will write gradients to ``dx`` (n, H), which has
        the accumulate dtype.
        """

    @abstractmethod
    def finish(self, sums: RowSums) -> None:
        """Take the last block's sums over the whole vocabulary, and complete ``dx``: d logp / d x."""

    @abstractmethod
    def staged(self) -> tuple[Tensor, ...]:
        """Return the tensors that ``head_gradients`` reads; do not call ``stage`` while they are in use."""

    @abstractmethod
    def restore(self, staged: tuple[Tensor, ...]) -> None:
        """Make ``head_gradients`` read these tensors, which ``staged`` of a tile of the same head returned."""

    @abstractmethod
    def release(self) -> None:
        """Free the memory of the kept rows: nothing that ``staged`` returned is read again."""

    @abstractmethod
    def head_gradients(self, coefficients: Tensor, out: Gradients, accumulate: bool = False) -> None:
        """Compute gradients of sum(coefficients * log-probs) of the kept rows with respect to weight and bias.

        Those that ``out`` holds have the accumulate dtype. With ``accumulate`` they are added to, else overwritten. An
        overwritten ``out.weight`` may have any dtype; values are rounded to it once. ``out.x`` is not touched.
        """

    @abstractmethod
    def recompute_gradients(
        self, x: Tensor, targets: Tensor, sums: RowSums, coefficients: Tensor, out: Gradients, accumulate: bool = False
    ) -> None:
        """Compute gradients of sum(coefficients * log-probs) of rows with known ``sums``, recomputing their logits.

        The number of rows is not limited. ``out.x`` (n, H), of the accumulate dtype, is overwritten; the others are as
        in ``head_gradients``.
        """


class Backend(ABC):
    """A named way to run the head's matmuls and the pass over its logits."""

    name: str

    @abstractmethod
    def unsupported(self, head: LMHead, device: torch.device) -> str | None:
        """Return why this head cannot run here and what to do instead, or None if it can."""

    def prepared(self, head: LMHead) -> LMHead:
        """Return the head in the form that the matmuls read, for all tiles of a call, so that a weight is cast once."""
        return head

    def scale_rows(self, x: Tensor, scale: Tensor, out: Tensor) -> None:
        """Write scale (n,) times the rows of x (n, H) to ``out``, computed in scale's dtype and rounded once."""
        torch.mul(x, scale.unsqueeze(1), out=out)

    @abstractmethod
    def default_workspace_bytes(self, head: LMHead, device: torch.device) -> int:
        """Return the default workspace size: it depends on the head's shape and the device, never on free memory."""

    @abstractmethod
    def capacity(self, head: LMHead, device: torch.device, workspace_bytes: int) -> int:
        """Return how many rows fit in a workspace of that size; 0 if not even one row fits."""

    @abstractmethod
    def kept_bytes(self, head: LMHead, rows: int) -> int:
        """Return the memory that kept rows occupy until their gradients are computed."""

    @abstractmethod
    def passing_bytes(self, head: LMHead, device: torch.device, rows: int, workspace_bytes: int) -> int:
        """Return the memory of a tile that computes d logp / d x of ``rows`` rows without keeping them."""

    @abstractmethod
    def logits_bytes(self, head: LMHead, device: torch.device, workspace_bytes: int) -> int:
        """Return the memory that logits and widened slices of the weight take in addition to kept rows."""

    @abstractmethod
    def open_tile(self, head: LMHead, capacity: int, workspace_bytes: int) -> HeadTile:
        """Return a workspace of at most ``workspace_bytes`` that keeps up to ``capacity`` rows."""


def open_tile(backend: Backend, head: LMHead, capacity: int, workspace_bytes: int) -> HeadTile:
    """Return a workspace of ``backend`` that keeps up to ``capacity`` rows, or a dummy if the head has no words."""
    if head.vocab_size:
        return backend.open_tile(head, capacity, workspace_bytes)
    # A head of one word, which is never multiplied, shows how many rows the other ranks' tiles take.
    dx_rows = backend.open_tile(head.without_weight(words=1), capacity, workspace_bytes).dx_rows
    return TileWithoutWords(head, capacity, dx_rows)


class TileWithoutWords(HeadTile):
    """The tile of a rank without any word of its own: it adds nothing, and joins every exchange.

    Such ranks exist where the vocabulary is cut into equal blocks, the last of which may be empty: 5 words over 4 ranks
    are 2, 2, 1 and 0. ``dx_rows`` is that of the other ranks.
    """

    def __init__(self, head: LMHead, capacity: int, dx_rows: int) -> None:
        super().__init__(head, capacity)
        self.dx_rows = dx_rows
        self.dx: Tensor | None = None

    def stage(
        self, x: Tensor, targets: Tensor, *, keep: bool = False, dx: Tensor | None = None, parts: Parts = frozenset()
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

    def restore(self, staged: tuple[Tensor, ...]) -> None:
        pass

    def release(self) -> None:
        pass

    def head_gradients(self, coefficients: Tensor, out: Gradients, accumulate: bool = False) -> None:
        pass

    def recompute_gradients(
        self, x: Tensor, targets: Tensor, sums: RowSums, coefficients: Tensor, out: Gradients, accumulate: bool = False
    ) -> None:
        if out.x is not None:
            out.x.zero_()


def chunks(start: int, stop: int, capacity: int) -> Iterator[slice]:
    """Yield the fewest slices of at most ``capacity``, nearly equal: a short last slice would waste a matmul."""
    if start < stop:
        count = -(-(stop - start) // capacity)
        size = -(-(stop - start) // count)
        yield from (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def cut(tensor: _Cuttable, rows: slice) -> _Cuttable:
    """Return ``tensor[rows]``, or ``tensor`` itself for all its rows: in small calls even slicing takes time."""
    return tensor if tensor is None or (rows.start == 0 and rows.stop >= len(tensor)) else tensor[rows]
