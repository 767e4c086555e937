"""Everything there is to measure on a GPU, in one command of under nine minutes.

    python -m benchmarks.gpu --out DIR

In this order, DIR/gpu.json being written after every step, so that an interrupted run keeps what it has:

1. tests: the package's tests, the Triton ones on the real device (log in DIR/tests.log).
2. accuracy: both backends, and the peers, against float64 on the device. Our gradients may err at most twice as much as
   plain torch in the same dtype, log-probs of 512 tokens at most 2e-3 nat.
3. cells: time and peak memory of forward, frozen head and forward + backward for every contender, interleaved with the
   bare products of the same operands. The main shape comes first, then its other lengths, then the other models at its
   length, then the rest; what the time does not suffice for is listed as such.
4. tuning, after the main shape: block sizes and workspaces next to the shipped ones. Reported, never applied.
5. targets: met or missed, with the measured figure; plots of time and memory.

``forward`` is without gradients (1 product), ``frozen head`` computes dX alone (2), ``forward+backward`` dX and dW (3).
Times are between CUDA events around one call that starts on an idle device, so they include the latency of Python and
of launches. The exit status is 1 if a test or an accuracy check failed; a missed target is not an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor
from tqdm import tqdm

import inspo_kernels as ik
from inspo_kernels import backends
from inspo_kernels.head import checked_head

from .harness import interleaved_times, own_peak, provenance, ratios, spread, write_json
from .peers import BETA, PEERS, TITLES, HeadShape, Loss, PairBatch, plain_logps, random_head

ROOT = Path(__file__).parent.parent
FORWARD, FROZEN, TRAIN = "forward", "frozen head", "forward+backward"
PRODUCTS = {FORWARD: 1, FROZEN: 2, TRAIN: 3}
MODES = (TRAIN, FORWARD, FROZEN)
# Nothing starts with less time left than the slowest cell takes at its fewest rounds.
RESERVE_SECONDS = 30.0
# Of each sweep.
TUNING_SECONDS = 6.0
SEQUENCE_NAT = 2e-3
TARGETS = {TRAIN: 1.08, FORWARD: 1.10, FROZEN: 1.10}
MEMORY_TARGET = 1.05


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    models: dict[str, HeadShape]
    tokens: tuple[int, ...]
    main: tuple[str, int]
    response: int
    accuracy_pairs: int
    tests: tuple[str, ...]
    test_seconds: float
    rounds: int
    workspace_rows: tuple[int, ...]

    def cells(self) -> list[tuple[str, int, str]]:
        """(model, tokens, mode), the main shape first."""
        model, tokens = self.main
        lengths = [(model, n) for n in self.tokens]
        at_main = [(m, tokens) for m in self.models]
        rest = [(m, n) for m in self.models for n in self.tokens]
        shapes = dict.fromkeys([self.main, *lengths, *at_main, *rest])
        return [(m, n, mode) for m, n in shapes for mode in MODES]


FULL = Plan(
    models={
        "llama3-8b": HeadShape(4096, 128_256),
        "qwen3-4b": HeadShape(2560, 151_936),
        "qwen3-8b": HeadShape(4096, 151_936),
        "gemma2-9b": HeadShape(3584, 256_000, softcap=30.0),
    },
    tokens=(1024, 2048, 4096, 8192, 16384),
    main=("llama3-8b", 8192),
    response=512,
    accuracy_pairs=2,
    # Compiling ahead of time for GPUs that are not there needs none, and minutes.
    tests=("tests/inspo_kernels", "--ignore=tests/inspo_kernels/test_triton_compile.py"),
    test_seconds=150.0,
    rounds=15,
    workspace_rows=(1024, 2048, 4096, 8192),
)
QUICK = Plan(
    models={"tiny": HeadShape(64, 1000), "tiny-softcap": HeadShape(48, 777, softcap=30.0)},
    tokens=(64, 128),
    main=("tiny", 128),
    response=16,
    accuracy_pairs=2,
    tests=("tests/inspo_kernels/test_logps.py",),
    test_seconds=60.0,
    rounds=3,
    workspace_rows=(32, 128),
)


class Clock:
    """Seconds since the start, and how many are left."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.perf_counter(), seconds

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.elapsed


