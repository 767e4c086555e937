"""Test the demo over seeds: its statistics, and a result file that is complete after each seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import demo_seeds


def test_t_interval_over_seeds() -> None:
    summary = demo_seeds.over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    # standard deviation sqrt(2.5), over sqrt(5) seeds
    assert summary["mean_ci"] == pytest.approx([3 - 2.7764 * 0.5**0.5, 3 + 2.7764 * 0.5**0.5], rel=1e-4)
    assert (summary["mean"], summary["min"], summary["max"]) == (3, 1, 5)
    assert "mean_ci" not in demo_seeds.over_seeds([1.0, 2.0])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["demo_seeds", *arguments])
    demo_seeds.main()


def fake_results(accuracy: float, low: float) -> dict:
    row = {"accuracy": accuracy, "accuracy_ci": [0.0, 1.0], "mean_length": 3.0, "gain": 0.1, "gain_ci": [low, 0.2]}
    models = {name: {"greedy": row, "sampled": row} for name in ("base", "sft", "dpo", "inspo")}
    return {"settings": {"samples": 8}, "models": models, "seconds": {"total": 1.0}}


def test_an_interrupted_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, ran = tmp_path / "demo_seeds.json", []

    def run_demo(settings, folder, say):
        if settings.seed == 2 and 2 not in ran:
            ran.append(2)
            raise KeyboardInterrupt
        ran.append(settings.seed)
        return fake_results(accuracy=settings.seed / 10, low=[-0.1, 0.1, 0.1][settings.seed])

    monkeypatch.setattr(demo_seeds, "run_demo", run_demo)
    arguments = ("--json", str(file), "--seeds", "0", "1", "2", "--quick")
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *arguments)
    assert json.loads(file.read_text())["summary"]["seeds"] == 2
    run(monkeypatch, *arguments)
    assert ran == [0, 1, 2, 2]
    result = json.loads(file.read_text())
    assert list(result["seeds"]) == ["0", "1", "2"]
    assert result["summary"]["greedy"]["inspo"]["accuracy"]["mean"] == pytest.approx(0.1)
    assert result["summary"]["sampled"]["inspo"]["seeds_with_gain_interval_above_0"] == 2
    assert "2 of 3" in capsys.readouterr().out
    run(monkeypatch, *arguments)  # nothing is left to run
    assert len(ran) == 4 and json.loads(file.read_text())["summary"] == result["summary"]
    assert "--quick" in result["command"] and result["versions"]["torch"] and result["date"]

    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments[:-1])
    assert "differs (settings: " in capsys.readouterr().err
    assert json.loads(file.read_text()) == result
