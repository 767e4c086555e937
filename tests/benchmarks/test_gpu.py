"""The GPU benchmark's whole flow on a CPU, and that it sees what it is there to see."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_accuracy, gpu_tuning
from benchmarks.batches import HeadShape, PairBatch, scored_tokens
from benchmarks.contenders import CONTENDERS, PEERS, Contender, ours

ROOT = Path(__file__).parents[2]
SHAPE = HeadShape(16, 50)
CPU = torch.device("cpu")
# Without those that compile for half a minute.
FAST_PEERS = [name for name in PEERS if not CONTENDERS[name].compiles_per_shape]


def batch_of(dtype=torch.float32, shape=SHAPE):
    return PairBatch(scored_tokens(shape, 16, 4), dtype=dtype, device=CPU)


def test_quick_run_on_a_cpu(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--quick", "--peers", *FAST_PEERS]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["finished"] and "--out DIR --device cpu --quick --peers" in result["command"]
    assert result["tests"]["status"] == "passed" and " passed" in (tmp_path / "tests.log").read_text()
    assert {"date", "versions", "hardware", "device"} <= set(result) and "trl" in result["versions"]

    checked = [row for row in result["accuracy"] if row["contender"] == "torch"]
    assert {(row["dtype"], row["softcap"]) for row in checked} == {
        (dtype, cap) for dtype in ("bfloat16", "float32") for cap in (None, 30.0)
    }
    assert {row["what"] for row in checked} == {
        *("loss, forward+backward", "loss, frozen head", "linear_logps", "linear_logps, frozen head")
    }
    assert all(row["ok"] and max(row["errors"].values()) > 0 for row in checked)

    plan = gpu.QUICK
    assert [(c["model"], c["tokens"], c["mode"]) for c in result["cells"]] == plan.cells()
    assert len(result["cells"]) == len(plan.models) * len(plan.tokens) * 3
    for cell in result["cells"]:
        rows = cell["contenders"]
        assert {"floor", "triton", "torch", *FAST_PEERS} <= set(rows)
        assert ("triton, labels on the CPU" in rows) == ((cell["model"], cell["tokens"]) == plan.main)
        assert rows["triton"] == {"status": "needs a GPU"}
        assert rows["floor"]["times_floor"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
        for name in ("torch", "log_softmax"):
            assert rows[name]["seconds"]["median"] > 0 and "peak_bytes" not in rows[name]
        assert all(row["status"] for row in rows.values())
    assert result["cells"][-1]["contenders"]["torch_linear_cross_entropy"]["status"] == "has no soft-cap"
    assert result["tuning"]["torch workspace rows"]["best"] is not None
    assert result["tuning"]["row pass"]["status"] == "needs a GPU"
    assert len(result["targets"]) == 5
    assert all(row["measured"] is None and row["verdict"].startswith("not measured") for row in result["targets"])
    assert (tmp_path / "time.png").stat().st_size > 10_000
    assert not (tmp_path / "memory.png").exists()  # nothing to show: memory is measured on GPUs
    assert "fused" not in capsys.readouterr().err


@pytest.fixture
def short(monkeypatch):
    """One shape, no tests, no accuracy, no tuning."""
    plan = replace(gpu.QUICK, models={"tiny": SHAPE}, tokens=(16,), main=("tiny", 16), response=4, rounds=2)
    monkeypatch.setattr(gpu, "QUICK", plan)
    monkeypatch.setattr(gpu, "run_tests", lambda *_: {"status": "passed", "summary": "", "log": "tests.log"})
    monkeypatch.setattr(gpu, "accuracy", lambda *_: iter(()))
    monkeypatch.setattr(gpu, "tune", lambda *_: {})


def run_short(folder):
    status = gpu.main(["--out", str(folder), "--device", "cpu", "--quick", "--peers"])
    return status, json.loads((folder / "gpu.json").read_text())


def test_failing_tests_fail_the_run_but_do_not_stop_it(tmp_path, short, monkeypatch, capsys):
    monkeypatch.undo()
    plan = replace(gpu.QUICK, tests=("tests/no_such_file.py",), models={"tiny": SHAPE}, tokens=(16,), main=("tiny", 16))
    monkeypatch.setattr(gpu, "QUICK", replace(plan, response=4, rounds=1))
    monkeypatch.setattr(gpu, "accuracy", lambda *_: iter(()))
    monkeypatch.setattr(gpu, "tune", lambda *_: {})
    status, result = run_short(tmp_path)
    assert status == 1 and result["finished"] and len(result["cells"]) == 3
    assert "FAILED tests failed: pytest's exit status was 4; see tests.log" in capsys.readouterr().out


def test_tests_that_take_too_long_are_ended_with_all_their_processes(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep 1000 & echo $! > {tmp_path}/worker\nwait\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(python))
    plan = replace(gpu.QUICK, test_seconds=3.0)
    assert gpu.run_tests(plan, tmp_path, gpu.Clock(100.0))["status"] == "failed: not done after 3 s"
    worker = int((tmp_path / "worker").read_text())
    for _ in range(100):  # killed, and then reaped by whoever inherits it
        state = Path(f"/proc/{worker}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("still there")


def test_interrupted_run_keeps_what_is_done(tmp_path, short, monkeypatch):
    measure, calls = gpu.measure, []

    def interrupt_second(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(gpu, "measure", interrupt_second)
    status, result = run_short(tmp_path)
    assert status == 130 and not result["finished"]
    assert [c["mode"] for c in result["cells"]] == [gpu.TRAIN] and (tmp_path / "time.png").exists()


def test_an_error_outside_any_contender_keeps_what_is_done(tmp_path, short, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "tune", lambda *_: 1 / 0)
    status, result = run_short(tmp_path)
    assert status == 1 and len(result["cells"]) == 3
    assert "FAILED stopped, failed: ZeroDivisionError" in capsys.readouterr().out


def test_cells_that_the_time_does_not_suffice_for_are_listed(tmp_path, short, monkeypatch):
    monkeypatch.setattr(gpu, "RESERVE_SECONDS", 1e9)
    _, result = run_short(tmp_path)
    assert len(result["cells"]) == 3
    for cell in result["cells"]:
        assert cell["contenders"]["torch"] == {"status": "not measured: out of time"}
    assert result["tuning"] == {"all": {"status": "not measured: out of time"}}


def test_main_shape_first_then_its_lengths_then_the_models():
    cells = gpu.FULL.cells()
    assert cells[:3] == [("llama3-8b", 8192, mode) for mode in ("forward+backward", "forward", "frozen head")]
    assert {c[0] for c in cells[: 3 * 5]} == {"llama3-8b"} and {c[1] for c in cells[3 * 5 : 3 * 8]} == {8192}
    assert len(cells) == len(set(cells)) == 4 * 5 * 3


@pytest.mark.parametrize("wrong", ["dhidden", "dweight", "sums"])
def test_a_wrong_backend_is_seen(wrong):
    batch = batch_of()

    def off(x, weight, batch):
        loss, sums = ours("torch")(x, weight, batch)
        if wrong == "sums":
            sums = sums + 0.01
        leaf = {"dhidden": x, "dweight": weight}.get(wrong)
        if leaf is not None and leaf.requires_grad:
            loss = loss + 1e-3 * (leaf - leaf.detach()).sum()
        return loss, sums

    found = {"torch": Contender("off", loss=off), "triton": "needs a GPU"}
    rows = gpu_accuracy.loss_errors(batch, found)
    verdicts = {row["what"]: row.get("ok") for row in rows if row["contender"] == "torch"}
    assert verdicts == {"loss, forward+backward": False, "loss, frozen head": wrong == "dweight"}
    assert all(row["ok"] for row in gpu_accuracy.loss_errors(batch, {"torch": CONTENDERS["torch"]}))
    rows = [{**row, "dtype": "float32", "softcap": None} for row in rows]
    problems = gpu.problems({"tests": None, "accuracy": rows})
    assert problems[0] == "accuracy: torch, loss, forward+backward, float32, soft-cap None"


def test_not_a_number_is_an_error():
    assert not gpu_accuracy.judged({"dhidden": float("nan")}, {"dhidden": 1.0})["ok"]


def test_accuracy_and_tuning_without_memory_for_them_go_on(monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(gpu_accuracy, "Truth", too_large)
    for rows in gpu_accuracy.accuracy(SHAPE, 1, 4, [], torch.float32, CPU):
        assert {row["status"] for row in rows} == {"not checked: out of memory"}
        assert "not checked" in gpu_accuracy.accuracy_table(rows)
        assert not gpu.problems({"tests": None, "accuracy": rows})
    monkeypatch.setattr(gpu_tuning, "tune_torch", too_large)
    tuning = gpu_tuning.tune(batch_of(), (), 0.0)
    assert tuning["torch workspace rows"] == {"status": "out of memory"}


def test_targets_are_judged_by_the_figures():
    model, tokens = gpu.FULL.main

    def cell(mode, ratio, **more):
        row = {"status": "measured", "times_floor": {"median": ratio}, "peak_bytes": 120}
        return {"model": model, "tokens": tokens, "mode": mode, "contenders": {"triton": row}, **more}

    log_probs = {"contender": "triton", "dtype": "bfloat16", "response": 512, "errors": {"sequence_nat": 1e-3}}
    cells = [cell(gpu.TRAIN, 1.07, workspace_and_gradients_bytes=100), cell(gpu.FORWARD, 1.2)]
    rows = gpu.targets({"cells": cells, "accuracy": [log_probs]})
    assert [row["verdict"] for row in rows] == [
        "met",
        "missed",
        "not measured: llama3-8b at 8192 tokens did not run",
        "missed",
        "met",
    ]
    assert [row["measured"] for row in rows] == [1.07, 1.2, None, 1.2, 1e-3]


UNDER_THE_INTERPRETER = """
import torch
from benchmarks import gpu_accuracy, gpu_tuning
from benchmarks.batches import HeadShape, PairBatch, scored_tokens
from benchmarks.contenders import CONTENDERS, Contender, our_logps, ours
from inspo_kernels import backends
from inspo_kernels.backends.triton_backend import TritonBackend

