"""What a long run meets: it is killed, stopped, out of disk space, resumed elsewhere or with other settings."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PAIRS, metrics, options, token_pairs, without_timings, write_jsonl
from transformers import AutoModelForCausalLM

import training.train
from training import checkpoint, output
from training.checkpoint import check_checkpoint, checkpoints
from training.config import InputError, TrainConfig
from training.output import JsonLines, locked
from training.train import main

RUN = ["--max_steps", "6", "--batch_size", "10", "--max_batch_tokens", "500", "--eval_data", str(PAIRS),
       "--save_every", "2", "--eval_every", "2", "--log_every", "3", "--weight_decay", "0.1"]  # fmt: skip

# Name: (function, number of its call or text in an argument, when the run is killed: see killed.py).
KILLS = {
    "before the first checkpoint": ("training.output.Window.add", 1, "after"),
    "after a step that was not logged yet": ("training.output.Window.add", 4, "after"),
    "in the middle of the model's file": ("training.checkpoint.save_file", "checkpoint-4.partial/model", "within"),
    "in the middle of the optimizer's file": ("training.checkpoint.save_file", "checkpoint-4.partial/opt", "within"),
    "with all files of a checkpoint but its name": ("training.checkpoint._publish", "checkpoint-4", "before"),
    "after a checkpoint, before the evaluation of its step": ("training.train.rotate", 2, "before"),
    "after sample answers, before the row of their evaluation": ("training.output.RunLog.add_samples", 3, "after"),
    "while the best model is written": ("training.checkpoint._publish", "best", "before"),
    "after the row of an evaluation": ("training.output.RunLog.draw", 3, "before"),
    "in the middle of a row": ("training.output.JsonLines._append", 5, "within"),
    "after the last step": ("training.output.Window.add", 6, "after"),
    "while the final model is written": ("training.checkpoint._publish", "final", "before"),
    "after the final model": ("training.output.RunLog.close", 1, "before"),
}


@pytest.fixture(autouse=True, scope="module")
def no_curves():
    """They are most of such a run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "plot_curves", lambda *what: None)
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    main(options(folder, *RUN))
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    scenarios = {
        name: {"arguments": options(folder / name, *RUN), "patch": patch, "file_limit": None}
        for name, patch in KILLS.items()
    }
    limited = {"arguments": options(folder / "limited", *RUN), "patch": None}
    scenarios["limited"] = limited | {"file_limit": 100_000}
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    program = [sys.executable, str(Path(__file__).with_name("killed.py")), str(folder / "scenarios.json")]
    ran = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return folder, json.loads(ran.stdout)


def assert_equal_runs(one: Path, other: Path) -> None:
    for kind in ("final", "best"):
        a, b = (AutoModelForCausalLM.from_pretrained(run / kind).state_dict() for run in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), kind
    assert without_timings(metrics(one)) == without_timings(metrics(other))
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    assert not list(other.glob("*.partial"))


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_that_is_resumed_equals_the_uninterrupted_one(killed, uninterrupted, name):
    folder, statuses = killed
    assert statuses[name] == -signal.SIGKILL
    if name == "after the final model":
        with pytest.raises(SystemExit, match="2"):
            main(options(folder / name, *RUN, "--resume", "auto"))
    else:
        assert not (folder / name / "final").exists()
        main(options(folder / name, *RUN, "--resume", "auto"))
    assert_equal_runs(uninterrupted, folder / name)
