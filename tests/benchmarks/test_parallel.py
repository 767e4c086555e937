"""Test the benchmark of a head that is split over ranks, and its calculation for GPUs."""

from __future__ import annotations

import json

import pytest

from benchmarks import parallel


def test_two_ranks_are_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(parallel, "RANKS", (2,))
    parallel.main(["--quick", "--rounds", "1", "--json", str(tmp_path / "parallel.json")])
    result = json.loads((tmp_path / "parallel.json").read_text())
    (cell,) = result["cells"]
    assert cell["ranks"] == 2 and cell["seconds"]["ours"]["median"] > 0
    rows, width = cell["scored_tokens"], cell["hidden"]
    assert cell["bytes_sent_per_rank"]["all_reduce"] == 4 * rows * width
    assert 0 < cell["bytes_sent_per_rank"]["gather"] - 12 * rows < 256
    assert "Calculated, not measured" in capsys.readouterr().out


def test_calculated_times_follow_the_stated_assumptions():
    rows = {(row["head"], row["ranks"], row["network"]): row for row in parallel.calculated()}
    slow, fast = rows["Llama-3-70B", 8, "400 Gb/s"], rows["Llama-3-70B", 8, "NVLink 4"]
    assert slow["matmuls_ms"] == pytest.approx(6 * 8192 * 8192 * 128_256 / 8 / 790e12 * 1e3)
    assert slow["dx_all_reduce_ms"] == pytest.approx(2 * 7 / 8 * 8192 * 8192 * 4 / 50e9 * 1e3)
    assert slow["gather_ms"] == pytest.approx(9 * fast["gather_ms"])
    waited = slow["gather_ms"] + slow["dx_all_reduce_ms"] - slow["matmuls_ms"] / 3
    assert slow["share_waited"] == pytest.approx(waited / (slow["matmuls_ms"] + waited))
    assert fast["share_waited"] < fast["share_without_overlap"] < slow["share_waited"] < slow["share_without_overlap"]
