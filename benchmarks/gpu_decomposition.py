"""Time the parts of one pass alone: each matmul, each pass over the logits and the glue between them.

Line by line the same as ``benchmarks.roofline`` predicts. Each line is timed twice: ``idle`` starts on an idle device,
so it includes the latency of Python and of launches; ``busy`` queues the same work behind a long matmul, so it is the
device's time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inspo_kernels.backends import BACKENDS
from inspo_kernels.scored_rows import spread_rows

from .batches import PairBatch
from .gpu_tuning import launch_fused_pass, launch_row_pass
from .harness import reason, seconds_behind_work, seconds_of, spread

ROUNDS = 7


def decompose(batch: PairBatch, stage_rows: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each line and its figures; a line that fails says why and the others go on."""
    for name, line_of in lines(batch, stage_rows):
        try:
            found = line_of()
            row = {"status": "needs a GPU"} if found is None else timed(*found, batch.hidden.device)
            del found
        except Exception as error:
            row = {"status": reason(error)}
        if batch.hidden.is_cuda:
            torch.cuda.synchronize()  # an error that outlives its line ends the step, not all that follow
            torch.cuda.empty_cache()
        yield name, row


Work = tuple[Callable[[], Any], dict[str, Any]]


def lines(batch: PairBatch, stage_rows: Sequence[int]) -> Iterator[tuple[str, Callable[[], Work | None]]]:
    """Yield each line's name and maker. A maker allocates the operands and returns the call and its work.

    A maker returns None if its kernel needs a GPU, or a GPU of another kind.
    """
    x, weight = batch.hidden, batch.weight
    narrow, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    stages = [rows for rows in stage_rows if rows <= len(x)]

    def e() -> Tensor:
        """Return random values in place of E, because matmuls of zeros run faster."""
        return torch.rand(len(x), len(weight), dtype=narrow, device=x.device)

    def on_gpu(make: Callable[..., Work | None], *more: Any) -> Callable[[], Work | None]:
        return partial(make, batch, *more) if x.is_cuda else lambda: None

    yield "copy", partial(copy, x.device)
    yield "logits matmul, narrow output", lambda: matmul(x, weight.t(), narrow)
    yield "logits matmul, float32 output", lambda: matmul(x, weight.t(), wide)
    for rows in stages:
        yield f"logits matmul in stages of {rows}", partial(matmul, x[:rows], weight.t(), wide, -(-len(x) // rows))
    for rows in stages:
        yield f"row pass with E, stages of {rows}", on_gpu(_row_pass, rows, True)
    yield "row pass, statistics alone", on_gpu(_row_pass, min(stage_rows[1], len(x)), False)
    yield "fused pass, sums alone", on_gpu(_fused_pass, False)
    yield "fused pass with E", on_gpu(_fused_pass, True)
    yield "dX matmul", lambda: matmul(e(), weight, wide)
    yield "dW matmul", lambda: matmul(e().t(), x, narrow)
    yield "dW matmul, float32 output", lambda: matmul(e().t(), x, wide)
    yield "label logits", on_gpu(_label_logits)
    yield "scaling of X", lambda: _scaling(x, narrow, narrow)
    yield "scaling of dX", lambda: _scaling(x, wide, narrow)
    yield "placing of dX", lambda: _placing(x)


def repeated(run: Callable[[], Any], times: int) -> Callable[[], None]:
    def runs() -> None:
        for _ in range(times):
            run()

    return runs


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype, times: int = 1) -> Work:
    """Return a call that computes a @ b into a preallocated tensor of ``dtype``, ``times`` times."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    # Another output dtype is for CUDA and ROCm alone: on a CPU both dtypes are float32.
    run = partial(torch.mm, a, b, out=out, **({} if dtype == a.dtype else {"out_dtype": dtype}))
    return repeated(run, times), {"operations": 2 * times * a.numel() * b.shape[1]}


def copy(device: torch.device) -> Work:
    """Return a large device-to-device copy: the memory rate that the other lines are compared with."""
    source = torch.rand((1 << 28) if device.type == "cuda" else (1 << 20), device=device)
    return partial(torch.empty_like(source).copy_, source), {"bytes": 2 * source.nbytes}


def _row_pass(batch: PairBatch, rows: int, store: bool) -> Work:
    """Launch once per group of rows, over the same memory, which is larger than any cache."""
    launch, raw = launch_row_pass(batch, rows, store=store)
    calls = -(-batch.shape.scored // rows)
    return repeated(partial(launch, first=0), calls), {"bytes": calls * raw.nbytes * (3 if store else 2) // 2}


def _fused_pass(batch: PairBatch, store: bool) -> Work | None:
    launch = launch_fused_pass(batch, store=store)
    if launch is None:
        return None
    return launch, {"operations": 2 * batch.shape.scored * batch.weight.numel()}


def _label_logits(batch: PairBatch) -> Work:
    from inspo_kernels.kernels import config
    from inspo_kernels.kernels.label_logits import label_logits

    arch = config.architecture(batch.hidden.device)
    run = partial(label_logits, batch.hidden, batch.weight, batch.targets, arch=arch)
    return run, {"bytes": 2 * batch.hidden.nbytes}


def _scaling(x: Tensor, source: torch.dtype, target: torch.dtype) -> Work:
    rows, scale = x.to(source), torch.rand(len(x), device=x.device)
    out = torch.empty_like(x, dtype=target)
    run = partial(BACKENDS["triton" if x.is_cuda else "torch"].scale_rows, rows, scale, out)
    return run, {"bytes": rows.nbytes + out.nbytes}


def _placing(x: Tensor) -> Work:
    """Copy the rows of dX to their places among all positions."""
    places = torch.randperm(len(x), device=x.device)
    return partial(spread_rows, x, places, x.shape, distinct=True), {"bytes": 3 * x.nbytes}


def timed(run: Callable[[], Any], work: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the seconds of ``run`` on an idle device and behind other work (equal on a CPU), and its rates."""
    run()
    idle = spread([seconds_of(run, str(device)) for _ in range(ROUNDS)])
    busy = spread([seconds_behind_work(run, str(device)) for _ in range(ROUNDS)]) if device.type == "cuda" else idle
    rates = {"bytes": "terabytes_per_second", "operations": "tflops"}
    found = {rates[what]: count / busy["median"] / 1e12 for what, count in work.items() if what in rates}
    return {"status": "measured", "idle": idle, "busy": busy, **work, **found}