backends.BACKENDS["triton"] = TritonBackend()
shape, cpu = scored_tokens(HeadShape(16, 70), 16, 4), torch.device("cpu")
CONTENDERS["triton"] = Contender("triton", our_logps("triton"), ours("triton"))
batch = PairBatch(shape, dtype=torch.bfloat16, device=cpu)
few = PairBatch(scored_tokens(shape.head, 2, 1), dtype=torch.bfloat16, device=cpu)
row_pass = gpu_tuning.tune_row_pass(few, 0.0)
assert row_pass["rows"] == 2, row_pass  # no more than there are targets
assert row_pass["shipped"] == "block 256, 1 warps" and len(row_pass["candidates"]) == 9, row_pass
stages, tiles = gpu_tuning.tune_stages(batch, 0.0), gpu_tuning.tune_tiles(batch, 0.0)
assert stages["shipped"] == "1024" and tiles["shipped"] == "8192", (stages, tiles)
for swept in (row_pass, stages, tiles):
    assert all(row["status"] == "measured" for row in swept["candidates"].values()), swept
found = {"triton": CONTENDERS["triton"], "torch": "left out"}
errors = gpu_accuracy.loss_errors(batch, found) + gpu_accuracy.logps_errors(batch, found)
assert sum(row.get("ok", False) for row in errors) == 4, errors
assert gpu_tuning.workspace_and_gradients(batch, "triton") == 16 * (128 * 2 + 128 * 4) + 4 * 16 * (16 + 70)
print("all ran")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs all this on a GPU")
def test_tuning_and_accuracy_of_triton_run_under_its_interpreter():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNDER_THE_INTERPRETER],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "all ran", done.stderr


def test_bad_arguments_say_what_to_do(tmp_path, capsys):
    for arguments, text in (
        (["--device", "cpu"], "add --quick"),
        (["--device", "cpu", "--quick", "--peers", "quack"], "'full_log_softmax', 'log_softmax'"),
        (["--device", "cuda"], "torch sees no GPU"),
        (["--device", "meta", "--quick"], "only cpu and cuda devices"),
    ):
        if "torch sees no GPU" == text and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit):
            gpu.main(["--out", str(tmp_path), *arguments])
        assert text in capsys.readouterr().err
    with pytest.raises(ValueError, match="no whole number of pairs"):
        scored_tokens(SHAPE, 20, 4)
