"""Communicate between the ranks of a run, and checkpoint activations under every engine."""

from __future__ import annotations

import functools
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

from .errors import InputError, SaveError

Value = TypeVar("Value")


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def end_processes(status: int) -> None:
    """Exit with ``status`` if this is one of several ranks; otherwise return.

    The interpreter's own shutdown is skipped. Threads of gloo may still release tensors during it, and would abort a
    rank whose work is done. ``destroy_process_group`` does not stop them: torch's caches still refer to the group.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def decoder_layers(module: nn.Module, what: str) -> list[GradientCheckpointingLayer]:
    """Return the decoder layers in ``module``. Raises InputError, naming the option ``what``, if there are none."""
    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"{what} needs a model whose layers are transformers' GradientCheckpointingLayer")
    return layers


@contextmanager
def checkpointed(layers: Sequence[GradientCheckpointingLayer]) -> Iterator[None]:
    """Make the forwards of ``layers`` keep only their input and recompute the rest in the backward pass.

    transformers does this only in train mode, which would enable dropout; here the mode of the layers stays as it is.
    The hooks of an engine stay outside: a sharded layer is gathered before it is recomputed.
    """
    replaced = [vars(layer).get("forward") for layer in layers]  # by hooks that place a model on devices, for example
    for layer in layers:
        # Nothing random is recomputed, so there is no random state to keep.
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, replaced):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum ``values`` over the ranks, in place, and return the sum on each."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Return on each rank whether ``flag`` is true on any. One rank alone does not wait for its device."""
    if not dist.is_initialized():
        return flag
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)).item())


def from_first_process(value: Value) -> Value:
    """Return the ``value`` of the first rank on each."""
    return gathered(value)[0]


def gathered(value: Value) -> list[Value]:
    """Return the values of all ranks, in their order, on each."""
    values = [value] * process_count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def check_same(value: Any, what: str) -> None:
    """Raise InputError on each rank if ``value`` differs between ranks."""
    values = gathered(value)
    if differing := [i for i, other in enumerate(values) if other != values[0]]:
        raise InputError(f"{what} in process {differing[0]} differ from those in process 0; give all the same")


def whole(value: Any) -> Any:
    """Return a sharded tensor gathered, and any other value unchanged. All ranks must call this together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def all_finite(module: nn.Module) -> bool:
    """Return whether the trained parameters of all ranks are finite; this reads the device once."""
    trained = [getattr(p, "ds_tensor", p) for p in module.parameters() if p.requires_grad]  # DeepSpeed's own share
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    bad = torch.stack([part.detach().isfinite().logical_not().any() for part in parts]).any()
    return not sum_over_processes(bad.double()).item()


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise an exception of the block on all ranks, so that none waits for a rank that has failed.

    All ranks enter the block, which must not communicate. A rank that did not fail raises InputError, SaveError or
    OSError for an exception of that class, and RuntimeError for any other.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    kind = next((kind for kind in (InputError, SaveError, OSError) if isinstance(error, kind)), RuntimeError)
    text = str(error) if kind is not RuntimeError else f"{type(error).__name__}: {error}"
    failures = gathered(error and (kind, text))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure:
            raise failure[0](f"in process {rank}: {failure[1]}")
