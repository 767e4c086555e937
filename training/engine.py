"""What the processes of a run tell each other, and what an engine keeps from a model's own code."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import InputError

Value = TypeVar("Value")


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def end_processes(status: int) -> None:
    """End a program that joined others, with exit status ``status``; return where it is the only process.

    The interpreter's own end is skipped: a thread of gloo that releases the last tensors meanwhile is aborted, and with
    it a process whose work was done. ``destroy_process_group`` does not stop these threads, because caches of torch
    still refer to the group of a sharded model.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def decoder_layers(module: nn.Module, what: str) -> list[GradientCheckpointingLayer]:
    """Return the layers of the transformers model in ``module``. Raises InputError where ``what`` cannot find any."""
    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"{what} needs a model whose layers are transformers' GradientCheckpointingLayer")
    return layers


@contextmanager
def checkpointed(layers: Sequence[GradientCheckpointingLayer]) -> Iterator[None]:
    """Within the block, forwards of ``layers`` keep their input alone and are computed again in the backward pass.

    transformers does so only in train mode, which would switch dropout on; here the layers' mode stays as it is. The
    hooks of an engine stay outside: a sharded layer is gathered before it is computed again.
    """
    forwards = [layer.forward for layer in layers]
    replaced = ["forward" in vars(layer) for layer in layers]  # by hooks that place a model on devices, say
    for layer, forward in zip(layers, forwards):
        # Nothing random is computed again, so there is no random state to keep.
        layer.forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward, own in zip(layers, forwards, replaced):
            if own:
                layer.forward = forward
            else:
                del layer.forward


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum in place; the same in each process."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true in some process; the same in each."""
    if not dist.is_initialized():
        return flag
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)).item())


def from_first_process(value: Value) -> Value:
    """Return ``value`` of the first process, in each."""
    return gathered(value)[0]


def gathered(value: Value) -> list[Value]:
    """Return the values of all processes, in each, by rank."""
    values = [value] * process_count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def check_same(value: Any, what: str) -> None:
    """Raise InputError, in each process, where ``value`` is not the same in all of them."""
    digests = gathered(hashlib.blake2b(repr(value).encode()).hexdigest())
    if differing := [i for i, digest in enumerate(digests) if digest != digests[0]]:
        raise InputError(f"{what} in process {differing[0]} differ from those in process 0; give all the same")


def all_finite(module: nn.Module) -> bool:
    """Whether all trained parameters are, in all processes; one read from the device."""
    trained = [getattr(p, "ds_tensor", p) for p in module.parameters() if p.requires_grad]  # DeepSpeed's own share
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    bad = torch.stack([part.detach().isfinite().logical_not().any() for part in parts]).any()
    return not sum_over_processes(bad.double()).item()


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Let an exception that leaves the block in one process leave it in all: nobody waits for one that is gone.

    For work without communication between the processes; all of them enter the block.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failure = None
    if error is not None:
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        failure = (isinstance(error, InputError), text)
    failures = gathered(failure)
    if error is None and (failed := [i for i, one in enumerate(failures) if one]):
        users, text = failures[failed[0]] or (False, "")
        error = (InputError if users else RuntimeError)(f"in process {failed[0]}: {text}")
    if error is not None:
        raise error
