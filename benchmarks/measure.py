"""Measure contenders on one batch: errors against float64, time relative to the bare matmuls, and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import HeadShape, PairBatch, Shape, equal
from .contenders import BETA, CONTENDERS, Contender, Outcome
from .harness import (
    compared,
    interleaved_times,
    own_peak,
    peak_memory_in_fresh_process,
    reason,
    release_freed_memory,
    seconds_behind_work,
)

# The modes (without gradients, dX only, dX and dW) and the number of matmuls with the head that each needs.
FORWARD, FROZEN, TRAIN = "forward", "frozen head", "forward+backward"
PRODUCTS = {FORWARD: 1, FROZEN: 2, TRAIN: 3}
MODES = (TRAIN, FORWARD, FROZEN)
LOSS, LOGPS = "loss", "logps"
# Names of errors in nats.
NATS = {"loss": "loss_nat", "sums": "sequence_nat", "logps": "token_nat"}
# Vocabulary entries per block in the comparison with float64.
BLOCK = 4096


def step(batch: PairBatch, mode: str, contender: Contender, what: str = LOSS) -> dict[str, Tensor]:
    """Return loss and summed log-probs (2B,), or log-probs (N,), and the gradients that ``mode`` asks for."""
    hidden = batch.hidden.detach().requires_grad_(mode != FORWARD)
    weight = batch.weight.detach().requires_grad_(mode == TRAIN)
    with torch.set_grad_enabled(mode != FORWARD):
        if what == LOSS:
            value, sums = contender.loss_of(hidden, weight, batch)
            result, upstream = {"loss": value.detach(), "sums": sums}, None
        else:
            value = contender.logps_of(hidden, weight, batch)
            result, upstream = {"logps": value.detach()}, upstream_of(value)
    leaves = {name: leaf for name, leaf in (("dhidden", hidden), ("dweight", weight)) if leaf.requires_grad}
    if leaves:
        result |= dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), upstream)))
    return result


def upstream_of(logps: Tensor) -> Tensor:
    """Return an upstream gradient that differs between tokens."""
    return torch.linspace(-1, 2, len(logps), dtype=logps.dtype, device=logps.device)


class Truth:
    """Loss and gradients in float64, computed from the batch's values and without the contenders' code.

    dW is computed and compared in blocks of the vocabulary, so that a large head needs no float64 copy.
    """

    def __init__(self, batch: PairBatch, what: str = LOSS, *, knows_reference: bool = True) -> None:
        self.batch = batch
        x, targets = batch.scored_rows(batch.hidden).double(), batch.targets[:, None]
        z = torch.cat([x @ block.double().t() for block in batch.weight.split(BLOCK)], 1)
        if batch.softcap is not None:
            z.div_(batch.softcap).tanh_().mul_(batch.softcap)
        logps = (z.gather(1, targets).squeeze(1) - z.logsumexp(1)).requires_grad_()
        if what == LOSS:
            sums = torch.zeros(len(batch.ref_logps), dtype=x.dtype, device=x.device)
            sums = sums.index_add(0, batch.segment_ids, logps)
            against = batch.ref_logps.double() if knows_reference else torch.zeros_like(sums)
            chosen, rejected = (sums - against).chunk(2)
            value = F.softplus(-BETA * (chosen - rejected)).mean()
            (upstream,) = torch.autograd.grad(value, logps)
            self.values = {"loss": value.detach(), "sums": sums.detach()}
        else:
            upstream, self.values = upstream_of(logps), {"logps": logps.detach()}
        slope = None if batch.softcap is None else 1 - (z / batch.softcap).square_()
        dz = z.log_softmax(1).exp_().neg_().mul_(upstream[:, None])
        dz.scatter_add_(1, targets, upstream[:, None])
        self.dz, self.x = dz if slope is None else dz.mul_(slope), x
        dx = torch.zeros_like(x)
        for block, of_block in zip(batch.weight.split(BLOCK), self.dz.split(BLOCK, 1)):
            dx.addmm_(of_block, block.double())
        if batch.scored_mask is not None:
            dx = torch.zeros_like(batch.hidden, dtype=dx.dtype).masked_scatter_(batch.scored_mask[..., None], dx)
        self.values["dhidden"] = dx

    def errors(self, got: dict[str, Tensor], relative: bool = False) -> dict[str, float]:
        """Return the gradients' relative errors by norm, and the largest errors of loss, sums and log-probs.

        Largest errors are in nats and have "_nat" in their names. With ``relative`` they are divided by the largest
        value.
        """
        result = {}
        for name, value in got.items():
            if name == "dweight":
                result[name] = self._weight_error(value)
                continue
            truth = self.values[name]
            wrong = value.double() - truth
            if name == "dhidden":
                result[name] = (wrong.norm() / truth.norm()).item()
            elif relative:
                result[name] = wrong.abs().max().item() / truth.abs().max().item()
            else:
                result[NATS[name]] = wrong.abs().max().item()
        return result

    def _weight_error(self, got: Tensor) -> float:
        wrong = right = 0.0
        for of_block, of_got in zip(self.dz.split(BLOCK, 1), got.split(BLOCK)):
            want = of_block.t() @ self.x
            wrong += (of_got.double() - want).square().sum().item()
            right += want.square().sum().item()
        return (wrong / right) ** 0.5


def check(
    row: dict[str, Any], got: dict[str, Tensor], batch: PairBatch, what: str, knows: bool, truths: dict[bool, Any]
) -> None:
    """Enter a contender's errors against float64, or that memory ran out: float64 needs far more of it.

    ``truths`` caches the truths with and without a reference for the next contender.
    """
    for stale in ("relative_error", "errors_not_checked"):
        row.pop(stale, None)
    try:
        if knows not in truths:
            truths[knows] = Truth(batch, what, knows_reference=knows)
        if not isinstance(truths[knows], str):
            row["relative_error"] = truths[knows].errors(got, relative=True)
            return
    except Exception as error:  # too_large re-raises every error except a lack of memory
        truths[knows] = too_large(error)
    row["errors_not_checked"] = truths[knows]


def too_large(error: Exception) -> str:
    """Return a status that says that memory ran out, or re-raise any other error."""
    if reason(error) != "out of memory":
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return "out of memory"


def products(
    x: Tensor, weight: Tensor, count: int, rows: int | None = None, words: int | None = None
) -> Callable[[], None]:
    """Return a call that computes X W^T, E W and E^T X into preallocated outputs, with the logits in place of E.

    It works in groups of ``rows`` rows and ``words`` words; the default is one group.
    """
    rows, words = min(rows or len(x), len(x)), min(words or len(weight), len(weight))
    workspace = x.new_empty(rows * words)
    dx = torch.empty_like(x) if count > 1 else None
    dweight = torch.empty_like(weight) if count > 2 else None

    def run() -> None:
        for i in range(0, len(x), rows):
            some = x[i : i + rows]
            for v in range(0, len(weight), words):
                part = weight[v : v + words]
                logits = workspace[: len(some) * len(part)].view(len(some), len(part))
                torch.mm(some, part.t(), out=logits)
                for out, a, b, first in (
                    (None if dx is None else dx[i : i + rows], logits, part, v == 0),
                    (None if dweight is None else dweight[v : v + words], logits.t(), some, i == 0),
                ):
                    if out is not None:
                        torch.addmm(out, a, b, beta=0 if first else 1, out=out)

    return run


def products_of(batch: PairBatch, mode: str, *group: int | None) -> Callable[[], None]:
    """Return the bare matmuls of a batch and mode."""
    return products(batch.scored_rows(batch.hidden).contiguous(), batch.weight, PRODUCTS[mode], *group)


def fastest_products(batch: PairBatch, mode: str) -> Callable[[], None]:
    """Return the floor: on a CPU the fastest of several groupings of rows and words, elsewhere whole matmuls."""
    candidates = [products_of(batch, mode)]
    if batch.hidden.device.type == "cpu":
        candidates += [products_of(batch, mode, rows, words) for rows in (512, 1024, 2048) for words in (1000, None)]
        times = interleaved_times({str(i): run for i, run in enumerate(candidates)}, 3)
        return candidates[min(range(len(candidates)), key=lambda i: median(times[str(i)]))]
    return candidates[0]


def measure(
    batch: PairBatch,
    mode: str,
    found: dict[str, Outcome],
    rounds: int,
    *,
    what: str = LOSS,
    seconds: float = float("inf"),
    with_errors: bool = True,
    cell: dict[str, Any] | None = None,
    save: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return ``cell`` with a row under ``contenders`` for the floor and for each name in ``found``.

    ``cell`` has its rows from the first round on, and ``save`` is called after each round. Existing rows, such as rows
    with memory figures, are extended. On a GPU, times from an idle device follow those behind other work.
    """
    cell = {} if cell is None else cell
    if any(isinstance(c, Contender) and c.compiles_per_shape for c in found.values()):
        torch.compiler.reset()  # otherwise shapes of earlier cells would count towards the compiler's limit
    rows, device, on_gpu = cell.setdefault("contenders", {}), str(batch.hidden.device), batch.hidden.is_cuda
    runs: dict[str, Callable[[], Any] | str] = {"floor": fastest_products(batch, mode)}
    runs |= {n: c if isinstance(c, str) else partial(step, batch, mode, c, what) for n, c in found.items()}
    truths: dict[bool, Any] = {}

    def first(name: str, row: dict[str, Any], got: dict[str, Tensor]) -> None:
        contender = found[name]
        if with_errors and isinstance(contender, Contender):
            check(row, got, batch, what, contender.knows_reference, truths)

    def free_and_save() -> None:
        truths.clear()  # gigabytes on a GPU, and read only in first calls
        save()

    options: dict[str, Any] = {"seconds": seconds, "first": first, "save": free_and_save}
    if on_gpu:
        options |= {"clock": seconds_behind_work, "seconds": 0.75 * seconds}
    compared(runs, "floor", device, rounds, rows=rows, **options)
    if on_gpu:
        alive = {name: run for name, run in runs.items() if rows[name]["status"] == "measured"}
        idle = compared(alive, "floor", device, min(rounds, 5), seconds=0.25 * seconds, memory=False)
        for name, row in idle.items():
            if row["status"] == "measured":
                rows[name]["from_idle"] = {key: row[key] for key in ("seconds", "times_floor")}
            else:
                rows[name] = row
        save()
    return cell


