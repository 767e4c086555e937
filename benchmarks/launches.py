"""List the cases of the compile report: each kernel as the backend launches it, and each launch of the tests.

``cases`` lists the shipped configurations by hand, with the facts that the report checks. As a pytest plugin, this
module records every launch of the tests, for any launcher and any arguments, and ``recorded`` replays them:

    TRITON_INTERPRET=1 LAUNCHES=FILE python -m pytest -p benchmarks.launches tests/inspo_kernels/test_triton.py

A launcher is any function in ``inspo_kernels.kernels`` that takes ``arch``. The plugin writes its name and the facts of
its arguments that affect compilation: dtypes, shapes, strides, alignment and which tensors share an address. Identical
calls are written once.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

VOCAB, HIDDEN, ROWS, TILE_WORDS = 128256, 4096, 4, 8448
HALF, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = {HALF: "fp16", BF16: "bf16", FP32: "fp32", FP64: "fp64"}
TRANSFORMS = {"plain": (False, None, 1.0), "cap": (False, 30.0, 1.0), "bias, cap, scale": (True, 30.0, 0.5)}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration, and the facts to check in its machine code.

    ``launch`` is called with the architecture's name as ``arch``. ``elements`` maps the architecture to the logits that
    a thread handles per iteration of the hot loop. ``bytes`` and ``cache_bytes`` are the memory and cache traffic per
    logit. If not ``shipped``, a kernel is reported once for all its launches, and its strides are not checked, because
    a stride of 1 is compiled in.
    """

    kernel: str
    configuration: str
    launch: Callable[..., Any]
    wide_loads: bool = True
    wide_stores: bool = False
    shipped: bool = True
    elements: Callable[[str], int] | None = None
    bytes: float = 0.0
    cache_bytes: float = 0.0
    stack_bytes: int = 0
    row_offsets: bool = True
    runs_on: Callable[[str], bool] = lambda arch: True


def cases() -> Iterator[Case]:
    """Yield every combination of dtypes and flags that the backend launches. Cap 30 and scale 0.5 are examples."""
    for transform in TRANSFORMS:
        for dtype in (BF16, HALF, FP32, FP64):
            yield row_pass_case(dtype, True, transform, VOCAB)
            if transform != "plain" or dtype in (FP32, FP64):  # for sums, E's dtype matters only to the bias
                yield row_pass_case(dtype, False, transform, VOCAB)
        yield row_pass_case(BF16, True, transform, VOCAB, first=TILE_WORDS)
        yield row_pass_case(BF16, False, transform, VOCAB, first=TILE_WORDS, statistics=True)
    for vocab in (1000, 50257):  # shorter blocks; an odd vocabulary size
        yield row_pass_case(BF16, True, "plain", vocab)
    yield from fused_pass_cases()
    yield from label_logits_cases()
    yield from bias_gradient_cases()
    yield from scale_rows_cases()


def row_pass_case(
    dtype: torch.dtype, store: bool, transform: str, vocab: int, first: int = 0, statistics: bool = False
) -> Case:
    """Return a launch on a tile of logits from word ``first`` on. E in place, and float16, use one whole tile."""
    from inspo_kernels.kernels import config

    with_bias, softcap, scale = TRANSFORMS[transform]
    accumulate_dtype = FP64 if dtype == FP64 else FP32
    stride = config.padded_vocab(vocab)
    in_place = store and dtype == accumulate_dtype
    words = stride if in_place or (store and dtype == HALF) else min(TILE_WORDS, stride)
    raw = torch.empty(ROWS, words, dtype=accumulate_dtype)
    e = None if not store else raw if in_place else torch.empty(ROWS, stride, dtype=dtype)
    bias = torch.empty(stride, dtype=dtype) if with_bias else None
    targets = torch.zeros(ROWS, dtype=torch.int64)
    options: dict[str, Any] = {"bias": bias, "softcap": softcap, "scale": scale, "statistics": statistics}
    launch = partial(row_pass_launch(raw, targets, e, vocab=vocab, **options), first=first)

    def elements(arch: str) -> int:
        chosen = config.row_pass(arch, words, accumulate_dtype, softcap, statistics)
        return chosen.block // (32 * chosen.num_warps)

    what = "E in place" if in_place else f"{NAMES[dtype]} E" if store else "statistics" if statistics else "sums"
    name = f"{NAMES[accumulate_dtype]} logits, {what}, {transform}, V={vocab}, word {first}"
    whole = words == stride
    return Case(
        "row_pass",
        name + (f", {NAMES[dtype]} bias" if with_bias else ""),
        launch,
        wide_stores=store,
        elements=elements,
        bytes=(accumulate_dtype.itemsize if whole else 0) + (dtype.itemsize if store else 0),
        cache_bytes=accumulate_dtype.itemsize + (dtype.itemsize if store else 0),
    )


