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


class NeedsGPU(Exception):
    """Report that a kernel needs a GPU, or a different GPU."""


def decompose(batch: PairBatch, stage_rows: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each line and its figures; a line that fails says why and the others go on."""
    for name, line_of in lines(batch, stage_rows):
        try:
            run, work = line_of()
            row = timed(run, batch.hidden.device) | work
            seconds = row["busy"]["median"]
            if "bytes" in work:
                row["terabytes_per_second"] = work["bytes"] / seconds / 1e12
            if "operations" in work:
                row["tflops"] = work["operations"] / seconds / 1e12
            del run
        except NeedsGPU:
            row = {"status": "needs a GPU"}
        except Exception as error:
            row = {"status": reason(error)}
        if batch.hidden.is_cuda:
            torch.cuda.synchronize()  # an error that outlives its line ends the step, not all that follow
            torch.cuda.empty_cache()
        yield name, row


Line = Callable[[], tuple[Callable[[], Any], dict[str, Any]]]


def lines(batch: PairBatch, stage_rows: Sequence[int]) -> Iterator[tuple[str, Line]]:
    """Yield name and maker of each line. A maker allocates the operands and returns the call and its work."""
    x, weight = batch.hidden, batch.weight
    (n, hidden), vocab = x.shape, len(weight)
    narrow, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    operations = {"operations": 2 * n * hidden * vocab}

    def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Any], dict[str, Any]]:
        return matmul_run(a, b, dtype), operations

    def e() -> Tensor:
        """Return random values in place of E, because matmuls of zeros run faster."""
        return torch.rand(n, vocab, dtype=narrow, device=x.device)

    yield "copy", lambda: copy_run(x.device)
    yield "logits matmul, narrow output", lambda: matmul(x, weight.t(), narrow)
    yield "logits matmul, float32 output", lambda: matmul(x, weight.t(), wide)
    for rows in stage_rows:
        if rows <= n:
            yield f"logits matmul in stages of {rows}", partial(_staged_matmul, x, weight, rows, wide)
    for rows in stage_rows:
        if rows <= n:
            yield f"row pass with E, stages of {rows}", partial(_row_pass, batch, rows, True)
    yield "row pass, statistics alone", partial(_row_pass, batch, min(stage_rows[1], n), False)
    yield "cached tiles, matmul", partial(_cache_tiles, batch, None)
    yield "cached tiles, matmul and sums", partial(_cache_tiles, batch, False)
    yield "cached tiles, matmul and E", partial(_cache_tiles, batch, True)
    yield "fused pass, sums alone", partial(_fused_pass, batch, False)
    yield "fused pass with E", partial(_fused_pass, batch, True)
    yield "dX matmul", lambda: matmul(e(), weight, wide)
    yield "dW matmul", lambda: matmul(e().t(), x, narrow)
    yield "dW matmul, float32 output", lambda: matmul(e().t(), x, wide)
    yield "label logits", partial(_label_logits, batch)
    yield "scaling of X", lambda: _scaling(x, narrow, narrow)
    yield "scaling of dX", lambda: _scaling(x, wide, narrow)
    yield "placing of dX", lambda: _placing(x)


def matmul_run(a: Tensor, b: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    """Return a call that computes a @ b into a preallocated tensor of ``dtype``."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    if dtype == a.dtype:
        return lambda: torch.mm(a, b, out=out)
    return lambda: torch.mm(a, b, out_dtype=dtype, out=out)  # CUDA and ROCm alone: on a CPU both dtypes are float32


def copy_run(device: torch.device) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return a large device-to-device copy: the memory rate that the other lines are compared with."""
    source = torch.rand((1 << 28) if device.type == "cuda" else (1 << 20), device=device)
    out = torch.empty_like(source)
    return lambda: out.copy_(source), {"bytes": 2 * source.nbytes}


def _staged_matmul(
    x: Tensor, weight: Tensor, rows: int, dtype: torch.dtype
) -> tuple[Callable[[], Any], dict[str, Any]]:
    one = matmul_run(x[:rows], weight.t(), dtype)
    calls = -(-len(x) // rows)

    def run() -> None:
        for _ in range(calls):
            one()

    return run, {"operations": 2 * calls * min(rows, len(x)) * weight.numel()}


def _row_pass(batch: PairBatch, rows: int, store: bool) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Launch once per group of rows, over the same memory, which is larger than any cache."""
    if not batch.hidden.is_cuda:
        raise NeedsGPU
    launch, raw = launch_row_pass(batch, rows, store=store)
    calls = -(-batch.shape.scored // rows)

    def run() -> None:
        for _ in range(calls):
            launch(0)

    return run, {"bytes": calls * raw.nbytes * (3 if store else 2) // 2}


def _cache_tiles(batch: PairBatch, store: bool | None) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Multiply one row of tiles, each read back from the cache at once unless ``store`` is None."""
    if not batch.hidden.is_cuda:
        raise NeedsGPU
    from inspo_kernels.kernels import config

    device = batch.hidden.device
    tile = config.logits_tile(config.architecture(device), device, 4)
    x = batch.hidden[: tile.rows]
    launch, raw = launch_row_pass(batch, len(x), tile.words, store=bool(store))
    parts = [part for part in batch.weight.split(tile.words) if len(part) == tile.words]

    def run() -> None:
        for i, part in enumerate(parts):
            torch.mm(x, part.t(), out_dtype=raw.dtype, out=raw)
            if store is not None:
                launch(i * tile.words)

    work = {"operations": 2 * raw.numel() * x.shape[1] * len(parts), "rows": len(x), "words": tile.words}
    return run, work | {"cache_bytes": raw.nbytes * len(parts)}


def _fused_pass(batch: PairBatch, store: bool) -> tuple[Callable[[], Any], dict[str, Any]]:
    launch = launch_fused_pass(batch, store=store)
    if launch is None:
        raise NeedsGPU
    return launch, {"operations": 2 * batch.shape.scored * batch.weight.numel()}


def _label_logits(batch: PairBatch) -> tuple[Callable[[], Any], dict[str, Any]]:
    if not batch.hidden.is_cuda:
        raise NeedsGPU
    from inspo_kernels.kernels import config
    from inspo_kernels.kernels.label_logits import label_logits

    arch = config.architecture(batch.hidden.device)
    run = partial(label_logits, batch.hidden, batch.weight, batch.targets, arch=arch)
    return run, {"bytes": 2 * batch.hidden.nbytes}


def _scaling(x: Tensor, source: torch.dtype, target: torch.dtype) -> tuple[Callable[[], Any], dict[str, Any]]:
    rows, scale = x.to(source), torch.rand(len(x), device=x.device)
    out = torch.empty_like(x, dtype=target)
    run = partial(BACKENDS["triton" if x.is_cuda else "torch"].scale_rows, rows, scale, out)
    return run, {"bytes": rows.nbytes + out.nbytes}


def _placing(x: Tensor) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Copy the rows of dX to their places among all positions."""
    places = torch.randperm(len(x), device=x.device)
    return partial(spread_rows, x, places, x.shape, distinct=True), {"bytes": 3 * x.nbytes}


def timed(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Return seconds of ``run`` from an idle device and behind other work; on a CPU they are equal."""
    run()
    idle = spread([seconds_of(run, str(device)) for _ in range(ROUNDS)])
    busy = spread([seconds_behind_work(run, str(device)) for _ in range(ROUNDS)]) if device.type == "cuda" else idle
    return {"status": "measured", "idle": idle, "busy": busy}


def line(name: str, row: dict[str, Any]) -> str:
    """Format one line for a terminal."""
    if row["status"] != "measured":
        return f"  {name:<42}{row['status']}"
    rates = f"{row['tflops']:8.1f} TFLOP/s" if "tflops" in row else ""
    rates += f"{row['terabytes_per_second']:8.3f} TB/s" if "terabytes_per_second" in row else ""
    return f"  {name:<42}{1e3 * row['idle']['median']:9.3f} ms idle{1e3 * row['busy']['median']:9.3f} ms busy {rates}"
