"""Define the arms of the study as data.

The table has five objectives, each in three variants: plain, conditioned on the other response (InSPO), and anchored
(InSPO plus the same objective on the marginals). The controls make differences between these arms interpretable. The
ablations change one option at a time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import inspo_kernels as ik

from .world import EQUALS, SEPARATOR, Judge

OBJECTIVES = {"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO", "rdpo": "R-DPO", "orpo": "ORPO"}
VARIANTS = ("plain", "inspo", "anchored")
DIFFERENCES = ("dpo", "ipo", "simpo", "rdpo")  # objectives without an SFT term of their own

# The parameter of each objective that is tuned together with the learning rate. ``FIXED`` holds the other parameters.
TUNED_PARAMETER = {"dpo": "beta", "ipo": "tau", "simpo": "beta", "rdpo": "beta", "orpo": "lam"}
FIXED: dict[str, dict[str, float]] = {"simpo": {"gamma": 1.0}, "rdpo": {"alpha": 0.1}}


class WithSFT(ik.Objective):
    """Another objective plus ``weight`` times the chosen response's mean negative log-prob per token.

    Use it with plain sequences, where this log-prob is log pi(y_w | x).
    """

    def __init__(self, objective: ik.Objective, weight: float) -> None:
        self.objective, self.weight = objective, weight
        self.needs_reference = objective.needs_reference

    def __call__(self, s: ik.PairSums) -> Tensor:
        return self.objective(s) - self.weight * s.chosen / s.chosen_len

    def rewards(self, s: ik.PairSums) -> tuple[Tensor, Tensor]:
        return self.objective.rewards(s)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    name: the arm's name in the result files. tuned_as: the arm whose tuned learning rate and parameter it uses.
    group: "table", "control", or the option that an ablation varies. level: the value of that option.
    own_alternative: probability that a response is conditioned on the other response of its *own* pair. Otherwise it is
        conditioned on a response of another pair with the same prompt kind.
    updates: factor of the number of updates. drafts: whether the base was also fitted to prompt + draft + answer rows.
    separator: tokens between the two responses. conditioned_reference: whether the reference also sees the alternative.
    alternative_dropout: probability that a pass trains a pair plain, with the plain reference.
    learning_rate, parameter: factors of the tuned values.
    """

    name: str
    title: str
    objective: str  # a key of OBJECTIVES, or "sft"
    tuned_as: str
    group: str = "table"
    level: float | str = ""
    conditioned: bool = False
    marginal_weight: float = 0.0
    sft_weight: float = 0.0
    own_alternative: float = 1.0
    updates: int = 1
    drafts: bool = True
    noise: float = Judge().noise
    separator: str = ""
    conditioned_reference: bool = False
    alternative_dropout: float = 0.0
    learning_rate: float = 1.0
    parameter: float = 1.0

    def __post_init__(self) -> None:
        if self.own_alternative < 1 and (self.marginal_weight or self.objective == "orpo"):
            raise ValueError(f"{self.name}: marginals need the pair's own responses; leave own_alternative at 1")
        changed = self.marginal_weight or self.own_alternative < 1 or self.separator or self.alternative_dropout
        if not self.conditioned and changed:
            raise ValueError(f"{self.name}: only conditioned sequences have an alternative")
        if not 0 <= self.alternative_dropout <= 1:
            raise ValueError(f"{self.name}: alternative_dropout must be within 0 and 1, got {self.alternative_dropout}")
        if self.alternative_dropout and self.uses_marginals:
            raise ValueError(f"{self.name}: a dropped pair is laid out plain and has no marginals to train on")
        if self.conditioned and self.sft_weight:
            raise ValueError(f"{self.name}: the SFT term needs plain sequences")

    @property
    def twin(self) -> str:
        """The baseline: the plain arm with the same objective and base."""
        return f"{self.objective} plain" + ("" if self.drafts else ", no drafts")

    @property
    def uses_marginals(self) -> bool:
        """Return whether the loss depends on the marginals. Otherwise training need not score them."""
        return bool(self.marginal_weight) or (self.objective == "orpo" and self.conditioned)

    def drops_alternative(self, seed: int, number: int, pair: int) -> bool:
        """Return whether pass ``number`` over the pairs trains ``pair`` plain. Each pass draws again."""
        coin = random.Random(f"alternative {seed} {number} {pair}").random()
        return coin < self.alternative_dropout

    def make_objective(self, parameter: float | None) -> ik.Objective:
        """Return the package's objective with the tuned ``parameter`` (None if it has no tuned parameter)."""
        if self.objective == "sft":  # ORPO without its odds ratio
            return ik.ORPO(lam=0.0, sft="chosen")
        assert parameter is not None
        options = {TUNED_PARAMETER[self.objective]: parameter * self.parameter, **FIXED.get(self.objective, {})}
        if self.objective == "orpo":
            return ik.ORPO(**options, sft="marginal" if self.conditioned else "chosen")
        objective = ik.objectives.make_objective(self.objective, **options)
        return WithSFT(objective, self.sft_weight) if self.sft_weight else objective