def row_pass_launch(
    raw: Tensor, targets: Tensor, e: Tensor | None, *, vocab: int, **options: Any
) -> Callable[..., None]:
    """Return a launch of the pass over a tile of logits (rows, words); call it with ``first`` and ``arch``."""
    from inspo_kernels.kernels.row_pass import PARTS, row_pass

    label, offset, rest = raw.new_zeros(3, len(raw))
    parts, raised = raw.new_empty(len(PARTS), len(raw)), torch.zeros_like(targets, dtype=torch.int32)
    given = launch_options(**options)
    return partial(row_pass, raw, targets, label, offset, rest, parts, raised, vocab=vocab, e=e, **given)


def fused_pass_launch(
    x: Tensor, weight: Tensor, targets: Tensor, label: Tensor, e: Tensor | None, **options: Any
) -> Callable[..., None]:
    """Return a launch of the fused pass over the rows of ``x``; call it with ``arch``."""
    from inspo_kernels.kernels.fused_pass import fused_pass

    given = launch_options(**options)
    offset, sums = torch.empty_like(label), label.new_empty(1 + len(given["wanted"]), len(label))
    raised = torch.zeros_like(targets, dtype=torch.int32)
    return partial(fused_pass, x, weight, targets, label, offset, sums, raised, e=e, **given)


def launch_options(
    bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0, statistics: bool = False
) -> dict[str, Any]:
    from inspo_kernels.kernels.row_pass import PARTS

    outer, wanted = 1.0 if softcap is None else softcap, frozenset(PARTS if statistics else ())
    return {"bias": bias, "softcap": softcap, "outer": outer, "scale": scale, "wanted": wanted}


def fused_pass_cases() -> Iterator[Case]:
    """Yield the launches of the fused pass, for the architectures that use it. Its tiles pass through shared memory."""
    from inspo_kernels.kernels import config

    stride = config.padded_vocab(VOCAB)
    e = torch.empty(ROWS, stride, dtype=BF16)
    kinds = [(BF16, store, statistics) for statistics in (False, True) for store in (True, False)]
    for transform, (with_bias, softcap, scale) in TRANSFORMS.items():
        for dtype, store, statistics in (*kinds, (HALF, False, False)):
            x, weight = torch.empty(ROWS, HIDDEN, dtype=dtype), torch.empty(VOCAB, HIDDEN, dtype=dtype)
            targets, label = torch.zeros(ROWS, dtype=torch.int64), torch.empty(ROWS)
            bias = torch.empty(stride, dtype=dtype) if with_bias else None
            options: dict[str, Any] = {"bias": bias, "softcap": softcap, "scale": scale, "statistics": statistics}
            what = ("E" if store else "sums") + (" and statistics" if statistics else "")
            yield Case(
                "fused_pass",
                f"{NAMES[dtype]} {what}, {transform}, V={VOCAB}",
                fused_pass_launch(x, weight, targets, label, e if store else None, **options),
                wide_loads=False,
                # Registers spill once per tile, which costs little next to the tile's thousands of multiply-adds.
                stack_bytes=160 if statistics else 32 if softcap else 0,
                row_offsets=False,
                runs_on=uses_fused_pass,
            )


def uses_fused_pass(arch: str) -> bool:
    from inspo_kernels.kernels import config

    return config.fused_pass(arch, None) is not None


def label_logits_cases() -> Iterator[Case]:
    from inspo_kernels.kernels.label_logits import label_logits

    targets = torch.zeros(ROWS, dtype=torch.int64)
    for dtype in (BF16, HALF, FP32, FP64):
        for layout in ("words in rows", "words in columns"):
            x, weight = torch.empty(ROWS, HIDDEN, dtype=dtype), torch.empty(VOCAB, HIDDEN, dtype=dtype)
            weight = weight if layout == "words in rows" else weight.t().contiguous().t()
            yield Case("label_logits", f"{NAMES[dtype]}, {layout}", partial(label_logits, x, weight, targets))


