"""Plan the runs: bases, then the tuning grid on a separate seed, then every arm on the study's seeds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import model as models
from . import runs
from .arms import ARMS, Arm
from .runs import Size
from .world import Judge, draw_prompts

TUNING_SEED = 900
# Learning rate and parameter at the centre of each objective's grid, chosen on other seeds (1000 and above). The grid
# is a cross: the centre, then each of the two divided by three and multiplied by three.
MIDDLE = {"dpo": (3e-4, 0.3), "ipo": (3e-4, 0.06), "simpo": (1e-4, 0.7), "rdpo": (3e-4, 0.3), "orpo": (1e-3, 1.0)}
SFT_LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
STEP = 3.0


@dataclass(frozen=True)
class Plan:
    """The size of the study: ``seeds`` for the table and SFT, ``fewer`` seeds for other controls and the ablations."""

    size: Size
    seeds: int
    fewer: int
    arms: tuple[str, ...] = tuple(ARMS)

    def seeds_of(self, arm: Arm) -> range:
        return range(self.seeds if arm.group == "table" or arm.objective == "sft" else self.fewer)


PLANS = {
    "full": Plan(Size(), seeds=8, fewer=5),
    "quick": Plan(
        Size(
            hidden_size=32,
            layers=1,
            word_lengths=(3,),
            fit_prompts=400,
            fit_steps=80,
            fit_rows=32,
            pairs=96,
            updates=8,
            update_pairs=16,
            validation_prompts=24,
            test_prompts=24,
            held_out_pairs=24,
            samples=2,
        ),
        seeds=3,
        fewer=2,
    ),
    # For an accelerator: a model with 19M parameters, and more of everything else.
    "large": Plan(
        Size(
            hidden_size=512,
            layers=6,
            word_lengths=(4, 5),
            fit_prompts=12_800,
            fit_steps=2000,
            fit_rows=256,
            fit_learning_rate=1e-3,
            pairs=6400,
            updates=100,
            update_pairs=64,
            validation_prompts=400,
            test_prompts=800,
        ),
        seeds=16,
        fewer=8,
    ),
}


@dataclass(frozen=True)
class Job:
    """One run, or the fit of a base, whose name is then in ``arm``."""

    arm: str
    seed: int
    part: str = "test"
    learning_rate: float | None = None
    parameter: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.arm, self.seed, self.part, self.learning_rate, self.parameter

    def execute(self, size: Size, cache: Path, device: str) -> dict[str, Any]:
        if self.arm not in ARMS:
            drafts = self.arm == runs.base_name(True)
            return runs.describe_base(size, self.seed, drafts=drafts, cache=cache, device=device)
        assert self.learning_rate is not None
        return runs.run(
            ARMS[self.arm],
            size,
            self.seed,
            learning_rate=self.learning_rate,
            parameter=self.parameter,
            part=self.part,
            cache=cache,
            device=device,
        )

    def updates(self, size: Size) -> int:
        return size.updates * ARMS[self.arm].updates if self.arm in ARMS else 0


def base_jobs(plan: Plan) -> list[Job]:
    jobs = [Job(runs.base_name(True), TUNING_SEED)]
    for arm in map(ARMS.get, plan.arms):
        assert arm is not None
        jobs += [Job(runs.base_name(arm.drafts), seed) for seed in plan.seeds_of(arm)]
    return list(dict.fromkeys(jobs))


def grid(arm: Arm) -> list[tuple[float, float | None]]:
    """Return the settings to try: (learning rate, parameter)."""
    if arm.objective == "sft":
        return [(rate, None) for rate in SFT_LEARNING_RATES]
    rate, parameter = MIDDLE[arm.objective]
    cross: list[tuple[float, float | None]] = [(rate, parameter)]
    for factor in (1 / STEP, STEP):
        cross += [(rate * factor, parameter), (rate, parameter * factor)]
    return cross


def tuned_arms(plan: Plan) -> dict[str, Arm]:
    """Return the arms whose settings are searched. Every other arm uses the settings of a searched arm."""
    return {name: ARMS[name] for name in dict.fromkeys(ARMS[name].tuned_as for name in plan.arms)}


def tuning_jobs(plan: Plan) -> list[Job]:
    return [
        Job(name, TUNING_SEED, "validation", *setting)
        for name, arm in tuned_arms(plan).items()
        for setting in grid(arm)
    ]


def winners(plan: Plan, records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return each tuned arm's setting with the best exact quality on validation prompts, and whether it is an edge.

    Edges are all settings but the centre of a cross, and the ends of a row. There the best setting may lie outside the
    grid.
    """
    done = {(r["arm"], r["learning_rate"], r["parameter"]): r for r in records if r["part"] == "validation"}
    best = {}
    for name, arm in tuned_arms(plan).items():
        tried = grid(arm)
        scores = [done[(name, *setting)]["quality"] for setting in tried]
        first = scores.index(max(scores))
        inner = tried[1:-1] if arm.objective == "sft" else tried[:1]
        rate, parameter = tried[first]
        best[name] = {
            "learning_rate": rate,
            "parameter": parameter,
            "quality": scores[first],
            "edge": tried[first] not in inner,
            "tried": [[*setting, score] for setting, score in zip(tried, scores)],
        }
    return best


