"""Run the over-training study: few or many pairs, few or many updates, by the protocol in docs/study_protocol.md.

A run trains one arm on the first pairs of a seed with a constant learning rate, and generates answers at each
checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from . import model as models
from . import runs
from .arms import AXIS_ARMS
from .plan import PLANS
from .runs import Size, Start
from .world import Judge, right_answer

TESTED = ("plain", "inspo", "other")  # the arms of H1 to H3
BASE = "base"
# Name of each decoding, with its temperature and whether it gives several answers per prompt.
DECODINGS = {"greedy": (0.0, False), "sampled": (1.0, True), "T=0.7": (0.7, True)}


@dataclass(frozen=True)
class AxisPlan:
    """The runs to do: ``tested_seeds`` for the hypotheses' arms at the fewest pairs, ``seeds`` everywhere else."""

    size: Size
    pairs: tuple[int, ...] = (128, 320, 1280)
    checkpoints: tuple[int, ...] = (20, 40, 80, 160)
    tested_updates: int = 80
    first_seed: int = 730_000
    tested_seeds: int = 24
    seeds: int = 5
    learning_rate: float = 3e-4
    sft_learning_rate: float = 1e-3
    beta: float = 0.1
    arms: tuple[str, ...] = tuple(AXIS_ARMS)

    def __post_init__(self) -> None:
        if unknown := [arm for arm in self.arms if arm not in AXIS_ARMS]:
            raise ValueError(f"unknown arms {unknown}; choose from {list(AXIS_ARMS)}")
        if self.tested_updates not in self.checkpoints or list(self.checkpoints) != sorted(set(self.checkpoints)):
            raise ValueError(f"checkpoints must ascend and hold {self.tested_updates}, got {self.checkpoints}")
        if min(self.seeds, self.tested_seeds) < 1:
            raise ValueError(f"each cell needs at least one seed, got {self.seeds} and {self.tested_seeds}")
        if max(self.pairs) > self.size.pairs:
            raise ValueError(f"a seed has at most {self.size.pairs} pairs, fewer than {max(self.pairs)}")

    def seeds_of(self, pairs: int, arm: str) -> range:
        """Return the seeds planned for a cell. The base belongs to the cells with the fewest pairs."""
        tested = pairs == self.pairs[0] and arm in (*TESTED, BASE)
        return range(self.first_seed, self.first_seed + (self.tested_seeds if tested else self.seeds))


AXIS_PLANS = {
    "full": AxisPlan(replace(Size(), validation_prompts=240, test_prompts=400, samples=2)),
    "quick": AxisPlan(
        replace(PLANS["quick"].size, pairs=64, updates=Size().updates, held_out_pairs=8),
        pairs=(16, 64),
        checkpoints=(2, 4, 8),
        tested_updates=4,
        tested_seeds=3,
        seeds=2,
    ),
}


@dataclass(frozen=True)
class AxisJob:
    """One run: an arm (or the untrained base) on the first ``pairs`` pairs of a seed."""

    arm: str
    pairs: int
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.arm, self.pairs, self.seed

    def execute(self, plan: AxisPlan, cache: Path, device: str) -> dict[str, Any]:
        """Return the run's record: quality and length by decoding and the greedy answers' edits, at each checkpoint."""
        began = time.perf_counter()
        begun = runs.start(plan.size, self.seed, drafts=True, cache=cache, device=device)
        model = runs.load(begun, plan.size, self.seed, device)
        found: list[dict[str, Any]] = []
        if self.arm == BASE:
            found.append(evaluate(model, begun, plan.size, self.seed, 0))
            details: dict[str, Any] = {
                "fit_loss": round(begun.fit_loss, 4),
                "right_lengths": "".join(str(len(right_answer(prompt))) for prompt in begun.prompts.test),
            }
        else:
            details = self._train(model, begun, plan, found)
        return {
            "arm": self.arm,
            "pairs": self.pairs,
            "seed": self.seed,
            **details,
            "checkpoints": found,
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _train(
        self, model: PreTrainedModel, begun: Start, plan: AxisPlan, found: list[dict[str, Any]]
    ) -> dict[str, Any]:
        arm = AXIS_ARMS[self.arm]
        examples = runs.label(begun.training[: self.pairs], Judge(), arm.own_alternative)
        sft = arm.objective == "sft"

        def watch(step: int) -> None:
            if step in plan.checkpoints:
                found.append(evaluate(model, begun, plan.size, self.seed, step))

        counts = runs.train(
            model,
            examples,
            arm,
            arm.make_objective(None if sft else plan.beta),
            seed=self.seed,
            decay=False,
            learning_rate=plan.sft_learning_rate if sft else plan.learning_rate,
            updates=plan.checkpoints[-1],
            update_pairs=plan.size.update_pairs,
            watch=watch,
            watch_every=1,
        )
        for step in plan.checkpoints[len(found) :]:  # a run that ended early uses its last model
            found.append(evaluate(model, begun, plan.size, self.seed, step))
        return {"found_pairs": len(examples), **counts}


def evaluate(model: PreTrainedModel, begun: Start, size: Size, seed: int, updates: int) -> dict[str, Any]:
    """Return quality and length of prompt-only answers. Validation prompts get only greedy answers."""

    def graded(part: str, temperature: float, count: int) -> dict[str, Any]:
        prompts = getattr(begun.prompts, part)
        draws = 2 * seed + (part == "test")
        answers = models.sample(model, prompts, count=count, seed=draws, temperature=temperature)
        return runs.graded(prompts, answers)

    result: dict[str, Any] = {"updates": updates, "validation": round(graded("validation", 0.0, 1)["quality"], 5)}
    for name, (temperature, several) in DECODINGS.items():
        full = graded("test", temperature, size.samples if several else 1)
        result[name] = {key: round(full[key], 5) for key in ("quality", "right", "length", "unended")}
        if name == "greedy":
            result["edits"] = full["edits"]
    return result


def axis_jobs(plan: AxisPlan, pairs: int) -> list[AxisJob]:
    """Return the runs with ``pairs`` pairs, seed by seed, with the hypotheses' arms first."""
    tested = [BASE, *TESTED] if pairs == plan.pairs[0] else []
    rest = [arm for arm in plan.arms if arm not in tested]
    tested = [arm for arm in tested if arm == BASE or arm in plan.arms]
    return [
        AxisJob(arm, pairs, seed)
        for arms in (tested, rest)
        if arms
        for seed in plan.seeds_of(pairs, arms[0])
        for arm in arms
    ]


def seconds(plan: AxisPlan, jobs: Sequence[AxisJob], update: float, fitting: float) -> float:
    """Estimate the seconds of all ``jobs`` in one process, from the seconds of one update and of one fitting step."""
    answering = 1.2  # on top of training
    training = answering * plan.checkpoints[-1] * update
    return sum(plan.size.fit_steps * fitting if job.arm == BASE else training for job in jobs)