def ours(backend: str, on_host: bool = False) -> Loss:
    def run(x: Tensor, weight: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
        out = ik.fused_inspo_loss(
            x,
            weight,
            batch.host_labels if on_host else batch.labels,
            segment_ids=batch.host_segment_ids if on_host else batch.segment_ids,
            ref_logps=batch.ref_logps,
            objective=ik.DPO(beta=BETA),
            softcap=batch.softcap,
            backend=backend,
        )
        return out.loss, out.logps

    return run


@cache
def backend_unavailable(backend: str, device: torch.device) -> str | None:
    """Why the backend cannot run on the device, in the package's words, or None."""
    if backend == "triton" and device.type == "cpu":
        return "needs a GPU"
    one = torch.zeros(1, 1, device=device)
    try:
        ik.linear_logps(one, one, torch.zeros(1, dtype=torch.int64), backend=backend)
    except ValueError as error:
        return f"not available: {error}"
    return None


Outcome = Loss | str


def contenders(plan: Plan, model: str, tokens: int, peers: list[str], device: torch.device) -> dict[str, Outcome]:
    """Every contender of a cell: what to run, or why it does not."""
    is_main = (model, tokens) == plan.main
    found: dict[str, Outcome] = {}
    for backend in ("triton", "torch"):
        found[backend] = backend_unavailable(backend, device) or ours(backend)
    if is_main:
        found["triton, labels on the CPU"] = backend_unavailable("triton", device) or ours("triton", on_host=True)
    for name in peers:
        peer = PEERS[name]
        reason = peer.unavailable(device, plan.models[model].softcap)
        if reason is None and peer.compiles_per_shape and model != plan.main[0]:
            reason = f"not measured: compiles anew for every head, so only {plan.main[0]}'s is"
        found[name] = reason or peer.run
    return found


def step(batch: PairBatch, mode: str, loss_of: Loss) -> dict[str, Tensor]:
    """Loss, summed log-probs (2B,) and the gradients that ``mode`` asks for."""
    x = batch.x.detach().requires_grad_(mode != FORWARD)
    weight = batch.weight.detach().requires_grad_(mode == TRAIN)
    with torch.set_grad_enabled(mode != FORWARD):
        loss, sums = loss_of(x, weight, batch)
    result = {"loss": loss.detach(), "sums": sums}
    leaves = {name: leaf for name, leaf in (("dhidden", x), ("dweight", weight)) if leaf.requires_grad}
    if leaves:
        result |= dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    return result


def reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip().split("\n")[0][:200]
    return f"failed: {type(error).__name__}" + (f": {text}" if text else "")


def guarded(runs: dict[str, Callable[[], Any]], failed: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """The same runs, a failing one being entered in ``failed`` once and doing nothing from then on."""

    def guard(name: str, run: Callable[[], Any]) -> None:
        if name not in failed:
            try:
                run()
            except Exception as error:
                failed[name] = reason(error)
        if failed.get(name) == "out of memory" and torch.cuda.is_available():
            torch.cuda.empty_cache()

    return {name: partial(guard, name, run) for name, run in runs.items()}


# --- tests ---


def run_tests(plan: Plan, out: Path, clock: Clock) -> dict[str, Any]:
    """The package's tests in a process of their own, log in ``out``/tests.log."""
    command = [sys.executable, "-m", "pytest", *plan.tests, "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    # An interpreter asked for elsewhere would keep the Triton tests off the device.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    log, start = out / "tests.log", time.perf_counter()
    with log.open("w") as file:
        try:
            limit = min(plan.test_seconds, clock.left)
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
            status = "passed" if code == 0 else f"failed: pytest's exit status was {code}"
        except subprocess.TimeoutExpired:
            status = f"failed: not done after {limit:.0f} s"
    lines = log.read_text().strip().splitlines()
    return {
        "status": status,
        "summary": lines[-1] if lines else "",
        "arguments": list(plan.tests),
        "seconds": time.perf_counter() - start,
        "log": log.name,
    }


# --- accuracy ---


def accuracy(plan: Plan, peers: list[str], timed: torch.dtype, device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """Rows of errors against float64, one list per dtype and soft-cap; peers in the dtype they are timed in."""
    model, tokens = plan.main
    for dtype in (torch.bfloat16, torch.float32):
        for softcap in (None, 30.0):
            shape = replace(plan.models[model], softcap=softcap)
            size = 2 * plan.accuracy_pairs * plan.response
            batch = PairBatch(shape, size, plan.response, dtype=dtype, device=device)
            found = contenders(plan, model, tokens, [p for p in peers if p == "log_softmax" or dtype == timed], device)
            for name in found.keys() & PEERS.keys():
                found[name] = PEERS[name].unavailable(device, softcap) or found[name]
            context = {"dtype": str(dtype).removeprefix("torch."), "softcap": softcap, "response": plan.response}
            yield [{**context, **row} for row in loss_errors(batch, found) + logps_errors(batch, found)]


def loss_errors(batch: PairBatch, found: dict[str, Outcome]) -> list[dict[str, Any]]:
    """Of the pairwise loss: gradients relative, loss and sequence log-probs in nats.

    Ours may err in the gradients twice as much as plain torch. The coefficient of a pair's gradient carries the error
    of its own log-probs besides, which is judged by itself: up to 2 beta times the largest of them, relative.
    """
    exact = widened(batch)
    truth = step(exact, TRAIN, ours("reference"))
    rows = []
    for mode in (TRAIN, FROZEN):
        plain = errors_of(step(batch, mode, PEERS["log_softmax"].run), truth)
        for name, loss_of in found.items():
            row: dict[str, Any] = {"what": f"loss, {mode}", "contender": name}
            rows.append(row)
            if isinstance(loss_of, str):
                row["status"] = loss_of
                continue
            try:
                row["errors"] = errors_of(step(batch, mode, loss_of), truth)
            except Exception as error:
                row["status"] = reason(error)
                row["ok"] = name in PEERS
                continue
            row["status"] = "measured"
            if name not in PEERS:
                from_sums = 2 * BETA * row["errors"]["sequence_nat"]
                limits = gradient_limits(batch, plain, from_sums)
                row |= judged(
                    row["errors"], limits | {"sequence_nat": SEQUENCE_NAT, "loss_nat": 2 * BETA * SEQUENCE_NAT}
                )
    return rows


def logps_errors(batch: PairBatch, found: dict[str, Outcome]) -> list[dict[str, Any]]:
    """Of ``linear_logps`` under an arbitrary upstream gradient, and of plain torch: relative, log-probs in nats."""

    def differentiate(batch: PairBatch, frozen: bool, logps_of: Callable[..., Tensor]) -> dict[str, Tensor]:
        x, weight = batch.x.detach().requires_grad_(), batch.weight.detach().requires_grad_(not frozen)
        logps = logps_of(x, weight, batch)
        upstream = torch.linspace(-1, 2, len(logps), dtype=logps.dtype, device=logps.device)
        leaves = {"dhidden": x} if frozen else {"dhidden": x, "dweight": weight}
        return {
            "logps": logps.detach(),
            **dict(zip(leaves, torch.autograd.grad(logps, list(leaves.values()), upstream))),
        }

    def package(backend: str) -> Callable[..., Tensor]:
        return lambda x, w, b: ik.linear_logps(x, w, b.labels, softcap=b.softcap, backend=backend)

    truth = differentiate(widened(batch), False, package("reference"))
    rows = []
    for frozen in (False, True):
        plain = errors_of(differentiate(batch, frozen, plain_logps), truth)
        what = "linear_logps, frozen head" if frozen else "linear_logps"
        rows.append({"what": what, "contender": "log_softmax", "status": "measured", "errors": plain})
        for backend in ("triton", "torch"):
            row: dict[str, Any] = {"what": what, "contender": backend}
            rows.append(row)
            if isinstance(found[backend], str):
                row["status"] = found[backend]
                continue
            try:
                row["errors"] = errors_of(differentiate(batch, frozen, package(backend)), truth)
            except Exception as error:
                row |= {"status": reason(error), "ok": False}
                continue
            # Errors of either sign: 512 of them stay within the limit of a sequence.
            limits = gradient_limits(batch, plain) | {"token_nat": SEQUENCE_NAT / 512**0.5}
            row |= {"status": "measured"} | judged(row["errors"], limits)
    return rows


def widened(batch: PairBatch) -> PairBatch:
    """The same values in float64."""
    exact = object.__new__(PairBatch)
    exact.__dict__ |= vars(batch) | {"x": batch.x.double(), "weight": batch.weight.double()}
    return exact


def errors_of(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    names = {"loss": "loss_nat", "sums": "sequence_nat", "logps": "token_nat"}
    result = {}
    for name, value in got.items():
        difference = value.double() - truth[name]
        if name in names:
            result[names[name]] = difference.abs().max().item()
        else:
            result[name] = (difference.norm() / truth[name].norm()).item()
    return result


def gradient_limits(batch: PairBatch, plain: dict[str, float], besides: float = 0.0) -> dict[str, float]:
    rounding = torch.finfo(batch.x.dtype).eps / 2
    return {name: 2 * max(plain[name], rounding) + besides for name in ("dhidden", "dweight") if name in plain}


def judged(errors: dict[str, float], limits: dict[str, float]) -> dict[str, Any]:
    """NaN is beyond every limit."""
    return {"limits": limits, "ok": all(errors[name] <= limit for name, limit in limits.items())}


# --- time and memory ---


def measure_cell(batch: PairBatch, mode: str, found: dict[str, Outcome], rounds: int, seconds: float) -> dict[str, Any]:
    """Time of every contender beside the bare products, and its peak memory."""
    device = str(batch.x.device)
    failed = {name: outcome for name, outcome in found.items() if isinstance(outcome, str)}
    steps = {name: partial(step, batch, mode, run) for name, run in found.items() if not isinstance(run, str)}
    runs = guarded({"floor": products(batch, PRODUCTS[mode]), **steps}, failed)
    first, peak = {}, {}
    for name in steps:
        start = time.perf_counter()
        runs[name]()
        if batch.x.is_cuda:
            torch.cuda.synchronize()
        first[name] = time.perf_counter() - start
        # A CPU allocator keeps what it frees: within one process its peaks say nothing.
        peak[name] = own_peak(runs[name], device) if batch.x.is_cuda else None
    alive = {name: run for name, run in runs.items() if name not in failed}
    times = interleaved_times(alive, rounds, device=device, seconds=seconds)
    times = {name: t for name, t in times.items() if name not in failed}
    to_floor = ratios(times, "floor") if "floor" in times else {}
    operations = PRODUCTS[mode] * 2 * batch.x.numel() * batch.shape.vocab
    rows: dict[str, Any] = {}
    for name in ("floor", *found):
        if name in failed:
            rows[name] = {"status": failed[name]}
            continue
        rows[name] = {
            "status": "measured",
            "seconds": spread(times[name]),
            "times_floor": to_floor.get(name),
            "tflops_of_products": operations / spread(times[name])["median"] / 1e12,
        }
        if name != "floor":
            rows[name] |= {"peak_bytes": peak[name], "first_call_seconds": first[name]}
    return {"rounds": max(map(len, times.values()), default=0), "contenders": rows}


def products(batch: PairBatch, count: int) -> Callable[[], None]:
    """X W^T, then E W, then E^T X, outputs preallocated in the input dtype; the logits stand for E."""
    x, weight = batch.x, batch.weight
    logits = x.new_empty(len(x), len(weight))
    dx = torch.empty_like(x) if count > 1 else None
    dweight = torch.empty_like(weight) if count > 2 else None

    def run() -> None:
        torch.mm(x, weight.t(), out=logits)
        if dx is not None:
            torch.mm(logits, weight, out=dx)
        if dweight is not None:
            torch.mm(logits.t(), x, out=dweight)

    return run


def workspace_and_gradients(batch: PairBatch, backend: str) -> int:
    """Bytes of the default workspace (of N rows, if those need less) + dX + dW, both in the accumulate dtype."""
    head = checked_head(batch.x, batch.weight, None, batch.softcap, 1.0)
    resolved = backends.resolve_backend(backend, head, batch.x.device)
    assert resolved is not None
    workspace = min(resolved.default_workspace_bytes(head, batch.x.device), len(batch.x) * resolved.bytes_per_row(head))
    gradients = (batch.x.numel() + batch.weight.numel()) * head.accumulate_dtype.itemsize
    return workspace + gradients


# --- tuning ---


def sweep(
    shipped: str, runs: dict[str, Callable[[], Any]], device: torch.device, seconds: float, repeats: int = 1
) -> dict[str, Any]:
    """Candidates interleaved, each beside ``shipped``; each run is ``repeats`` launches, back to back."""
    failed: dict[str, str] = {}
    runs = guarded(runs, failed)
    for run in runs.values():
        run()
    times = interleaved_times(
        {name: run for name, run in runs.items() if name not in failed}, 15, device=str(device), seconds=seconds
    )
    times = {name: [t / repeats for t in values] for name, values in times.items() if name not in failed}
    to_shipped = ratios(times, shipped) if shipped in times else {}
    rows: dict[str, Any] = {name: {"status": why} for name, why in failed.items()}
    for name, values in times.items():
        rows[name] = {"status": "measured", "seconds": spread(values), "times_shipped": to_shipped.get(name)}
    best = min(times, key=lambda name: spread(times[name])["median"], default=None)
    return {"shipped": shipped, "best": best, "candidates": rows}


def tune(plan: Plan, batch: PairBatch, seconds: float) -> dict[str, Any]:
    """Candidates next to what ships. Nothing is changed."""
    device, result = batch.x.device, {}
    for name, runs in (
        ("row pass", tune_row_pass),
        ("triton stage rows", tune_stages),
        ("triton tile rows", tune_tiles),
    ):
        why = backend_unavailable("triton", device)
        try:
            result[name] = {"status": why} if why else runs(batch, seconds)
        except Exception as error:
            result[name] = {"status": reason(error)}
    result["torch workspace rows"] = tune_torch(plan, batch, seconds)
    return result


def tune_row_pass(batch: PairBatch, seconds: float, rows: int = 1024) -> dict[str, Any]:
    """Block and warps of the pass over one stage of logits."""
    from inspo_kernels.kernels import config, row_pass

    vocab, device = batch.shape.vocab, batch.x.device
    arch = config.architecture(device)
    stride = config.padded_vocab(vocab)
    raw = torch.randn(rows, stride, device=device)
    e = torch.empty(
        rows, stride, dtype=batch.x.dtype if batch.x.dtype != torch.float32 else torch.bfloat16, device=device
    )
    logps, sums = (torch.empty(rows, device=device) for _ in range(2))
    shipped = config.row_pass(arch, vocab, raw.dtype, batch.softcap)
    pairs = [(2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16), (16384, 16)]
    candidates = dict.fromkeys([shipped, *(config.RowPass(*pair) for pair in pairs)])
    repeats = 10  # one launch is no longer than its own latency

    def run(candidate: Any) -> None:
        with mock.patch.object(config, "row_pass", lambda *_: candidate):
            for _ in range(repeats):
                row_pass.row_pass(
                    raw,
                    batch.labels[:rows],
                    logps,
                    sums,
                    vocab=vocab,
                    e=e,
                    bias=None,
                    softcap=batch.softcap,
                    logit_scale=1.0,
                    arch=arch,
                )

    runs = {row_pass_name(c): partial(run, c) for c in candidates}
    swept = sweep(row_pass_name(shipped), runs, device, seconds, repeats)
    moved = raw.nbytes + e.nbytes
    for row in swept["candidates"].values():
        if row["status"] == "measured":
            row["terabytes_per_second"] = moved / row["seconds"]["median"] / 1e12
    return swept | {"rows": rows, "vocab": vocab}


def row_pass_name(candidate: Any) -> str:
    return f"block {candidate.block}, {candidate.num_warps} warps"


def tune_stages(batch: PairBatch, seconds: float) -> dict[str, Any]:
    return tune_constant("STAGE_ROWS", (512, 1024, 2048, 4096), batch, seconds)


def tune_tiles(batch: PairBatch, seconds: float) -> dict[str, Any]:
    return tune_constant("TILE_ROWS", (2048, 4096, 8192), batch, seconds)


def tune_constant(constant: str, values: tuple[int, ...], batch: PairBatch, seconds: float) -> dict[str, Any]:
    """Forward + backward with another value of one of the Triton backend's constants."""
    from inspo_kernels.backends import triton_backend

    shipped = getattr(triton_backend, constant)

    def run(value: int) -> None:
        with mock.patch.object(triton_backend, constant, value):
            step(batch, TRAIN, ours("triton"))

    runs = {str(value): partial(run, value) for value in sorted({shipped, *values})}
    return sweep(str(shipped), runs, batch.x.device, seconds)


def tune_torch(plan: Plan, batch: PairBatch, seconds: float) -> dict[str, Any]:
    """Forward + backward of the torch backend with other workspaces."""
    head = checked_head(batch.x, batch.weight, None, batch.softcap, 1.0)
    resolved = backends.resolve_backend("torch", head, batch.x.device)
    assert resolved is not None
    shipped = f"default ({resolved.capacity(head, batch.x.device, None)})"

    def run(limit: int | None) -> None:
        def loss_of(x: Tensor, weight: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
            out = ik.fused_inspo_loss(
                x,
                weight,
                batch.labels,
                segment_ids=batch.segment_ids,
                ref_logps=batch.ref_logps,
                softcap=batch.softcap,
                max_workspace_bytes=limit,
                backend="torch",
            )
            return out.loss, out.logps

        step(batch, TRAIN, loss_of)

    runs = {str(rows): partial(run, rows * resolved.bytes_per_row(head)) for rows in plan.workspace_rows}
    return sweep(shipped, {shipped: partial(run, None), **runs}, batch.x.device, seconds)


# --- results ---


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the Triton backend is held to at Llama-3-8B's head and 8,192 tokens, stated for an H200."""
    model, tokens = FULL.main
    cells = {c["mode"]: c for c in result["cells"] if (c["model"], c["tokens"]) == (model, tokens)}
    rows = []

    def judge(what: str, limit: float, measured: float | None, why: str) -> None:
        verdict = f"not measured: {why}" if measured is None else "met" if measured <= limit else "missed"
        rows.append({"target": what, "limit": limit, "measured": measured, "verdict": verdict})

    for mode, limit in TARGETS.items():
        row, why = triton_row(cells.get(mode))
        ratio = row["times_floor"]["median"] if row and row["times_floor"] else None
        judge(f"{mode}: time / bare products ({PRODUCTS[mode]})", limit, ratio, why or "the products failed")
    row, why = triton_row(cells.get(TRAIN))
    peak = row["peak_bytes"] / cells[TRAIN]["workspace_and_gradients_bytes"] if row and row["peak_bytes"] else None
    judge(f"{TRAIN}: peak memory / (workspace + dX + dW)", MEMORY_TARGET, peak, why)
    errors = [
        r["errors"]["sequence_nat"]
        for r in result["accuracy"]
        if (r["contender"], r["dtype"], r["response"]) == ("triton", "bfloat16", FULL.response)
        and "sequence_nat" in r.get("errors", {})
    ]
    why = f"no bfloat16 log-probs of {FULL.response} tokens by triton"
    judge(
        f"bfloat16: log-probs of {FULL.response} tokens, nat from float64", SEQUENCE_NAT, max(errors, default=None), why
    )
    return rows


def triton_row(cell: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
    """The Triton backend's measured row of a cell, or why there is none."""
    if cell is None:
        return None, f"{FULL.main[0]} at {FULL.main[1]} tokens did not run"
    row = cell["contenders"]["triton"]
    return (row, "") if row["status"] == "measured" else (None, row["status"])


def plot(
    result: dict[str, Any], value: Callable[[dict[str, Any]], tuple[float, float, float] | None], label: str
) -> Figure:
    """One panel per mode and model: ``value`` (median, q1, q3) of every contender by scored tokens."""
    cells = result["cells"]
    models, modes = (list(dict.fromkeys(c[key] for c in cells)) for key in ("model", "mode"))
    names = list(dict.fromkeys(name for c in cells for name in c["contenders"]))
    figure = Figure(figsize=(3.6 * len(models), 2.9 * len(modes) + 0.6), layout="constrained")
    panels = figure.subplots(len(modes), len(models), squeeze=False, sharex=True)
    handles = {}
    for axes_row, mode in zip(panels, modes):
        for axes, model in zip(axes_row, models):
            here = sorted((c for c in cells if (c["model"], c["mode"]) == (model, mode)), key=lambda c: c["tokens"])
            shape = here[0]
            axes.set_title(f"{model} ({shape['hidden']} x {shape['vocab']:,}), {mode}", fontsize=8)
            for i, name in enumerate(names):
                points = [(c["tokens"], value(c["contenders"].get(name, {}))) for c in here]
                points = [(n, v) for n, v in points if v is not None]
                if points:
                    x, (middle, low, high) = [n for n, _ in points], zip(*(v for _, v in points))
                    handles[name] = axes.plot(x, middle, marker="o", markersize=3, color=f"C{i}")[0]
                    axes.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.set_xticks([c["tokens"] for c in here], [f"{c['tokens']:,}" for c in here], fontsize=7)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3, which="both", linewidth=0.4)
        axes_row[0].set_ylabel(label)
    for axes in panels[-1]:
        axes.set_xlabel("scored tokens")
    if handles:
        figure.legend(handles.values(), [TITLES[n] for n in handles], loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{result['hardware']['gpu'] or result['hardware']['cpu']}, {result['dtype']}", fontsize=9)
    return figure


def times_floor(row: dict[str, Any]) -> tuple[float, float, float] | None:
    ratio = row.get("times_floor")
    return ratio and (ratio["median"], ratio["q1"], ratio["q3"])


def peak_gib(row: dict[str, Any]) -> tuple[float, float, float] | None:
    peak = row.get("peak_bytes")
    return None if peak is None else (peak / 2**30,) * 3


def cell_table(cell: dict[str, Any]) -> str:
    lines = [f"{cell['model']}, {cell['tokens']} tokens, {cell['mode']}"]
    for name, row in cell["contenders"].items():
        if row["status"] != "measured":
            lines.append(f"  {name:<27}{row['status']}")
            continue
        ratio = row["times_floor"]
        times = f"{ratio['median']:6.2f}x floor ({ratio['q1']:.2f}-{ratio['q3']:.2f})" if ratio else " " * 25
        peak = row.get("peak_bytes")
        memory = "" if peak is None else f"{peak / 2**30:8.2f} GiB"
        lines.append(f"  {name:<27}{1e3 * row['seconds']['median']:9.2f} ms{times}{memory}")
    return "\n".join(lines)


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    dtype, softcap, response = (rows[0][key] for key in ("dtype", "softcap", "response"))
    lines = [f"errors against float64: {dtype}, soft-cap {softcap}, responses of {response} tokens"]
    for row in rows:
        errors = "  ".join(f"{name} {value:.1e}" for name, value in row.get("errors", {}).items())
        verdict = "" if row.get("ok", True) else "  TOO LARGE" if errors else "  FAILED"
        lines.append(f"  {row['what']:<26}{row['contender']:<27}{errors or row['status']}{verdict}")
    return "\n".join(lines)


def tuning_table(tuning: dict[str, Any]) -> str:
    lines = ["tuning"]
    for name, swept in tuning.items():
        if "best" not in swept:
            lines.append(f"  {name}: {swept['status']}")
            continue
        rows = swept["candidates"]
        best = rows.get(swept["best"], {}).get("times_shipped")
        beside = (
            f", {best['median']:.3f} ({best['q1']:.3f}-{best['q3']:.3f}) times the shipped one's time" if best else ""
        )
        lines.append(f"  {name}: shipped {swept['shipped']}, best {swept['best']}{beside}")
    return "\n".join(lines)


def problems(result: dict[str, Any]) -> list[str]:
    """What makes the run fail."""
    found = [f"stopped, {result['stopped']}"] if "stopped" in result else []
    if result["tests"] and result["tests"]["status"] != "passed":
        found.append(f"tests {result['tests']['status']}; see {result['tests']['log']}")
    for row in result["accuracy"]:
        if not row.get("ok", True):
            found.append(f"accuracy: {row['contender']}, {row['what']}, {row['dtype']}, soft-cap {row['softcap']}")
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": device.type,
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def run(
    plan: Plan, options: argparse.Namespace, result: dict[str, Any], save: Callable[[], None], clock: Clock
) -> None:
    """All steps in order, each entered in ``result`` and saved when done."""
    device, peers = torch.device(options.device), options.peers
    cells = plan.cells()
    bar = tqdm(total=2 + 4 + len(cells), desc="gpu benchmark", unit="step", disable=None)

    def done(text: str) -> None:
        save()
        bar.update()
        tqdm.write(text)

    result["tests"] = run_tests(plan, options.out, clock)
    done(f"tests {result['tests']['status']}: {result['tests']['summary']}")
    dtype = getattr(torch, result["dtype"])
    for rows in accuracy(plan, peers, dtype, device):
        result["accuracy"] += rows
        done(accuracy_table(rows))
    weight, weight_of = None, None
    for i, (model, tokens, mode) in enumerate(cells):
        shape = plan.models[model]
        cell: dict[str, Any] = {"model": model, "tokens": tokens, "mode": mode, **asdict(shape)}
        found = contenders(plan, model, tokens, peers, device)
        if clock.left < RESERVE_SECONDS:
            late = {"status": "not measured: out of time"}
            cell["contenders"] = {name: late for name in ("floor", *found)}
        else:
            if weight_of != model:
                weight = None
                weight, weight_of = random_head(shape, dtype=dtype, device=device), model
            batch = PairBatch(shape, tokens, plan.response, dtype=dtype, device=device, weight=weight)
            is_main = (model, tokens) == plan.main
            share = (clock.left - RESERVE_SECONDS) / (len(cells) - i)
            rounds, seconds = (2 * plan.rounds, 4 * share) if is_main else (plan.rounds, share / 2)
            cell |= measure_cell(batch, mode, found, rounds, seconds)
            if mode == TRAIN and not isinstance(found["triton"], str):
                cell["workspace_and_gradients_bytes"] = workspace_and_gradients(batch, "triton")
        result["cells"].append(cell)
        done(cell_table(cell))
        if i == len(MODES) - 1:
            if clock.left > 3 * RESERVE_SECONDS:
                result["tuning"] = tune(plan, batch, TUNING_SECONDS)
            else:
                result["tuning"] = {"all": {"status": "not measured: out of time"}}
            done(tuning_table(result["tuning"]))
    bar.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda", help='"cuda", "cuda:1", or "cpu" (with --quick) [cuda]')
    parser.add_argument("--quick", action="store_true", help="shapes of seconds, to see that everything runs")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), metavar="PEER",
                        help=f"other libraries to time, of {', '.join(PEERS)} [all]")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.5, help="no step starts that would end later [8.5]")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cpu" and not options.quick:
        parser.error("--device cpu takes hours at these shapes: add --quick, or use a GPU")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; --device cpu --quick shows that the script runs")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    options.out.mkdir(parents=True, exist_ok=True)

    plan, clock = QUICK if options.quick else FULL, Clock(60 * options.minutes)
    given = sys.argv[1:] if arguments is None else arguments
    given = ["DIR" if a == str(options.out) else "--out=DIR" if a.startswith("--out=") else a for a in given]
    result: dict[str, Any] = {
        **provenance(
            shlex.join(["python", "-m", "benchmarks.gpu", *given]),
            [p.package for p in PEERS.values() if p.package != "torch"],
        ),
        "device": hardware(device),
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "response_tokens": plan.response,
        "method": " ".join(__doc__.split("\n\n")[-1].split()),
        "finished": False,
        "tests": None,
        "accuracy": [],
        "tuning": {},
        "cells": [],
        "targets": [],
    }

    def save() -> None:
        result["seconds"] = clock.elapsed
        write_json(options.out / "gpu.json", result)

    interrupted = False
    try:
        run(plan, options, result, save, clock)
        result["finished"] = True
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; what is done is kept", file=sys.stderr)
    except Exception as error:
        # A CUDA error outlives the contender that caused it; what is done is kept all the same.
        traceback.print_exc()
        result["stopped"] = reason(error)
    result["targets"] = targets(result)
    for name, value, label in (
        ("time", times_floor, "time / bare products"),
        ("memory", peak_gib, "peak memory above inputs, GiB"),
    ):
        if any(value(row) for cell in result["cells"] for row in cell["contenders"].values()):
            plot(result, value, label).savefig(options.out / f"{name}.png", dpi=130)
    save()
    for row in result["targets"]:
        figure = "" if row["measured"] is None else f": {row['measured']:.4g}"
        print(f"target {row['target']} <= {row['limit']:g}{figure}: {row['verdict']}")
    failures = problems(result)
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{clock.elapsed:.0f} s; results in {options.out}")
    return 130 if interrupted else int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
