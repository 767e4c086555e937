"""What a backend is: a workspace in which rows of logits are summed up and turned into gradients.

``passes`` drives every backend through these few methods, so a backend holds kernels and nothing of pairs, groups,
objectives or autograd. To add one, subclass ``Backend`` and ``HeadTile`` in a file of its own and list it in
``backends/__init__.py``.
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
    """A workspace, reused for block after block of rows.

    A block goes through ``stage``, which sums it up, and ``finish``, which is given the sums over the whole vocabulary:
    the block's own, or those that ranks with other words have combined. Rows staged with ``keep`` stay in the workspace
    for ``head_gradients`` until the next ``stage``; at most ``capacity`` rows can be kept, any number staged otherwise.
    """

    # Rows that one ``stage`` with ``dx`` can take.
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
        """Sums of hidden states ``x`` (n, H) and ``targets`` (n,), with the optional fields ``parts`` of ``RowSums``.

        A target outside 0..V-1 is a word of another rank. ``dx`` (n, H), of the accumulate dtype, is where ``finish``
        will leave gradients.
        """

    @abstractmethod
    def finish(self, sums: RowSums) -> None:
        """Take the sums over the whole vocabulary of the rows staged last, and complete ``dx``: d logp / d x."""

    @abstractmethod
    def staged(self) -> tuple[Tensor, ...]:
        """The tensors that ``head_gradients`` reads; they must not be staged over while in use."""

    @abstractmethod
    def restore(self, staged: tuple[Tensor, ...]) -> None:
        """Make ``head_gradients`` read these, from ``staged`` of a tile of the same head."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the kept rows' memory: nothing that ``staged`` returned is read again."""

    @abstractmethod
    def head_gradients(
        self, coefficients: Tensor, *, dweight: Tensor | None, dbias: Tensor | None, accumulate: bool = False
    ) -> None:
        """Gradients of sum(coefficients * log-probs) of the kept rows in weight and bias.

        ``dweight`` (V, H) and ``dbias`` (V,), of the accumulate dtype, are added to, or written unless ``accumulate``.
        Where ``dweight`` is written it may have any dtype, to which it is rounded once.
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
        """Gradients of sum(coefficients * log-probs) of any number of rows whose ``sums`` are known, the logits anew.

        ``dx`` (n, H), of the accumulate dtype, is written; ``dweight`` and ``dbias`` as in ``head_gradients``.
        """


class Backend(ABC):
    """A named way to run the head's matmuls and the pass over its logits."""

    name: str

    @abstractmethod
    def unsupported(self, head: LMHead, device: torch.device) -> str | None:
        """Why this head cannot run here and what to do instead, or None if it can."""

    def prepared(self, head: LMHead) -> LMHead:
        """The head as this backend multiplies it, for all tiles of a call: a cast weight is cast once."""
        return head

    @abstractmethod
    def default_workspace_bytes(self, head: LMHead, device: torch.device) -> int:
        """Workspace when the user sets no bound: from the head's shape and the device alone, never from free memory."""

    @abstractmethod
    def capacity(self, head: LMHead, device: torch.device, workspace_bytes: int) -> int:
        """Rows that can be kept in a workspace of that size; 0 if not even one."""

    @abstractmethod
    def kept_bytes(self, head: LMHead, rows: int) -> int:
        """Memory that kept rows go on taking until their gradients are computed."""

    @abstractmethod
    def passing_bytes(self, head: LMHead, device: torch.device, rows: int, workspace_bytes: int) -> int:
        """Memory of a tile in which so many rows are given d logp / d x without being kept."""

    @abstractmethod
    def logits_bytes(self, head: LMHead, device: torch.device, workspace_bytes: int) -> int:
        """Memory that logits and widened slices of the weight take beside kept rows."""

    @abstractmethod
    def open_tile(self, head: LMHead, capacity: int, workspace_bytes: int) -> HeadTile:
        """A workspace of at most ``workspace_bytes`` that keeps up to ``capacity`` rows."""


def chunks(start: int, stop: int, capacity: int) -> Iterator[slice]:
    """As few slices of at most ``capacity`` as possible, nearly equal: a last one of few rows would waste a matmul."""
    if start < stop:
        count = -(-(stop - start) // capacity)
        size = -(-(stop - start) // count)
        yield from (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def cut(tensor: Tensor, rows: slice) -> Tensor:
    """``tensor[rows]``, or ``tensor`` itself where these are all its rows: small calls are made of such operations."""
    return tensor if rows.start == 0 and rows.stop >= len(tensor) else tensor[rows]
