"""Timing and memory that can be believed: interleaved rounds, per-round ratios, a fresh process per memory figure."""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import inspo_kernels

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy")
FEWEST_ROUNDS = 3
RESULT_FOLDER = "benchmarks/results"


def provenance(command: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return the provenance that a result file must hold; ``packages`` are named beside the usual ones."""
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
        "package": {"version": inspo_kernels.__version__, "commit": commit()},
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def joined_provenance(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return date and package for figures of two runs: the new ones, with the commits of both runs."""
    before = old.get("package", {}).get("commit") or "unknown"
    known = before.split(", ")
    commits = dict.fromkeys([*known, new["package"]["commit"] or "unknown"])
    commit = None if list(commits) == ["unknown"] else ", ".join(commits)
    return {"date": new["date"], "package": new["package"] | {"commit": commit}}


def commit() -> str | None:
    """Return the short hash of this checkout, None without git; "+changes" if a tracked file differs.

    Result files do not count: a run writes them, so they differ in a checkout that was clean before.
    """

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude,top){RESULT_FOLDER}")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def read_result(path: str | Path) -> dict[str, Any]:
    """A result file, or an ``OSError`` or ``ValueError`` that says what is wrong with it."""
    try:
        result = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    what = "it is no result file of loss, logps, scaling, step or gpu"
    if not isinstance(result, dict) or "cells" not in result:
        raise ValueError(f"{path} has no cells: {what}")
    if benchmark_of(result) is None:
        raise ValueError(f"{path} names no command: {what}")
    return result


def benchmark_of(result: Mapping[str, Any]) -> str | None:
    """The module that measured it."""
    return next((word for word in str(result.get("command", "")).split() if word.startswith("benchmarks.")), None)


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
    after_round: Callable[[dict[str, list[float]]], None] = lambda times: None,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, all of them once a round: drifting load then hits all alike.

    After ``seconds`` no further round starts once there are ``FEWEST_ROUNDS`` (fewer only if ``rounds`` is).
    ``after_round`` gets what there is after each round, so that an interrupted run can keep it.
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
        if i >= warmup:
            after_round(times)
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
    """Median and quartiles, of the values themselves: two of them are not extrapolated."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high}


def ratios(times: Mapping[str, Sequence[float]], to: str) -> dict[str, dict[str, float]]:
    """Return the ratios of each contender's time to that of ``to`` in the same round."""
    return {name: spread([a / b for a, b in zip(t, times[to], strict=True)]) for name, t in times.items()}


def reason(error: Exception) -> str:
    """Why a contender has no figure, for a table."""
    text = str(error).strip().split("\n")[0][:200]
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    if memory:
        return "out of memory"
    return f"failed: {type(error).__name__}" + (f": {text}" if text else "")


def guarded(runs: Mapping[str, Callable[[], Any]], failed: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """Wrap ``runs`` so that a failing run is entered in ``failed`` once and then does nothing."""

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


def peak_memory_in_fresh_process(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """``status`` and, if measured, ``peak_bytes``: the JSON that ``python -m module *arguments`` prints last."""
    child = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if child.returncode == -9:
        return {"status": "out of memory"}
    if child.returncode != 0:
        return {"status": f"failed: {(child.stderr.strip() or str(child.returncode)).splitlines()[-1][:200]}"}
    return json.loads(child.stdout.strip().splitlines()[-1])


def limit_memory() -> None:
    """Let allocations beyond the memory that is free now fail, rather than have this process killed."""
    try:
        free = 1024 * _proc_kib("meminfo", "MemAvailable")
    except OSError:
        return
    limits = [limit for limit in resource.getrlimit(resource.RLIMIT_DATA) if limit != resource.RLIM_INFINITY]
    limit = min([int(0.95 * free), *limits])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def release_freed_memory() -> None:
    """Give back what was freed, so that a second run's peak is counted from the same level as the first's."""
    gc.collect()
    inspo_kernels.release_workspace()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library: its freed memory stays resident and the peak is understated


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
        before = _proc_kib("self/status", "VmRSS")
        run()
        return 1024 * (_proc_kib("self/status", "VmHWM") - before)
    except OSError:
        return None


def _proc_kib(file: str, field: str) -> int:
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# --- what the commands share ---


def positive(text: str) -> int:
    """Parse a count of at least one, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return number


def result_file(text: str) -> Path:
    """Parse a file that can be written, for argparse: checked before hours of measuring."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: nothing can be written in {folder}")
    return path


def add_common_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    parser.add_argument("--json", type=result_file, help="result file; written as results come")
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda" or "cuda:1" [cpu]')
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"interleaved, after a warm-up [{rounds}]")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that everything runs: some minutes")
    parser.add_argument("--only", choices=["time", "memory"], help="one of the two; --resume adds the other later")
    parser.add_argument("--resume", action="store_true", help="measure what the result file lacks, and add it")


def opened_result(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    command: str,
    packages: Sequence[str],
    dtype: str,
    **fields: Any,
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Return a new result, or with --resume the file's, and the function that saves it if --json names a file."""
    result = provenance(command, packages) | {"dtype": dtype, "finished": False, "cells": []} | fields
    result = _resumed(parser, options, result) if options.resume else result

    def save() -> None:
        if options.json:
            write_json(options.json, result)

    return result, save


def _resumed(parser: argparse.ArgumentParser, options: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """Return what the file holds, if it was measured in the same way on the same machine, with all its commits."""
    if options.json is None or not options.json.exists():
        parser.error("--resume: needs --json with the file of an earlier run")
    try:
        old = read_result(options.json)
    except (OSError, ValueError) as error:
        parser.error(f"--resume: {error}")
    if (was := benchmark_of(old)) != (now := benchmark_of(result)):
        parser.error(f"--resume: {options.json} is of {was}, not of {now}; start a new file")
    for key in ("hardware", "versions", "dtype"):
        if old.get(key) != result[key]:
            parser.error(f"--resume: {key} of {options.json} are {old.get(key)}, here {result[key]}; start a new file")
    commands = dict.fromkeys([*old["command"].split("; "), result["command"]])
    return old | joined_provenance(old, result) | {"command": "; ".join(commands), "finished": False}


def lacks(row: Mapping[str, Any] | None, what: str) -> bool:
    """Return whether a contender's row still lacks ``what``; a contender that cannot run lacks nothing."""
    return not row or (row.get("status", "measured") == "measured" and what not in row)


def cell_of(result: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """The result's cell of that name, added if it is new."""
    for known in result["cells"]:
        if known["name"] == cell["name"]:
            return known
    result["cells"].append(cell)
    return cell


def checked_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device, made the current one: events and memory counts are of that one."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        parser.error(f"--device {name}: {str(error).splitlines()[0]}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {name}: only cpu and cuda devices are measured")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch sees no GPU ({_why_no_gpu()}); use --device cpu")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.index is not None and device.index >= count:
        parser.error(f"--device {name}: there is no such device, only {count} of type {device.type}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _why_no_gpu() -> str:
    """Return torch's own reason: no driver, a driver that is too old, or a build without CUDA."""
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0]
    return "there is none"


def command(module: str, arguments: Sequence[str], json_file: Path | None) -> str:
    """The command to print in a result file: without the place the file was written to."""
    given = ["FILE" if json_file is not None and a == str(json_file) else a for a in arguments]
    return shlex.join(["python", "-m", module, *given])


@contextmanager
def kept_on_interrupt(save: Callable[[], None]) -> Iterator[None]:
    """On Ctrl-C, save what is done and end with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        save()
        print("interrupted; what is done is kept", file=sys.stderr)
        sys.exit(130)
