"""Test that all training steps do the same work, that ours process fewer positions, and that failures are named."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import inspo_kernels as ik
from benchmarks import harness, speed_tables, step, step_contenders, step_jobs
from benchmarks.step_contenders import STEP_CONTENDERS, StepContender

CPU = torch.device("cpu")
QUICK = {"model": "quick", "updates": 3, "pairs": 2, "tokens": 48}


def job(share="real", dtype=torch.float64):
    return step_jobs.job_of(**QUICK, share=share, dtype=dtype, device=CPU)


def test_every_contender_makes_the_same_updates():
    pytest.importorskip("trl")
    rows = step.same_work(list(STEP_CONTENDERS), job())
    assert list(rows) == ["four_forwards", *(n for n in STEP_CONTENDERS if n != "four_forwards")]
    assert all(row["same"] for row in rows.values()), rows
    within = {name: row["tolerance"] for name, row in rows.items() if row["tolerance"] > 1e-9}
    assert within == dict.fromkeys(("trl", "trl_compact", "trainer_rows", "trainer"), 1e-4)
    losses = rows["rows"]["losses"]
    assert len(losses) == 3 and len(set(losses)) == 3 and all(abs(loss - 0.69) < 0.1 for loss in losses)


@pytest.mark.parametrize("layout", ["rows", "tree", "packed_tree"])
def test_all_but_the_labels_moves_to_the_device(layout):
    batch = ik.condition_pairs([([1, 2], [3], [4, 5])], pad_token_id=0, layout=layout)
    moved = step_jobs.moved(batch, torch.device("meta"))
    stays = {name for name, value in moved.items() if isinstance(value, torch.Tensor) and not value.is_meta}
    assert stays <= {"labels", "marginal_labels", "segment_ids"}


def test_other_work_is_detected(monkeypatch):
    def conditioned_reference(own):
        ours = step_contenders.Ours(own, "rows")
        with torch.no_grad():
            ours.ref_logps = [ours._forward(batch, conditioned=True).logps for batch in own.batches]
        return ours

    monkeypatch.setitem(STEP_CONTENDERS, "rows", StepContender("wrong", conditioned_reference))
    row = step.same_work(["rows"], job())["rows"]
    assert not row["same"] and row["errors"]["loss"] > 1e-4


def test_a_missing_baseline_is_reported(monkeypatch):
    def broken(own):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(STEP_CONTENDERS, "four_forwards", StepContender("broken", broken))
    assert step.same_work(["rows"], job()) == {
        "four_forwards": {"status": "failed: RuntimeError: no such kernel"},
        "rows": {"status": "not compared: four_forwards failed: RuntimeError: no such kernel"},
    }


def test_positions_are_those_of_the_layouts():
    found = step.prepared(["rows", "tree", "four_forwards"], job("0.5", torch.float32))
    counted = {name: run().positions / QUICK["updates"] for name, run in found.items()}
    prompt, response = 24, 12
    assert counted == {
        "rows": 2 * 2 * (prompt + 2 * response),
        "tree": 2 * (prompt + 4 * response),
        "four_forwards": 2 * 2 * (prompt + 2 * response) + 2 * 2 * (prompt + response),
    }


def test_lengths_of_a_share():
    assert step_jobs.lengths_of("0.667", 1, 512) == ((342, 85, 85),)
    assert max(map(sum, step_jobs.lengths_of("real", 20, 100))) <= 100


def test_quick_run_writes_a_complete_file(tmp_path, monkeypatch, capsys):
    def broken(own):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(STEP_CONTENDERS, "tree", StepContender("broken", broken))
    monkeypatch.setitem(STEP_CONTENDERS, "trl", StepContender("absent", broken, "no-such"))
    contenders = ["rows", "tree", "trl", "four_forwards"]
    peaks = []

    def peak(module, function, given):
        peaks.append(given["name"])
        return {"status": "measured", "peak_bytes": 1 << 20}

    monkeypatch.setattr(step, "peak_memory_in_fresh_process", peak)
    file = tmp_path / "step.json"
    step.main(
        [
            "--quick",
            "--shares",
            "0.5",
            "--rounds",
            "2",
            "--updates",
            "1",
            "--contenders",
            *contenders,
            "--json",
            str(file),
        ]
    )
    result = json.loads(file.read_text())
    (cell,) = result["cells"]
    rows = cell["contenders"]
    assert result["finished"] and peaks == contenders and cell["rounds"] == 2
    assert rows["tree"] == {"status": "failed: RuntimeError: no such kernel"}
    assert rows["trl"] == {"status": "not installed: pip install no-such"}
    assert rows["rows"]["times_four_forwards"]["median"] > 0 and rows["rows"]["peak_bytes"] == 1 << 20
    assert rows["rows"]["reference_seconds_per_step"] > 0 == rows["four_forwards"]["reference_seconds_per_step"]
    assert result["same_work"]["contenders"]["rows"]["same"]
    assert "not installed" in capsys.readouterr().out and "not installed" in speed_tables.step(result)


def test_peak_of_a_step_is_above_the_model():
    given = {"what": {**QUICK, "share": "real"}, "name": "rows", "device": "cpu"}
    row = harness.peak_memory_in_fresh_process("benchmarks.step", "peak_of", given)
    assert row["status"] == "measured" and 0 < row["peak_bytes"] < 1 << 28


def test_seconds_are_of_one_update(monkeypatch):
    """The fake clock advances one second per reading, so a run takes one second for any number of updates."""
    ticks = itertools.count()
    monkeypatch.setattr(step_jobs, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    for updates in (1, 4):
        cell: dict = {}
        own = step_jobs.job_of(**QUICK | {"updates": updates}, share="0.5", dtype=torch.float32, device=CPU)
        step.measure(own, ["four_forwards"], 1, cell, lambda: None)
        assert cell["contenders"]["four_forwards"]["seconds"]["median"] == 1 / updates


def test_bad_arguments_say_what_to_do(capsys):
    for arguments, text in (
        (["--shares", "2"], 'between 0 and 1, or "real"'),
        (["--models", "big"], "'small', 'trunk'"),
        (["--updates", "0"], "--updates: 0 is not a whole number of at least 1"),
        (["--pairs", "0"], "--pairs: 0 is not a whole number of at least 1"),
        (["--pairs", "100000"], "200000 real pairs of at most 512 tokens are needed and there are"),
    ):
        with pytest.raises(SystemExit):
            step.main(arguments)
        assert text in capsys.readouterr().err


def test_trainers_are_compared_with_each_other(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setattr(step, "peak_memory_in_fresh_process", lambda *_: {"status": "measured", "peak_bytes": 3 << 20})
    file = tmp_path / "trainers.json"
    words = ["--shares", "0.5", "--rounds", "1", "--updates", "2", "--contenders", "trl_compact", "trainer"]
    step.main(["--quick", *words, "--json", str(file)])
    result = json.loads(file.read_text())
    rows = result["cells"][0]["contenders"]
    assert list(rows) == ["trl_compact", "trainer"] and rows["trainer"]["times_trl_compact"]["median"] > 0
    assert all(row["same"] for row in result["same_work"]["contenders"].values())
    said = speed_tables.trainers(result)
    assert "| 1.00, 3 MiB | " in said and "InSPOTrainer" in said and "times_" not in said


def test_tables_show_separately_timed_reference_passes():
    """Four forwards take 2 s. The step takes a quarter of this, and the reference 0.2 s per step's pairs."""
    ratio = {"median": 0.25, "q1": 0.2, "q3": 0.3}
    row = {"status": "measured", "times_four_forwards": ratio, "reference_seconds_per_step": 0.2, "peak_bytes": 2**20}
    cell = {"contenders": {"four_forwards": {"seconds": {"median": 2.0}}}}
    assert speed_tables.step_time("tree", row, cell) == "0.25 (0.20-0.30) + 0.10, 1 MiB"
    assert speed_tables.step_time("trl", row, cell) == "0.25 (0.20-0.30), 1 MiB"
    assert speed_tables.step_time("loop", {"status": "measured", "peak_bytes": 2**21}, cell) == "not yet timed, 2 MiB"


def test_a_failing_baseline_leaves_times_without_ratios(monkeypatch):
    def broken(own):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(STEP_CONTENDERS, "four_forwards", StepContender("broken", broken))
    cell: dict = {}
    step.measure(job("0.5", torch.float32), ["rows", "four_forwards"], 1, cell, lambda: None)
    row = cell["contenders"]["rows"]
    assert row["seconds"]["median"] > 0 and speed_tables.step_time("rows", row, cell) == "not yet timed"
    assert cell["contenders"]["four_forwards"] == {"status": "failed: RuntimeError: no such kernel"}
