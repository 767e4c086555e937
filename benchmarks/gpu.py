"""Measure everything that needs a GPU, in order of value, in calls of a few minutes each.

    python -m benchmarks.gpu --out DIR                  as many steps as fit into 9.5 minutes; a second call continues
    python -m benchmarks.gpu --out DIR --steps smoke,main,decomposition --minutes 4

Each step runs in its own process with its own time limit, and DIR/gpu.json is written when it ends. So a CUDA error
that outlives its cause, a crash or a lack of time costs one step. Another call with the same DIR continues with the
missing steps and shapes; steps that are named are repeated. DIR holds gpu.json, part.json (while a step runs),
steps.log, tests.log, time.png and memory.png.

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
import os
import shlex
import signal
import subprocess
import sys
import tempfile
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
from .result_files import add_names, checked_device, commit, continued, differences, dtype_name, provenance, write_json

LOG, LOG_BYTES = "steps.log", 8 << 20
# Left at the end of a call for plots and the last result.
CLOSING_SECONDS = 8.0
LEAST_MINUTES = 0.5
WHEELS = """
peers on a machine without a network: fetch their wheels elsewhere,
  pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl \\
    trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1
and name the folder: --wheels .whl. All are pure Python, 2 MiB together, so they fit into 64 MiB with this repository.
The timed part of trl loads without trl's own requirements. The row of a missing peer says so. Only plots need
matplotlib.
"""


# --- results ---


def fresh_result(command: str, device: torch.device) -> dict[str, Any]:
    return {
        **provenance(command, PEER_PACKAGES),
        "device": hardware(device),
        "dtype": dtype_name(dtype_of(device)),
        "method": " ".join(__doc__.split("\n\n")[-1].split()),
        "finished": False,
        "seconds": 0.0,
        "steps": {},
        "smoke": [],
        "tests": None,
        "accuracy": [],
        "cells": [],
        "tuning": {},
        "targets": [],
    }


def merge(result: dict[str, Any], row: dict[str, Any]) -> None:
    """Enter what a step has left. Lists and tables are replaced; contenders are added to existing cells.

    A contender measured by two steps keeps the figures of the earlier step, unless that step is done again.
    """
    for key, value in row["part"].items():
        if key != "cells":
            result[key] = value
            continue
        for cell in value:
            known = next((c for c in result["cells"] if c["name"] == cell["name"]), None)
            if known is None:
                known = {**cell, "contenders": {}}
                result["cells"].append(known)
            for name, figures in cell.get("contenders", {}).items():
                old = known["contenders"].get(name)
                if old is None or old["status"] != "measured" or old["step"] == row["step"]:
                    known["contenders"][name] = figures | {"step": row["step"]}
            known |= {key: value for key, value in cell.items() if key != "contenders"}
    result["cells"] = [cell for cell in result["cells"] if cell["contenders"]]


def collect(out: Path, result: dict[str, Any]) -> dict[str, Any] | None:
    """Merge and remove the part that a step has left, and return its row for the table of steps, or None."""
    file = out / PART
    if not file.exists():
        return None
    row = json.loads(file.read_text())
    merge(result, row)
    file.unlink()
    return {"step": row["step"], "status": row["status"], "notes": row["notes"]}


def enter_interrupted(out: Path, result: dict[str, Any]) -> None:
    """Enter what a step had when its call was interrupted or killed."""
    if row := collect(out, result):
        result["steps"][row["step"]] = step_row(
            row["status"] or "stopped with its call; its figures so far are kept", row
        )


def step_row(status: str, row: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"status": status, "notes": row["notes"], "seconds": seconds, "commit": commit(), "date": today}


def result_of_folder(parser: argparse.ArgumentParser, out: Path, command: str, device: torch.device) -> dict[str, Any]:
    """Return the result of earlier calls with this folder, or a new one."""
    file = out / "gpu.json"
    result = fresh_result(command, device)
    if not file.exists():
        return result
    try:
        old = json.loads(file.read_text())
    except ValueError as error:
        parser.error(f"--out: {file} is not JSON ({error}); remove it or name another folder")
    if "steps" not in old:
        parser.error(f"--out: {file} is of an older version of this command; remove it or name another folder")
    if other := differences(old, result, ("device", "versions")):
        parser.error(f"--out: {file} differs ({other}); name another folder")
    return continued(old, result)


# --- steps ---


def pending(result: dict[str, Any], named: Sequence[str] | None) -> list[str]:
    """Return the steps of this call in order: the named ones, or untried and then unfinished ones."""
    if named is not None:
        return [name for name in STEPS if name in named]
    tried = [name for name in STEPS if name in result["steps"]]
    unfinished = [name for name in tried if result["steps"][name]["status"] != "done"]
    return [*(name for name in STEPS if name not in tried), *unfinished]


def run_step(
    name: str, options: argparse.Namespace, result: dict[str, Any], seconds: float, environment: dict[str, str]
) -> None:
    """Run a step in its own process and enter what it leaves, however it ends."""
    before = result["steps"].get(name, {"status": "done"})
    # An unfinished step continues; a finished one that is named is repeated.
    known = [] if before["status"] == "done" else [cell["name"] for cell in result["cells"] if _has(cell, name)]
    given = {"name": name, "known": known, "seconds": max(5.0, seconds - 5), "out": str(options.out.absolute())}
    given |= {key: getattr(options, key) for key in ("device", "quick", "peers")}
    command = [sys.executable, "-m", "benchmarks.gpu_steps", json.dumps(given)]
    log, start = options.out / LOG, time.perf_counter()
    shown = log.stat().st_size if log.exists() else 0
    code = run_in_group(command, log, seconds, environment)
    row = collect(options.out, result) or {"status": "", "notes": []}
    status = row["status"]
    if code is None:
        status = f"stopped after {seconds:.0f} s; what it had is kept"
    elif not status:
        why = f"signal {-code}" if code < 0 else f"exit status {code}"
        status = f"failed: the process ended with {why}; see {LOG}"
    result["steps"][name] = step_row(status, row, time.perf_counter() - start)
    with log.open(errors="replace") as file:
        file.seek(shown)
        print(file.read(20_000).rstrip(), flush=True)
    shorten(log)


def _has(cell: dict[str, Any], step: str) -> bool:
    """Return whether the step measured this cell in enough rounds; a killed step leaves a cell with fewer."""
    rows = [row for row in cell["contenders"].values() if row.get("step") == step]
    return bool(rows) and all(row.get("rounds", FEWEST_ROUNDS) >= FEWEST_ROUNDS for row in rows)


def shorten(log: Path) -> None:
    """Keep only the end of a log that has grown too large to bring back."""
    if log.stat().st_size > LOG_BYTES:
        log.write_bytes(log.read_bytes()[-LOG_BYTES // 2 :])


def installed_wheels(parser: argparse.ArgumentParser, folder: Path | None, target: str) -> dict[str, str]:
    """Return the environment of the steps: with --wheels, the wheels unpacked for them alone."""
    environment = dict(os.environ)
    if folder is None:
        return environment
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        parser.error(f"--wheels: there is no wheel in {folder}")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", target]
    done = subprocess.run([*pip, *map(str, wheels)], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or "pip failed").splitlines()[-1]
        print(f"--wheels: not installed, their peers are left out: {why}")
        return environment
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [target, environment.get("PYTHONPATH")]))
    return environment


def run(options: argparse.Namespace, result: dict[str, Any], clock: Timer, environment: dict[str, str]) -> None:
    """Run the steps of this call until its time is spent."""
    earlier = result["seconds"]
    todo = pending(result, options.steps)
    for i, name in enumerate(todo):
        step, left = STEPS[name], clock.left - CLOSING_SECONDS
        if left < step.least:
            print(f"[{i + 1}/{len(todo)}] {name}: not started, {max(0.0, left):.0f} s are left; call again to go on")
            continue
        print(f"[{i + 1}/{len(todo)}] {name} ({step.about}), at most {min(step.seconds, left):.0f} s", flush=True)
        run_step(name, options, result, min(step.seconds, left), environment)
        print(f"    {name}: {result['steps'][name]['status']}, {result['steps'][name]['seconds']:.0f} s", flush=True)
        result["seconds"] = earlier + clock.elapsed
        save(options.out, result)


def save(out: Path, result: dict[str, Any]) -> None:
    result["finished"] = all(result["steps"].get(name, {}).get("status") == "done" for name in STEPS)
    result["targets"] = targets(result)
    write_json(out / "gpu.json", result)


def draw(out: Path, result: dict[str, Any]) -> None:
    """Draw time and memory if there are figures and matplotlib is installed."""
    try:
        from .plots import peak_gib, plot_cells, times_floor
    except ImportError as error:  # every figure is in gpu.json, and can be drawn elsewhere
        print(f"no plots: {error}")
        return
    for name, value, label in (
        ("time", times_floor, "time / bare matmuls"),
        ("memory", peak_gib, "peak memory above inputs, GiB"),
    ):
        if any(value(row) for cell in result["cells"] for row in cell["contenders"].values()):
            plot_cells(result, value, label).savefig(out / f"{name}.png", dpi=100)


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
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels of peers that are not installed")
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
    result, clock = result_of_folder(parser, options.out, command, device), Timer(60 * options.minutes)
    enter_interrupted(options.out, result)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    with tempfile.TemporaryDirectory() as site:
        try:
            run(options, result, clock, installed_wheels(parser, options.wheels, site))
        except KeyboardInterrupt:
            interrupted = True
            enter_interrupted(options.out, result)
            print("interrupted; finished steps are kept, and another call continues", file=sys.stderr)
    save(options.out, result)
    draw(options.out, result)
    for row in result["targets"]:
        figure = "" if row["measured"] is None else f": {row['measured']:.4g}"
        print(f"target {row['target']} <= {row['limit']:g}{figure}: {row['verdict']}")
    for name in STEPS:
        for note in result["steps"].get(name, {}).get("notes", []):
            print(f"note, {name}: {note}")
    failures = problems(result)
    for failure in failures:
        print(f"FAILED {failure}")
    missing = [name for name in STEPS if result["steps"].get(name, {}).get("status") != "done"]
    print(f"{clock.elapsed:.0f} s; still to do: {', '.join(missing) or 'nothing'}; results in {options.out}")
    return 130 if interrupted else int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
