from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import real_pairs, report
from training.data import Pair

PAIRS = Path(__file__).parents[1] / "training/pairs.jsonl"


def test_no_prompt_is_both_trained_on_and_held_out():
    pairs = [Pair([i // 3], [i], [i + 1]) for i in range(60)]
    training, held_out = real_pairs.split_by_prompt(pairs, 0.3, seed=1)
    assert len(held_out) == 18 and sorted(training + held_out) == sorted(pairs)
    assert not {tuple(p.prompt) for p in training} & {tuple(p.prompt) for p in held_out}


def test_results_hold_what_is_reported_and_no_path_of_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(real_pairs, "OBJECTIVES", {"simpo": {"beta": 1.5}})
    out = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["real_pairs", "--pairs", str(PAIRS), "--json", str(out), "--base_steps", "2",
                                      "--steps", "1"])  # fmt: skip
    real_pairs.main()
    result = json.loads(out.read_text())
    assert [(run["objective"], run["conditioned"]) for run in result["runs"]] == [("simpo", True), ("simpo", False)]
    assert all(run["parameters"] == {"beta": 1.5} for run in result["runs"])
    assert "--pairs pairs.jsonl" in result["command"] and str(PAIRS) not in out.read_text()
    assert "simpo, InSPO" in report.real_pairs(result)
