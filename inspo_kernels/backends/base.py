"""The interface of a backend: a workspace that reduces rows of logits to sums and turns them into gradients.

``passes`` drives every backend through these few methods. A backend therefore holds kernels, and knows nothing about
pairs, groups, objectives or autograd. To add a backend, subclass ``Backend`` and ``HeadTile`` in a new file and list
the class in ``backends/__init__.py``.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from ..head import LMHead
from ..row_sums import RowSums


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
        self,
        x: Tensor,
        targets: Tensor,
        *,
        keep: bool = False,
        dx: Tensor | None = None,
        parts: frozenset[str] = frozenset(),
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
    def head_gradients(
        self, coefficients: Tensor, *, dweight: Tensor | None, dbias: Tensor | None, accumulate: bool = False
    ) -> None:
        """Compute gradients of sum(coefficients * log-probs) of the kept rows with respect to weight and bias.

        ``dweight`` (V, H) and ``dbias`` (V,) have the accumulate dtype. With ``accumulate`` they are added to, else
        overwritten. An overwritten ``dweight`` may have any dtype; values are rounded to it once.
        """

    @abstractmethod
    def recompute_gradients(
        self,
        x: Tensor,
        targets: Tensor,
        sums: RowSums,
        coefficients: Tensor,
        *,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        accumulate: bool = False,
    ) -> None:
        """Compute gradients of sum(coefficients * log-probs) of rows with known ``sums``, recomputing their logits.

        The number of rows is not limited. ``dx`` (n, H), of the accumulate dtype, is overwritten; ``dweight`` and
        ``dbias`` are as in ``head_gradients``.
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


def chunks(start: int, stop: int, capacity: int) -> Iterator[slice]:
    """Yield the fewest slices of at most ``capacity``, nearly equal: a short last slice would waste a matmul."""
    if start < stop:
        count = -(-(stop - start) // capacity)
        size = -(-(stop - start) // count)
        yield from (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def cut(tensor: Tensor, rows: slice) -> Tensor:
    """Return ``tensor[rows]``, or ``tensor`` itself for all its rows: in small calls even slicing takes time."""
    return tensor if rows.start == 0 and rows.stop >= len(tensor) else tensor[rows]
