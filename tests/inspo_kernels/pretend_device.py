"""Simulate a second device without hardware: tensors report another device while their values are on the CPU.

Tests can then check anywhere what a real accelerator would refuse, wait for or launch. Operations that mix devices
raise, and ``Ledger`` lists every host read (for which the device must finish), every blocking copy and every launch.
Registering the device affects the whole process, so ``check_pretend_device`` runs in a separate process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend(rename="pretend", backend_module=_Module())
DEVICE = torch.device("pretend", 0)

# The shapes of their results depend on values, which the host must read from the device.
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
}
# In addition to views, these are only bookkeeping on the host.
NO_LAUNCH = {
    aten.detach.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.lift_fresh.default,
    aten._unsafe_view.default,
    aten.is_same_size.default,
}


class Ledger:
    """The requests to the device, by name."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.waits: list[str] = []
        self.launches: list[str] = []


class OnDevice(Tensor):
    """A tensor on ``DEVICE``; ``value`` holds its elements, in memory shared by its views."""

    value: Tensor
    ledger = Ledger()

    @staticmethod
    def __new__(cls, value: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=DEVICE,
        )

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def tolist(self) -> Any:
        self.ledger.reads.append("tolist")
        return self.value.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _execute(function, args, kwargs or {}, cls.ledger)


class Pretend(TorchDispatchMode):
    """While active, tensors can be created on ``DEVICE`` and moved there. ``ledger`` lists the device's operations."""

    def __enter__(self) -> Pretend:
        self.ledger = OnDevice.ledger = Ledger()
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _execute(function, args, kwargs or {}, self.ledger)


def values(tree: Any) -> Any:
    """Return the same tree with CPU tensors that share memory with the device's tensors."""
    return tree_map(lambda leaf: leaf.value if isinstance(leaf, OnDevice) else leaf, tree)


def _execute(function: Any, args: Any, kwargs: dict[str, Any], ledger: Ledger) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    from_device = any(isinstance(t, OnDevice) for t in tensors)
    asked = kwargs.get("device")
    to_device = from_device if asked is None else torch.device(asked).type == DEVICE.type
    name = str(function).removeprefix("aten.")
    if from_device or to_device:
        _enter(ledger, function, name, tensors, args, kwargs, to_device)
    own_args, own_kwargs = values((args, kwargs))
    if asked is not None and to_device:
        own_kwargs["device"] = torch.device("cpu")
    with _disable_current_modes():
        if function is aten.addmm.dtype_out:
            result = _mixed_addmm(*own_args, **own_kwargs)
        elif function is aten._to_copy.default and from_device != to_device:
            # A copy to another device is one even where nothing else changes.
            result = function(*own_args, **own_kwargs).clone()
        else:
            result = function(*own_args, **own_kwargs)
    if not to_device:
        return result
    wrapped = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return return_and_correct_aliasing(function, args, kwargs, wrapped)


def _enter(
    ledger: Ledger, function: Any, name: str, tensors: list[Tensor], args: Any, kwargs: dict[str, Any], to_device: bool
) -> None:
    copies = function in (aten._to_copy.default, aten.copy_.default)
    devices = {t.device.type for t in tensors if t.dim() or isinstance(t, OnDevice)}
    if copies:
        source, destination = (tensors[0], to_device) if function is aten._to_copy.default else (args[1], args[0])
        if isinstance(destination, Tensor):
            destination = isinstance(destination, OnDevice)
        if isinstance(source, OnDevice) and not destination:
            ledger.reads.append(name)
        elif not isinstance(source, OnDevice) and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            ledger.waits.append(name)
        else:
            ledger.launches.append(name)
        return
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} was given {sorted(devices)}")
    if _reads(function, args, kwargs):
        ledger.reads.append(name)
    elif not function.is_view and function not in NO_LAUNCH:
        ledger.launches.append(name)


def _reads(function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if function is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if function is aten.segment_reduce.default:
        return not kwargs.get("unsafe")  # its checks look at the lengths
    if function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return function in READS


def _mixed_addmm(
    added: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    """Compute ``addmm`` of narrow operands into a wide result, which torch supports only on GPUs, with GPU rules."""
    assert a.dtype == b.dtype and out.dtype == out_dtype and added.dtype in (out_dtype, a.dtype)
    assert out_dtype == a.dtype or (out_dtype == torch.float32 and a.dtype in (torch.float16, torch.bfloat16))
    return torch.addmm(added, a.to(out_dtype), b.to(out_dtype), beta=beta, alpha=alpha, out=out)
