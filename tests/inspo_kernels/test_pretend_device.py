"""Run ``check_pretend_device`` in a separate process, because registering a device affects the whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).with_name("check_pretend_device.py")


@pytest.mark.sweep
@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU where there is none")
def test_on_a_device_that_is_not_the_cpu():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CHECKS)],
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
