"""Write and read result files with their provenance, and parse the options that the commands share."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import inspo_kernels

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy")
# The benchmarks write these themselves, so differences here do not mark the code as changed.
WRITTEN = ("benchmarks/results", "docs")


def provenance(command: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return the provenance that a result file must hold. It names ``packages`` in addition to the usual ones."""
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


def continued(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the older of two runs' results with the newer date and package, and the commits and commands of both."""
    before = old.get("package", {}).get("commit") or "unknown"
    commits = dict.fromkeys([*before.split(", "), new["package"]["commit"] or "unknown"])
    commit = None if list(commits) == ["unknown"] else ", ".join(commits)
    commands = dict.fromkeys([*old["command"].split("; "), new["command"]])
    package = new["package"] | {"commit": commit}
    return {**old, "date": new["date"], "package": package, "command": "; ".join(commands)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the keys in which two results differ, with both values, or "" if there are none."""
    return "; ".join(
        f"{key}: {old.get(key)} there, {new.get(key)} here" for key in keys if old.get(key) != new.get(key)
    )


def commit() -> str | None:
    """Return the short hash of this checkout; "+changes" if a tracked file differs.

    ``WRITTEN`` does not count: a run changes it in a checkout that was clean before. The environment variable
    INSPO_KERNELS_COMMIT names the commit of a copy whose git does not know it; without either it is None.
    """
    if known := os.environ.get("INSPO_KERNELS_COMMIT"):
        return known

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        code = [":/", *(f":(exclude,top){folder}" for folder in WRITTEN)]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def read_result(path: str | Path, table: str = "cells") -> dict[str, Any]:
    """Return a parsed result file with this table. Raises ``OSError`` or ``ValueError`` if it is not usable."""
    try:
        result = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or table not in result or benchmark_of(result) is None:
        raise ValueError(f"{path} has no {table} or names no command, so it is not a result file of this kind")
    return result


def resumed(
    parser: argparse.ArgumentParser, option: str, path: Path, result: dict[str, Any], keys: Sequence[str], **kind: str
) -> dict[str, Any]:
    """Return the file's result with this run added to its provenance, or ``result`` if there is no file.

    A file from another benchmark, or one that differs in one of ``keys``, is an error.
    """
    if not path.exists():
        return result
    try:
        old = read_result(path, **kind)
    except (OSError, ValueError) as error:
        parser.error(f"{option}: {error}")
    if (was := benchmark_of(old)) != (now := benchmark_of(result)):
        parser.error(f"{option}: {path} is of {was}, not of {now}; move it or name another place")
    if other := differences(old, result, keys):
        parser.error(f"{option}: {path} differs ({other}); move it or name another place")
    return result | continued(old, result)


def benchmark_of(result: Mapping[str, Any]) -> str | None:
    """Return the name of the module that measured the result."""
    return next((word for word in str(result.get("command", "")).split() if word.startswith("benchmarks.")), None)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write the file atomically, so that an interrupted run does not change it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_parser(module: str, doc: str) -> argparse.ArgumentParser:
    """Return the parser of ``python -m benchmarks.MODULE``, described by the first line of its docstring."""
    return argparse.ArgumentParser(f"python -m benchmarks.{module}", description=doc.splitlines()[0])


def positive(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return number


def result_file(text: str) -> Path:
    """Parse the path of a writable file, for argparse. The check comes before hours of measuring."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: cannot write to {folder}")
    return path


def add_names(parser: argparse.ArgumentParser, option: str, names: Iterable[str], about: str, **more: Any) -> None:
    """Add an option that takes one or more of ``names``. Its help lists them after ``about``."""
    choices, one = list(names), option.strip("-").removesuffix("s").upper()
    text = f"{about}: {', '.join(choices)}"
    parser.add_argument(option, **{"nargs": "+", "choices": choices, "metavar": one, "help": text} | more)


def add_common_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    parser.add_argument("--json", type=result_file, help="result file, saved after each figure")
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda" or "cuda:1" [cpu]')
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help=f"interleaved rounds, after a warm-up [{rounds}]"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes: check in minutes that everything runs")
    parser.add_argument(
        "--only", choices=["time", "memory"], help="measure only time or only memory; --resume adds the other later"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="if the --json file exists, keep its finished cells and measure the missing cells",
    )


@dataclass
class Run:
    """A command's options and device, and the result that it fills."""

    options: argparse.Namespace
    device: torch.device
    result: dict[str, Any]

    def save(self) -> None:
        """Write the result to --json, if given."""
        if self.options.json:
            write_json(self.options.json, self.result)

    def cell(self, name: str, **fields: Any) -> dict[str, Any]:
        """Return the result's cell with that name. Add one without contenders if it is missing."""
        cell = next((cell for cell in self.result["cells"] if cell["name"] == name), None)
        if cell is None:
            cell = {"name": name, **fields, "contenders": {}}
            self.result["cells"].append(cell)
        return cell


@contextmanager
def measuring(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    arguments: Sequence[str],
    packages: Sequence[str],
    dtype_of: Callable[[torch.device], torch.dtype],
    **fields: Any,
) -> Iterator[Run]:
    """Yield a run whose result is new or, with --resume, read from the file.

    At the end the result is finished and saved. On Ctrl-C the finished figures are saved, and the exit status is 130.
    """
    device = checked_device(parser, options.device)
    module = parser.prog.removeprefix("python -m ")
    result = provenance(command(module, arguments, options.json), packages)
    result |= {"dtype": dtype_name(dtype_of(device)), "cells": []} | fields
    if options.resume and options.json is None:
        parser.error("--resume: give --json with the file of an earlier run")
    if options.resume:
        result = resumed(parser, "--resume", options.json, result, ("hardware", "versions", "dtype"))
    run = Run(options, device, result | {"finished": False})
    try:
        yield run
    except KeyboardInterrupt:
        run.save()
        print("interrupted; finished figures are kept", file=sys.stderr)
        sys.exit(130)
    run.result["finished"] = True
    run.save()
    if options.json:
        print(f"written to {options.json}")


def lacks(row: Mapping[str, Any] | None, what: str) -> bool:
    """Return whether a contender's row still lacks ``what``. A contender that cannot run lacks nothing."""
    return not row or (row.get("status", "measured") == "measured" and what not in row)


def checked_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """Return the device and make it current, because events and memory counts refer to the current device."""
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            torch.cuda.init()  # raises with torch's own reason, such as a missing or outdated driver
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except Exception as error:
        parser.error(f"--device {name}: {str(error).splitlines()[0]}")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        parser.error(f"--device {name}: only cpu and cuda devices are supported, and one cpu")
    return device


def command(module: str, arguments: Sequence[str], json_file: Path | None) -> str:
    """Return the command for a result file, with FILE in place of the file's own path."""
    given = ["FILE" if json_file is not None and a == str(json_file) else a for a in arguments]
    return shlex.join(["python", "-m", module, *given])
