"""Compute every number of ``axis.json`` from the over-training runs, by the rules of docs/study_protocol.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .axis import BASE, DECODINGS, TESTED, AxisPlan, axis_jobs
from .statistics import equivalence, holm, t_interval

LEVEL, MARGIN = 0.05, 0.02

# The protocol's conclusion for each verdict, word for word.
CONCLUSIONS = {
    "H1": {
        "supported": "With equal updates and many passes, InSPO gives better answers from the prompt alone than plain "
        "DPO, in this world.",
        "contradicted": "With equal updates and many passes, InSPO gives worse answers than plain DPO.",
        "neither": "The exploratory gain was not confirmed.",
    },
    "H2": {
        "supported": "InSPO is better even if both arms stop at their best number of updates.",
        "contradicted": "With early stopping on validation prompts, plain DPO is better.",
        "equal": "With early stopping, the two are as good as each other, within 0.02.",
        "neither": "With early stopping, we can tell neither a difference nor equality.",
    },
    "H3": {
        "supported": "The pair's own other response matters: the gain is not only regularisation.",
        "contradicted": "Another pair's response serves better than the pair's own.",
        "equal": "Any response serves as well as the pair's own, within 0.02: no sign of self-reflection.",
        "neither": "We cannot tell whether the pair's own other response matters.",
    },
}
TITLES = {
    BASE: "base",
    "plain": "plain DPO",
    "inspo": "InSPO-DPO",
    "other": "InSPO-DPO, another pair's alternative",
    "conditioned reference": "InSPO-DPO, conditioned reference",
    "dropout": "InSPO-DPO, conditioned reference, 50% dropout",
    "anchored": "anchored InSPO-DPO",
    "sft": "SFT on the chosen answers",
}
# Deviations from the protocol that no rule below can detect.
NOTED: tuple[str, ...] = ()

Value = Callable[[str, int], float]  # of an arm on a seed


class AxisRuns:
    """The finished runs by number of pairs, arm and seed."""

    def __init__(self, plan: AxisPlan, records: Iterable[Mapping[str, Any]]) -> None:
        self.plan = plan
        self.records = {(r["pairs"], r["arm"], r["seed"]): r for r in records}

    def seeds(self, pairs: int, *arms: str) -> list[int]:
        """Return the seeds that have runs of all ``arms``. The base counts for every number of pairs."""
        found = [{s for p, a, s in self.records if (p, a) == (self._file(pairs, arm), arm)} for arm in arms]
        return sorted(set.intersection(*found))

    def _file(self, pairs: int, arm: str) -> int:
        return self.plan.pairs[0] if arm == BASE else pairs

    def checkpoints(self, pairs: int, arm: str, seed: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.records[self._file(pairs, arm), arm, seed]["checkpoints"]
        return found

    def after(self, pairs: int, updates: int, decoding: str = "greedy", what: str = "quality") -> Value:
        """Return an arm's value after ``updates`` updates. The base's value does not depend on updates."""

        def value(arm: str, seed: int) -> float:
            points = self.checkpoints(pairs, arm, seed)
            (point,) = [p for p in points if p["updates"] == (0 if arm == BASE else updates)]
            return float(point[decoding][what])

        return value

    def best(self, pairs: int, decoding: str = "greedy", what: str = "quality") -> Value:
        """Return an arm's value at the checkpoint with the best validation quality. The earlier one wins ties."""
        return lambda arm, seed: float(self.best_point(pairs, arm, seed)[decoding][what])

    def best_point(self, pairs: int, arm: str, seed: int) -> dict[str, Any]:
        return max(self.checkpoints(pairs, arm, seed), key=lambda p: (p["validation"], -p["updates"]))

    def differences(self, pairs: int, first: str, of_first: Value, second: str, of_second: Value) -> list[float]:
        seeds = self.seeds(pairs, first, second)
        return [of_first(first, seed) - of_second(second, seed) for seed in seeds]


def missing_for_report(plan: AxisPlan, keys: Iterable[tuple[Any, ...]]) -> str:
    """Return the names of the hypotheses' arms with runs on fewer than two seeds, or an empty string."""
    found = [(arm, pairs) for arm, pairs, _ in keys]
    return ", ".join(arm for arm in (BASE, *TESTED) if found.count((arm, plan.pairs[0])) < 2)