# --- peak memory on a CPU, in a fresh process per figure ---


def measure_peaks(
    shape: Shape,
    mode: str,
    names: Iterable[str],
    cell: dict[str, Any],
    *,
    what: str = LOSS,
    rows: bool = True,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Measure each contender's peak memory above its inputs in a fresh process, and record it in ``cell``."""
    table = cell.setdefault("contenders", {})
    given = {"head": asdict(shape.head), "lengths": shape.lengths, "mode": mode, "what": what, "rows": rows}
    for name in names:
        peak = peak_memory_in_fresh_process("benchmarks.measure", "peak_of", given | {"name": name})
        table[name] = table.get(name, {}) | peak
        save()


def run_of(name: str, batch: PairBatch, mode: str, what: str) -> Callable[[], Any]:
    return products_of(batch, mode) if name == "floor" else partial(step, batch, mode, CONTENDERS[name], what)


def peak_of(
    head: dict[str, Any], lengths: list[list[int]], mode: str, what: str, rows: bool, name: str
) -> int | str | None:
    """Return one contender's peak memory on the call after a warm-up, or why it cannot run."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "rows": rows}
    small = PairBatch(equal(HeadShape(64, 1000), 2, 16, 32), **options)
    run_of("torch", small, TRAIN, LOSS)()
    batch = PairBatch(Shape(HeadShape(**head), tuple((x, w, l) for x, w, l in lengths)), **options)
    if name != "floor" and (why := CONTENDERS[name].unavailable(batch, per_token=what == LOGPS)):
        return why
    run_of(name, batch, mode, what)()
    release_freed_memory()
    return own_peak(lambda: run_of(name, batch, mode, what)())
