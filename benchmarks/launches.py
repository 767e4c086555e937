"""List the cases of the compile report: each kernel as the backend launches it, and each launch of the tests.

``cases`` lists the shipped configurations by hand, with the facts that the report checks. ``recorded`` replays launches
that ``benchmarks.record_launches`` recorded while the tests ran, for any launcher and any arguments.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

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
    from inspo_kernels.kernels.row_pass import PARTS, row_pass

    with_bias, softcap, logit_scale = TRANSFORMS[transform]
    accumulate_dtype = FP64 if dtype == FP64 else FP32
    stride = config.padded_vocab(vocab)
    in_place = store and dtype == accumulate_dtype
    words = stride if in_place or (store and dtype == HALF) else min(TILE_WORDS, stride)
    raw = torch.empty(ROWS, words, dtype=accumulate_dtype)
    e = None if not store else raw if in_place else torch.empty(ROWS, stride, dtype=dtype)
    bias = torch.empty(stride, dtype=dtype) if with_bias else None
    targets, raised = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int32)
    label, offset, rest = torch.empty(3, ROWS, dtype=accumulate_dtype)
    parts = torch.empty(len(PARTS), ROWS, dtype=accumulate_dtype)
    launch = partial(
        row_pass,
        raw,
        targets,
        label,
        offset,
        rest,
        parts,
        raised,
        first=first,
        vocab=vocab,
        e=e,
        bias=bias,
        softcap=softcap,
        outer=1.0 if softcap is None else softcap,
        scale=logit_scale,
        wanted=frozenset(PARTS if statistics else ()),
    )

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


def fused_pass_cases() -> Iterator[Case]:
    """Yield the launches of the fused pass, for the architectures that use it. Its tiles pass through shared memory."""
    from inspo_kernels.kernels import config
    from inspo_kernels.kernels.fused_pass import fused_pass
    from inspo_kernels.kernels.row_pass import PARTS

    for transform, (with_bias, softcap, logit_scale) in TRANSFORMS.items():
        for dtype, store, statistics in (
            (BF16, True, False),
            (BF16, False, False),
            (BF16, True, True),
            (BF16, False, True),
            (HALF, False, False),
        ):
            wanted = frozenset(PARTS if statistics else ())
            stride = config.padded_vocab(VOCAB)
            launch = partial(
                fused_pass,
                torch.empty(ROWS, HIDDEN, dtype=dtype),
                torch.empty(VOCAB, HIDDEN, dtype=dtype),
                torch.zeros(ROWS, dtype=torch.int64),
                torch.empty(ROWS),
                torch.empty(ROWS),
                torch.empty(1 + len(wanted), ROWS),
                torch.zeros(ROWS, dtype=torch.int32),
                e=torch.empty(ROWS, stride, dtype=BF16) if store else None,
                bias=torch.empty(stride, dtype=dtype) if with_bias else None,
                softcap=softcap,
                outer=1.0 if softcap is None else softcap,
                scale=logit_scale,
                wanted=wanted,
            )
            what = ("E" if store else "sums") + (" and statistics" if statistics else "")
            yield Case(
                "fused_pass",
                f"{NAMES[dtype]} {what}, {transform}, V={VOCAB}",
                launch,
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


def recorded(file: Path) -> Iterator[Case]:
    """Yield a case for each launch in a ``record_launches`` file, on tensors with the recorded layouts.

    The report checks fewer facts of these launches, because tests use odd strides and widths on purpose.
    """
    for i, line in enumerate(file.read_text().splitlines()):
        call = json.loads(line)
        launcher = getattr(importlib.import_module(call["module"]), call["name"])
        tensors: list[torch.Tensor] = []
        arguments = [_made(value, tensors) for value in call["args"]]
        keywords = {name: _made(value, tensors) for name, value in call["kwargs"].items()}
        yield Case(
            call["name"],
            f"test launch {i}: {_shown(call)}",
            partial(launcher, *arguments, **keywords),
            wide_loads=False,
            shipped=False,
            stack_bytes=160 if call["name"] == "fused_pass" else 0,
            runs_on=uses_fused_pass if call["name"] == "fused_pass" else Case.runs_on,
        )


def _made(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Rebuild an argument that ``record_launches.written`` recorded. Tensors that shared an address share one again."""
    if not isinstance(value, dict):
        return value
    if "set" in value:
        return frozenset(value["set"])
    if "float" in value:
        return float(value["float"])
    if "dtype" not in value:
        return value
    shape, stride, dtype = value["shape"], value["stride"], getattr(torch, value["dtype"])
    if value["same_as"] is not None:
        tensor = torch.as_strided(tensors[value["same_as"]].view(dtype), shape, stride)
    else:
        reach = sum((n - 1) * s for n, s in zip(shape, stride)) + 1 if all(shape) else 0
        start = value["offset"] // dtype.itemsize
        tensor = torch.empty(reach + start, dtype=dtype).as_strided(shape, stride, start)
    tensors.append(tensor)
    return tensor


def _shown(call: dict[str, Any]) -> str:
    """Format the dtypes of a call's tensors and its options for a table."""
    values = [*call["args"], *call["kwargs"].values()]
    dtypes = [v["dtype"] for v in values if isinstance(v, dict) and "dtype" in v]
    options = {name: v for name, v in call["kwargs"].items() if not isinstance(v, dict)}
    return ", ".join([*dict.fromkeys(dtypes), *(f"{name}={v}" for name, v in options.items())])