def summarize(plan: AxisPlan, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all results. A cell with fewer than two seeds has only its count of seeds."""
    records = list(records)
    runs = AxisRuns(plan, records)
    planned = [job for pairs in plan.pairs for job in axis_jobs(plan, pairs)]
    return {
        "runs": len(records),
        "planned": len(planned),
        "run_seconds": sum(r["seconds"] for r in records),
        "hypotheses": _hypotheses(runs),
        "equivalence": _equivalence(runs),
        "over_trained": _over_trained(runs),
        "stopping": t_interval(
            runs.differences(
                plan.pairs[0],
                "inspo",
                runs.after(plan.pairs[0], plan.tested_updates),
                "plain",
                runs.best(plan.pairs[0]),
            )
        ),
        "base": _base(runs),
        "cells": {str(pairs): {arm: _cell(runs, pairs, arm) for arm in plan.arms} for pairs in plan.pairs},
        "deviations": [*NOTED, *_deviations(runs)],
    }


def hypothesis_differences(runs: AxisRuns) -> dict[str, list[float]]:
    """Return the differences of H1 to H3 in the primary metric, seed by seed."""
    plan = runs.plan
    few = plan.pairs[0]
    fixed, best = runs.after(few, plan.tested_updates), runs.best(few)
    return {
        "H1": runs.differences(few, "inspo", fixed, "plain", fixed),
        "H2": runs.differences(few, "inspo", best, "plain", best),
        "H3": runs.differences(few, "inspo", fixed, "other", fixed),
    }


def _hypotheses(runs: AxisRuns) -> dict[str, dict[str, Any]]:
    differences = hypothesis_differences(runs)
    found = {name: t_interval(values) for name, values in differences.items()}
    adjusted = holm([1.0 if entry["p"] is None else entry["p"] for entry in found.values()])
    for (name, entry), p in zip(found.items(), adjusted):
        equal = name != "H1" and equivalence(differences[name], MARGIN)["equivalent"]
        entry["holm_p"] = p
        entry["sd"] = float(np.std(differences[name], ddof=1))
        entry["verdict"] = verdict(entry["mean"], p, equal)
        entry["conclusion"] = CONCLUSIONS[name][entry["verdict"]]
    return found


def verdict(mean: float, adjusted_p: float, equal: bool) -> str:
    """Return the protocol's verdict on a hypothesis: "supported", "contradicted", "equal" or "neither"."""
    if adjusted_p < LEVEL:
        return "supported" if mean > 0 else "contradicted"
    return "equal" if equal else "neither"


def _equivalence(runs: AxisRuns) -> dict[str, dict[str, Any]]:
    plan = runs.plan
    few, fixed = plan.pairs[0], runs.after(plan.pairs[0], plan.tested_updates)
    differences = {name: values for name, values in hypothesis_differences(runs).items() if name != "H1"}
    if "dropout" in plan.arms:
        differences["dropout"] = runs.differences(few, "dropout", fixed, "inspo", fixed)
    return {name: equivalence(values, MARGIN) for name, values in differences.items() if len(values) > 1}


def _over_trained(runs: AxisRuns) -> dict[str, Any]:
    """Compare plain at the tested number of updates with plain at its best: over-trained if significantly worse."""
    few = runs.plan.pairs[0]
    fixed = runs.after(few, runs.plan.tested_updates)
    interval = t_interval(runs.differences(few, "plain", fixed, "plain", runs.best(few)))
    return interval | {"over_trained": interval["p"] is not None and interval["p"] < LEVEL and interval["mean"] < 0}


def _base(runs: AxisRuns) -> dict[str, Any]:
    seeds = runs.seeds(runs.plan.pairs[0], BASE)
    columns = {
        decoding: {what: _mean(runs.after(0, 0, decoding, what), BASE, seeds) for what in ("quality", "length")}
        for decoding in DECODINGS
    }
    return {"seeds": len(seeds), **columns}


def _mean(value: Value, arm: str, seeds: Sequence[int]) -> float:
    return float(np.mean([value(arm, seed) for seed in seeds]))


def _cell(runs: AxisRuns, pairs: int, arm: str) -> dict[str, Any]:
    """Summarize an arm in a cell: quality, length and paired differences at each checkpoint and at the best."""
    seeds = runs.seeds(pairs, arm, BASE)
    cell: dict[str, Any] = {"seeds": len(seeds), "planned": len(runs.plan.seeds_of(pairs, arm))}
    if len(seeds) < 2:
        return cell
    cell["updates"] = {
        str(updates): _row(runs, pairs, arm, lambda d, w, u=updates: runs.after(pairs, u, d, w))  # type: ignore[misc]
        for updates in runs.plan.checkpoints
    }
    cell["best"] = _row(runs, pairs, arm, lambda d, w: runs.best(pairs, d, w))
    chosen = [runs.best_point(pairs, arm, seed)["updates"] for seed in seeds]
    cell["best"]["chosen"] = {str(updates): chosen.count(updates) for updates in runs.plan.checkpoints}
    return cell


def _row(runs: AxisRuns, pairs: int, arm: str, value_of: Callable[[str, str], Value]) -> dict[str, Any]:
    seeds = runs.seeds(pairs, arm, BASE)
    row: dict[str, Any] = {}
    for decoding in DECODINGS:
        value = value_of(decoding, "quality")
        row[decoding] = {
            "quality": t_interval([value(arm, seed) for seed in seeds]),
            "length": _mean(value_of(decoding, "length"), arm, seeds),
            "unended": _mean(value_of(decoding, "unended"), arm, seeds),
        }
        for other in (BASE, "plain", "sft"):
            differences = runs.differences(pairs, arm, value, other, value)
            if other != arm and len(differences) > 1:
                row[decoding][f"minus {other}"] = t_interval(differences)
    return row


def _deviations(runs: AxisRuns) -> list[str]:
    """Return every deviation from the protocol that the runs show."""
    plan, found = runs.plan, []
    for pairs in plan.pairs:
        for arm in (BASE, *plan.arms) if pairs == plan.pairs[0] else plan.arms:
            planned, ran = len(plan.seeds_of(pairs, arm)), len(runs.seeds(pairs, arm))
            if ran < planned:
                found.append(f"{pairs} pairs, {TITLES[arm]}: {ran} of {planned} seeds.")
    for (pairs, arm, seed), record in runs.records.items():
        if arm != BASE and not record["finite"]:
            found.append(f"{pairs} pairs, {TITLES[arm]}, seed {seed}: the loss became non-finite.")
        if arm != BASE and record["found_pairs"] < pairs:
            found.append(f"{pairs} pairs, {TITLES[arm]}, seed {seed}: only {record['found_pairs']} pairs.")
    return found
