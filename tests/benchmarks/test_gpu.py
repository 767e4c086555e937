"""Run the GPU benchmark's whole flow on a CPU, and check that it detects errors."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    gpu,
    gpu_accuracy,
    gpu_decomposition,
    gpu_plan,
    gpu_processes,
    gpu_steps,
    gpu_training,
    gpu_tuning,
)
from benchmarks.batches import HeadShape, PairBatch, scored_tokens
from benchmarks.contenders import CONTENDERS, PEERS, Contender, ours
from benchmarks.speed_tables import SHAPE_ROWS

ROOT = Path(__file__).parents[2]
SHAPE = HeadShape(16, 50)
CPU = torch.device("cpu")
# Without contenders that compile for half a minute or take seconds to import.
FAST_PEERS = [name for name in PEERS if CONTENDERS[name].package == "torch" and not CONTENDERS[name].compiles_per_shape]


def batch_of(dtype=torch.float32, shape=SHAPE):
    return PairBatch(scored_tokens(shape, 16, 4), dtype=dtype, device=CPU)


def command(out, *more):
    return [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--device", "cpu", "--quick", *more]


def read(out):
    return json.loads((out / "gpu.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Run every step with quick sizes, without peers that compile."""
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(command(out, "--peers", *FAST_PEERS), cwd=ROOT, capture_output=True, text=True)
    return out, done


@pytest.mark.sweep
def test_quick_run_leaves_every_result(quick):
    out, done = quick
    assert done.returncode == 0, done.stdout + done.stderr
    result = read(out)
    assert result["finished"] and "--out DIR --device cpu --quick --peers" in result["command"]
    assert [row["status"] for row in result["steps"].values()] == ["done"] * len(gpu_steps.STEPS)
    assert list(result["steps"]) == list(gpu_steps.STEPS)
    files = list(out.iterdir())
    assert all(file.is_file() and file.stat().st_size < 16 << 20 for file in files)
    assert {"gpu.json", "steps.log", "tests.log"} == {file.name for file in files}
    assert result["tests"]["status"] == "passed" and " passed" in (out / "tests.log").read_text()
    assert {"date", "versions", "hardware", "device", "settings"} <= set(result) and "trl" in result["versions"]
    assert result["settings"]["allow_bf16_reduced_precision_reduction"] == "False"
    assert result["training"]["status"] == "measured" and result["training"]["tokens_per_second"]["median"] > 0
    assert result["decomposition"]["dW matmul"]["busy"]["median"] > 0
    assert result["decomposition"]["label logits"] == {"status": "needs a GPU"}
    for name in ("autocast", "statistics", "trees"):
        assert any(row["status"] == "measured" for row in result[name].values()), name
    assert result["tuning"]["row pass"] == {"status": "needs a GPU"}
    assert all(row["measured"] is None and row["verdict"].startswith("not measured") for row in result["targets"])


@pytest.mark.sweep
def test_quick_run_checks_against_float64(quick):
    result = read(quick[0])
    checked = [row for row in [*result["smoke"], *result["accuracy"]] if row["contender"] == "torch"]
    assert {(row["dtype"], row["softcap"]) for row in checked} == {
        (dtype, cap) for dtype in ("bfloat16", "float32") for cap in (None, 30.0)
    }
    assert all(row["ok"] and max(row["errors"].values()) > 0 for row in checked)


