"""Record every launch of the package's kernels, as a pytest plugin for ``benchmarks.compile_report --tests``.

    LAUNCHES=FILE python -m pytest -p benchmarks.record_launches tests/inspo_kernels/test_triton.py

A launcher is any function in ``inspo_kernels.kernels`` that takes ``arch``. The plugin writes its name and the facts of
its arguments that affect compilation: dtypes, shapes, strides, alignment and which tensors share an address. Identical
calls are written once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Triton decides at import whether it interprets, and the launchers import it.
os.environ.setdefault("TRITON_INTERPRET", "1")
_calls: dict[str, None] = {}


def written(value: Any, addresses: list[int]) -> Any:
    """Return a JSON value from which ``launches.recorded`` rebuilds an argument that compiles to the same kernel."""
    if isinstance(value, torch.Tensor):
        address = value.data_ptr()
        same_as = addresses.index(address) if address and address in addresses else None  # 0: it is empty
        addresses.append(address)
        dtype = str(value.dtype).removeprefix("torch.")
        layout = {"shape": list(value.shape), "stride": list(value.stride()), "offset": address % 16}
        return {"dtype": dtype, **layout, "same_as": same_as}
    if isinstance(value, frozenset):
        return {"set": sorted(value)}
    if isinstance(value, float):
        return {"float": repr(value)}
    return value


def recording(launcher: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(launcher)
    def call(*args: Any, **kwargs: Any) -> Any:
        addresses: list[int] = []
        one = {
            "module": launcher.__module__,
            "name": launcher.__name__,
            "args": [written(value, addresses) for value in args],
            "kwargs": {name: written(value, addresses) for name, value in kwargs.items() if name != "arch"},
        }
        _calls[json.dumps(one)] = None
        return launcher(*args, **kwargs)

    return call


def pytest_configure() -> None:
    from inspo_kernels import kernels

    for found in pkgutil.iter_modules(kernels.__path__):
        if found.name == "config":  # its functions choose sizes for an architecture and launch nothing
            continue
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and "arch" in inspect.signature(function).parameters:
                setattr(module, name, recording(function))


def pytest_unconfigure() -> None:
    Path(os.environ["LAUNCHES"]).write_text("".join(f"{call}\n" for call in _calls))
