"""Run the study's command on micro sizes, also after a kill, and check that its report follows from its files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from micro_study import MICRO_SIZE

from benchmarks.study import __main__ as command
from benchmarks.study import execution, plan, report, summary
from benchmarks.study.arms import ARMS
from benchmarks.study.plan import TUNING_SEED, Plan, grid, winners
from benchmarks.study.statistics import t_interval

MICRO = Plan(
    replace(MICRO_SIZE, fit_steps=6),
    seeds=2,
    fewer=2,
    arms=("dpo plain", "dpo inspo", "sft", "dpo plain, no drafts", "dpo inspo, label noise 0.5"),
)


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.sweep
def test_the_command_runs_and_resumes_after_a_kill(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(plan.PLANS, "quick", MICRO)
    arguments = ["--quick", "--part", "arms", "--workers", "1", "--output", "out"]
    command.main(arguments)
    file = tmp_path / "out" / "runs.jsonl"
    whole = lines_of(file)
    jobs = len(plan.all_jobs(MICRO))
    assert len(whole) == 1 + jobs and f"{jobs} of {jobs} runs to do: about" in capsys.readouterr().out
    text = (tmp_path / "out" / "study.md").read_text()
    assert "**Tiny sizes" in text and "InSPO-DPO" in text
    assert all((tmp_path / "out" / f"study_{n}.png").exists() for n in ("arms", "curves"))

    kept = file.read_text().splitlines(keepends=True)
    file.write_text("".join(kept[:-4]) + kept[-4][:50])  # three lines lost, one cut off
    command.main([*arguments, "--report"])
    unfinished = json.loads((tmp_path / "out" / "study.json").read_text())["unfinished"]
    assert unfinished and "Unfinished and left out: " in (tmp_path / "out" / "study.md").read_text()
    executed = []
    monkeypatch.setattr(execution, "ProcessPoolExecutor", lambda *_, **__: InProcess(executed))
    command.main(arguments)
    assert len(executed) == 4 and f"4 of {jobs} runs to do" in capsys.readouterr().out
    again = lines_of(file)
    for line in (*whole, *again):
        line.pop("seconds", None)
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, whole))

    other = Plan(**{**vars(MICRO), "seeds": 3})
    monkeypatch.setitem(plan.PLANS, "quick", other)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "holds runs with other settings (plan)" in capsys.readouterr().err


class InProcess:
    """An executor without processes. It lists the jobs that it runs."""

    def __init__(self, executed):
        self.executed = executed

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, job, *rest):
        from concurrent.futures import Future

        self.executed.append(job)
        future: Future = Future()
        future.set_result(function(job, *rest))
        return future


def test_grids_are_small_and_know_their_edges():
    for arm in ARMS.values():
        assert len(grid(arm)) <= 6 and len(set(grid(arm))) == len(grid(arm))
    small = Plan(**{**vars(MICRO), "arms": ("dpo plain", "sft")})

    def records(best):
        return [
            {
                "arm": name,
                "part": "validation",
                "learning_rate": rate,
                "parameter": parameter,
                "quality": 0.9 if (name, rate, parameter) in best else 0.5,
            }
            for name in ("dpo plain", "sft")
            for rate, parameter in grid(ARMS[name])
        ]

    middle = {("dpo plain", *grid(ARMS["dpo plain"])[0]), ("sft", *grid(ARMS["sft"])[1])}
    assert [won["edge"] for won in winners(small, records(middle)).values()] == [False, False]
    outer = {("dpo plain", *grid(ARMS["dpo plain"])[4]), ("sft", *grid(ARMS["sft"])[-1])}
    found = winners(small, records(outer))
    assert [won["edge"] for won in found.values()] == [True, True]
    assert (found["dpo plain"]["learning_rate"], found["dpo plain"]["parameter"]) == grid(ARMS["dpo plain"])[4]


def test_the_tuning_seed_is_used_for_nothing_else():
    full = plan.PLANS["full"]
    assert full.seeds >= 8 and full.fewer >= 5
    for job in plan.all_jobs(full):
        assert (job.seed == TUNING_SEED) == (job.part == "validation") or job.arm not in ARMS


# --- from runs to numbers ---


def record(arm, seed, edits, lengths, **more):
    quality = 1 - sum(int(e, 36) for e in edits) / len(edits) / 4
    return {
        "arm": arm,
        "seed": seed,
        "part": "test",
        "edits": edits,
        "lengths": lengths,
        "right_lengths": "44",
        "quality": quality,
        "unended": 0.0,
        "finite": True,
        **more,
    }


def test_win_rates_follow_from_edits_and_lengths():
    runs = summary.Runs([record("base", 0, "0044", "4444"), record("dpo plain", 0, "0004", "4644")])
    sigmoid = 1 / (1 + np.exp(-np.array([0.0, 0.2 * 2, 6.0, 0.0])))
    assert runs.win_rate("dpo plain", "base", 0) == pytest.approx(sigmoid.mean())
    assert runs.win_rate("base", "dpo plain", 0) == pytest.approx(1 - sigmoid.mean())
    assert runs.win_rate("base", "base", 0) == 0.5
    np.testing.assert_allclose(runs.answers["dpo plain", 0].quality, [[1, 1], [1, 0]])


@pytest.mark.parametrize(
    ("change", "collapsed"),
    [
        ({}, False),
        ({"quality": 0.41}, False),
        ({"quality": 0.39}, True),
        ({"unended": 0.3}, True),
        ({"finite": False}, True),
    ],
)
def test_collapse_is_what_the_report_says_it_is(change, collapsed):
    base = record("base", 0, "2222", "4444")  # quality one half
    runs = summary.Runs([base, record("dpo plain", 0, "2222", "4444", **change)])
    assert runs.collapsed("dpo plain", 0) is collapsed


def test_the_finding_says_what_the_contrasts_say():
    def contrast(kind, objective, mean, p, holm_p=None):
        return {"kind": kind, "objective": objective, "quality": {"mean": mean, "p": p, "holm_p": holm_p}}

    said = report.finding(
        {
            "seeds": 8,
            "fewer_seeds": 5,
            "arms": {"dpo inspo, no drafts": {"collapsed": 4, "seeds": 5}},
            "contrasts": [
                contrast("inspo - plain", "DPO", -0.1, 0.001, 0.005),
                contrast("inspo - plain", "IPO", 0.1, 0.02, 0.08),
                contrast("inspo - plain", "ORPO", 0.1, 0.001, 0.004),
                contrast("inspo - shuffled", "DPO", 0.1, 0.3),
                contrast("anchored - inspo", "DPO", 0.02, 0.01),
                contrast("anchored - plain", "DPO", -0.02, 0.04),
            ],
        }
    )
    assert "the plain objective: better for ORPO, worse for DPO, no significant difference for IPO (8 seeds" in said
    assert "as the alternative: no significant difference for DPO (5 seeds" in said
    assert "against InSPO: better for DPO; against the plain objective: worse for DPO (8 seeds, not adjusted)." in said
    assert "collapses on 4 of 5 seeds" in said


# --- the committed results ---


@pytest.fixture(scope="module")
def committed():
    return json.loads((report.RESULTS / "study.json").read_text())


def test_the_committed_report_is_what_its_files_say(committed):
    tabular = json.loads(report.TABULAR.read_text())
    assert (report.DOCS / "study.md").read_text() == report.text(committed, tabular)
    assert all((report.DOCS / f"study_{name}.png").exists() for name in ("arms", "curves", "ablations"))


def test_the_committed_numbers_follow_from_the_committed_runs(committed):
    records = lines_of(report.RESULTS / "runs.jsonl")[1:]
    runs = summary.Runs(records)
    for name, row in committed["arms"].items():
        seeds = runs.seeds(name)
        assert row["quality"] == t_interval(runs.field(name, "quality", seeds)) and row["seeds"] == len(seeds)
        for seed in seeds:  # what training reported agrees with the answers
            assert runs.answers[name, seed].quality.mean() == pytest.approx(runs.records[name, seed]["quality"])
    for entry in committed["contrasts"]:
        seeds = runs.seeds(entry["first"], entry["second"])
        differences = [
            runs.records[entry["first"], seed]["quality"] - runs.records[entry["second"], seed]["quality"]
            for seed in seeds
        ]
        assert entry["quality"]["mean"] == pytest.approx(np.mean(differences))
    assert committed["tuning"] == json.loads(json.dumps(winners(plan.PLANS["full"], records)))


def test_committed_runs_match_arms_and_settings(monkeypatch):
    monkeypatch.setattr(execution.torch, "__version__", lines_of(report.RESULTS / "runs.jsonl")[0]["torch"])
    records = execution.open_records(plan.PLANS["full"], report.RESULTS, "cpu")
    assert all(job in records for job in plan.all_jobs(plan.PLANS["full"], records.by_key.values()))


def test_committed_table_arms_had_equal_training(committed):
    assert committed["checks"]["updates"] == [plan.PLANS["full"].size.updates]
    assert committed["checks"]["pairs_equal"]
