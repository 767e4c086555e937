"""List the backends by name. ``"reference"`` is missing: ``inspo_kernels.reference`` has no passes to drive."""

from __future__ import annotations

import torch

from ..arguments import choice
from ..head import LMHead
from .base import Backend, HeadTile, open_tile
from .torch_backend import TorchBackend
from .triton_backend import TritonBackend

__all__ = ["Backend", "HeadTile", "check_backend", "open_tile", "resolve_backend"]

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TorchBackend(), TritonBackend())}


def check_backend(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is "auto", "reference" or the name of a backend."""
    choice("backend", name, [*BACKENDS, "auto", "reference"])


def resolve_backend(name: str, head: LMHead, device: torch.device) -> Backend | None:
    """Return the backend called ``name``, or the device's default for "auto"; None for "reference".

    Raises ``ValueError`` for an unknown name, or one that cannot run this head here.
    """
    check_backend(name)
    if name == "reference":
        return None
    if name == "auto":
        name = "torch" if device.type == "cpu" or BACKENDS["triton"].unsupported(head, device) else "triton"
    if reason := BACKENDS[name].unsupported(head, device):
        raise ValueError(f"backend {name!r}: {reason}")
    return BACKENDS[name]
