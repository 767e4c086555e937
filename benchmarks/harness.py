"""Timing and memory that can be believed: interleaved rounds, per-round ratios, a fresh process per memory figure."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy")
FEWEST_ROUNDS = 3


def provenance(command: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a result file must say about where its numbers come from; ``packages`` are named beside the usual ones."""
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": versions,
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write whole or not at all, so that an interrupted run leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def interleaved_times(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    *,
    device: str = "cpu",
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, all of them once a round: drifting load then hits all alike.

    After ``seconds`` no further round starts once there are ``FEWEST_ROUNDS`` (fewer only if ``rounds`` is).
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    bar = tqdm(range(warmup + rounds), desc="rounds", unit="round", leave=False, disable=not sys.stderr.isatty())
    for i in bar:
        if i >= warmup + FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, run in contenders.items():
            elapsed = seconds_of(run, device)
            if i >= warmup:
                times[name].append(elapsed)
    bar.close()
    return times


def seconds_of(run: Callable[[], Any], device: str = "cpu") -> float:
    """From an idle device to the end of ``run``'s work there, by the device's own clock."""
    if torch.device(device).type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high}


def ratios(times: Mapping[str, Sequence[float]], to: str) -> dict[str, dict[str, float]]:
    """Of each contender's time to that of ``to`` in the same round."""
    return {name: spread([a / b for a, b in zip(t, times[to], strict=True)]) for name, t in times.items()}


def peak_memory_in_fresh_process(module: str, arguments: Sequence[str]) -> int | None:
    """Bytes printed last by ``python -m module *arguments``, measured there with ``own_peak``, or None."""
    child = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    last = child.stdout.strip().splitlines()[-1]
    return None if last == "None" else int(last)


def own_peak(run: Callable[[], Any], device: str = "cpu") -> int | None:
    """Peak memory of ``run`` above what the process held before it, in bytes.

    On a GPU the allocator's own count. On a CPU the resident high-water mark, reset before the run; None where there
    is no /proc to read it from.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_kib("VmRSS")
        run()
        return 1024 * (_status_kib("VmHWM") - before)
    except OSError:
        return None


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
