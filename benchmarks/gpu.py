"""Measure everything that needs a GPU, in order of value, in calls of a few minutes each.

    python -m benchmarks.gpu --out DIR                  as many steps as fit into 9.5 minutes; a second call continues
    python -m benchmarks.gpu --out DIR --steps smoke,main,decomposition --minutes 4

Each step runs in its own process with its own time limit, and DIR/gpu.json is written when it ends. So a CUDA error
that outlives its cause, a crash or a lack of time costs one step. Another call with the same DIR continues with the
missing steps and shapes; steps that are named are repeated. DIR holds gpu.json, part.json (while a step runs),
steps.log and tests.log.

``forward`` is without gradients (1 matmul), ``frozen head`` computes dX alone (2), ``forward+backward`` dX and dW (3).
Times are between CUDA events around one call that is queued behind a few large matmuls, as a loss is queued behind the
model in training. Beside them are times from an idle device, which include the latency of Python and of launches. Every
round starts with the next contender, because a GPU at its power limit is slower after a long load. Matmuls keep
full-precision sums: reduced-precision reductions of split-K bfloat16 matmuls and float16 accumulation are off for every
contender. The exit status is 1 if a step, a test or an accuracy check failed; a missed target is no error.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .batches import dtype_of
from .contenders import PEER_PACKAGES, PEERS
from .gpu_plan import hardware, problems, targets
from .gpu_processes import run_in_group
from .gpu_steps import PART, STEPS
from .harness import FEWEST_ROUNDS, Timer
from .result_files import add_names, checked_device, commit, dtype_name, provenance, resumed, write_json

LOG, LOG_BYTES = "steps.log", 8 << 20
# Left at the end of a call for the last result.
CLOSING_SECONDS = 3.0
LEAST_MINUTES = 0.5
WHEELS = """
peers on a machine without a network: fetch their wheels elsewhere, unpack them there and let Python find them,
  pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl \\
    trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1
  pip install --no-index --no-deps --target .peers .whl/*.whl
  PYTHONPATH=.peers python -m benchmarks.gpu --out DIR
All are pure Python, 2 MiB together, so they fit into 64 MiB with this repository. The timed part of trl loads without
trl's own requirements. The row of a missing peer says so.
"""


# --- results ---


def fresh_result(command: str, device: torch.device) -> dict[str, Any]:
    about = {"device": hardware(device), "dtype": dtype_name(dtype_of(device))}
    method = " ".join(__doc__.split("\n\n")[-1].split())
    figures: dict[str, Any] = {"seconds": 0.0, "steps": {}, "accuracy": [], "cells": []}
    return {**provenance(command, PEER_PACKAGES), **about, "method": method, **figures}


def merge(result: dict[str, Any], row: dict[str, Any]) -> None:
    """Enter what a step has left. Lists and tables are replaced; contenders are added to existing cells.

    A contender measured by two steps keeps the figures of the earlier step, unless that step is done again.
    """
    result |= {key: value for key, value in row["part"].items() if key != "cells"}
    for cell in row["part"].get("cells", []):
        rows = cell.pop("contenders", {})
        if not rows:
            continue
        known = next((c for c in result["cells"] if c["name"] == cell["name"]), None)
        if known is None:
            result["cells"].append(known := {**cell, "contenders": {}})
        for name, figures in rows.items():
            old = known["contenders"].get(name)
            if old is None or old["status"] != "measured" or old["step"] == row["step"]:
                known["contenders"][name] = figures | {"step": row["step"]}
        known |= cell


def enter(out: Path, result: dict[str, Any], why: str, name: str | None = None, seconds: float | None = None) -> None:
    """Enter what step ``name``, or the step of an interrupted call, has left.

    ``why`` it ended is its status if it has not written one itself.
    """
    file = out / PART
    row = json.loads(file.read_text()) if file.exists() else {"step": name, "status": "", "notes": [], "part": {}}
    file.unlink(missing_ok=True)
    if row["step"] is not None:
        merge(result, row)
        found = {"status": row["status"] or why, "notes": row["notes"], "seconds": seconds, "commit": commit()}
        result["steps"][row["step"]] = found | {"date": datetime.now(UTC).strftime("%Y-%m-%d")}


# --- steps ---


def unfinished(result: dict[str, Any]) -> list[str]:
    return [name for name in STEPS if result["steps"].get(name, {}).get("status") != "done"]


def pending(result: dict[str, Any], named: Sequence[str] | None) -> list[str]:
    """Return the steps of this call in order: the named ones, or untried and then unfinished ones."""
    if named is not None:
        return [name for name in STEPS if name in named]
    return sorted(unfinished(result), key=lambda name: name in result["steps"])


def run_step(name: str, options: argparse.Namespace, result: dict[str, Any], seconds: float) -> None:
    """Run a step in its own process and enter what it leaves, however it ends."""
    # An unfinished step continues; a finished one that is named is repeated.
    again = result["steps"].get(name, {"status": "done"})["status"] == "done"
    known = [] if again else [cell["name"] for cell in result["cells"] if _has(cell, name)]
    given = {"name": name, "known": known, "seconds": max(5.0, seconds - 5), "out": str(options.out.absolute())}
    given |= {key: getattr(options, key) for key in ("device", "quick", "peers")}
    command = [sys.executable, "-m", "benchmarks.gpu_steps", json.dumps(given)]
    log, start = options.out / LOG, time.perf_counter()
    shown = log.stat().st_size if log.exists() else 0
    code = run_in_group(command, log, seconds)
    ended = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
    why = f"failed: the process ended with {ended}; see {LOG}"
    if code is None:
        why = f"stopped after {seconds:.0f} s; what it had is kept"
    enter(options.out, result, why, name, time.perf_counter() - start)
    text = log.read_bytes()
    print(text[shown:][:20_000].decode(errors="replace").rstrip(), flush=True)
    log.write_bytes(text[-LOG_BYTES:])


def _has(cell: dict[str, Any], step: str) -> bool:
    """Return whether the step measured this cell in enough rounds; a killed step leaves a cell with fewer."""
    rows = [row for row in cell["contenders"].values() if row.get("step") == step]
    return bool(rows) and all(row.get("rounds", FEWEST_ROUNDS) >= FEWEST_ROUNDS for row in rows)


def run(options: argparse.Namespace, result: dict[str, Any], clock: Timer) -> None:
    """Run the steps of this call until its time is spent."""
    earlier = result["seconds"]
    todo = pending(result, options.steps)
    for i, name in enumerate(todo):
        step, left = STEPS[name], clock.left - CLOSING_SECONDS
        if left < step.least:
            print(f"[{i + 1}/{len(todo)}] {name}: not started, {max(0.0, left):.0f} s are left; call again to go on")
            continue
        print(f"[{i + 1}/{len(todo)}] {name} ({step.about}), at most {min(step.seconds, left):.0f} s", flush=True)
        run_step(name, options, result, min(step.seconds, left))
        print(f"    {name}: {result['steps'][name]['status']}, {result['steps'][name]['seconds']:.0f} s", flush=True)
        result["seconds"] = earlier + clock.elapsed
        save(options.out, result)


def save(out: Path, result: dict[str, Any]) -> None:
    result |= {"finished": not unfinished(result), "targets": targets(result)}
    write_json(out / "gpu.json", result)


# --- the command ---


def step_names(text: str) -> list[str]:
    """Parse step names separated by commas, for argparse."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if wrong := [name for name in names if name not in STEPS]:
        raise argparse.ArgumentTypeError(f"there is no step {', '.join(wrong)}: they are {', '.join(STEPS)}")
    return names


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    steps = "\n".join(f"  {name:<14}{step.about}, at most {step.seconds:.0f} s" for name, step in STEPS.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__.splitlines()[0],
        epilog=f"steps, in order:\n{steps}\n{WHEELS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the results: a new one, or that of earlier calls"
    )
    parser.add_argument("--device", default="cuda", help='"cuda", "cuda:1", or "cpu" (with --quick) [cuda]')
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that everything runs")
    parser.add_argument("--steps", type=step_names, metavar="A,B", help="steps to run [all that are missing]")
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit of this call [9.5]")
    add_names(parser, "--peers", PEERS, "other libraries to time [all]", nargs="*", default=PEERS)
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    parser, options = parsed(arguments)
    device = checked_device(parser, options.device)
    if options.minutes < LEAST_MINUTES:
        parser.error(f"--minutes {options.minutes:g}: no step fits into less than {LEAST_MINUTES:g}")
    if device.type == "cpu" and not options.quick:
        parser.error("--device cpu takes hours at these shapes: add --quick, or use a GPU")
    options.out.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if arguments is None else arguments
    given = ["DIR" if a == str(options.out) else "--out=DIR" if a.startswith("--out=") else a for a in given]
    command = shlex.join(["python", "-m", "benchmarks.gpu", *given])
    result, clock = fresh_result(command, device), Timer(60 * options.minutes)
    result = resumed(parser, "--out", options.out / "gpu.json", result, ("device", "versions"))
    stopped = "stopped with its call; its figures so far are kept"
    enter(options.out, result, stopped)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    try:
        run(options, result, clock)
    except KeyboardInterrupt:
        interrupted = True
        enter(options.out, result, stopped)
        print("interrupted; finished steps are kept, and another call continues", file=sys.stderr)
    save(options.out, result)
    for row in result["targets"]:
        figure = "" if row["measured"] is None else f": {row['measured']:.4g}"
        print(f"target {row['target']} <= {row['limit']:g}{figure}: {row['verdict']}")
    for name in STEPS:
        for note in result["steps"].get(name, {}).get("notes", []):
            print(f"note, {name}: {note}")
    failures = problems(result)
    for failure in failures:
        print(f"FAILED {failure}")
    missing = ", ".join(unfinished(result))
    print(f"{clock.elapsed:.0f} s; still to do: {missing or 'nothing'}; results in {options.out}")
    return 130 if interrupted else int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
