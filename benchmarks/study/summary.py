"""Compute every number of ``study.json`` from the runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats

from .arms import ARMS, OBJECTIVES, VARIANTS, Arm
from .plan import TUNING_SEED, Plan, all_jobs, winners
from .runs import base_name
from .statistics import Array, bootstrap_win_rates, fit_length_model, holm, t_interval
from .world import Judge

COLLAPSED_BELOW, COLLAPSED_UNENDED = 0.1, 0.2
FEWEST_SEEDS = 5
FEWEST_RANKED = 8  # a rank correlation over fewer arms is not informative
REPLICATES = 300


@dataclass(frozen=True)
class Answers:
    """One run's answers to the test prompts, (prompts, answers): exact quality, and length in tokens."""

    quality: Array
    length: Array

    @classmethod
    def of(cls, record: Mapping[str, Any], base: Mapping[str, Any]) -> Answers:
        right = np.array([int(digit, 36) for digit in base["right_lengths"]])
        edits, lengths = (
            np.array([int(digit, 36) for digit in record[name]], dtype=float).reshape(len(right), -1)
            for name in ("edits", "lengths")
        )
        return cls(1 - edits / right[:, None], lengths)

    def verdicts(self, other: Answers) -> Array:
        """Return the judge's noise-free probability (prompts, answers) of preferring these answers; 1/2 for a tie."""
        judge = Judge()
        return 1 / (1 + np.exp(judge.a * (other.quality - self.quality) + judge.b * (other.length - self.length)))


