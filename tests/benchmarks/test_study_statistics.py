"""Test the study's statistics against scipy, against values computed by hand, and on planted coefficients."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from benchmarks.study.statistics import (
    RIDGE_ARM,
    RIDGE_PROMPT,
    bootstrap_win_rates,
    fit_length_model,
    holm,
    t_interval,
)


def test_t_interval_is_scipys():
    values = [0.1, -0.05, 0.2, 0.08, 0.03]
    found, known = t_interval(values), scipy.stats.ttest_1samp(values, 0.0)
    assert found["p"] == pytest.approx(known.pvalue)
    assert (found["low"], found["high"]) == pytest.approx(tuple(known.confidence_interval(0.95)))
    assert found["n"] == 5


def test_t_interval_needs_two_different_values():
    assert t_interval([0.5, 0.5]) == {"mean": 0.5, "low": 0.5, "high": 0.5, "p": None, "n": 2}
    with pytest.raises(ValueError, match="at least two"):
        t_interval([0.5])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]


def planted(rng, prompts=400, answers=3):
    """Return verdicts with planted logits, and lengths that depend on the arm."""
    arm, length = np.array([-0.5, 0.0, 0.8, 0.8]), 1.5
    difficulty = rng.normal(0, 1.0, prompts)
    difficulty -= difficulty.mean()
    differences = rng.normal(0, 3, (prompts, answers, 4)) + np.array([-2.0, 0.0, 0.0, 4.0])
    logits = arm + length * np.tanh(differences / differences.std()) + difficulty[:, None, None]
    return arm, length, difficulty, differences, 1 / (1 + np.exp(-logits))


def test_the_length_model_recovers_planted_coefficients():
    arm, length, difficulty, differences, verdicts = planted(np.random.default_rng(0), answers=12)
    found = fit_length_model(verdicts, differences)
    assert found.length == pytest.approx(length, abs=0.06)
    np.testing.assert_allclose(found.arm, arm, atol=0.06)
    assert np.corrcoef(found.prompt, difficulty)[0, 1] > 0.99
    truth = (1 / (1 + np.exp(-(arm + difficulty[:, None])))).mean(0)
    np.testing.assert_allclose(found.win_rates, truth, atol=0.02)
    raw = verdicts.mean((0, 1))
    assert raw[3] - raw[2] > 0.1  # the longer of two equal arms seems better
    assert found.win_rates[3] == pytest.approx(found.win_rates[2], abs=0.01)


def test_the_length_model_counts_ties_as_half():
    rng = np.random.default_rng(1)
    _, length, _, differences, probability = planted(rng, prompts=3000)
    found = fit_length_model((rng.random(probability.shape) < probability).astype(float), differences)
    assert found.length == pytest.approx(length, rel=0.15)
    np.testing.assert_allclose(found.win_rates[3], found.win_rates[2], atol=0.03)
    ties = fit_length_model(np.full((50, 2, 3), 0.5), differences[:50, :2, :3])
    np.testing.assert_allclose(ties.win_rates, 0.5, atol=1e-6)
    assert abs(ties.length) < 1e-6


def test_the_length_model_minimises_its_penalised_likelihood():
    _, _, _, differences, verdicts = planted(np.random.default_rng(2), prompts=6, answers=2)
    present = np.ones((6, 4))
    present[:3, 1] = 0.0
    found = fit_length_model(verdicts, differences, present)
    seen = np.broadcast_to(present[:, None, :], verdicts.shape)
    taste = np.tanh(differences / differences[seen > 0].std())

    def loss(x):
        z = x[:4] + x[4] * taste + x[5:, None, None]
        penalty = RIDGE_PROMPT / 2 * x[5:] @ x[5:] + RIDGE_ARM / 2 * x[:5] @ x[:5]
        return (seen * (np.logaddexp(0, z) - verdicts * z)).sum() + penalty

    known = scipy.optimize.minimize(loss, np.zeros(11), method="BFGS", options={"gtol": 1e-7}).x
    np.testing.assert_allclose(np.concatenate([found.arm, [found.length], found.prompt]), known, atol=1e-4)


def test_an_arm_that_always_wins_stays_finite():
    verdicts = np.stack([np.ones((30, 2)), np.full((30, 2), 0.5)], -1)
    found = fit_length_model(verdicts, np.zeros((30, 2, 2)))
    assert 0.95 < found.win_rates[0] < 1 and np.isfinite(found.arm).all()


def test_the_bootstrap_resamples_and_refits():
    _, _, _, differences, verdicts = planted(np.random.default_rng(3), prompts=60, answers=1)
    seeds = np.repeat(np.arange(6), 10)
    verdicts = np.where((seeds < 3)[:, None, None], verdicts, verdicts * 0.5)  # seeds that differ
    present = np.ones((60, 4))
    present[10:, 0] = 0.0  # an arm of the first seed alone
    drawn = bootstrap_win_rates(verdicts, differences, present, seeds, replicates=40, seed=0)
    whole = fit_length_model(verdicts, differences, present).win_rates
    assert drawn.shape == (40, 4)
    assert (drawn[:, 1].min() < whole[1] < drawn[:, 1].max()) and drawn[:, 1].std() > 0.02
    assert 0 < np.isnan(drawn[:, 0]).sum() < 40  # seeds are drawn whole: some resamples lack its only seed
