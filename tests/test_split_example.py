"""Test the example of a head that is split over ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def losses(processes: int) -> list[float]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(launcher if processes > 1 else ()), str(ROOT / "examples" / "tensor_parallel.py")]
    for _ in range(3):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        # gloo's threads outlive destroy_process_group, and now and then abort a process that is about to exit.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]


def test_tensor_parallel_trains_as_one_process_does():
    one, two = losses(1), losses(2)
    assert two == pytest.approx(one, abs=1e-4)
    assert len(one) == 10 and one[-1] < one[0] / 2