def table_arm(objective: str, variant: str) -> Arm:
    """Return an arm of the main table. The anchored arm adds the marginal loss with weight 1."""
    name = f"{objective} {variant}"
    title = {"plain": "{}", "inspo": "InSPO-{}", "anchored": "anchored InSPO-{}"}[variant].format(OBJECTIVES[objective])
    return Arm(
        name,
        title,
        objective,
        tuned_as=name,
        conditioned=variant != "plain",
        marginal_weight=float(variant == "anchored"),
    )


def table() -> Iterator[Arm]:
    for objective in OBJECTIVES:
        for variant in VARIANTS:
            yield table_arm(objective, variant)


def controls() -> Iterator[Arm]:
    yield Arm("sft", "SFT on the chosen answers", "sft", tuned_as="sft", group="control")
    for objective, title in OBJECTIVES.items():
        plain, inspo = table_arm(objective, "plain"), table_arm(objective, "inspo")
        yield replace(plain, name=f"{objective} twice", title=f"{title}, twice the updates", group="control", updates=2)
        if objective in DIFFERENCES:
            name = f"{objective} + sft"
            yield replace(plain, name=name, title=f"{title} + SFT term", tuned_as=name, group="control", sft_weight=1.0)
            yield replace(
                inspo,
                name=f"{objective} shuffled",
                title=f"InSPO-{title}, shuffled alternative",
                group="control",
                own_alternative=0.0,
            )
    for variant in VARIANTS:
        arm = table_arm("dpo", variant)
        yield replace(
            arm, name=f"{arm.name}, no drafts", title=f"{arm.title}, base without drafts", group="control", drafts=False
        )


def ablations() -> Iterator[Arm]:
    """Yield DPO's arms with one option changed. The unchanged arm is in the table and not repeated."""

    def changed(variant: str, group: str, level: float | str, **changes: Any) -> Arm:
        arm = table_arm("dpo", variant)
        name, title = f"{arm.name}, {group} {level}", f"{arm.title}, {group} {level}"
        return replace(arm, name=name, title=title, group=group, level=level, **changes)

    for noise in (0.0, 0.3, 0.5):
        for variant in VARIANTS:
            yield changed(variant, "label noise", noise, noise=noise)
    for share in (0.25, 0.5, 0.75):
        yield changed("inspo", "own alternative", share, own_alternative=share)
    for weight in (0.1, 0.3, 1.0, 3.0):
        yield changed("inspo", "marginal weight", weight, marginal_weight=weight)
    for variant in ("plain", "inspo"):
        for factor in (1 / 3, 3.0):
            yield changed(variant, "learning rate", round(factor, 2), learning_rate=factor)
            yield changed(variant, "beta", round(factor, 2), parameter=factor)
    yield changed("inspo", "presentation", "after an unknown separator", separator=SEPARATOR)
    yield changed("inspo", "presentation", "after another =", separator=EQUALS)
    yield changed("inspo", "presentation", "reference conditioned, too", conditioned_reference=True)


ARMS: dict[str, Arm] = {arm.name: arm for arms in (table(), controls(), ablations()) for arm in arms}

# The arms of the over-training study, in the order of its report.
AXIS_ARMS: dict[str, Arm] = {
    "plain": ARMS["dpo plain"],
    "inspo": ARMS["dpo inspo"],
    "other": ARMS["dpo shuffled"],
    "conditioned reference": ARMS["dpo inspo, presentation reference conditioned, too"],
    "dropout": replace(
        ARMS["dpo inspo"],
        name="dpo inspo, alternative dropout",
        title="InSPO-DPO, reference conditioned, 50% dropout",
        group="axis",
        conditioned_reference=True,
        alternative_dropout=0.5,
    ),
    "anchored": ARMS["dpo anchored"],
    "sft": ARMS["sft"],
}
