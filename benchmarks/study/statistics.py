"""Compute intervals over seeds, adjusted p-values, and win rates without the judge's preference for length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray

Array = NDArray[np.float64]

RIDGE_PROMPT, RIDGE_ARM = 1.0, 1e-3


def t_interval(values: Sequence[float], level: float = 0.95) -> dict[str, Any]:
    """Return mean, t interval and two-sided p-value against 0. Seeds are the observations; pass differences to pair.

    If all values are equal there is no test: the interval is the mean itself and p is None.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} observations: an interval needs at least two")
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = error * float(scipy.stats.t.ppf((1 + level) / 2, len(values) - 1))
    p = float(2 * scipy.stats.t.sf(abs(mean) / error, len(values) - 1)) if error > 0 else None
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p, "n": len(values)}


def equivalence(values: Sequence[float], margin: float, level: float = 0.05) -> dict[str, Any]:
    """Run two one-sided paired t-tests (TOST): is the mean difference between -``margin`` and +``margin``?

    Returns the mean, its 1 - 2 ``level`` interval (``low``, ``high``), the larger of the two p-values and
    ``equivalent``: whether both tests reject, that is, whether the interval lies within the margins.
    """
    if margin <= 0:
        raise ValueError(f"margin must be positive, got {margin}")
    interval = t_interval(values, 1 - 2 * level)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    inside = margin - abs(interval["mean"])
    p = float(scipy.stats.t.sf(inside / error, len(values) - 1)) if error > 0 else float(inside <= 0)
    return interval | {"p": p, "margin": margin, "equivalent": p < level}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values. A hypothesis is rejected at the family-wise levels above its value."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class LengthModel:
    """P(arm's answer to prompt x preferred) = sigmoid(arm[a] + length * tanh(length difference / scale) + prompt[x]).

    ``win_rates`` (arms,) are the predictions at a length difference of 0, averaged over each arm's prompts.
    """

    arm: Array
    length: float
    prompt: Array
    scale: float
    win_rates: Array


def fit_length_model(verdicts: Array, length_differences: Array, present: Array | None = None) -> LengthModel:
    """Fit a ridge logistic regression jointly over all arms, as for AlpacaEval's length-controlled win rates.

    Args:
        verdicts: (prompts, answers, arms) in [0, 1], 1/2 for a tie: the arm's answer against its opponent's.
        length_differences: same shape, the arm's length minus the opponent's, in tokens.
        present: (prompts, arms), 1 if the arm answered the prompt; None: all arms answered all prompts.

    The penalty is (RIDGE_PROMPT/2) |prompt|^2 + (RIDGE_ARM/2)(|arm|^2 + length^2). It models difficulties as a
    population around 0, and keeps the other coefficients finite if an arm always wins. Newton's method runs until the
    gradient per observation is below 1e-8.
    """
    prompts, arms = verdicts.shape[0], verdicts.shape[2]
    present = np.ones((prompts, arms)) if present is None else present
    weights = np.broadcast_to(present[:, None, :], verdicts.shape)
    scale = float(length_differences[weights > 0].std()) or 1.0
    taste = np.tanh(length_differences / scale)
    arm, length, prompt = np.zeros(arms), 0.0, np.zeros(prompts)

    def logits() -> Array:
        return arm + length * taste + prompt[:, None, None]

    def loss() -> float:
        z = logits()
        fit = float((weights * (np.logaddexp(0, z) - verdicts * z)).sum())
        return fit + RIDGE_PROMPT / 2 * float(prompt @ prompt) + RIDGE_ARM / 2 * (float(arm @ arm) + length**2)

    for _ in range(100):
        p = 1 / (1 + np.exp(-logits()))
        slope = weights * (p - verdicts)
        g_prompt = slope.sum((1, 2)) + RIDGE_PROMPT * prompt
        g_rest = np.append(slope.sum((0, 1)), (slope * taste).sum()) + RIDGE_ARM * np.append(arm, length)
        if max(np.abs(g_prompt).max(), np.abs(g_rest).max()) < 1e-8 * weights.sum():
            break
        curvature = weights * p * (1 - p)
        along = curvature * taste
        # The prompts' block is diagonal: eliminate it, solve for arms and length, substitute back.
        h_prompt = curvature.sum((1, 2)) + RIDGE_PROMPT
        cross = np.column_stack([curvature.sum(1), along.sum((1, 2))])
        h_rest = np.diag(np.append(curvature.sum((0, 1)), (along * taste).sum()) + RIDGE_ARM)
        h_rest[-1, :-1] = h_rest[:-1, -1] = along.sum((0, 1))
        step_rest = np.linalg.solve(
            h_rest - cross.T @ (cross / h_prompt[:, None]), g_rest - cross.T @ (g_prompt / h_prompt)
        )
        step_prompt = (g_prompt - cross @ step_rest) / h_prompt
        before, start, fraction = loss(), (arm, length, prompt), 1.0
        while True:
            arm, length = start[0] - fraction * step_rest[:-1], start[1] - fraction * float(step_rest[-1])
            prompt = start[2] - fraction * step_prompt
            if loss() <= before + 1e-10 * abs(before):
                break
            fraction /= 2
    else:
        raise ArithmeticError("the length model did not converge in 100 steps")
    at_equal_length = 1 / (1 + np.exp(-(arm + prompt[:, None])))
    counts = present.sum(0)
    rates = (at_equal_length * present).sum(0) / np.where(counts > 0, counts, np.nan)
    return LengthModel(arm, length, prompt, scale, rates)


def bootstrap_win_rates(
    verdicts: Array, length_differences: Array, present: Array, seeds: NDArray[np.int64], *, replicates: int, seed: int
) -> Array:
    """Return (replicates, arms): length-controlled win rates, refitted to resampled seeds and prompts within seeds.

    ``seeds`` (prompts,): the seed of each prompt. The value is NaN if a resample lacks an arm.
    """
    rng = np.random.default_rng(seed)
    places = [np.flatnonzero(seeds == s) for s in np.unique(seeds)]
    rates = []
    for _ in range(replicates):
        drawn = [places[i] for i in rng.integers(len(places), size=len(places))]
        rows = np.concatenate([rng.choice(block, size=len(block)) for block in drawn])
        rates.append(fit_length_model(verdicts[rows], length_differences[rows], present[rows]).win_rates)
    return np.array(rates)
