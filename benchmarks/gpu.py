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
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .batches import MODELS, HeadShape, PairBatch, random_head, scored_tokens
from .cells import table
from .contenders import CONTENDERS, OURS, PEER_PACKAGES, PEERS, Contender, chosen
from .gpu_accuracy import SEQUENCE_NAT, accuracy, accuracy_table
from .gpu_tuning import tune, tuning_table, workspace_and_gradients
from .harness import checked_device, provenance, reason, write_json
from .measure import FORWARD, FROZEN, MODES, PRODUCTS, TRAIN, measure
from .plots import peak_gib, plot_cells, times_floor

ROOT = Path(__file__).parent.parent
# Nothing starts with less time left than the slowest cell takes at its fewest rounds.
RESERVE_SECONDS = 30.0
# Of each sweep.
TUNING_SECONDS = 6.0
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
    models=MODELS,
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
        tests = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        limit = min(plan.test_seconds, clock.left)
        try:
            code = tests.wait(limit)
            status = "passed" if code == 0 else f"failed: pytest's exit status was {code}"
        except subprocess.TimeoutExpired:
            status = f"failed: not done after {limit:.0f} s"
        finally:
            # Its workers, too: they would go on using the GPU beside what is timed next.
            with suppress(ProcessLookupError):
                os.killpg(tests.pid, signal.SIGKILL)
    lines = log.read_text().strip().splitlines()
    return {
        "status": status,
        "summary": lines[-1] if lines else "",
        "arguments": list(plan.tests),
        "seconds": time.perf_counter() - start,
        "log": log.name,
    }


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
    main_head = plan.models[plan.main[0]]
    for rows in accuracy(main_head, plan.accuracy_pairs, plan.response, peers, dtype, device):
        result["accuracy"] += rows
        done(accuracy_table(rows))
    weight, weight_of = None, None
    for i, (model, tokens, mode) in enumerate(cells):
        shape = scored_tokens(plan.models[model], tokens, plan.response)
        cell = {"name": f"{model}, {tokens} tokens, {mode}", "model": model, "tokens": tokens, "mode": mode}
        cell |= shape.as_json()
        is_main = (model, tokens) == plan.main
        names = [*(n for n in OURS if is_main or CONTENDERS[n].variant_of is None), *peers]
        if clock.left < RESERVE_SECONDS:
            cell["contenders"] = {name: {"status": "not measured: out of time"} for name in ("floor", *names)}
        else:
            if weight_of != model:
                weight = None
                weight, weight_of = random_head(shape.head, dtype=dtype, device=device), model
            batch = PairBatch(shape, dtype=dtype, device=device, weight=weight)
            found = chosen(names, batch)
            for name, outcome in found.items():
                if isinstance(outcome, Contender) and outcome.compiles_per_shape and not is_main:
                    found[name] = "not measured: compiles anew for every shape, so only the main one is"
            share = (clock.left - RESERVE_SECONDS) / (len(cells) - i)
            rounds, seconds = (2 * plan.rounds, 4 * share) if is_main else (plan.rounds, share / 2)
            measure(batch, mode, found, rounds, seconds=seconds, with_errors=False, cell=cell)
            if mode == TRAIN and not isinstance(found["triton"], str):
                cell["workspace_and_gradients_bytes"] = workspace_and_gradients(batch, "triton")
        result["cells"].append(cell)
        done(table(cell))
        if i == len(MODES) - 1:
            if clock.left > 3 * RESERVE_SECONDS:
                result["tuning"] = tune(batch, plan.workspace_rows, TUNING_SECONDS)
            else:
                result["tuning"] = {"all": {"status": "not measured: out of time"}}
            done(tuning_table(result["tuning"]))
    bar.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda", help='"cuda", "cuda:1", or "cpu" (with --quick) [cuda]')
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that everything runs")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), metavar="PEER",
                        help=f"other libraries to time, of {', '.join(PEERS)} [all]")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.5, help="no step starts that would end later [8.5]")
    options = parser.parse_args(arguments)
    device = checked_device(parser, options.device)
    if device.type == "cpu" and not options.quick:
        parser.error("--device cpu takes hours at these shapes: add --quick, or use a GPU")
    options.out.mkdir(parents=True, exist_ok=True)

    plan, clock = QUICK if options.quick else FULL, Clock(60 * options.minutes)
    given = sys.argv[1:] if arguments is None else arguments
    given = ["DIR" if a == str(options.out) else "--out=DIR" if a.startswith("--out=") else a for a in given]
    result: dict[str, Any] = {
        **provenance(shlex.join(["python", "-m", "benchmarks.gpu", *given]), PEER_PACKAGES),
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
        result["targets"] = targets(result)
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
    for name, value, label in (
        ("time", times_floor, "time / bare products"),
        ("memory", peak_gib, "peak memory above inputs, GiB"),
    ):
        if any(value(row) for cell in result["cells"] for row in cell["contenders"].values()):
            plot_cells(result, value, label).savefig(options.out / f"{name}.png", dpi=130)
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
