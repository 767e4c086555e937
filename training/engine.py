"""The processes of a run: one, several with a copy of the model each (DDP), or several that share it (FSDP2).

``accelerate launch`` starts them and says by its configuration which engine it is.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .config import InputError, TrainConfig

Value = TypeVar("Value")
PATIENCE = timedelta(hours=2)  # how long a process waits for another one
# Settings of accelerate's FSDP plugin that would silently have no effect here, or a wrong one: value, what to do.
_FSDP_SETTINGS = {
    "FSDP_VERSION": ("2", "set fsdp_version: 2"),
    # With it, transformers loads the weights in one process and leaves the others empty.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "set fsdp_cpu_ram_efficient_loading: false"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "set fsdp_reshard_after_forward: true"),
    "FSDP_OFFLOAD_PARAMS": ("false", "set fsdp_offload_params: false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "set gradient_checkpointing in the training configuration instead"),
}


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def start_processes() -> Accelerator:
    """Joins the processes that a launcher started. Raises InputError for a launch that no engine here serves."""
    check_launch(os.environ)
    # A launcher ends the others where one process dies. Ten minutes, NCCL's own patience, are too few for the others
    # while the first one writes a checkpoint of a large model to a slow disk.
    kwargs = [DistributedDataParallelKwargs(gradient_as_bucket_view=True), InitProcessGroupKwargs(timeout=PATIENCE)]
    # Apple's GPUs have no float64, which sums and objectives need. Autocast is PairModel's own.
    return Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(), kwargs_handlers=kwargs)


def end_processes(status: int) -> None:
    """Ends a program that joined others, with exit status ``status``; returns where it is the only process.

    Without the interpreter's own end: a thread of gloo that lets go of the last tensors while the interpreter is being
    taken down is aborted, and with it a process whose work was done. ``destroy_process_group`` does not stop these
    threads, because caches of torch still refer to the group of a sharded model.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def check_launch(environment: Mapping[str, str]) -> None:
    """Raises InputError where what ``accelerate launch`` put into the environment would do nothing, or harm."""
    if _is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        raise InputError(
            "DeepSpeed is not supported; launch with an FSDP2 configuration (training/configs/accelerate/"
            "fsdp2_8gpu.yaml), which shards parameters, gradients and optimizer state as ZeRO-3 does"
        )
    if (precision := environment.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise InputError(
            f"accelerate's configuration has mixed_precision={precision}; set it to 'no' there, and choose "
            "mixed_precision and param_dtype in the training configuration"
        )
    if _is_true(environment, "ACCELERATE_USE_FSDP"):
        for name, (value, remedy) in _FSDP_SETTINGS.items():
            if (given := environment.get(name, value)).lower() != value:
                raise InputError(f"accelerate's configuration has {name.lower()}={given}, not supported; {remedy}")


def is_sharded() -> bool:
    """Whether this run's engine is FSDP2."""
    return process_count() > 1 and _is_true(os.environ, "ACCELERATE_USE_FSDP")


def wrap(module: nn.Module, accelerator: Accelerator, config: TrainConfig) -> nn.Module:
    """``module`` (model and loss, ``module.model`` a transformers model) on this process's device, in its engine.

    FSDP2 is torch's ``fully_shard`` on each decoder layer and on the whole, so that embeddings and head are whole
    within the forward of ``module``; accelerate's own wrapping would shard the head by itself, and ignores a CPU.
    """
    if not is_sharded():
        module = accelerator.prepare_model(module)
        if isinstance(module, DistributedDataParallel):
            # Buffers are constants (rotary frequencies); keeping them alike would be a collective in every forward.
            module.broadcast_buffers = False
        return module
    mesh = init_device_mesh(accelerator.device.type, (process_count(),))
    low = torch.bfloat16 if config.mixed_precision == "bf16" else None
    # Inputs and outputs hold float64 sums: they keep their dtype. Gradients are averaged in float32.
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(module, "FSDP2"):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # The root, too, is sharded again after each forward: whole weights would outlive a checkpoint that is loaded.
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    register_fsdp_forward_method(module, "answer")
    return module


def decoder_layers(module: nn.Module, what: str) -> list[GradientCheckpointingLayer]:
    """The layers of the transformers model in ``module``. Raises InputError where ``what`` cannot find any."""
    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"{what} needs a model whose layers are transformers' GradientCheckpointingLayer")
    return layers


@contextmanager
def checkpointed(layers: Sequence[GradientCheckpointingLayer]) -> Iterator[None]:
    """Forwards of ``layers`` within the block keep their input alone, and are computed again in the backward pass.

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


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around a forward and backward: DDP averages gradients in the ``last`` one of a step alone.

    FSDP2 does so in each, because gradients of the whole model would take the memory that sharding saves.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


def clip_gradients(module: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients down to ``max_norm`` together; returns their norm before, 0-d, the same in each process."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def sum_over_processes(values: Tensor) -> Tensor:
    """In place; the same in each process."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true in some process; the same in each."""
    if not dist.is_initialized():
        return flag
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)).item())


def from_first_process(value: Value) -> Value:
    """``value`` of the first process, in each."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def check_same(value: Any, what: str) -> None:
    """Raises InputError, in each process, where ``value`` is not the same in all of them."""
    if dist.is_initialized():
        digests: list[str] = [""] * process_count()
        dist.all_gather_object(digests, hashlib.blake2b(repr(value).encode()).hexdigest())
        if differing := [i for i, digest in enumerate(digests) if digest != digests[0]]:
            raise InputError(f"{what} in process {differing[0]} differ from those in process 0; give all the same")


def all_finite(module: nn.Module) -> bool:
    """Whether all trained parameters are, in all processes; one read from the device."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters() if p.requires_grad]
    bad = torch.stack([part.detach().isfinite().logical_not().any() for part in parts]).any()
    return not sum_over_processes(bad.double()).item()


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state of ``module``, unsharded on the CPU in the first process and empty in the others, which all call it."""
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@contextmanager
def together() -> Iterator[None]:
    """An exception that leaves the block in one process leaves it in all: nobody waits for one that is gone.

    For work without communication between the processes; all of them enter the block.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if process_count() > 1:
        failures: list[tuple[bool, str] | None] = [None] * process_count()
        users = isinstance(error, InputError)
        text = str(error) if users else f"{type(error).__name__}: {error}"
        dist.all_gather_object(failures, None if error is None else (users, text))
        if error is None and (failed := [i for i, failure in enumerate(failures) if failure]):
            users, text = failures[failed[0]] or (False, "")
            error = (InputError if users else RuntimeError)(f"in process {failed[0]}: {text}")
    if error is not None:
        raise error


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() == "true"
