"""Run a test program on several gloo ranks that are forks of one process, because imports take longer than the runs.

``python tests/forked_ranks.py FILE FOLDER RANKS`` imports FILE and calls its ``main(FOLDER)`` on each rank, with the
variables that a launcher sets. It writes each rank's output to FOLDER/output.RANK, and prints the exit statuses.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_ranks(file: str, folder: Path, *, ranks: int = 2, timeout: float = 240) -> list[int]:
    """Return the exit statuses of the ranks that ran the program ``file``."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, file, str(folder), str(ranks)]
    program = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        printed, _ = program.communicate(timeout=timeout)
    except BaseException:
        os.killpg(program.pid, signal.SIGKILL)
        raise
    return json.loads(printed)


def start(rank: int, file: Path, folder: Path) -> int:
    """Start a fork that ends as a process of its own would, and return its process id."""
    if pid := os.fork():
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    output = os.open(folder / f"output.{rank}", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    importlib.import_module(file.stem).main(folder)
    sys.exit()


def main(file: Path, folder: Path, ranks: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    sys.path.insert(0, str(file.parent))
    importlib.import_module(file.stem)
    gc.freeze()  # every run collects garbage, and would scan what imports made
    children = [start(rank, file, folder) for rank in range(ranks)]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