def test_jobs(plan: Plan, best: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    """Return all arms at their tuned settings, the most important first, so that an unfinished study is useful."""
    arms = [ARMS[name] for name in plan.arms]

    def turn(arm: Arm, seed: int) -> int:
        if arm.objective == "sft" or (arm.group == "table" and not arm.marginal_weight):
            return 0
        if arm.group == "table":
            return 1 if seed < plan.fewer else 3
        if arm.objective == "dpo" and (arm.group == "control" or arm.noise == 0.5):
            return 2
        return 4 if arm.group == "control" else 5

    wanted = sorted(((arm, seed) for arm in arms for seed in plan.seeds_of(arm)), key=lambda one: turn(*one))
    return [
        Job(arm.name, seed, "test", best[arm.tuned_as]["learning_rate"], best[arm.tuned_as]["parameter"])
        for arm, seed in wanted
    ]


def all_jobs(plan: Plan, records: Iterable[Mapping[str, Any]] = ()) -> list[Job]:
    """Return the whole plan. Until ``records`` hold all tuning runs, the last jobs lack their tuned settings."""
    try:
        best: Mapping[str, Mapping[str, Any]] = winners(plan, records)
    except KeyError:
        best = {name: {"learning_rate": None, "parameter": None} for name in tuned_arms(plan)}
    return base_jobs(plan) + tuning_jobs(plan) + test_jobs(plan, best)


def step_seconds(size: Size, device: str) -> tuple[float, float]:
    """Time a few InSPO updates and fitting steps, and return the seconds of one of each."""
    prompts = draw_prompts(size.word_lengths, training=64, validation=8, test=8, seed=0).training
    model = models.build(size.hidden_size, size.layers, 0, device)
    clock = time.perf_counter()
    models.fit(model, prompts, steps=6, rows=size.fit_rows, learning_rate=1e-4, draft_share=0.5, seed=0)
    fitting = (time.perf_counter() - clock) / 6
    pairs = [runs.Candidates(p, ("abcdef$", "abcd$"), (0.0, 0.0), (0.5, 0.5, 0.5, 0)) for p in prompts]
    arm = ARMS["dpo inspo"]
    clock = time.perf_counter()
    runs.train(
        model,
        runs.label(pairs, Judge()),
        arm,
        arm.make_objective(0.1),
        learning_rate=1e-4,
        updates=6,
        update_pairs=min(size.update_pairs, len(pairs)),
        seed=0,
    )
    return (time.perf_counter() - clock) / 6, fitting


def seconds(plan: Plan, jobs: Iterable[Job], device: str) -> float:
    """Estimate the seconds of all ``jobs`` in one process."""
    size = plan.size
    update, fitting = step_seconds(size, device)
    # Sampling, judging and scoring held-out pairs add about two fifths to training.
    return sum(1.4 * job.updates(size) * update if job.arm in ARMS else size.fit_steps * fitting for job in jobs)
