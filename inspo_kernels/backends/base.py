"""What a backend is: a workspace of logits rows that can be scored and then turned into gradients.

``passes`` drives every backend through these few methods, so a backend holds kernels and nothing of pairs, groups,
objectives or autograd. To add one, subclass ``Backend`` and ``HeadTile`` in a file of its own and list it in
``backends/__init__.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from ..head import LMHead


class HeadTile(ABC):
    """A workspace for up to ``capacity`` rows of logits over the whole vocabulary, reused for tile after tile."""

    def __init__(self, head: LMHead, capacity: int) -> None:
        self.head = head
        self.capacity = capacity

    @abstractmethod
    def stage(self, x: Tensor, targets: Tensor) -> Tensor:
        """Log-probs (n,) in the accumulate dtype of ``targets`` (n,) given hidden states ``x`` (n, H).

        Leaves in the workspace what ``gradients`` needs; the next ``stage`` overwrites it. n <= capacity.
        """

    @abstractmethod
    def staged(self) -> tuple[Tensor, ...]:
        """The tensors that ``gradients`` reads, of the rows staged last; they must not be staged over while in use."""

    @abstractmethod
    def restore(self, staged: tuple[Tensor, ...]) -> None:
        """Make ``gradients`` read these, from ``staged`` of a tile of the same head."""

    @abstractmethod
    def gradients(
        self,
        coefficients: Tensor,
        *,
        dx: Tensor | None = None,
        dweight: Tensor | None = None,
        dbias: Tensor | None = None,
        accumulate: bool = False,
    ) -> None:
        """Gradients of sum(coefficients * log-probs) of the staged rows, into preallocated tensors.

        ``dx`` (n, H) is written. ``dweight`` (V, H) and ``dbias`` (V,) are added to, or written unless ``accumulate``.
        They have the accumulate dtype; ``dx``, and ``dweight`` unless ``accumulate``, may have any other, to which they
        are rounded once. Only what is given is computed. The staged rows stay as they are.
        """

    def score(self, x: Tensor, targets: Tensor) -> Tensor:
        """Log-probs alone (N,), of any number of rows; a backend may know something cheaper than ``stage``."""
        return torch.cat([self.stage(x[rows], targets[rows]) for rows in chunks(0, len(x), self.capacity)])


class Backend(ABC):
    """A named way to run the head's products and the passes over its logits."""

    name: str

    @abstractmethod
    def unsupported(self, head: LMHead, device: torch.device) -> str | None:
        """Why this head cannot run here and what to do instead, or None if it can."""

    @abstractmethod
    def default_workspace_bytes(self, head: LMHead, device: torch.device) -> int:
        """Workspace when the user sets no bound: from the head's shape and the device alone, never from free memory."""

    @abstractmethod
    def bytes_per_row(self, head: LMHead) -> int:
        """Workspace that one row of a tile takes."""

    @abstractmethod
    def staged_bytes(self, head: LMHead, rows: int) -> int:
        """Memory that staged rows go on taking until their gradients are computed."""

    @abstractmethod
    def open_tile(self, head: LMHead, capacity: int) -> HeadTile:
        """Allocate a workspace of ``capacity`` rows."""

    def capacity(self, head: LMHead, device: torch.device, max_workspace_bytes: int | None) -> int:
        """Rows that fit the workspace bound, at least one."""
        limit = self.default_workspace_bytes(head, device) if max_workspace_bytes is None else max_workspace_bytes
        return max(1, limit // self.bytes_per_row(head))


def chunks(start: int, stop: int, capacity: int) -> Iterator[slice]:
    """As few slices of at most ``capacity`` as possible, nearly equal: a last one of few rows would waste a product."""
    if start < stop:
        count = -(-(stop - start) // capacity)
        size = -(-(stop - start) // count)
        yield from (slice(i, min(i + size, stop)) for i in range(start, stop, size))
