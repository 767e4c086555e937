"""The loss benchmark measures what it says, on a shape of seconds, and its file holds what the README needs."""

from __future__ import annotations

import json

import pytest

from benchmarks import harness, loss, report


def test_quick_run_writes_a_complete_file(tmp_path, capsys):
    file = tmp_path / "loss.json"
    loss.main(["--shape", "quick", "--rounds", "3", "--json", str(file)])
    result = json.loads(file.read_text())
    assert set(result["contenders"]) == {"floor", "fused", "full log_softmax"}
    for name, row in result["contenders"].items():
        assert row["seconds"]["median"] > 0
        assert name == "floor" or all(error < 1e-5 for error in row["relative_error"].values())
    assert result["contenders"]["floor"]["times_floor"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert result["command"].startswith("python -m benchmarks.loss --shape quick")
    assert {"date", "versions", "hardware"} <= set(result)
    assert "fused" in capsys.readouterr().out
    assert "| `fused_inspo_loss`" in report.loss(result)


def test_errors_compare_with_float64(monkeypatch):
    """A contender with a wrong gradient is seen."""

    def wrong(batch):
        right = loss.fused(batch)

        def run():
            value = right()
            batch.weight.grad.mul_(1.01)
            return value

        return run

    monkeypatch.setitem(loss.CONTENDERS, "wrong", wrong)
    errors = loss.errors(loss.SHAPES["quick"])
    assert errors["wrong"]["dweight"] == pytest.approx(0.01, rel=1e-3)
    assert errors["fused"]["dweight"] < 1e-5


def test_own_peak_counts_what_is_allocated_and_freed():
    def allocate():
        import torch

        torch.ones(64 << 18)  # 64 MiB of float32

    peak = harness.own_peak(allocate)
    if peak is None:
        pytest.skip("no /proc/self/clear_refs on this platform, so the benchmark reports memory as not measured")
    assert 60 << 20 < peak < 80 << 20


def test_unknown_shape_lists_the_known(capsys):
    with pytest.raises(SystemExit):
        loss.main(["--shape", "huge"])
    assert "reference" in capsys.readouterr().err


def test_interrupted_writing_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    harness.write_json(file, {"old": 1})
    with pytest.raises(TypeError):
        harness.write_json(file, {"new": object()})
    assert json.loads(file.read_text()) == {"old": 1}
