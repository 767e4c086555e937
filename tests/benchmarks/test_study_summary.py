"""Recompute the study's numbers from the committed runs with simple code, and with scipy where possible."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from benchmarks.study import plan, report, statistics, summary

OBJECTIVES = ("dpo", "ipo", "simpo", "rdpo", "orpo")


@pytest.fixture(scope="module")
def records():
    return [json.loads(line) for line in (report.RESULTS / "runs.jsonl").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def found(records):
    """Return the summary of the committed runs, with only a few bootstrap draws."""
    return summary.summarize(plan.PLANS["full"], records, replicates=3)


@pytest.fixture(scope="module")
def answers(records):
    """Return, by (arm, seed), exact quality and length as (prompts, answers)."""
    tests = {(r["arm"], r["seed"]): r for r in records if r["part"] == "test"}

    def numbers(text):
        return np.array([int(digit, 36) for digit in text], dtype=float)

    result = {}
    for (arm, seed), record in tests.items():
        right = numbers(tests["base, no drafts" if "no drafts" in arm else "base", seed]["right_lengths"])
        edits, lengths = (numbers(record[name]).reshape(len(right), -1) for name in ("edits", "lengths"))
        result[arm, seed] = 1 - edits / right[:, None], lengths
    return result


def quality(answers, arm, seed):
    return answers[arm, seed][0].mean()


def win_rate(answers, arm, other, seed):
    (better, longer), (worse, shorter) = answers[arm, seed], answers[other, seed]
    return (1 / (1 + np.exp(-6 * (better - worse) - 0.2 * (longer - shorter)))).mean()


def length_controlled(answers, arms, seed):
    """Fit the documented regression with a general optimizer."""
    base_quality, base_length = answers["base", seed]
    verdicts, lengths = [], []
    for arm in arms:
        arm_quality, arm_length = answers[arm, seed]
        lengths.append(arm_length - base_length)
        verdicts.append(1 / (1 + np.exp(-6 * (arm_quality - base_quality) - 0.2 * lengths[-1])))
    y, d = np.array(verdicts), np.array(lengths)  # (arms, prompts, answers)
    taste, (n, prompts, _) = np.tanh(d / d.std()), y.shape

    def loss(parameters):
        arm, phi, prompt = parameters[:n], parameters[n], parameters[n + 1 :]
        z = arm[:, None, None] + phi * taste + prompt[:, None]
        slope = 1 / (1 + np.exp(-z)) - y
        value = (np.logaddexp(0, z) - y * z).sum() + prompt @ prompt / 2 + 1e-3 / 2 * (arm @ arm + phi**2)
        gradient = [slope.sum((1, 2)) + 1e-3 * arm, [(slope * taste).sum() + 1e-3 * phi], slope.sum((0, 2)) + prompt]
        return value, np.concatenate(gradient)

    fit = scipy.optimize.minimize(
        loss,
        np.zeros(n + 1 + prompts),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-6},
    )
    arm, prompt = fit.x[:n], fit.x[n + 1 :]
    return dict(zip(arms, (1 / (1 + np.exp(-arm[:, None] - prompt))).mean(1)))


def assert_interval(got, expected):
    test = scipy.stats.ttest_1samp(expected, 0)
    low, high = test.confidence_interval()
    assert (got["mean"], got["low"], got["high"], got["p"]) == pytest.approx(
        (np.mean(expected), low, high, test.pvalue), rel=1e-6, abs=1e-9
    )


def test_all_but_the_bootstrap_is_as_committed(found):
    committed = json.loads((report.RESULTS / "study.json").read_text())

    def fixed(result):
        result = json.loads(json.dumps({name: result[name] for name in found}))
        for row in result["arms"].values():
            row["lc_win_rate"] = row.get("lc_win_rate", {}).get("mean")
        return result

    def flat(value, path=""):
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from flat(item, f"{path}/{key}")
        else:
            yield path, value

    expected = dict(flat(fixed(committed)))
    assert dict(flat(fixed(found))) == {
        path: pytest.approx(value, rel=1e-6, abs=1e-12) if isinstance(value, float) else value
        for path, value in expected.items()
    }


def test_contrasts_are_paired_and_adjusted(found, answers):
    contrasts = {(c["kind"], c["first"].split()[0]): c for c in found["contrasts"]}
    p_values = {"quality": [], "win_rate": []}
    for name in OBJECTIVES:
        inspo, plain, seeds = f"{name} inspo", f"{name} plain", range(8)
        differences = {
            "quality": [quality(answers, inspo, s) - quality(answers, plain, s) for s in seeds],
            "win_rate": [win_rate(answers, inspo, "base", s) - win_rate(answers, plain, "base", s) for s in seeds],
        }
        for measure, values in differences.items():
            assert_interval(contrasts["inspo - plain", name][measure], values)
            p_values[measure].append(scipy.stats.ttest_1samp(values, 0).pvalue)
        twice = [quality(answers, f"{name} anchored", s) - quality(answers, f"{name} twice", s) for s in range(5)]
        assert_interval(contrasts["anchored - twice", name]["quality"], twice)
    for measure, raw in p_values.items():
        adjusted, largest = {}, 0.0
        for left, (p, name) in zip(range(5, 0, -1), sorted(zip(raw, OBJECTIVES))):
            adjusted[name] = largest = max(largest, min(1.0, left * p))
        for name in OBJECTIVES:
            assert contrasts["inspo - plain", name][measure]["holm_p"] == pytest.approx(adjusted[name], rel=1e-6)
    bases = [quality(answers, f"dpo {v}, no drafts", s) for v in ("inspo", "plain") for s in range(5)]
    assert_interval(contrasts["no drafts", "dpo"]["quality"], [a - b for a, b in zip(bases[:5], bases[5:])])


def test_rows_hold_quality_gain_and_win_rates(found, answers):
    for arm, twin, base in (
        ("dpo inspo", "dpo plain", "base"),
        ("orpo anchored", "orpo plain", "base"),
        ("dpo inspo, no drafts", "dpo plain, no drafts", "base, no drafts"),
    ):
        row = found["arms"][arm]
        seeds = range(row["seeds"])
        assert row["quality"]["mean"] == pytest.approx(np.mean([quality(answers, arm, s) for s in seeds]))
        assert_interval(row["gain"], [quality(answers, arm, s) - quality(answers, base, s) for s in seeds])
        for measure, other in (("win_rate", base), ("win_rate_twin", twin)):
            rates = [win_rate(answers, arm, other, s) for s in seeds]
            assert row[measure]["mean"] == pytest.approx(np.mean(rates))
        assert row["length"] == pytest.approx(np.mean([answers[arm, s][1].mean() for s in seeds]))


def test_length_controlled_win_rates_track_quality(found, answers, records):
    judged = [name for name, row in found["arms"].items() if "lc_win_rate" in row]
    table = [name for name in judged if found["arms"][name]["seeds"] == 8]
    ranks = {name: [] for name in ("win_rate", "lc_win_rate", "length")}
    differences = []
    for seed in range(8):
        rates = length_controlled(answers, [name for name in judged if (name, seed) in answers], seed)
        differences.append(rates["dpo inspo"] - rates["dpo plain"])
        measured = {
            "win_rate": [win_rate(answers, name, "base", seed) for name in table],
            "lc_win_rate": [rates[name] for name in table],
            "length": [answers[name, seed][1].mean() for name in table],
        }
        for name, values in measured.items():
            by_quality = [quality(answers, arm, seed) for arm in table]
            ranks[name].append(scipy.stats.spearmanr(values, by_quality).statistic)
    contrast = next(c for c in found["contrasts"] if (c["kind"], c["objective"]) == ("inspo - plain", "DPO"))
    assert contrast["lc_win_rate"]["mean"] == pytest.approx(np.mean(differences), abs=1e-5)
    assert found["tracking"]["arms"]["n"] == len(table)
    for name, values in ranks.items():
        assert found["tracking"][name]["mean"] == pytest.approx(np.tanh(np.mean(np.arctanh(values))), abs=2e-3)
        assert -1 <= found["tracking"][name]["low"] <= found["tracking"][name]["high"] <= 1
    difference = np.mean(ranks["lc_win_rate"]) - np.mean(ranks["win_rate"])
    assert found["tracking"]["difference"]["mean"] == pytest.approx(difference, abs=2e-3)


def test_curves_are_means_over_seeds(found, records):
    mine = [r["curve"] for r in records if (r["arm"], r["part"]) == ("dpo inspo", "test")]
    assert len(mine) == 8 and [point["step"] for point in found["curves"]["dpo inspo"]][::5] == [0, 80]
    for at, point in enumerate(found["curves"]["dpo inspo"]):
        assert point == pytest.approx({name: np.mean([curve[at][name] for curve in mine]) for name in point})


def test_the_bootstrap_draws_prompts_within_seeds():
    """With one seed, only prompts can be resampled."""
    rng = np.random.default_rng(0)
    verdicts, lengths = rng.random((20, 2, 2)), rng.normal(size=(20, 2, 2))
    drawn = statistics.bootstrap_win_rates(
        verdicts, lengths, np.ones((20, 2)), np.zeros(20, dtype=np.int64), replicates=5, seed=0
    )
    assert len(np.unique(drawn[:, 0])) == 5
