"""Measure time in interleaved rounds with per-round ratios, and memory in a fresh process per figure."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import inspo_kernels

FEWEST_ROUNDS = 3


class Timer:
    """Count the seconds since the start, and those left."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.perf_counter(), seconds

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.elapsed


def interleaved_times(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    *,
    device: str = "cpu",
    seconds: float = math.inf,
    clock: Callable[[Callable[[], Any], str], float] | None = None,
    after_round: Callable[[dict[str, list[float]]], None] = lambda times: None,
) -> dict[str, list[float]]:
    """Return each contender's seconds in each round. Every round runs all contenders, so drifting load affects all.

    Each round starts with the next contender, because a GPU at its power limit is slower after a long load.

    ``clock`` takes the time of a run, ``seconds_of`` by default. After ``seconds`` no further round starts, but at
    least ``FEWEST_ROUNDS`` run (fewer only if ``rounds`` is smaller). ``after_round`` receives the times after each
    round, so that an interrupted run can keep them.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    end = time.perf_counter() + seconds
    bar = tqdm(range(warmup + rounds), desc="rounds", unit="round", leave=False, disable=not sys.stderr.isatty())
    for i in bar:
        if i >= warmup + FEWEST_ROUNDS and time.perf_counter() > end:
            break
        turn = i % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            elapsed = (clock or seconds_of)(contenders[name], device)
            if i >= warmup:
                times[name].append(elapsed)
        if i >= warmup:
            after_round(times)
    bar.close()
    return times


def seconds_of(run: Callable[[], Any], device: str = "cpu") -> float:
    """Return the seconds until an idle device has finished ``run``'s work, by the device's own clock."""
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


def seconds_behind_work(run: Callable[[], Any], device: str) -> float:
    """Return the device's seconds for ``run`` on a GPU that is busy until all of it is queued, as in training.

    Half a dozen large matmuls hide up to 10 ms of Python and launches, and bring the GPU to its clock under load.
    """
    if torch.device(device).type != "cuda":
        return seconds_of(run, device)
    blocker = _blocker(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    for _ in range(6):
        torch.mm(blocker, blocker)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _blocker(device: str) -> torch.Tensor:
    return torch.rand(8192, 8192, device=device, dtype=torch.bfloat16)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles; quartiles of two values are not extrapolated."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high}


def ratios(times: Mapping[str, Sequence[float]], to: str) -> dict[str, dict[str, float]]:
    """Return the ratios of each contender's time to that of ``to`` in the same round."""
    return {name: spread([a / b for a, b in zip(t, times[to], strict=True)]) for name, t in times.items()}


def reason(error: Exception) -> str:
    """Return the reason that a table shows instead of a contender's figure."""
    text = str(error).strip().split("\n")[0][:200]
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    if memory:
        return "out of memory"
    return f"failed: {type(error).__name__}" + (f": {text}" if text else "")


