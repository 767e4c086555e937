"""Keep the memory of large CPU workspaces from one call to the next.

The C library maps a block above 32 MiB anew each time it is allocated, and the first write to each page traps into the
system. For a workspace these traps take as long as a matmul of 64 rows with the head. So the largest unused workspace
of each dtype stays allocated until ``release_workspace`` or the end of the process.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# glibc's largest threshold: a smaller freed block is reused by the next allocation of its size.
_ALWAYS_MAPPED = 32 << 20
# A buffer is either here or in use by one call. Taking it out is atomic, so threads and nested calls never share it.
_idle: dict[torch.dtype, Tensor] = {}
# What was allocated here and lives. A hook of saved tensors may put memory of its own in place of a call's.
_own: set[StorageWeakRef] = set()


def borrow(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a flat uninitialised tensor of at least ``size`` elements, to be given back or left to be freed."""
    if device.type != "cpu" or size * dtype.itemsize < _ALWAYS_MAPPED or torch.compiler.is_compiling():
        return torch.empty(size, dtype=dtype, device=device)
    idle = _idle.pop(dtype, None)
    if idle is not None and idle.numel() >= size:
        return idle
    del idle  # before a larger one is allocated
    buffer = torch.empty(size, dtype=dtype, device=device)
    _own.difference_update([own for own in list(_own) if own.expired()])
    _own.add(StorageWeakRef(buffer.untyped_storage()))
    return buffer


def give_back(buffer: Tensor) -> None:
    """Let a later call have this memory, which nobody may read or write any more; ``buffer`` may be a part of it."""
    if buffer.device.type != "cpu" or not _own or torch.compiler.is_compiling():
        return
    if StorageWeakRef(buffer.untyped_storage()) not in _own:
        return
    whole = torch.empty(0, dtype=buffer.dtype, device="cpu").set_(buffer.untyped_storage())
    if buffer.is_inference() or whole.is_inference():
        return
    idle = _idle.get(buffer.dtype)
    if idle is None or idle.numel() < whole.numel():
        _idle[buffer.dtype] = whole


def release_workspace() -> None:
    """Free the workspace memory that is kept between calls on a CPU.

    The kept memory is at most the largest workspace of any call, as set by ``max_workspace_bytes`` or its default.
    """
    _idle.clear()
