from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import loop_overhead, real_pairs, report
from training.data import Pair

PAIRS = Path(__file__).parents[1] / "training/pairs.jsonl"


def test_training_and_held_out_prompts_are_disjoint():
    pairs = [Pair([i // 3], [i], [i + 1]) for i in range(60)]
    training, held_out = real_pairs.split_by_prompt(pairs, 0.3, seed=1)
    assert len(held_out) == 18 and sorted(training + held_out) == sorted(pairs)
    assert not {tuple(p.prompt) for p in training} & {tuple(p.prompt) for p in held_out}


@pytest.mark.sweep
def test_results_are_complete_without_data_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(real_pairs, "OBJECTIVES", {"simpo": {"beta": 1.5}})
    out = tmp_path / "r.json"
    real_pairs.main(["--pairs", str(PAIRS), "--json", str(out), "--base_steps", "2", "--steps", "1"])
    result = json.loads(out.read_text())
    assert [(run["objective"], run["conditioned"]) for run in result["runs"]] == [("simpo", True), ("simpo", False)]
    assert all(run["parameters"] == {"beta": 1.5} for run in result["runs"])
    assert "--pairs pairs.jsonl" in result["command"] and str(PAIRS) not in out.read_text()
    assert "simpo, InSPO" in report.real_pairs(result)


def test_loop_overhead_alternates_and_reports_median_and_quartiles(tmp_path, monkeypatch, capsys):
    ran, seconds = [], {"bare": iter([2.0, 1.0, 4.0, 2.0, 1.0]), "loop": iter([3.0, 1.0, 5.0, 4.0, 1.0])}

    def run(name):
        def seconds_of(config, pairs, steps):
            ran.append((name, steps))
            return next(seconds[name])

        return seconds_of

    out = tmp_path / "r.json"
    with monkeypatch.context() as patch:
        patch.setattr(loop_overhead, "RUNS", {name: run(name) for name in ("bare", "loop")})
        loop_overhead.main([f"--pairs={PAIRS}", "--json", str(out)])
    assert ran == [
        (name, 100) for name in ("bare", "loop", "loop", "bare", "bare", "loop", "loop", "bare", "bare", "loop")
    ]
    result = json.loads(out.read_text())
    assert result["loop_over_bare"] == {"median": 1.25, "q1": 1.0, "q3": 1.5}
    assert result["command"].endswith("--pairs=pairs.jsonl --json FILE") and str(PAIRS) not in out.read_text()
    said = capsys.readouterr().out
    assert "loop / bare: 1.25 (quartiles 1-1.5)" in said and "loop, s: 3 (quartiles 1-4)" in said
    text = report.loop_overhead(result)
    assert "took 1.25 (1.00-1.50) times as long" in text and "5 rounds of 100 steps" in text


def test_loop_overhead_times_both(tmp_path):
    out = tmp_path / "r.json"
    loop_overhead.main(["--pairs", str(PAIRS), "--json", str(out), "--steps", "2", "--rounds", "1"])
    result = json.loads(out.read_text())
    assert all(0 < seconds[0] < 60 for seconds in result["seconds"].values()) and result["save_every"] == 2


@pytest.mark.parametrize("module", [loop_overhead, real_pairs])
@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--pairs", "none.jsonl"], "--pairs: none.jsonl: no such file"),
        (["--pairs", __file__], "not JSON"),
        (["--pairs", str(PAIRS), "--steps", "0"], "--steps: 0 is not a whole number of at least 1"),
        (["--pairs", str(PAIRS), "--json", "."], "--json: . is a folder"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(module, arguments, says, tmp_path, capsys):
    with pytest.raises(SystemExit):
        module.main(["--json", str(tmp_path / "r.json"), *arguments])
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_too_few_pairs_are_refused(tmp_path, capsys):
    one = tmp_path / "one.jsonl"
    one.write_text(PAIRS.read_text().splitlines()[0] + "\n")
    for module, arguments, says in (
        (loop_overhead, ["--pairs", str(PAIRS), "--steps", "1"], "give at least 2"),
        (real_pairs, ["--pairs", str(one)], "have the same prompt"),
    ):
        with pytest.raises(SystemExit):
            module.main([*arguments, "--json", str(tmp_path / "r.json")])
        assert says in capsys.readouterr().err
