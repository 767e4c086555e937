"""The GPU benchmark's whole flow on a CPU, and that it sees what it is there to see."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, peers

ROOT = Path(__file__).parents[2]
SHAPE = peers.HeadShape(16, 50)
CPU = torch.device("cpu")


def batch_of(dtype=torch.float32, shape=SHAPE):
    return peers.PairBatch(shape, 16, 4, dtype=dtype, device=CPU)


def test_quick_run_on_a_cpu(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--quick"]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["finished"] and result["command"].endswith("--out DIR --device cpu --quick")
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
        assert {"floor", "triton", "torch", *peers.PEERS} <= set(rows)
        assert rows["triton"] == {"status": "needs a GPU"}
        assert rows["floor"]["times_floor"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
        for name in ("torch", "log_softmax"):
            assert rows[name]["seconds"]["median"] > 0 and rows[name]["peak_bytes"] is None
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


def test_interrupted_run_keeps_what_is_done(tmp_path, short, monkeypatch):
    measure, calls = gpu.measure_cell, []

    def interrupt_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(gpu, "measure_cell", interrupt_second)
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


def test_contenders_that_fail_are_named_and_the_others_are_measured():
    calls = []

    def runs_out(x, weight, batch):
        calls.append(None)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("tried to allocate much")
        return peers.log_softmax(x, weight, batch)

    def broken(x, weight, batch):
        raise RuntimeError("no kernel image\nand more")

    found = {"late": runs_out, "broken": broken, "absent": "not installed", "log_softmax": peers.log_softmax}
    cell = gpu.measure_cell(batch_of(), gpu.TRAIN, found, rounds=4, seconds=60)
    rows = cell["contenders"]
    assert {name: row["status"] for name, row in rows.items()} == {
        "floor": "measured",
        "late": "out of memory",
        "broken": "failed: RuntimeError: no kernel image",
        "absent": "not installed",
        "log_softmax": "measured",
    }
    assert len(calls) == 4  # not called again
    assert cell["rounds"] == 4 and rows["log_softmax"]["times_floor"]["median"] > 0


@pytest.mark.parametrize("mode, gradients", [(gpu.FORWARD, 0), (gpu.FROZEN, 1), (gpu.TRAIN, 2)])
def test_modes_compute_what_their_floor_computes(mode, gradients):
    batch, seen = batch_of(), []

    def loss_of(x, weight, batch):
        seen.append((torch.is_grad_enabled(), x.requires_grad, weight.requires_grad))
        return peers.log_softmax(x, weight, batch)

    result = gpu.step(batch, mode, loss_of)
    assert seen == [(gradients > 0, gradients > 0, gradients > 1)]
    assert len(result) == 2 + gradients and gpu.PRODUCTS[mode] == 1 + gradients


@pytest.mark.parametrize("mode", gpu.MODES)
def test_floor_is_the_products(mode):
    from torch.utils.flop_counter import FlopCounterMode

    batch = batch_of()
    run = gpu.products(batch, gpu.PRODUCTS[mode])
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == gpu.PRODUCTS[mode] * 2 * 16 * SHAPE.hidden * SHAPE.vocab


@pytest.mark.parametrize("wrong", ["dhidden", "dweight", "sums"])
def test_a_wrong_backend_is_seen(wrong):
    batch = batch_of()

    def off(x, weight, batch):
        loss, sums = gpu.ours("torch")(x, weight, batch)
        if wrong == "sums":
            sums = sums + 0.01
        leaf = {"dhidden": x, "dweight": weight}.get(wrong)
        if leaf is not None and leaf.requires_grad:
            loss = loss + 1e-4 * (leaf - leaf.detach()).sum()
        return loss, sums

    rows = gpu.loss_errors(batch, {"torch": off, "triton": "needs a GPU"})
    verdicts = {row["what"]: row.get("ok") for row in rows if row["contender"] == "torch"}
    assert verdicts == {"loss, forward+backward": False, "loss, frozen head": wrong == "dweight"}
    assert all(row["ok"] for row in gpu.loss_errors(batch, {"torch": gpu.ours("torch")}))
    rows = [{**row, "dtype": "float32", "softcap": None} for row in rows]
    found = gpu.problems({"tests": None, "accuracy": rows})
    assert found[0] == "accuracy: torch, loss, forward+backward, float32, soft-cap None"


def test_not_a_number_is_an_error():
    assert not gpu.judged({"dhidden": float("nan")}, {"dhidden": 1.0})["ok"]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", [name for name, peer in peers.PEERS.items() if not peer.needs_gpu])
def test_peers_compute_the_same_loss_and_gradients(name, softcap):
    reason = peers.PEERS[name].unavailable(CPU, softcap)
    if reason:
        pytest.skip(f"{name}: {reason}")
    batch = batch_of(shape=replace(SHAPE, softcap=softcap))
    want = gpu.step(gpu.widened(batch), gpu.TRAIN, gpu.ours("reference"))
    errors = gpu.errors_of(gpu.step(batch, gpu.TRAIN, peers.PEERS[name].run), want)
    assert all(error < 1e-5 for error in errors.values()), errors


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
from benchmarks import gpu, peers
from inspo_kernels import backends
from inspo_kernels.backends.triton_backend import TritonBackend

backends.BACKENDS["triton"] = TritonBackend()
batch = peers.PairBatch(peers.HeadShape(16, 70), 16, 4, dtype=torch.bfloat16, device=torch.device("cpu"))
row_pass = gpu.tune_row_pass(batch, 0.0, rows=2)
assert row_pass["shipped"] == "block 256, 1 warps" and len(row_pass["candidates"]) == 9, row_pass
stages, tiles = gpu.tune_stages(batch, 0.0), gpu.tune_tiles(batch, 0.0)
assert stages["shipped"] == "1024" and tiles["shipped"] == "8192", (stages, tiles)
for swept in (row_pass, stages, tiles):
    assert all(row["status"] == "measured" for row in swept["candidates"].values()), swept
found = {"triton": gpu.ours("triton"), "torch": "left out"}
errors = gpu.loss_errors(batch, found) + gpu.logps_errors(batch, found)
assert sum(row.get("ok", False) for row in errors) == 4, errors
assert gpu.workspace_and_gradients(batch, "triton") == 16 * (128 * 2 + 128 * 4) + 4 * 16 * (16 + 70)
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
        (["--device", "cpu", "--quick", "--peers", "quack"], "'log_softmax', 'trl'"),
        (["--device", "cuda"], "torch sees no GPU"),
    ):
        if "torch sees no GPU" == text and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit):
            gpu.main(["--out", str(tmp_path), *arguments])
        assert text in capsys.readouterr().err
    with pytest.raises(ValueError, match="no whole number of pairs"):
        peers.PairBatch(SHAPE, 20, 4, dtype=torch.float32, device=CPU)
