"""Test the over-training study's summary: find planted differences, and recompute the committed numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.stats

from benchmarks.study import axis_report, axis_summary, statistics
from benchmarks.study.axis import AXIS_PLANS, BASE, DECODINGS
from benchmarks.study.axis_summary import CONCLUSIONS, MARGIN, AxisRuns

PLAN = replace(AXIS_PLANS["full"], pairs=(128,), tested_seeds=12, seeds=3, arms=("plain", "inspo", "other", "dropout"))
STEPS = (20, 40, 80, 160)


def record(arm, seed, qualities, validation=None, **more):
    """Return a run with these qualities at its checkpoints, for all decodings."""
    steps = (0,) if arm == BASE else STEPS
    points = [
        {"updates": step, "validation": v, **{d: {"quality": q, "length": 5.0, "unended": 0.0} for d in DECODINGS}}
        for step, q, v in zip(steps, qualities, validation or qualities, strict=True)
    ]
    run = {"arm": arm, "pairs": 128, "seed": seed, "checkpoints": points, "seconds": 1.0}
    return run if arm == BASE else {**run, "found_pairs": 128, "finite": True, **more}


def planted(gain_at_80=0.05, gain_at_best=0.0, own=0.0, noise=0.01):
    """Return runs in which plain falls after 40 updates and InSPO has the given differences, up to ``noise``."""
    rng = np.random.default_rng(0)
    found = []
    for seed in range(730_000, 730_012):
        level = 0.5 + 0.1 * rng.standard_normal()
        plain = np.array([0.08, 0.12, 0.05, 0.0]) + level
        inspo = plain + [0.0, gain_at_best, gain_at_80, 0.05] + noise * rng.standard_normal(4)
        other = inspo - own + noise * rng.standard_normal(4)
        validation = [0.5, 0.7, 0.6, 0.4]
        found.append(record(BASE, seed, [level]))
        for arm, qualities in (("plain", plain), ("inspo", inspo), ("other", other)):
            found.append(record(arm, seed, list(map(float, qualities)), validation))
    for seed in range(730_000, 730_003):
        found.append(record("dropout", seed, [0.5, 0.5, 0.5, 0.5]))
    return found


@pytest.mark.parametrize(
    ("options", "verdicts"),
    [
        ({}, ("supported", "equal", "equal")),
        ({"gain_at_80": 0.0, "gain_at_best": 0.05, "own": 0.05}, ("neither", "supported", "supported")),
        ({"gain_at_80": -0.05, "gain_at_best": -0.05, "own": -0.05}, ("contradicted",) * 3),
        ({"noise": 0.2}, ("neither",) * 3),
    ],
)
def test_planted_differences_lead_to_their_conclusions(options, verdicts):
    result = axis_summary.summarize(PLAN, planted(**options))
    tests = result["hypotheses"]
    assert tuple(test["verdict"] for test in tests.values()) == verdicts
    assert [test["conclusion"] for test in tests.values()] == [CONCLUSIONS[n][v] for n, v in zip(tests, verdicts)]
    assert result["over_trained"]["over_trained"]
    assert not result["deviations"]


def test_every_conclusion_is_in_the_protocol():
    text = (axis_report.DOCS / "study_protocol.md").read_text()
    outcome = {"supported": "supported", "contradicted": "contradicted", "equal": "neither, TOST passes"}
    for name, conclusions in CONCLUSIONS.items():
        for verdict, words in conclusions.items():
            undecided = "neither, TOST fails" if "equal" in conclusions else "neither"
            assert f"| {name} {outcome.get(verdict, undecided)} | {words} |" in text
    assert f"margin of **{MARGIN:g}**" in text


def test_validation_picks_the_earliest_best_checkpoint():
    runs = AxisRuns(PLAN, [record("plain", 1, [0.1, 0.2, 0.9, 0.3], [0.5, 0.6, 0.1, 0.6])])
    assert runs.best_point(128, "plain", 1)["updates"] == 40
    assert runs.best(128)("plain", 1) == 0.2


def test_deviations_name_short_cells_lost_losses_and_missing_pairs():
    records = planted()
    records = [r for r in records if not (r["arm"] == "other" and r["seed"] == 730_011)]
    records[1] |= {"finite": False, "found_pairs": 120}
    found = axis_summary.summarize(PLAN, records)["deviations"]
    assert found == [
        "128 pairs, InSPO-DPO, another pair's alternative: 11 of 12 seeds.",
        "128 pairs, plain DPO, seed 730000: the loss became non-finite.",
        "128 pairs, plain DPO, seed 730000: only 120 pairs.",
    ]


def test_a_cell_of_one_seed_has_no_numbers():
    records = [r for r in planted() if r["arm"] != "dropout" or r["seed"] == 730_000]
    result = axis_summary.summarize(PLAN, records)
    assert result["cells"]["128"]["dropout"] == {"seeds": 1, "planned": 3} and "dropout" not in result["equivalence"]
    command = {"versions": {"torch": "2"}, "date": "2026-11-25", "hardware": {"cpu": "a CPU", "cores": 2}}
    plan = json.loads(json.dumps(asdict(PLAN)))
    text = axis_report.text(result | command | {"plan": plan})
    assert "128 pairs, InSPO-DPO, conditioned reference, 50% dropout: 1 of 3 seeds." in text


def test_the_report_says_where_the_best_stop_is():
    plan = {"plan": json.loads(json.dumps(asdict(PLAN)))}
    inside = axis_summary.summarize(PLAN, planted()) | plan
    assert "the smallest allowed" not in axis_report._edge(inside)
    records = planted()
    for run in records:
        if run["arm"] == "plain":
            run["checkpoints"][0]["validation"] = 0.9
    at_edge = axis_summary.summarize(PLAN, records) | plan
    assert "This number is 20, the smallest allowed, on 12 of" in axis_report._edge(at_edge)


def test_findings_mention_arms_below_the_base():
    plan = {"plan": json.loads(json.dumps(asdict(PLAN)))}
    words = ", both below the base that they started from"
    assert words not in axis_report.finding(axis_summary.summarize(PLAN, planted()) | plan)
    records = planted()
    for run in records:
        if run["arm"] == BASE:
            run["checkpoints"][0]["greedy"]["quality"] += 0.5
    assert words in axis_report.finding(axis_summary.summarize(PLAN, records) | plan)


def test_equivalence_is_two_one_sided_tests():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.015, 0.03):
        values = shift + 0.01 * rng.standard_normal(10)
        found = statistics.equivalence(list(values), 0.02)
        below = scipy.stats.ttest_1samp(values, 0.02, alternative="less").pvalue
        above = scipy.stats.ttest_1samp(values, -0.02, alternative="greater").pvalue
        assert found["p"] == pytest.approx(max(below, above))
        assert found["equivalent"] == (-0.02 < found["low"] and found["high"] < 0.02)
    assert statistics.equivalence([0.0, 0.0], 0.02)["equivalent"]
    assert not statistics.equivalence([0.05, 0.05], 0.02)["equivalent"]
    with pytest.raises(ValueError, match="margin must be positive"):
        statistics.equivalence([0.0, 0.1], 0.0)


# --- the committed results ---


@pytest.fixture(scope="module")
def committed():
    return json.loads((axis_report.RESULTS / "axis.json").read_text())


@pytest.fixture(scope="module")
def records(committed):
    lines = [
        json.loads(line)
        for pairs in committed["plan"]["pairs"]
        for line in (axis_report.RESULTS / f"{pairs}.jsonl").read_text().splitlines()[1:]
    ]
    return {(r["pairs"], r["arm"], r["seed"]): r for r in lines}


def test_the_committed_report_is_what_its_file_says(committed):
    assert (axis_report.DOCS / "study_axis.md").read_text() == axis_report.text(committed)
    assert (axis_report.DOCS / "study_axis.png").exists()


def qualities(records, arm, seed, pairs=128):
    """Return {updates: exact quality of the greedy answers}, computed from their edits."""
    right = np.array([int(digit) for digit in records[128, "base", seed]["right_lengths"]])
    return {
        point["updates"]: float(np.mean(1 - np.array([int(digit, 36) for digit in point["edits"]]) / right))
        for point in records[pairs, arm, seed]["checkpoints"]
    }


def best(records, arm, seed):
    points = records[128, arm, seed]["checkpoints"]
    highest = max(point["validation"] for point in points)
    return qualities(records, arm, seed)[min(p["updates"] for p in points if p["validation"] == highest)]


def test_the_committed_tests_follow_from_the_answers(committed, records):
    seeds = sorted(
        set.intersection(*({s for p, a, s in records if (p, a) == (128, arm)} for arm in ("plain", "inspo", "other")))
    )
    at_80 = {arm: [qualities(records, arm, seed)[80] for seed in seeds] for arm in ("plain", "inspo", "other")}
    at_best = {arm: [best(records, arm, seed) for seed in seeds] for arm in ("plain", "inspo")}
    pairs = {
        "H1": (at_80["inspo"], at_80["plain"]),
        "H2": (at_best["inspo"], at_best["plain"]),
        "H3": (at_80["inspo"], at_80["other"]),
    }
    p_values = {name: scipy.stats.ttest_rel(*both).pvalue for name, both in pairs.items()}
    ranked = sorted(p_values, key=p_values.__getitem__)
    adjusted = np.maximum.accumulate([min(1, (3 - i) * p_values[name]) for i, name in enumerate(ranked)])
    for name, both in pairs.items():
        test = committed["hypotheses"][name]
        assert test["n"] == len(seeds)
        assert test["mean"] == pytest.approx(np.mean(np.subtract(*both)), abs=2e-5)
        assert test["holm_p"] == pytest.approx(adjusted[ranked.index(name)], rel=0.02, abs=1e-6)
        if name != "H1":
            interval = scipy.stats.ttest_rel(*both).confidence_interval(0.9)
            equal = committed["equivalence"][name]
            assert equal["low"] == pytest.approx(interval.low, abs=5e-5)
            assert equal["equivalent"] == (-MARGIN < interval.low and interval.high < MARGIN)


def test_the_committed_gains_follow_from_the_answers(committed, records):
    for pairs, arms in committed["cells"].items():
        for arm, cell in arms.items():
            seeds = [s for p, a, s in records if (p, a) == (int(pairs), arm)]
            assert cell["seeds"] == len(seeds)
            for updates, row in cell.get("updates", {}).items():
                gains = [
                    qualities(records, arm, seed, int(pairs))[int(updates)] - qualities(records, "base", seed)[0]
                    for seed in seeds
                ]
                assert row["greedy"]["minus base"]["mean"] == pytest.approx(np.mean(gains), abs=2e-5)


def test_the_committed_runs_are_of_the_protocols_plan(committed):
    assert committed["plan"] == json.loads(json.dumps(asdict(AXIS_PLANS["full"])))
    for pairs in committed["plan"]["pairs"]:
        file = axis_report.RESULTS / f"{pairs}.jsonl"
        assert file.stat().st_size < 350_000
        settings = json.loads(file.read_text().splitlines()[0])
        assert {name: settings["plan"][name] for name in settings["plan"] if name != "arms"} == {
            name: value for name, value in committed["plan"].items() if name != "arms"
        }