class Runs:
    """Test runs by arm and seed."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.records = {(r["arm"], r["seed"]): r for r in records if r["part"] == "test"}
        self.answers = {key: Answers.of(r, self.base(ARMS.get(key[0]), key[1])) for key, r in self.records.items()}

    def base(self, arm: Arm | None, seed: int) -> Mapping[str, Any]:
        return self.records[base_name(arm is None or arm.drafts), seed]

    def seeds(self, *arms: str) -> list[int]:
        """Return the seeds that have runs of all ``arms``."""
        found = [{seed for name, seed in self.records if name == arm and seed != TUNING_SEED} for arm in arms]
        return sorted(set.intersection(*found))

    def field(self, arm: str, name: str, seeds: Sequence[int]) -> list[float]:
        return [self.records[arm, seed][name] for seed in seeds]

    def win_rate(self, arm: str, opponent: str, seed: int) -> float:
        return float(self.answers[arm, seed].verdicts(self.answers[opponent, seed]).mean())

    def collapsed(self, arm: str, seed: int) -> bool:
        """Return whether quality fell by over 0.1, a fifth of the answers are unended or the loss is not finite."""
        record = self.records[arm, seed]
        fallen = self.base(ARMS[arm], seed)["quality"] - record["quality"]
        return fallen > COLLAPSED_BELOW or record["unended"] > COLLAPSED_UNENDED or not record["finite"]


def summarize(plan: Plan, records: Iterable[Mapping[str, Any]], replicates: int = REPLICATES) -> dict[str, Any]:
    """Return all results. Arms with fewer than five seeds (or the plan's number, if smaller) are only named."""
    records = list(records)
    runs = Runs(records)
    fewest = min(FEWEST_SEEDS, plan.fewer)
    arms = [ARMS[name] for name in plan.arms]
    complete = [arm for arm in arms if len(runs.seeds(arm.name)) >= fewest]
    shown = [arm for arm in complete if arm.group in ("table", "control")]
    judged = [arm for arm in shown if arm.drafts]
    controlled = _length_controlled(runs, judged, replicates)
    per_seed = _length_controlled_per_seed(runs, judged)
    drafts = dict.fromkeys(base_name(arm.drafts) for arm in shown)
    return {
        "seeds": plan.seeds,
        "fewer_seeds": plan.fewer,
        "runs": len(records),
        "planned": len(all_jobs(plan)),
        "run_seconds": sum(r["seconds"] for r in records),
        "unfinished": [arm.name for arm in arms if arm not in complete],
        "bases": {name: _base(runs, name) for name in drafts},
        "tuning": winners(plan, records),
        "arms": {arm.name: _row(runs, arm) | controlled.get(arm.name, {}) for arm in shown},
        "length_taste": controlled["length_taste"],
        "contrasts": _contrasts(runs, per_seed, complete),
        "tracking": _tracking(runs, per_seed, judged),
        "ablations": _ablations(runs, complete),
        "curves": {arm.name: _curve(runs, arm.name) for arm in shown if arm.objective != "sft"},
        "checks": _checks(runs, complete),
    }


def _base(runs: Runs, name: str) -> dict[str, Any]:
    seeds = runs.seeds(name)
    found = [runs.records[name, seed] for seed in seeds]
    columns = (
        "quality",
        "right",
        "length",
        "unended",
        "fit_loss",
        "pairs",
        "chosen_better",
        "chosen_worse",
        "chosen_longer",
    )
    means = {column: float(np.mean([r[column] for r in found])) for column in columns}
    gap = [min(r["conditioning_gap"].values()) for r in found]
    return {"seeds": len(seeds), **means, "conditioning_gap": float(np.mean(gap)), "lowest_gap": min(gap)}


def _row(runs: Runs, arm: Arm) -> dict[str, Any]:
    seeds = runs.seeds(arm.name)
    base = base_name(arm.drafts)
    last = [runs.records[arm.name, seed]["curve"][-1] for seed in seeds]
    row: dict[str, Any] = {
        "seeds": len(seeds),
        "quality": t_interval(runs.field(arm.name, "quality", seeds)),
        "gain": t_interval(_differences(runs, arm.name, base, seeds)),
        "right": float(np.mean(runs.field(arm.name, "right", seeds))),
        "length": float(np.mean(runs.field(arm.name, "length", seeds))),
        "unended": float(np.mean(runs.field(arm.name, "unended", seeds))),
        "win_rate": t_interval([runs.win_rate(arm.name, base, seed) for seed in seeds]),
        "marginal_accuracy": float(np.mean([point["marginal accuracy"] for point in last])),
        "conditioned_accuracy": float(np.mean([point["conditioned accuracy"] for point in last])),
        "collapsed": sum(runs.collapsed(arm.name, seed) for seed in seeds),
        "train_seconds": float(np.mean(runs.field(arm.name, "seconds", seeds))),
    }
    if arm.twin != arm.name and (shared := runs.seeds(arm.name, arm.twin)):
        row["win_rate_twin"] = t_interval([runs.win_rate(arm.name, arm.twin, seed) for seed in shared])
    return row


def _differences(runs: Runs, arm: str, other: str, seeds: Sequence[int]) -> list[float]:
    return [a - b for a, b in zip(runs.field(arm, "quality", seeds), runs.field(other, "quality", seeds), strict=True)]


def _against_base(runs: Runs, arms: Sequence[Arm], seeds: Sequence[int]) -> tuple[Array, Array, Array, Any]:
    """Return verdicts and length differences (prompts, answers, arms), presence (prompts, arms), and prompts' seeds."""
    verdicts, lengths, present, owners = [], [], [], []
    for seed in seeds:
        base = runs.answers[base_name(True), seed]
        found = [runs.answers.get((arm.name, seed)) for arm in arms]
        verdicts.append(np.stack([base.verdicts(base) if a is None else a.verdicts(base) for a in found], -1))
        lengths.append(np.stack([base.length * 0 if a is None else a.length - base.length for a in found], -1))
        present.append(np.tile([float(a is not None) for a in found], (len(base.quality), 1)))
        owners.append(np.full(len(base.quality), seed))
    return np.concatenate(verdicts), np.concatenate(lengths), np.concatenate(present), np.concatenate(owners)


def _length_controlled(runs: Runs, arms: Sequence[Arm], replicates: int) -> dict[str, Any]:
    """Return win rates against the base from one fit over all arms and seeds, with the fit's bootstrap intervals."""
    seeds = runs.seeds(base_name(True))
    verdicts, lengths, present, owners = _against_base(runs, arms, seeds)
    fitted = fit_length_model(verdicts, lengths, present)
    drawn = bootstrap_win_rates(verdicts, lengths, present, owners, replicates=replicates, seed=0)
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    rates = {
        arm.name: {"lc_win_rate": {"mean": float(fitted.win_rates[i]), "low": float(low[i]), "high": float(high[i])}}
        for i, arm in enumerate(arms)
    }
    return rates | {"length_taste": {"coefficient": fitted.length, "scale": fitted.scale}}


def _length_controlled_per_seed(runs: Runs, arms: Sequence[Arm]) -> dict[tuple[str, int], float]:
    """Return the same win rates, fitted to one seed at a time, for paired differences between arms."""
    rates: dict[tuple[str, int], float] = {}
    for seed in runs.seeds(base_name(True)):
        here = [arm for arm in arms if (arm.name, seed) in runs.records]
        if here:
            fitted = fit_length_model(*_against_base(runs, here, [seed])[:2])
            rates |= {(arm.name, seed): float(rate) for arm, rate in zip(here, fitted.win_rates)}
    return rates


def _contrasts(runs: Runs, controlled: Mapping[tuple[str, int], float], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return paired differences, each with its kind. Holm's method adjusts InSPO - plain over the objectives."""
    names = {arm.name for arm in arms}
    wanted: list[tuple[str, str, str, str]] = []
    for key, title in OBJECTIVES.items():
        wanted += [
            ("inspo - plain", title, f"{key} inspo", f"{key} plain"),
            ("anchored - inspo", title, f"{key} anchored", f"{key} inspo"),
            ("anchored - plain", title, f"{key} anchored", f"{key} plain"),
            ("anchored - twice", title, f"{key} anchored", f"{key} twice"),
            ("inspo - shuffled", title, f"{key} inspo", f"{key} shuffled"),
            ("inspo - sft", title, f"{key} inspo", "sft"),
            ("plain - sft", title, f"{key} plain", "sft"),
            ("inspo - plain with sft", title, f"{key} inspo", f"{key} + sft"),
            ("plain with sft - plain", title, f"{key} + sft", f"{key} plain"),
        ]
    wanted.append(("no drafts", "DPO", "dpo inspo, no drafts", "dpo plain, no drafts"))
    measures: dict[str, Callable[[str, int], float]] = {
        "quality": lambda arm, seed: runs.records[arm, seed]["quality"],
        "win_rate": lambda arm, seed: runs.win_rate(arm, base_name(ARMS[arm].drafts), seed),
        "lc_win_rate": lambda arm, seed: controlled[arm, seed],
    }
    found = []
    for kind, title, first, second in wanted:
        if {first, second} <= names:
            seeds = runs.seeds(first, second)
            entry: dict[str, Any] = {"kind": kind, "objective": title, "first": first, "second": second}
            for name, value in measures.items():
                if name != "lc_win_rate" or ARMS[first].drafts:
                    entry[name] = t_interval([value(first, seed) - value(second, seed) for seed in seeds])
            found.append(entry)
    main = [entry for entry in found if entry["kind"] == "inspo - plain"]
    for name in measures:
        for entry in main:
            entry[name]["holm_p"] = None
        tested = [entry[name] for entry in main if entry[name]["p"] is not None]
        for result, adjusted in zip(tested, holm([result["p"] for result in tested])):
            result["holm_p"] = adjusted
    return found


def _tracking(
    runs: Runs, controlled: Mapping[tuple[str, int], float], arms: Sequence[Arm]
) -> dict[str, dict[str, Any]]:
    """Return rank correlations over arms of exact quality with win rate, length-controlled win rate and length.

    They are computed within each seed, over the arms that ran on all seeds, then averaged over seeds. Returns an empty
    result if there is nothing to rank.
    """
    seeds = runs.seeds(base_name(True))
    here = [arm.name for arm in arms if runs.seeds(arm.name) == seeds]
    if len(here) < FEWEST_RANKED:
        return {}
    series: dict[str, list[float]] = {"win_rate": [], "lc_win_rate": [], "length": []}
    for seed in seeds:
        quality = [runs.records[name, seed]["quality"] for name in here]
        measured = {
            "win_rate": [runs.win_rate(name, base_name(True), seed) for name in here],
            "lc_win_rate": [controlled[name, seed] for name in here],
            "length": [runs.records[name, seed]["length"] for name in here],
        }
        if any(len(set(values)) == 1 for values in (quality, *measured.values())):
            return {}
        for name, values in measured.items():
            series[name].append(float(scipy.stats.spearmanr(values, quality).statistic))
    found = {name: _of_correlations(values) for name, values in series.items()}
    found["difference"] = t_interval([b - a for a, b in zip(series["win_rate"], series["lc_win_rate"])])
    return found | {"arms": {"n": len(here)}}


def _of_correlations(values: Sequence[float]) -> dict[str, Any]:
    """Return a t interval of the Fisher transforms, transformed back so that it stays between -1 and 1."""
    interval = t_interval([float(np.arctanh(np.clip(value, -1 + 1e-9, 1 - 1e-9))) for value in values])
    return interval | {name: float(np.tanh(interval[name])) for name in ("mean", "low", "high")}


def _ablations(runs: Runs, arms: Sequence[Arm]) -> dict[str, list[dict[str, Any]]]:
    """Return each ablation's arms, including the unchanged arm from the table, all on the same seeds."""
    unchanged: dict[str, tuple[float | str, Sequence[str]]] = {
        "label noise": (Judge().noise, VARIANTS),
        "own alternative": (1.0, ("inspo",)),
        "learning rate": (1.0, ("plain", "inspo")),
        "beta": (1.0, ("plain", "inspo")),
        "presentation": ("right behind the prompt", ("inspo",)),
        "marginal weight": (0.0, ("inspo",)),
    }
    names = {arm.name for arm in arms}
    found: dict[str, list[dict[str, Any]]] = {}
    for group, (level, variants) in unchanged.items():
        members = [(arm.name, arm.level, arm.name.split(",")[0]) for arm in arms if arm.group == group]
        members += [(f"dpo {v}", level, f"dpo {v}") for v in variants if f"dpo {v}" in names]
        if group == "own alternative" and "dpo shuffled" in names:
            members.append(("dpo shuffled", 0.0, "dpo inspo"))
        if not any(arm.group == group for arm in arms):
            continue
        seeds = runs.seeds(*(name for name, _, _ in members))
        found[group] = [
            {
                "arm": name,
                "level": at,
                "line": line,
                "quality": t_interval(runs.field(name, "quality", seeds)),
                "gain": t_interval(_differences(runs, name, base_name(True), seeds)),
                "length": float(np.mean(runs.field(name, "length", seeds))),
                "collapsed": sum(runs.collapsed(name, seed) for seed in seeds),
            }
            for name, at, line in sorted(members, key=lambda m: (m[2], str(m[1])))
        ]
    return found


def _curve(runs: Runs, arm: str) -> list[dict[str, float]]:
    """Return the held-out pairs' reward statistics during training, averaged over seeds."""
    curves = [runs.records[arm, seed]["curve"] for seed in runs.seeds(arm)]
    return [{name: float(np.mean([point[name] for point in points])) for name in points[0]} for points in zip(*curves)]


def _checks(runs: Runs, arms: Sequence[Arm]) -> dict[str, Any]:
    """Return checks for unequal treatment: all arms' updates, and the numbers of their pairs."""
    table = [arm for arm in arms if arm.group == "table"]
    seeds = runs.seeds(base_name(True))
    of_table = [runs.records[arm.name, seed] for arm in table for seed in runs.seeds(arm.name)]
    return {
        "updates": sorted({r["updates"] for r in of_table}),
        "pairs_equal": all(
            len({runs.records[arm.name, seed]["pairs"] for arm in table if (arm.name, seed) in runs.records}) <= 1
            for seed in seeds
        ),
        "tokens": {
            variant: float(np.mean([r["tokens"] for r in of_table if r["arm"].endswith(f" {variant}")] or [0.0]))
            for variant in VARIANTS
        },
    }
