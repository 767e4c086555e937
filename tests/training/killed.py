"""Kill runs at chosen calls. Tests start this program once for all their runs.

    python tests/training/killed.py FILE

FILE holds {name: {"arguments": [...], "patch": [TARGET, CALL, HOW] or null, "file_limit": bytes or null}}. Each run is
a separate process with the arguments of training.train. SIGKILL ends it at one call of TARGET (the CALL-th, or the
first with the text CALL in an argument): "before" the call, "after" it, or "within", when half of the file that the
call writes is on disk. The program prints {name: exit status} and writes each run's output to NAME.txt next to FILE.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import training.output
from training.options import parse_config
from training.train import main

torch.set_num_threads(1)
training.output.plot_curves = lambda *what: None  # curves are slow, and resuming does not depend on them


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patch(target: str, call: int | str, how: str) -> None:
    path, _, name = target.rpartition(".")
    module, _, owner_name = path.rpartition(".")
    owner: Any = (
        importlib.import_module(path) if path.islower() else getattr(importlib.import_module(module), owner_name)
    )
    original, calls = getattr(owner, name), itertools.count(1)

    def patched(*args: Any, **kwargs: Any) -> Any:
        if not (next(calls) == call if isinstance(call, int) else any(call in str(argument) for argument in args)):
            return original(*args, **kwargs)
        if how == "before":
            kill()
        result = original(*args, **kwargs)
        if how == "within":
            written = next(Path(a) for a in args if isinstance(a, str | Path) and Path(a).is_file())
            os.truncate(written, written.stat().st_size // 2)
        kill()
        return result

    setattr(owner, name, patched)


def run(arguments: list[str], change: list[Any] | None, file_limit: int | None) -> None:
    if change:
        patch(*change)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    main(arguments)


def in_a_process(*run_arguments: Any, output: Path) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 70
    try:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        run(*run_arguments)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    scenarios = json.loads(file.read_text())
    parse_config(next(iter(scenarios.values()))["arguments"])  # builds what every run would build again
    gc.freeze()  # every run collects garbage, and would scan what imports made
    print(
        json.dumps(
            {
                name: in_a_process(
                    one["arguments"], one["patch"], one["file_limit"], output=file.with_name(f"{name}.txt")
                )
                for name, one in scenarios.items()
            }
        )
    )