def guarded(runs: Mapping[str, Callable[[], Any]], failed: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """Wrap ``runs``: a run that fails is recorded in ``failed`` and does nothing from then on."""

    def guard(name: str, run: Callable[[], Any]) -> Any:
        if name in failed:
            return None
        try:
            return run()
        except Exception as error:
            failed[name] = reason(error)
        if failed[name] == "out of memory" and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    return {name: partial(guard, name, run) for name, run in runs.items()}


def compared(
    runs: Mapping[str, Callable[[], Any] | str],
    to: str,
    device: str,
    rounds: int,
    *,
    seconds: float = math.inf,
    clock: Callable[[Callable[[], Any], str], float] | None = None,
    ratio: str | None = None,
    memory: bool = True,
    warmup: int = 1,
    rows: dict[str, dict[str, Any]] | None = None,
    first: Callable[[str, dict[str, Any], Any], None] = lambda name, row, got: None,
    save: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Time the runs in interleaved rounds, relative to the run named ``to``; on a GPU, measure peak memory, too.

    The key of a row's ratios is ``ratio``, by default "times_" followed by ``to``. A text in place of a run says why it
    cannot run. A run that fails has only a status and is not called again. ``rows`` are extended after each round, and
    then ``save`` is called, so that an interrupted run leaves no row without figures. A row whose status is not
    "measured" stays as it is. ``first`` receives a run's name, its row and the result of its first call.
    """
    rows, on_gpu = {} if rows is None else rows, torch.device(device).type == "cuda"
    failed = {name: run for name, run in runs.items() if isinstance(run, str)}
    failed |= {name: row["status"] for name, row in rows.items() if row.get("status", "measured") != "measured"}
    alive = guarded({n: run for n, run in runs.items() if not isinstance(run, str) and n not in failed}, failed)
    fresh: dict[str, dict[str, Any]] = {name: {"status": "measured"} | rows.get(name, {}) for name in runs}
    for name, run in alive.items():
        got = run()
        if got is not None:
            first(name, fresh[name], got)
        del got
        if memory and on_gpu and name not in failed:
            fresh[name]["peak_bytes"] = own_peak(run, device)

    def after_round(times: dict[str, list[float]]) -> None:
        times = {name: values for name, values in times.items() if name not in failed}
        beside = ratios(times, to) if to in times else {}
        for name, row in fresh.items():
            if name in failed:
                rows[name] = {"status": failed[name]}
            elif name in times:
                row |= {"rounds": len(times[name]), "seconds": spread(times[name])}
                rows[name] = row | {ratio or f"times_{to}": beside.get(name)}
        save()

    alive = {name: run for name, run in alive.items() if name not in failed}
    interleaved_times(alive, rounds, warmup, device=device, seconds=seconds, clock=clock, after_round=after_round)
    return rows


def peak_memory_in_fresh_process(module: str, function: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``peak_row`` of a module's function, called with JSON arguments in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.harness", module, function, json.dumps(given)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode == -9:
        return {"status": "out of memory"}
    if child.returncode != 0:
        return {"status": f"failed: {(child.stderr.strip() or str(child.returncode)).splitlines()[-1][:200]}"}
    return json.loads(child.stdout.strip().splitlines()[-1])


def peak_row(peak_of: Callable[..., int | str | None], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``status`` and, if measured, ``peak_bytes``. ``peak_of`` returns bytes, or why they cannot be measured."""
    try:
        found = peak_of(**given)
    except Exception as error:
        found = reason(error)
    return {"status": found} if isinstance(found, str) else {"status": "measured", "peak_bytes": found}


def limit_memory() -> None:
    """Make allocations beyond the memory that is now free raise an error, so that this process is not killed."""
    try:
        free = 1024 * _proc_kib("meminfo", "MemAvailable")
    except OSError:
        return
    limits = [limit for limit in resource.getrlimit(resource.RLIMIT_DATA) if limit != resource.RLIM_INFINITY]
    limit = min([int(0.95 * free), *limits])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def release_freed_memory() -> None:
    """Return freed memory to the system, so that two peaks are measured from the same level."""
    gc.collect()
    inspo_kernels.release_workspace()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library: freed memory stays resident, so the peak is too small


def own_peak(run: Callable[[], Any], device: str = "cpu") -> int | None:
    """Return the peak memory of ``run`` in bytes, above what the process held before.

    On a GPU this is the allocator's own count. On a CPU it is the resident high-water mark, reset before the run, or
    None without /proc.
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
        before = _proc_kib("self/status", "VmRSS")
        run()
        return 1024 * (_proc_kib("self/status", "VmHWM") - before)
    except OSError:
        return None


def _proc_kib(file: str, field: str) -> int:
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":  # a fresh process
    _, module, function, given = sys.argv
    peak_of = getattr(importlib.import_module(module), function)
    limit_memory()
    print(json.dumps(peak_row(peak_of, json.loads(given))))
