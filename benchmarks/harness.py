"""Timing and memory that can be believed: interleaved rounds, per-round ratios, a fresh process per memory figure."""

from __future__ import annotations

import importlib.metadata
import json
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


def provenance(command: str) -> dict[str, Any]:
    """What a result file must say about where its numbers come from."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
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
    contenders: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, all of them once a round: drifting load then hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in tqdm(range(warmup + rounds), desc="rounds", unit="round", disable=not sys.stderr.isatty()):
        for name, run in contenders.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


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


def own_peak(run: Callable[[], Any]) -> int | None:
    """Peak memory of ``run`` above what the process held before it, in bytes.

    On a GPU the allocator's own count. On a CPU the resident high-water mark, reset before the run; None where there
    is no /proc to read it from.
    """
    if torch.cuda.is_available():
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


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
