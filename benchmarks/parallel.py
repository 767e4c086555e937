"""Measure a head that is split over ranks by words: time, bytes sent and peak memory per rank, with gloo.

    python -m benchmarks.parallel --json benchmarks/results/parallel_cpu.json

The floor is the three bare matmuls of a rank's own words with preallocated outputs, run on all ranks at the same time.
Each rank has one thread. With more ranks than cores, times are left out, because the ranks would compete for cores. The
second table is calculated, not measured: it compares the time of one call's collectives on faster networks with the
matmuls.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import inspo_kernels as ik
from inspo_kernels.groups import GATHER

from .batches import HeadShape, PairBatch, Shape, equal
from .harness import own_peak, release_freed_memory, spread
from .measure import products
from .result_files import command, make_parser, positive, provenance, result_file, write_json
from .tables import markdown, ratio_text

RANKS = (1, 2, 4)
REFERENCE, QUICK = equal(HeadShape(512, 32_000), 4, 128, 256), equal(HeadShape(32, 500), 2, 8, 16)

# --- the calculated table and its assumptions ---
ASSUMPTIONS = {
    "matmuls": "790e12 operations a second, as bf16 matmuls of random data ran on one H200",
    "sent": "dX in float32, and 12 bytes a row: offset, rest and the label's logit in float32",
    "collectives": "of R ranks an all-reduce sends 2 (R - 1) / R of its bytes and a gather receives R - 1 parts, at "
    "full bandwidth",
    "left out": "latency, launches and the pass over the logits",
    "overlap": "dX is sent while dW is computed, so a rank waits only for the part that takes longer than that matmul",
}
# Bytes per second and GPU in one direction: NVLink 4 has 900 GB/s in both directions, 400 Gb/s is 50 GB/s.
NETWORKS = {"NVLink 4": 450e9, "400 Gb/s": 50e9}
HEADS = {"Llama-3-70B": HeadShape(8192, 128_256), "Llama-4": HeadShape(5120, 202_048)}
GPUS, TOKENS, FLOPS = (2, 4, 8), 8192, 790e12
CALCULATED_TIMES = {"matmuls": 1, "gather": 3, "dx_all_reduce": 1}  # digits of their ms in the table


def calculated() -> list[dict[str, Any]]:
    """Calculate the ms of one call's matmuls and collectives on GPUs for each head, network and number of ranks."""
    rows = []
    for (head_name, head), ranks, (network, bandwidth) in product(HEADS.items(), GPUS, NETWORKS.items()):
        matmul = 2 * TOKENS * head.hidden * head.vocab / ranks / FLOPS
        reduced = 2 * (ranks - 1) / ranks * TOKENS * head.hidden * 4 / bandwidth
        gathered = (ranks - 1) * TOKENS * 12 / bandwidth
        waited = gathered + max(0.0, reduced - matmul)
        about = {"head": head_name, "hidden": head.hidden, "vocab": head.vocab, "ranks": ranks, "network": network}
        times = {"matmuls_ms": 3e3 * matmul, "gather_ms": 1e3 * gathered, "dx_all_reduce_ms": 1e3 * reduced}
        shares = {
            "share_waited": waited / (3 * matmul + waited),
            "share_without_overlap": (gathered + reduced) / (3 * matmul + gathered + reduced),
        }
        rows.append(about | times | shares)
    return rows


@dataclass
class Traffic:
    """Count one rank's seconds in collectives, including waiting, and the bytes that it passes to each kind."""

    seconds: float = 0.0
    sent: dict[str, int] = field(default_factory=dict)

    def watch(self) -> None:
        """Count from now on."""
        for name in (GATHER, "all_reduce"):
            setattr(dist, name, partial(self.run, name, getattr(dist, name)))

    def run(self, name: str, collective: Callable[..., Any], *tensors: Tensor, **options: Any) -> Any:
        kind = "all_reduce" if name == "all_reduce" else "gather"
        self.sent[kind] = self.sent.get(kind, 0) + tensors[-1].nbytes
        work = self.timed(collective, *tensors, **options)
        return work and SimpleNamespace(wait=partial(self.timed, work.wait))

    def timed(self, call: Callable[..., Any], *tensors: Tensor, **options: Any) -> Any:
        start = time.perf_counter()
        result = call(*tensors, **options)
        self.seconds += time.perf_counter() - start
        return result


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("parallel", __doc__)
    parser.add_argument("--json", type=result_file, help="result file")
    parser.add_argument("--rounds", type=positive, default=7, help="rounds after a warm-up [7]")
    parser.add_argument("--quick", action="store_true", help="a small shape, to check that everything runs")
    options = parser.parse_args(arguments)
    shape = QUICK if options.quick else REFERENCE
    given = command("benchmarks.parallel", sys.argv[1:] if arguments is None else arguments, options.json)
    result: dict[str, Any] = provenance(given) | {
        "what": "parallel",
        "dtype": "float32",
        "threads_per_rank": 1,
        "cells": [],
        "assumptions": {**ASSUMPTIONS, "bytes_per_second": NETWORKS},
        "calculated": calculated(),
    }
    for ranks in RANKS:
        result["cells"].append(measure(shape, ranks, options.rounds))
        if options.json is not None:
            write_json(options.json, result)
    print(tables(result))


