"""What only a GPU can run: FSDP2 and DeepSpeed through accelerate, in one process, against the same run without them.

python -m pytest tests/training/test_gpu_engines.py
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import metrics, options

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
RUN = (
    "--logging_steps",
    "1",
    "--save_steps",
    "2",
    "--per_device_train_batch_size",
    "8",
    "--max_steps",
    "4",
    "--max_batch_tokens",
    "400",
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: FSDP2 and DeepSpeed through accelerate are NOT tested"
)


def launch(config: str, folder: Path, *more: str) -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "accelerate" / config),
    ]
    ran = subprocess.run(
        [*command, "--num_processes", "1", "-m", "training.train", *options(folder, *RUN, *more)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]


@pytest.mark.parametrize("engine", ["fsdp2_8gpu.yaml", "deepspeed_zero2", "deepspeed_zero3"])
def test_an_engine_computes_and_resumes_what_a_plain_process_does(engine: str, tmp_path: Path) -> None:
    more: tuple[str, ...] = ()
    if engine.startswith("deepspeed"):
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed: it is NOT tested")
        more = ("--deepspeed", str(CONFIGS / f"{engine}.json"))
        text = (CONFIGS / "accelerate/deepspeed_8gpu.yaml").read_text()
        file = tmp_path / "launch.yaml"
        file.write_text(text.replace("training/configs/deepspeed_zero2.json", more[1]))
        engine = str(file)
    launch("one_gpu.yaml", tmp_path / "plain")
    launch(engine, tmp_path / "engine", *more)
    expected = [row["loss"] for row in metrics(tmp_path / "plain") if "loss" in row]
    assert [row["loss"] for row in metrics(tmp_path / "engine") if "loss" in row] == pytest.approx(expected, rel=1e-4)

    shutil.copytree(tmp_path / "engine", tmp_path / "again", ignore=shutil.ignore_patterns("final", "checkpoint-4"))
    launch(engine, tmp_path / "again", *more, "--resume_from_checkpoint", "auto")
    assert [row["loss"] for row in metrics(tmp_path / "again") if "loss" in row] == pytest.approx(expected, rel=1e-4)