def bias_gradient_cases() -> Iterator[Case]:
    from inspo_kernels.kernels import config
    from inspo_kernels.kernels.bias_gradient import bias_gradient

    def elements(arch: str) -> int:
        chosen = config.bias_gradient(arch)
        return chosen.block_rows * chosen.block_cols // (32 * chosen.num_warps)

    for dtype in (BF16, HALF, FP32, FP64):
        for accumulate in (False, True):
            e = torch.empty(ROWS, VOCAB, dtype=dtype)
            scale = torch.empty(ROWS, dtype=FP64 if dtype == FP64 else FP32)
            out = torch.empty(VOCAB, dtype=scale.dtype)
            yield Case(
                "bias_gradient",
                f"{NAMES[dtype]} E, {'added to' if accumulate else 'written'}",
                partial(bias_gradient, e, scale, out, accumulate=accumulate),
                elements=elements,
                bytes=dtype.itemsize,
                cache_bytes=dtype.itemsize,
            )


def scale_rows_cases() -> Iterator[Case]:
    """Yield the scaling of X, and of dX into its own dtype and others. Its two-byte stores are as wide as its loads."""
    from inspo_kernels.kernels.scale_rows import scale_rows

    for source, target in ((BF16, BF16), (HALF, HALF), (FP32, BF16), (FP32, HALF), (FP32, FP32), (FP64, FP64)):
        x, out = torch.empty(ROWS, HIDDEN, dtype=source), torch.empty(ROWS, HIDDEN, dtype=target)
        scale = torch.empty(ROWS, dtype=FP64 if source == FP64 else FP32)
        launch = partial(scale_rows, x, scale, out)
        yield Case("scale_rows", f"{NAMES[source]} to {NAMES[target]}", launch, wide_stores=True)


# --- launches of the tests ---


class Layout(NamedTuple):
    """The facts of a tensor that affect compilation. ``same_as`` counts to an earlier tensor at the same address."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    same_as: int | None


_calls: dict[bytes, None] = {}


def recording(launcher: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(launcher)
    def call(*args: Any, **kwargs: Any) -> Any:
        addresses: list[int] = []

        def written(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            address = value.data_ptr()
            same_as = addresses.index(address) if address and address in addresses else None  # 0: it is empty
            addresses.append(address)
            return Layout(value.dtype, tuple(value.shape), value.stride(), address % 16, same_as)

        given = [written(value) for value in args]  # before the options: ``same_as`` counts in this order
        options = {name: written(value) for name, value in kwargs.items() if name != "arch"}
        one = (launcher.__module__, launcher.__name__, given, options)
        _calls[pickle.dumps(one)] = None
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
    Path(os.environ["LAUNCHES"]).write_bytes(pickle.dumps(list(_calls)))


def recorded(file: Path) -> Iterator[Case]:
    """Yield a case for each launch that the plugin wrote to ``file``, on tensors with the recorded layouts.

    The report checks fewer facts of these launches, because tests use odd strides and widths on purpose.
    """
    for i, call in enumerate(pickle.loads(file.read_bytes())):
        module, name, args, kwargs = pickle.loads(call)
        tensors: list[Tensor] = []
        arguments = [_made(value, tensors) for value in args]
        keywords = {key: _made(value, tensors) for key, value in kwargs.items()}
        dtypes = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        options = (f"{key}={value}" for key, value in kwargs.items() if not isinstance(value, Layout))
        yield Case(
            name,
            f"test launch {i}: {', '.join([*dtypes, *options])}",
            partial(getattr(importlib.import_module(module), name), *arguments, **keywords),
            wide_loads=False,
            shipped=False,
            stack_bytes=160 if name == "fused_pass" else 0,
            runs_on=uses_fused_pass if name == "fused_pass" else Case.runs_on,
        )


def _made(value: Any, tensors: list[Tensor]) -> Any:
    """Rebuild a recorded argument. Tensors that shared an address share one again."""
    if not isinstance(value, Layout):
        return value
    if value.same_as is not None:
        tensor = torch.as_strided(tensors[value.same_as].view(value.dtype), value.shape, value.stride)
    else:
        reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride)) + 1 if all(value.shape) else 0
        start = value.offset // value.dtype.itemsize
        tensor = torch.empty(reach + start, dtype=value.dtype).as_strided(value.shape, value.stride, start)
    tensors.append(tensor)
    return tensor