def measure(shape: Shape, ranks: int, rounds: int) -> dict[str, Any]:
    """Measure one row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (ranks, folder, shape, rounds), ranks, start_method="spawn")
        found = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(ranks)]
    cell: dict[str, Any] = {
        "ranks": ranks,
        "hidden": shape.head.hidden,
        "vocab": shape.head.vocab,
        "scored_tokens": shape.scored,
        "rounds": rounds,
        "bytes_sent_per_rank": found[0]["sent"],
        "peak_memory_mib": max(one["peak"] for one in found) / 2**20,
    }
    if ranks <= (os.cpu_count() or 1):
        # A round ends when its last rank does.
        times = {name: [max(each) for each in zip(*(one[name] for one in found))] for name in ("ours", "floor")}
        ratio = [ours / floor for ours, floor in zip(times["ours"], times["floor"])]
        cell |= {"seconds": {name: spread(each) for name, each in times.items()}, "to_floor": spread(ratio)}
        cell["share_in_collectives"] = statistics.median(found[0]["collectives"])
    return cell


def _rank(rank: int, ranks: int, folder: str, shape: Shape, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    ours, floor = _runs(shape, rank, ranks)
    release_freed_memory()
    peak = own_peak(ours)
    traffic = Traffic()
    traffic.watch()
    times: dict[str, list[float]] = {"ours": [], "floor": [], "collectives": []}
    for i in range(1 + rounds):
        for name, run in (("ours", ours), ("floor", floor)):
            dist.barrier()
            traffic.seconds, traffic.sent = (0.0, {}) if name == "ours" else (traffic.seconds, traffic.sent)
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if i:
                times[name].append(elapsed)
                if name == "ours":
                    times["collectives"].append(traffic.seconds / elapsed)
    torch.save({**times, "peak": peak or 0, "sent": traffic.sent}, Path(folder, f"{rank}.pt"))
    dist.barrier()
    os._exit(0)


def _runs(shape: Shape, rank: int, ranks: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two calls: the loss with gradients on this rank's words, and the bare matmuls."""
    batch = PairBatch(shape, dtype=torch.float32, device=torch.device("cpu"), rows=True)
    assert batch.labels is not None
    labels, (first, last) = batch.labels, (shape.head.vocab * i // ranks for i in (rank, rank + 1))
    hidden, weight = batch.hidden.requires_grad_(), batch.weight[first:last].clone().requires_grad_()

    def ours() -> None:
        hidden.grad = weight.grad = None
        out = ik.fused_inspo_loss(hidden, weight, labels, objective="simpo", process_group=dist.group.WORLD)
        out.loss.backward()

    return ours, products(batch.scored_rows(hidden.detach()), weight.detach(), 3)


def tables(result: dict[str, Any]) -> str:
    """Format the measured and the calculated table in Markdown."""
    first, measured = result["cells"][0], []
    for cell in result["cells"]:
        timed = ["more ranks than cores", "", ""]
        if "seconds" in cell:
            milliseconds = f"{1e3 * cell['seconds']['ours']['median']:,.0f}"
            timed = [milliseconds, ratio_text(cell["to_floor"]), f"{cell['share_in_collectives']:.1%}"]
        sent = (f"{cell['bytes_sent_per_rank'].get(kind, 0) / 1024:,.0f} KiB" for kind in ("gather", "all_reduce"))
        measured.append([str(cell["ranks"]), *timed, ", ".join(sent), f"{cell['peak_memory_mib']:.0f} MiB"])
    calculated_rows = []
    for row in result["calculated"]:
        head = f"{row['head']}: H = {row['hidden']:,}, V = {row['vocab']:,}"
        times = (f"{row[f'{what}_ms']:.{digits}f} ms" for what, digits in CALCULATED_TIMES.items())
        shares = (f"{row[name]:.1%}" for name in ("share_waited", "share_without_overlap"))
        calculated_rows.append([head, str(row["ranks"]), row["network"], *times, *shares])
    assumptions = dict(result["assumptions"])
    rates = assumptions.pop("bytes_per_second").items()
    bandwidths = ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in rates)
    assumptions["bandwidth of a GPU in one direction"] = bandwidths
    assumed = "\n".join(f"- {name}: {text}" for name, text in assumptions.items())
    columns = "ranks", "ms", "time / floor", "in collectives", "sent per rank: sums, dX", "peak memory per rank"
    times_of = "three matmuls", "gather of sums", "all-reduce of dX", "waited", "without overlap"
    return "\n\n".join(
        [
            f"Measured: one call with gradients, {first['scored_tokens']:,} scored tokens, H = {first['hidden']}, "
            f"V = {first['vocab']:,}, {result['dtype']}, gloo on {result['hardware']['cores']} cores, one thread per "
            "rank. The floor is the three bare matmuls of a rank's words, run on all ranks at the same time.",
            markdown(columns, measured),
            f"Calculated, not measured, for {TOKENS:,} scored tokens in bf16, under these assumptions:",
            assumed,
            markdown(["head", "ranks", "network", *times_of], calculated_rows),
        ]
    )


if __name__ == "__main__":
    main()
