"""Test faults of long runs: killed, stopped, out of disk space, resumed elsewhere or with other settings."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import EVENTFUL, PAIRS, metrics, options, tiny_model, token_pairs, without_timings, write_jsonl
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import training.resumable
import training.train
from training import output
from training.checkpoint import check_checkpoint, checkpoints
from training.config import TrainConfig
from training.errors import InputError, Stopped
from training.output import JsonLines, locked
from training.train import main

RUN = ["--max_steps", "6", *EVENTFUL]

# Name: (function, call number or text in an argument, when to kill the run: see killed.py).
KILLS = {
    "before the first checkpoint": ("training.output.Window.add", 1, "after"),
    "after a step that was not logged yet": ("training.output.Window.add", 4, "after"),
    "in the middle of the model's file": ("training.resumable.save_file", "checkpoint-4/model", "within"),
    "in the middle of the optimizer's file": ("torch.save", "checkpoint-4/optimizer", "within"),
    "with all files of a checkpoint but its name": ("training.checkpoint.publish", "checkpoint-4", "before"),
    "after a checkpoint, before older ones are deleted": ("training.resumable.rotate", 2, "before"),
    "after sample answers, before their row": ("training.reporting.ReportingTrainer._sample", 3, "after"),
    "while the best model is written": ("training.checkpoint.publish", "best", "before"),
    "after the row of an evaluation": ("training.output.RunLog.draw", 3, "before"),
    "in the middle of a row": ("training.output.JsonLines._put", 6, "within"),
    "after the last step": ("training.output.Window.add", 6, "after"),
    "while the final model is written": ("training.checkpoint.publish", "final", "before"),
    "after the final model": ("training.train.end_processes", 1, "before"),
}


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
    scenarios["limited"] = limited | {"file_limit": 70_000}
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    program = [sys.executable, str(Path(__file__).with_name("killed.py")), str(folder / "scenarios.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(program, capture_output=True, text=True, env=environment, check=True)
    return folder, json.loads(ran.stdout)


def assert_equal_runs(one: Path, other: Path) -> None:
    for kind in ("final", "best"):
        a, b = (AutoModelForCausalLM.from_pretrained(run / kind).state_dict() for run in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), kind
    assert without_timings(metrics(one)) == without_timings(metrics(other))
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    assert not list(other.glob("*.partial"))


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_resumes_to_the_same_result(killed, uninterrupted, name):
    folder, statuses = killed
    assert statuses[name] == -signal.SIGKILL
    if name == "after the final model":
        with pytest.raises(SystemExit, match="2"):
            main(options(folder / name, *RUN, "--resume_from_checkpoint", "auto"))
    else:
        assert not (folder / name / "final").exists()
        main(options(folder / name, *RUN, "--resume_from_checkpoint", "auto"))
    assert_equal_runs(uninterrupted, folder / name)


def test_a_full_disk_costs_only_a_checkpoint(killed, uninterrupted):
    """RLIMIT_FSIZE lets the model's file fit, but not the optimizer's, which is twice as large."""
    folder, statuses = killed
    assert statuses["limited"] == 0
    printed = (folder / "limited.txt").read_text()
    for step in (2, 4, 6):
        assert f"checkpoint-{step} could not be written: " in printed and "the run goes on" in printed
    assert "the run goes on. If it ended now: no checkpoint was kept" in printed
    assert not list((folder / "limited").glob("checkpoint-*"))
    assert_equal_runs(uninterrupted, folder / "limited")


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_the_end_keeps_checkpoints(tmp_path, uninterrupted, monkeypatch, capsys):
    out = tmp_path / "out"
    original = training.reporting.model_card
    monkeypatch.setattr(
        training.reporting, "model_card", lambda *a, **k: full() if "/final" in a[2] else original(*a, **k)
    )
    with pytest.raises(SystemExit) as stopped:
        main(options(out, *RUN))
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert (
        "final could not be written" in error and "No space left" in error and "--resume_from_checkpoint auto" in error
    )
    assert not (out / "final").exists() and not (out / "final.partial").exists()
    monkeypatch.undo()
    main(options(out, *RUN, "--resume_from_checkpoint", "auto"))
    assert_equal_runs(uninterrupted, out)


def test_rows_wait_for_space_on_the_disk(tmp_path, monkeypatch):
    said, rows = [], []
    lines = JsonLines(tmp_path / "metrics.jsonl", said.append)

    def add(row, **how):
        rows.append(row)
        lines.write(rows, **how)

    def half(self, file, rows, mode):
        with file.open(mode) as to:
            to.write('{"st')
        full()

    add({"step": 1}, anew=True)
    add({"step": 2})
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "_put", half)
        add({"step": 3})
        add({"step": 4})
    assert len(said) == 1 and "metrics.jsonl cannot be written" in said[0]
    add({"step": 5, "text": "a\u2028b"})
    add({"step": 6})
    with (tmp_path / "metrics.jsonl").open() as file:
        assert [json.loads(line) for line in file] == rows


def terminate_after(monkeypatch, call):
    original, calls = output.Window.add, iter(range(1, 99))

    def add(self, *args):
        original(self, *args)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(output.Window, "add", add)


def test_sigterm_saves_and_says_how_to_resume(tmp_path, uninterrupted, monkeypatch, capsys):
    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        terminate_after(patch, 3)  # while step 3 ends: step 4, which is evaluated, is the last one
        with pytest.raises(SystemExit) as stopped:
            main(options(out, *RUN))
    assert stopped.value.code == 143
    assert (
        f"stopped by SIGTERM after step 4: {out / 'checkpoint-4'} is kept: --resume_from_checkpoint auto"
        in capsys.readouterr().err
    )
    assert signal.getsignal(signal.SIGTERM) == before
    assert [row["step"] for row in metrics(out)] == [0, 2, 3]  # the evaluation of step 4 waits
    main(options(out, *RUN, "--resume_from_checkpoint", "auto"))
    assert_equal_runs(uninterrupted, out)


@pytest.mark.parametrize(("evaluation", "step"), [(1, 0), (2, 2), (4, 6)])
@pytest.mark.parametrize("save_every", ["2", "4"])
def test_sigterm_interrupts_an_evaluation_and_keeps_its_step(
    tmp_path, uninterrupted, monkeypatch, capsys, evaluation, step, save_every
):
    def score(module, pairs, *given, **more):
        def counted(*batch, **how):
            passes.append(batch)
            os.kill(os.getpid(), signal.SIGTERM)
            return module(*batch, **how)

        broken_off = more["stop_requested"] is not None and next(evaluations) == evaluation
        return original(counted if broken_off else module, pairs, *given, **more)

    out, passes, original, evaluations = tmp_path / "out", [], training.reporting.score, iter(range(1, 99))
    run = [*RUN, "--save_steps", save_every]
    with monkeypatch.context() as patch:
        patch.setattr(training.reporting, "score", score)
        with pytest.raises(SystemExit, match="143"):
            main(options(out, *run))
    assert len(passes) == 1  # of several
    kept = (
        f"after step {step}: {out / f'checkpoint-{step}'} is kept: --resume_from_checkpoint auto"
        if step
        else "before step 1: no"
    )
    assert f"stopped by SIGTERM {kept}" in capsys.readouterr().err
    assert [row["step"] for row in metrics(out) if "eval_loss" in row] == [*range(0, step, 2)]
    main(options(out, *run, "--resume_from_checkpoint", "auto"))
    assert_equal_runs(uninterrupted, out)


def test_sigterm_in_evaluation_stops_the_run(tmp_path, monkeypatch, capsys):
    original, evaluations = training.reporting.score, iter(range(1, 99))

    def score(*given, **more):
        if more["stop_requested"] is not None and next(evaluations) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*given, **more)

    monkeypatch.setattr(training.reporting, "score", score)
    with pytest.raises(SystemExit, match="143"):
        main(options(tmp_path / "out", *RUN))
    assert "stopped by SIGTERM after step 2" in capsys.readouterr().err


def test_sigterm_saves_without_regular_checkpoints(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        terminate_after(patch, 1)
        with pytest.raises(SystemExit, match="143"):
            main(options(tmp_path / "out"))
    assert check_checkpoint(tmp_path / "out" / "checkpoint-2")["step"] == 2
    with monkeypatch.context() as patch:
        terminate_after(patch, 1)
        with pytest.raises(Stopped, match=r"after step \d: no checkpoint was kept"):
            training.train.train(TrainConfig(max_steps=3), token_pairs(), model=tiny_model(), quiet=True)


def test_a_full_disk_after_sigterm_is_reported(tmp_path, monkeypatch, capsys):
    terminate_after(monkeypatch, 1)
    monkeypatch.setattr(training.resumable, "save_file", full)
    with pytest.raises(SystemExit, match="143"):
        main(options(tmp_path / "out"))
    assert ": no checkpoint was kept" in capsys.readouterr().err


def test_the_newest_checkpoint_that_is_whole_is_used(uninterrupted, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out, ignore=shutil.ignore_patterns("final"))
    file = out / "checkpoint-6" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(SystemExit, match="2"):
        main(options(out, *RUN, "--resume_from_checkpoint", str(out / "checkpoint-6")))
    assert "checkpoint-6 is damaged, or no checkpoint: optimizer.pt has" in capsys.readouterr().err
    main(options(out, *RUN, "--resume_from_checkpoint", "auto"))
    printed = capsys.readouterr().out
    assert "checkpoint-6 is damaged: optimizer.pt has" in printed and "checkpoint-4 after step 4" in printed
    assert_equal_runs(uninterrupted, out)
    assert (out / "set-aside-checkpoint-6").is_dir() and check_checkpoint(out / "checkpoint-6")


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    main(options(tmp_path / "out", "--max_steps", "4", "--save_steps", "1", "--save_total_limit", "2"))
    assert list(checkpoints(tmp_path / "out")) == [3, 4]


def test_a_final_checkpoint_resumes_without_steps(uninterrupted, tmp_path, monkeypatch, capsys):
    out = tmp_path / "elsewhere"
    shutil.copytree(uninterrupted / "checkpoint-6", out / "checkpoint-6")  # nothing else: another machine, say
    data = shutil.copy(PAIRS, tmp_path / "moved.jsonl")
    monkeypatch.setattr(output.Window, "add", full)  # no step is made
    main(options(out, *RUN, "--train_data", str(data), "--resume_from_checkpoint", "auto"))
    assert without_timings(metrics(out)) == without_timings(metrics(uninterrupted))
    one, other = (AutoModelForCausalLM.from_pretrained(run / "final").state_dict() for run in (out, uninterrupted))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_changed_data_or_models_are_refused_unless_allowed(tmp_path, capsys):
    records = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    data, base = write_jsonl(tmp_path / "d.jsonl", records), tmp_path / "base"
    main(options(base))
    more = ["--save_steps", "2", "--train_data", data]
    given = ["--model", str(base / "final"), *options(tmp_path / "out", *more)[8:]]
    main(given)
    shutil.rmtree(tmp_path / "out" / "final")

    write_jsonl(tmp_path / "d.jsonl", records[:-1])
    model = AutoModelForCausalLM.from_pretrained(base / "final")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(base / "final")
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--resume_from_checkpoint", "auto"])
    error = capsys.readouterr().err
    assert "(model holds something else; train_data holds something else)" in error
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--resume_from_checkpoint", "auto", "--weight_decay", "0.5"])
    assert "(weight_decay was 0.0, is 0.5)" in capsys.readouterr().err
    main([*given, "--resume_from_checkpoint", "auto", "--weight_decay", "0.5", "--resume_changed", "true"])
    printed = capsys.readouterr().out
    assert "WARNING" in printed and "resumed with other settings: weight_decay was 0.0, is 0.5" in printed
    assert "resumed with other settings: model holds something else; train_data holds something else" in printed


def test_the_state_of_another_optimizer_is_refused(tmp_path, uninterrupted, capsys):
    resume = ["--resume_from_checkpoint", str(uninterrupted / "checkpoint-4"), "--resume_changed", "true"]
    for optim in ("adafactor", "sgd"):
        with pytest.raises(SystemExit, match="2"):
            main(options(tmp_path / "out", *RUN, *resume, "--optim", optim))
        assert "holds the state of another optimizer (optim was 'adamw_torch_fused'" in capsys.readouterr().err


def test_a_checkpoint_beyond_the_end_is_refused(tmp_path, uninterrupted, capsys):
    more = [
        *RUN,
        "--max_steps",
        "5",
        "--resume_changed",
        "true",
        "--resume_from_checkpoint",
        str(uninterrupted / "checkpoint-6"),
    ]
    with pytest.raises(SystemExit, match="2"):
        main(options(tmp_path / "out", *more))
    assert "checkpoint-6 is of step 6, but the run has 5 steps" in capsys.readouterr().err


def test_checkpoints_of_two_runs_are_not_mixed(tmp_path, uninterrupted, capsys):
    shutil.copytree(uninterrupted / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    with pytest.raises(SystemExit, match="2"):
        main(options(tmp_path / "out", *RUN, "--resume_from_checkpoint", str(uninterrupted / "checkpoint-4")))
    assert "holds an unfinished run with checkpoint-2" in capsys.readouterr().err


def endless_rate(monkeypatch, step):
    """Make the learning rate infinite from ``step`` updates on."""
    original = training.resumable.ResumableTrainer.create_scheduler

    def create(self, num_training_steps, optimizer=None):
        schedule = original(self, num_training_steps, optimizer)
        # Warm-up begins at 1.
        schedule.lr_lambdas = [lambda now, f=f: f(now) if now <= step else math.inf for f in schedule.lr_lambdas]
        return schedule

    monkeypatch.setattr(training.resumable.ResumableTrainer, "create_scheduler", create)


def test_divergence_leaves_a_checkpoint_to_go_on_from(tmp_path, uninterrupted, monkeypatch, capsys):
    """The loss of step 2 is finite, but an unbounded update makes the parameters non-finite."""
    more = [*RUN, "--save_steps", "1", "--save_total_limit", "1"]
    with monkeypatch.context() as patch:
        endless_rate(patch, step=1)
        with pytest.raises(SystemExit, match="1"):
            main(options(tmp_path / "out", *more))
    error = capsys.readouterr().err
    assert "after step 2 the model's parameters are not finite" in error and "checkpoint-1 is kept" in error
    main(options(tmp_path / "out", *more, "--resume_from_checkpoint", "auto"))
    assert_equal_runs(uninterrupted, tmp_path / "out")


def test_a_nonfinite_loss_names_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    endless_rate(monkeypatch, step=2)
    with pytest.raises(SystemExit, match="1"):
        main(options(tmp_path / "out", "--max_steps", "5", "--save_steps", "2"))
    error = capsys.readouterr().err
    assert "step 4: loss nan" in error and f"{tmp_path / 'out' / 'checkpoint-2'} is kept" in error
    check_checkpoint(tmp_path / "out" / "checkpoint-2")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which even root cannot write")
def test_an_unwritable_folder_is_a_one_line_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(options(Path("/proc/self/out")))
    assert "output_dir /proc/self/out: cannot be written to" in capsys.readouterr().err
    with pytest.raises(InputError, match="cannot be written to"), locked(Path("/dev/null/out")):
        pass


def test_other_held_out_pairs_are_not_compared(tmp_path, uninterrupted):
    out, records = tmp_path / "out", PAIRS.read_text().splitlines()
    shutil.copytree(uninterrupted / "checkpoint-4", out / "checkpoint-4")
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(records[:5]) + "\n")
    main(options(out, *RUN, "--eval_data", str(other), "--resume_from_checkpoint", "auto", "--resume_changed", "true"))
    rows = [row for row in metrics(out) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [4, 6]  # earlier ones are of other pairs
    best = check_checkpoint(out / "checkpoint-6")["best"]
    rank = lambda row: [row[f"eval_marginal/rewards/{kind}"] for kind in ("accuracies", "margins")]  # noqa: E731
    assert best == max(rows, key=rank)
    card = (out / "final" / "README.md").read_text()
    assert "after step 4" in card and "before training" not in card


def test_lora_checkpoints_hold_the_adapter_and_resume_exactly(tmp_path):
    main(options(tmp_path / "base"))
    model = ["--model", str(tmp_path / "base" / "final"), "--lora.r", "2"]
    more = [*RUN, "--keep_best", "false", "--learning_rate", "1e-2"]

    def run(name, *resume):
        main([*model, *options(tmp_path / name, *more, *resume)[8:]])

    run("whole")
    with safe_open(tmp_path / "whole" / "checkpoint-4" / "model.safetensors", "pt") as tensors:
        assert tensors.keys() and all("lora_" in name for name in tensors.keys())
    shutil.copytree(tmp_path / "whole", tmp_path / "again", ignore=shutil.ignore_patterns("final", "checkpoint-6"))
    run("again", "--resume_from_checkpoint", "auto")
    one, other = (load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("whole", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert without_timings(metrics(tmp_path / "whole")) == without_timings(metrics(tmp_path / "again"))
    card = ModelCard.load(tmp_path / "whole" / "final" / "README.md")
    assert card.data.library_name == "peft" and "of them trained" in card.text