@pytest.mark.sweep
def test_quick_run_measures_every_cell(quick):
    result, plan = read(quick[0]), gpu_plan.QUICK
    cells = {(c["model"], c["tokens"], c["mode"]): c["contenders"] for c in result["cells"]}
    assert set(cells) == {*plan.main_cells(), *plan.other_cells()} and len(cells) == len(result["cells"])
    for cell, rows in cells.items():
        named = FAST_PEERS if cell[:2] == plan.main else {*FAST_PEERS} & {*SHAPE_ROWS}
        assert {"floor", "triton", *named} <= set(rows)
        assert ("torch" in rows) == (cell[:2] == plan.main)
        assert "triton, labels on the CPU" in rows
        assert rows["triton"]["status"] == "needs a GPU"
        assert rows["floor"]["times_floor"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
        assert rows["log_softmax"]["seconds"]["median"] > 0 and all(row["status"] for row in rows.values())
    of_main = cells[plan.main_cells()[0]]
    assert of_main["torch"]["step"] == "compiled" and of_main["log_softmax"]["step"] == "peers"


@pytest.mark.sweep
def test_a_killed_call_keeps_results_and_resumes(tmp_path):
    steps = ("--peers", "--steps", "smoke,main,shapes")
    running = subprocess.Popen(command(tmp_path, *steps), cwd=ROOT, stdout=subprocess.DEVNULL, text=True)
    part = tmp_path / "part.json"
    deadline = time.monotonic() + 120
    while not (part.exists() and '"shapes"' in part.read_text() and '"mode"' in part.read_text()):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    running.kill()
    running.wait()
    assert [read(tmp_path)["steps"][name]["status"] for name in ("smoke", "main")] == ["done", "done"]
    while processes_of(tmp_path):
        assert time.monotonic() < deadline, "the step outlived its call"
        time.sleep(0.1)

    had = json.loads(part.read_text())["part"]["cells"][0]
    done = subprocess.run(command(tmp_path, *steps[:-1], "shapes"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read(tmp_path)
    assert result["steps"]["shapes"]["status"] == "done" and not part.exists()
    kept = next(cell for cell in result["cells"] if cell["name"] == had["name"])
    assert kept["contenders"]["floor"]["seconds"]["median"] > 0
    shapes = {(*gpu_plan.QUICK.main,), *((m, n) for m, n, _ in gpu_plan.QUICK.other_cells())}
    assert {(cell["model"], cell["tokens"]) for cell in result["cells"]} == shapes


def processes_of(folder):
    """Return the command lines of the steps that run in a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "benchmarks.gpu_steps" in words and any(str(folder) in word for word in words):
            found.append(words)
    return found


@pytest.fixture
def fake_step(tmp_path, monkeypatch):
    """Replace the real process of a step with a shell script."""

    def fake(script):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        monkeypatch.setattr(gpu.sys, "executable", str(python))

    options = argparse.Namespace(out=tmp_path, device="cpu", quick=True, peers=[])
    result = gpu.fresh_result("python -m benchmarks.gpu", CPU)
    return fake, options, result


PART = {"step": "main", "status": "", "notes": [], "part": {"cells": []}}


def test_crashed_step_keeps_what_it_wrote(tmp_path, fake_step):
    fake, options, result = fake_step
    row = {"status": "measured", "seconds": {"median": 1.0}}
    cell = {"name": "a", "model": "m", "tokens": 1, "mode": "forward", "contenders": {"floor": row}}
    (tmp_path / "written").write_text(json.dumps(PART | {"part": {"cells": [cell]}}))
    fake(f"cp {tmp_path}/written {tmp_path}/part.json; echo sticky; kill -SEGV $$")
    gpu.run_step("main", options, result, 20.0)
    assert result["steps"]["main"]["status"] == "failed: the process ended with signal 11; see steps.log"
    assert result["cells"][0]["contenders"]["floor"] == row | {"step": "main"}
    assert "sticky" in (tmp_path / "steps.log").read_text() and gpu_plan.problems(result)


def test_step_that_takes_too_long_is_stopped(tmp_path, fake_step):
    fake, options, result = fake_step
    (tmp_path / "written").write_text(json.dumps(PART | {"notes": ["half"]}))
    fake(f"cp {tmp_path}/written {tmp_path}/part.json; sleep 1000")
    gpu.run_step("main", options, result, 1.0)
    assert result["steps"]["main"]["status"] == "stopped after 1 s; what it had is kept"
    assert result["steps"]["main"]["notes"] == ["half"] and not gpu_plan.problems(result)


def test_cells_cut_short_are_measured_again(tmp_path, fake_step):
    fake, options, result = fake_step
    fake(f'echo "$@" > {tmp_path}/words')
    result["steps"]["main"] = {"status": "stopped with its call"}
    for name, rounds in (("short", 1), ("whole", 3)):
        row = {"status": "measured", "step": "main", "rounds": rounds}
        rows = {"floor": row, "cut_cross_entropy": {"status": "needs a GPU", "step": "main"}}
        result["cells"].append({"name": name, "contenders": rows})
    gpu.run_step("main", options, result, 20.0)
    assert '"known": ["whole"]' in (tmp_path / "words").read_text()


def test_step_without_time_left_is_not_started(capsys, fake_step):
    _, options, result = fake_step
    options.steps = ["main", "training"]
    gpu.run(options, result, gpu.Timer(20.0))
    assert result["steps"] == {} and capsys.readouterr().out.count("call again to go on") == 2


@pytest.mark.sweep
def test_failing_tests_fail_the_run(tmp_path):
    result = gpu_processes.run_tests(("tests/no_such_file.py",), tmp_path / "tests.log", 60.0)
    # 4 means that a file is missing, 5 that nothing was collected. pytest's plugins decide which of them occurs.
    assert result["status"] in [f"failed: pytest's exit status was {status}" for status in (4, 5)]
    failed = gpu.fresh_result("", CPU) | {"tests": result}
    assert gpu_plan.problems(failed) == [f"tests {result['status']}; see tests.log"]


def test_tests_that_take_too_long_fail(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 1000\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu_processes.sys, "executable", str(python))
    assert gpu_processes.run_tests((), tmp_path / "tests.log", 1.0)["status"] == "failed: not done after 1 s"


def test_a_slow_step_ends_with_all_its_processes(tmp_path):
    command = ["sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/worker; wait"]
    assert gpu_processes.run_in_group(command, tmp_path / "log", 1.0) is None
    worker = int((tmp_path / "worker").read_text())
    for _ in range(100):  # killed, and then reaped by whoever inherits it
        state = Path(f"/proc/{worker}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("still there")


def test_steps_never_tried_come_before_failed_ones():
    steps = {"smoke": {"status": "done"}, "main": {"status": "failed: x"}, "tests": {"status": "stopped after 3 s"}}
    todo = gpu.pending({"steps": steps}, None)
    assert todo[0] == "decomposition" and todo[-2:] == ["main", "tests"] and "smoke" not in todo
    assert gpu.pending({"steps": steps}, ["main", "smoke"]) == ["smoke", "main"]


def test_earlier_steps_keep_figures_in_shared_cells():
    def part(step, **seconds):
        rows = {name: {"status": "measured", "seconds": value} for name, value in seconds.items()}
        return {"step": step, "part": {"cells": [{"name": "a", "contenders": rows}]}}

    result = {"cells": []}
    for row in (part("main", floor=1, triton=2), part("peers", floor=3, trl=4), part("main", floor=5)):
        gpu.merge(result, row)
    (cell,) = result["cells"]
    assert {name: row["seconds"] for name, row in cell["contenders"].items()} == {"floor": 5, "triton": 2, "trl": 4}


def test_result_of_another_device_is_not_continued(tmp_path, capsys):
    result = gpu.fresh_result("python -m benchmarks.gpu", CPU) | {"device": {"type": "cuda", "name": "another"}}
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--device", "cpu", "--quick"])
    assert "name another place" in capsys.readouterr().err


def test_main_shape_comes_before_the_other_shapes():
    plan = gpu_plan.FULL
    assert plan.main_cells() == [("llama3-8b", 8192, mode) for mode in ("forward+backward", "forward", "frozen head")]
    others = plan.other_cells()
    assert {c[0] for c in others[: 3 * 4]} == {"llama3-8b"} and {c[1] for c in others[3 * 4 : 3 * 7]} == {8192}
    assert len(others) == len(set(others)) == 4 * 5 * 3 - 3


@pytest.mark.parametrize("seconds, steps", [(60.0, 3), (10.0, 1)])
def test_training_is_measured_until_time_is_over(seconds, steps):
    result = gpu_training.training_run(gpu_plan.QUICK, CPU, seconds)
    assert result["status"] == "measured" and result["steps"] == steps
    assert result["tokens_per_second"]["median"] > 0 and result["tflops"] > 0


def test_autocast_and_trees_are_measured():
    rows = dict(gpu_training.autocast(batch_of(), 1, 1.0)) | dict(gpu_training.trees(gpu_plan.QUICK, CPU, 1.0))
    assert rows.pop("packed tree, flex_attention") == {"status": "needs a GPU"}
    assert {row["status"] for row in rows.values()} == {"measured"} and len(rows) == 7


def test_cells_without_time_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "RESERVE_SECONDS", 1e9)
    context = gpu_steps.Context("shapes", gpu_plan.QUICK, CPU, [], tmp_path, gpu.Timer(60.0))
    gpu_steps.measure_cells(context, gpu_plan.QUICK.main_cells(), ["torch"], rounds=2)
    assert len(context.part["cells"]) == 1 and context.notes == ["2 cells not measured: out of time"]


def test_failing_line_of_the_decomposition_leaves_the_others(monkeypatch):
    monkeypatch.setattr(gpu_decomposition, "_scaling", lambda *_: 1 / 0)
    rows = dict(gpu_decomposition.decompose(batch_of(), (8, 16)))
    assert rows["scaling of X"]["status"].startswith("failed: ZeroDivisionError")
    assert rows["dX matmul"]["status"] == "measured" and rows["copy"]["terabytes_per_second"] > 0


def truncation_nat(hidden, tokens, words=2048, group=16):
    """Simulate the error of the summed log-sum-exp of ``tokens`` rows of standard normal logits, in nats.

    Exact sums of ``group`` terms are added to a float32 accumulator that is rounded toward zero, as measured on tensor
    cores (Fasi et al. 2021). A sample of ``words`` stands for the vocabulary: the mean error does not depend on it.
    """
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(words, hidden, generator=g) / hidden**0.5).bfloat16().double()
    x = torch.randn(8, hidden, generator=g).bfloat16().double()
    total = torch.zeros(len(x), words)
    for k in range(0, hidden, group):
        exact = total.double() + x[:, k : k + group] @ weight[:, k : k + group].t()
        total = exact.float()
        away = total.double().abs() > exact.abs()
        total = torch.where(away, torch.nextafter(total, torch.zeros_like(total)), total)
    errors = total.double().logsumexp(1) - (x @ weight.t()).logsumexp(1)
    return tokens * errors.mean().abs().item()


def test_accuracy_limit_is_twice_the_simulated_error():
    estimate = truncation_nat(4096, 512)
    assert estimate == pytest.approx(gpu_accuracy.SEQUENCE_NAT / 2, rel=0.1)
    assert truncation_nat(1024, 512) < estimate / 3


@pytest.mark.parametrize("wrong", ["dhidden", "dweight", "sums"])
def test_a_wrong_backend_is_detected(wrong):
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
    rows = gpu_accuracy.errors(batch, found, "loss")
    verdicts = {row["what"]: row.get("ok") for row in rows if row["contender"] == "torch"}
    assert verdicts == {"loss, forward+backward": False, "loss, frozen head": wrong == "dweight"}
    assert all(row["ok"] for row in gpu_accuracy.errors(batch, {"torch": CONTENDERS["torch"]}, "loss"))
    rows = [{**row, "dtype": "float32", "softcap": None} for row in rows]
    problems = gpu_plan.problems({"steps": {}, "tests": None, "accuracy": rows})
    assert problems[0] == "accuracy: torch, loss, forward+backward, float32, soft-cap None"


def test_nan_is_an_error():
    assert not gpu_accuracy.judged({"dhidden": float("nan")}, {"dhidden": 1.0})["ok"]


def test_accuracy_and_tuning_continue_without_memory(monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(gpu_accuracy, "Truth", too_large)
    for rows in gpu_accuracy.accuracy(SHAPE, 4, [], torch.float32, CPU):
        assert {row["status"] for row in rows} == {"not checked: out of memory"}
        assert "not checked" in gpu_accuracy.accuracy_table(rows)
        assert not gpu_plan.problems({"steps": {}, "tests": None, "accuracy": rows})
    monkeypatch.setattr(gpu_tuning, "CONTENDERS", {"triton": CONTENDERS["torch"]})
    monkeypatch.setattr(gpu_tuning, "TUNED", {"one": too_large, "other": lambda batch: None})
    tuned = dict(gpu_tuning.tune(batch_of(), 0.0))
    assert tuned == {"one": {"status": "out of memory"}, "other": {"status": "not used on this device"}}


def test_targets_are_judged_by_the_figures():
    model, tokens = gpu_plan.FULL.main

    def cell(mode, ratio, **more):
        row = {"status": "measured", "times_floor": {"median": ratio}, "peak_bytes": 120}
        return {"model": model, "tokens": tokens, "mode": mode, "contenders": {"triton": row}, **more}

    log_probs = {"contender": "triton", "dtype": "bfloat16", "response": 512, "errors": {"sequence_nat": 1e-3}}
    cells = [cell(gpu_plan.TRAIN, 1.04, workspace_and_gradients_bytes=100), cell(gpu_plan.FORWARD, 1.2)]
    rows = gpu_plan.targets({"cells": cells, "accuracy": [log_probs]})
    assert [row["verdict"] for row in rows] == [
        "met",
        "not measured",
        "missed",
        "missed",
        "met",
    ]
    assert [row["measured"] for row in rows] == [1.04, None, 1.2, 1.2, 1e-3]


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
sweep = lambda found: gpu_tuning.sweep(*found, cpu, 0.0)
row_pass = sweep(gpu_tuning.row_passes(few))  # no more rows than there are targets
assert row_pass["shipped"] == "block 256, 1 warps" and len(row_pass["candidates"]) == 9, row_pass
kept, tiles = sweep(gpu_tuning.kept_rows(batch)), sweep(gpu_tuning.logits_tiles(batch))
assert kept["shipped"] == "8192" and tiles["shipped"] == "16 x 64", (kept, tiles)
for swept in (row_pass, kept, tiles):
    assert all(row["status"] == "measured" for row in swept["candidates"].values()), swept
found = {"triton": CONTENDERS["triton"], "torch": "left out"}
errors = gpu_accuracy.errors(batch, found, "loss") + gpu_accuracy.errors(batch, found, "logps")
assert sum(row.get("ok", False) for row in errors) == 4, errors
assert gpu_tuning.workspace_and_gradients(batch, "triton") == 16 * (128 * 2 + 64 * 4) + 4 * 16 * (16 + 70)
print("all ran")
"""


@pytest.mark.sweep
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs all this on a GPU")
def test_triton_tuning_and_accuracy_run_interpreted():
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
        (["--device", "cuda"], "--device cuda: "),
        (["--device", "meta", "--quick"], "only cpu and cuda devices"),
        (["--device", "cpu", "--quick", "--minutes", "0"], "--minutes 0: no step fits"),
    ):
        if text == "--device cuda: " and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit):
            gpu.main(["--out", str(tmp_path), *arguments])
        assert text in capsys.readouterr().err
    with pytest.raises(ValueError, match="not a whole number of pairs"):
        scored_tokens(SHAPE, 20, 4)
