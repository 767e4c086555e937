"""Test checkpoints of two-process runs: stopped by a signal to one process, resumed, and exchanged with one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import metrics, options, without_timings
from stopped_processes import PAIRS_OF_A_STEP
from stopped_processes import RUN as OPTIONS
from transformers import AutoModelForCausalLM

from training.train import main

HERE = Path(__file__).parent
pytestmark = pytest.mark.sweep  # a third kind of launch; other tests use the others
RUN = [*OPTIONS, "--per_device_train_batch_size", str(PAIRS_OF_A_STEP)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    main(options(folder / "one", *RUN))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parents[1])}
    program = [*launcher, str(HERE / "stopped_processes.py"), str(folder)]
    ran = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return folder


def weights(run):
    return AutoModelForCausalLM.from_pretrained(run / "final").state_dict()


def test_a_signal_stops_all_ranks_and_resumes_exactly(folder):
    seen = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    for run, step in (("stopped", 2), ("broken_off", 2), ("reference", None)):
        assert seen[0][run] == seen[1][run]
        kept = folder / run / f"checkpoint-{step}"
        expected = (
            f"stopped by SIGTERM after step {step}: {kept} is kept: --resume_from_checkpoint auto continues from it"
        )
        if step is None:
            expected = "stopped by SIGTERM: reference log-probs of 8 pairs are scored, kept in"
        assert seen[0][run].startswith(expected)
        one, other = weights(folder / "whole"), weights(folder / run)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert without_timings(metrics(folder / "whole")) == without_timings(metrics(folder / run))
        assert (folder / "whole/samples.jsonl").read_text() == (folder / run / "samples.jsonl").read_text()


def test_one_process_and_two_read_each_others_checkpoints(folder, tmp_path):
    shutil.copytree(folder / "whole" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    main(options(tmp_path / "out", *RUN, "--resume_from_checkpoint", "auto"))
    runs = [folder / "one", folder / "whole", folder / "continued", tmp_path / "out"]
    alone = weights(runs[0])
    for run in runs[1:]:
        for name, tensor in weights(run).items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=2e-4)
        for row, expected in zip(metrics(run), metrics(runs[0]), strict=True):
            for key in set(row) & {"loss", "eval_loss", "learning_rate"}:
                assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), (run, row["step"], key)
    assert (folder / "whole/samples.jsonl").read_text() == (folder / "one/samples.jsonl").read_text()


def test_a_full_disk_reaches_every_rank(folder):
    assert not list((folder / "full").glob("checkpoint-*")) and (folder / "full" / "final").is_dir()
    seen = [json.loads((folder / f"{rank}.json").read_text())["full"] for rank in (0, 1)]
    assert "no space in the first process" in seen[0]
    assert seen[1] == seen[0].replace("written: ", "written: in process 0: ")
    assert not (folder / "fuller" / "final").exists()
