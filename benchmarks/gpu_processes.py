"""Run the processes of the GPU benchmark's steps, and end all that they start."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run_in_group(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run a command from the repository's root, output appended to ``log``; None if it took longer than ``seconds``.

    Whatever of its process group is left is killed: it would go on using the GPU beside what is timed next.
    """
    with log.open("a") as file:
        running = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, process_group=0)
        try:
            return running.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def end_with_parent() -> None:
    """End this process and its group when its parent is gone, however the parent ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def run_tests(tests: Sequence[str], log: Path, seconds: float) -> dict[str, Any]:
    """Run the package's tests and return their result; their output is in ``log``."""
    command = [sys.executable, "-m", "pytest", *tests, "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    # An interpreter asked for elsewhere would keep the Triton tests off the device.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
            status = "passed" if code == 0 else f"failed: pytest's exit status was {code}"
        except subprocess.TimeoutExpired:
            status = f"failed: not done after {seconds:.0f} s"
    lines = log.read_text(errors="replace").strip().splitlines()
    return {"status": status, "summary": lines[-1] if lines else "", "arguments": list(tests), "log": log.name}
