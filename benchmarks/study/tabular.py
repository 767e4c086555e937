"""Compute exactly what is invariant in InSPO, for K responses to one prompt with every log-prob a free parameter.

``python -m benchmarks.study.tabular --json FILE``

Labels reveal only P[y, z] = P(y preferred to z), 0 < P < 1, with or without cycles. A pair {y, z} is drawn with weight
w[y, z] > 0 and labelled by P. The expected loss of a margin objective l is

    risk = sum_{y != z} w[y, z] P[y, z] l(u[y, z]),
    conditioned:  u[y, z] = [log pi(y|z) - log ref(y)] - [log pi(z|y) - log ref(z)]
    plain:        u[y, z] = [log pi(y)   - log ref(y)] - [log pi(z)   - log ref(z)]

For a strictly proper l each pair's risk has one minimiser, the scalarization u* = link(P): logit P (logistic), 2P - 1
(squared), (logit P)/2 (exponential). The sum of these minima is the Bayes risk. The hinge is not proper and left out.

Four objects must be distinguished. This module examines the last three; the first depends on P alone, by definition:

    (i)   the un-regularised target argmax_y P(y over z), for each alternative z
    (ii)  the decoded preferences link^-1(u) at an optimum
    (iii) the conditioned policy pi(y|z) at an optimum
    (iv)  the prompt-only policy. Only the model ties it to pi(y|z), so the result depends on the parametrisation. Here
          log pi(y|z) = log softmax_y(theta[y] + phi[y, z]) and log pi(y) = log softmax_y(theta[y]), trained by gradient
          descent from theta = log ref, phi = 0.

Why (ii) says nothing about (iii) and (iv): the u of conditioned policies can be any antisymmetric matrix. Off the
diagonal, log pi(y|z) and log pi(z|y) are free up to their difference. The diagonal pi(z|z), which no loss sees, makes
each column sum to one. So every P is decoded exactly, and the optima form a family of dimension K(K-1) - K(K-1)/2.
Lowering all log pi(y|z), y != z, by the same amount stays inside the family and ends at the policy that only echoes the
alternative. And since phi can compensate for any theta, *every* prompt-only policy belongs to some optimum.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import inspo_kernels as ik

from ..result_files import provenance, write_json

DOUBLE = torch.float64
KINDS = ("bradley_terry", "cyclic")
CONVERGED = 1e-6  # largest excess risk of a converged descent


class Exponential(ik.Objective):
    """The loss exp(-m), m = a_chosen - a_rejected."""

    def __call__(self, s: ik.PairSums) -> Tensor:
        a_chosen, a_rejected = self._advantages(s)
        return torch.exp(a_rejected - a_chosen)


@dataclass(frozen=True)
class Scalarization:
    """A strictly proper margin objective with its link (P -> the margin of least risk) and the link's inverse."""

    objective: ik.Objective
    link: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


SCALARIZATIONS = {
    "logistic": Scalarization(ik.DPO(beta=1.0), torch.logit, torch.sigmoid),
    "squared": Scalarization(ik.IPO(tau=0.5), lambda p: 2 * p - 1, lambda u: (1 + u) / 2),
    "exponential": Scalarization(Exponential(), lambda p: torch.logit(p) / 2, lambda u: torch.sigmoid(2 * u)),
}


@dataclass(frozen=True)
class World:
    """Preferences (..., K, K), pair weights (..., K, K), symmetric, and reference log-probs (..., K)."""

    preferences: Tensor
    weights: Tensor
    log_ref: Tensor

    @property
    def size(self) -> int:
        return self.log_ref.shape[-1]


def bradley_terry(strengths: Tensor) -> Tensor:
    """Return P[y, z] = sigmoid(strengths[y] - strengths[z])."""
    return torch.sigmoid(strengths.unsqueeze(-1) - strengths.unsqueeze(-2))


def random_world(size: int, generator: torch.Generator, *, cyclic: bool) -> World:
    """Draw a world. If ``cyclic``, every pair's preference is independent; otherwise they are Bradley-Terry."""
    if cyclic:
        noise = torch.randn(size, size, generator=generator, dtype=DOUBLE)
        preferences = torch.sigmoid(noise - noise.T)
    else:
        preferences = bradley_terry(torch.randn(size, generator=generator, dtype=DOUBLE))
    return World(preferences, random_weights(size, generator), random_log_ref(size, generator))


def random_weights(size: int, generator: torch.Generator) -> Tensor:
    weights = torch.rand(size, size, generator=generator, dtype=DOUBLE) + 0.1
    return weights + weights.T


def random_log_ref(size: int, generator: torch.Generator) -> Tensor:
    return torch.log_softmax(torch.randn(size, generator=generator, dtype=DOUBLE), -1)


def margins(log_probs: Tensor, log_ref: Tensor) -> Tensor:
    """Return u (..., K, K) for log pi(y|z) at [..., y, z] (conditioned), or for log pi(y) (..., K) (plain)."""
    advantages = (log_probs if log_probs.ndim > log_ref.ndim else log_probs.unsqueeze(-1)) - log_ref.unsqueeze(-1)
    return advantages - advantages.mT


def risk(u: Tensor, world: World, objective: ik.Objective) -> Tensor:
    """Return the expected loss (...): the sum over ordered pairs y != z of w P l(u)."""
    zero = torch.zeros_like(u).flatten()
    # Margin objectives depend only on the difference of the sums, so u can take the place of the chosen sum.
    sums = ik.PairSums(
        chosen=u.flatten(),
        rejected=zero,
        ref_chosen=zero,
        ref_rejected=zero,
        chosen_len=zero + 1,
        rejected_len=zero + 1,
        index=torch.arange(len(zero)),
    )
    different = 1 - torch.eye(world.size, dtype=DOUBLE)
    return (objective(sums).view(u.shape) * world.weights * world.preferences * different).sum((-2, -1))


def bayes_risk(world: World, scalarization: Scalarization) -> Tensor:
    return risk(scalarization.link(world.preferences), world, scalarization.objective)


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Return a minimiser near ``start``, found by L-BFGS to the last digits."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=5000, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    optimizer.step(closure)
    return parameters.detach()


def conditioned_optimum(world: World, scalarization: Scalarization) -> Tensor:
    """Return a log pi(y|z) (..., K, K) of least risk, found from the reference as start for every alternative."""

    def loss(logits: Tensor) -> Tensor:
        return risk(margins(torch.log_softmax(logits, -2), world.log_ref), world, scalarization.objective).sum()

    return torch.log_softmax(minimise(loss, world.log_ref.unsqueeze(-1).expand_as(world.preferences)), -2)


def plain_optimum(world: World, scalarization: Scalarization) -> Tensor:
    """Return the unique log pi(y) (..., K) of least risk: u and the policy both have K - 1 degrees of freedom."""

    def loss(logits: Tensor) -> Tensor:
        return risk(margins(torch.log_softmax(logits, -1), world.log_ref), world, scalarization.objective).sum()

    return torch.log_softmax(minimise(loss, world.log_ref), -1)


def dimension_of_optima(log_probs: Tensor, log_ref: Tensor) -> int:
    """Return the local dimension of the conditioned policies (K (K - 1) free parameters) that have the same u."""
    size = len(log_ref)
    upper = torch.triu_indices(size, size, 1)

    def decoded(logits: Tensor) -> Tensor:
        return margins(torch.log_softmax(logits.view(size, size), 0), log_ref)[upper[0], upper[1]]

    jacobian = torch.autograd.functional.jacobian(decoded, log_probs.flatten())
    return size * (size - 1) - int(torch.linalg.matrix_rank(jacobian))


def echoing(log_probs: Tensor, by: float) -> Tensor:
    """Return the policy with the same u in which all responses but the alternative are e^-by times as likely."""
    size = len(log_probs)
    lowered = log_probs - by
    others = lowered.masked_fill(torch.eye(size, dtype=torch.bool), -torch.inf).logsumexp(0)
    return torch.where(torch.eye(size, dtype=torch.bool), torch.log(-torch.expm1(others)), lowered)


def shared_descent(
    world: World,
    scalarization: Scalarization,
    *,
    anchor: float = 0.0,
    step: float = 0.02,
    steps: int = 20_000,
    gap: float = 1e-10,
) -> tuple[Tensor, Tensor]:
    """Return prompt-only log pi(y) (..., K) after gradient descent, and each world's excess over its least risk.

    Leading dimensions hold several worlds, which descend together until the largest excess risk is below ``gap`` or
    ``steps`` have passed. ``anchor`` is the weight of the prompt-only policy's plain risk, which the lower bound then
    includes. Each loss is divided by its curvature at 0, so that a step has the same effect for every scalarization.
    Steps ten times as large diverge in some worlds, to NaN with the exponential loss.
    """
    theta = world.log_ref.clone().requires_grad_()
    phi = torch.zeros_like(world.preferences).requires_grad_()
    curvature = _curvature(scalarization.objective)
    bound = bayes_risk(world, scalarization)
    if anchor:
        bound = bound + anchor * risk(
            margins(plain_optimum(world, scalarization), world.log_ref), world, scalarization.objective
        )
    for _ in range(steps):
        conditioned = torch.log_softmax(theta.unsqueeze(-1) + phi, -2)
        total = risk(margins(conditioned, world.log_ref), world, scalarization.objective)
        if anchor:
            alone = torch.log_softmax(theta, -1)
            total = total + anchor * risk(margins(alone, world.log_ref), world, scalarization.objective)
        excess = (total - bound).detach()
        if excess.max() < gap:
            break
        gradients = torch.autograd.grad(total.sum() / curvature, (theta, phi))
        with torch.no_grad():
            for parameter, gradient in zip((theta, phi), gradients, strict=True):
                parameter -= step * gradient
    return torch.log_softmax(theta.detach(), -1), excess


def _curvature(objective: ik.Objective) -> Tensor:
    world = World(torch.full((2, 2), 0.5, dtype=DOUBLE), torch.ones(2, 2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE))

    def of_margin(u: Tensor) -> Tensor:
        return risk(torch.stack([u * 0, u, -u, u * 0]).view(2, 2), world, objective)

    return torch.autograd.functional.hessian(of_margin, torch.zeros((), dtype=DOUBLE))


def stack(worlds: Sequence[World]) -> World:
    return World(*(torch.stack([getattr(w, f) for w in worlds]) for f in ("preferences", "weights", "log_ref")))


def measure(size: int, worlds: int, seed: int = 0) -> dict[str, Any]:
    """Measure every claim of the module's docstring over random worlds with ``size`` responses."""
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {"responses": size, "worlds": worlds, "seed": seed}
    for kind in KINDS:
        drawn = [random_world(size, generator, cyclic=kind == "cyclic") for _ in range(worlds)]
        moved = [World(w.preferences, random_weights(size, generator), random_log_ref(size, generator)) for w in drawn]
        here, there = stack(drawn), stack(moved)
        result[kind] = {
            "conditioned": {name: _optimum(here, there, s, conditioned_optimum) for name, s in SCALARIZATIONS.items()},
            "plain": {name: _optimum(here, there, s, plain_optimum) for name, s in SCALARIZATIONS.items()},
            "prompt_only": _prompt_only(
                here,
                {
                    "reference": World(here.preferences, here.weights, there.log_ref),
                    "weights": World(here.preferences, there.weights, here.log_ref),
                },
            ),
        }
    world = drawn[0]
    optimum = conditioned_optimum(world, SCALARIZATIONS["logistic"])
    echo = echoing(optimum, 8.0)
    result["dimension_of_optima"] = dimension_of_optima(optimum, world.log_ref)
    result["dimension_expected"] = size * (size - 1) // 2
    result["echo"] = {
        "least_probability_of_the_alternative": echo.diagonal().exp().min().item(),
        "largest_change_of_u": (margins(echo, world.log_ref) - margins(optimum, world.log_ref)).abs().max().item(),
    }
    return result


def _optimum(
    here: World, there: World, s: Scalarization, optimum: Callable[[World, Scalarization], Tensor]
) -> dict[str, float]:
    """Return the largest values over the worlds. ``there`` has the same preferences, other references and weights."""
    policies = [optimum(world, s) for world in (here, there)]
    us = [margins(policy, world.log_ref) for policy, world in zip(policies, (here, there), strict=True)]
    least = bayes_risk(here, s)
    gap = (risk(us[0], here, s.objective) - least) / least.abs()
    wrong = (s.decode(us[0]) - here.preferences) * (1 - torch.eye(here.size, dtype=DOUBLE))
    return {
        "gap_to_bayes": gap.max().item(),
        "error_of_decoded_preferences": wrong.abs().max().item(),
        "decoded_moves_with_ref_and_weights": (s.decode(us[0]) - s.decode(us[1])).abs().max().item(),
        "policy_moves_with_ref_and_weights": (policies[0].exp() - policies[1].exp()).abs().max().item(),
    }


def _prompt_only(here: World, changed: Mapping[str, World]) -> dict[str, Any]:
    """Return how often the prompt-only policy's most likely answer stays the same, and how often P favours it.

    ``changed``: the same preferences with another "reference" or with other "weights". Raises ArithmeticError if a
    descent did not converge.
    """

    def descended(world: World, s: Scalarization) -> Tensor:
        log_probs, excess = shared_descent(world, s)
        if not excess.max() < CONVERGED:  # also catches NaN
            raise ArithmeticError(f"a descent ended with an excess risk of {excess.max().item()}")
        return log_probs

    def summary(policy: Callable[[World, Scalarization], Tensor]) -> dict[str, float]:
        answers = {name: policy(here, s).argmax(-1) for name, s in SCALARIZATIONS.items()}
        first = answers["logistic"]
        elsewhere = {name: policy(world, SCALARIZATIONS["logistic"]).argmax(-1) for name, world in changed.items()}
        return {
            "same_for_all_scalarizations": share(torch.stack([one == first for one in answers.values()]).all(0)),
            **{f"same_for_other_{name}": share(first == other) for name, other in elsewhere.items()},
            "is_the_favourite": share(first == favourite),
        }

    def share(agree: Tensor) -> float:
        return agree.double().mean().item()

    # The response that wins most often against a uniformly drawn one (Borda). The diagonal is the same for all.
    favourite = here.preferences.sum(-1).argmax(-1)
    return {
        "conditioned": summary(descended),
        "plain": summary(plain_optimum),
        "reference_is_the_favourite": share(here.log_ref.argmax(-1) == favourite),
    }


def table(result: dict[str, Any]) -> str:
    """Format ``result`` as text."""
    lines = [
        f"{result['responses']} responses, {result['worlds']} random worlds of each kind; largest values over worlds"
    ]
    for kind in KINDS:
        for training in ("conditioned", "plain"):
            for name, row in result[kind][training].items():
                cells = "  ".join(f"{key.replace('_', ' ')} {value:.1e}" for key, value in row.items())
                lines.append(f"{kind:>13} {training:>11} {name:>11}  {cells}")
        alone = result[kind]["prompt_only"]
        for training in ("conditioned", "plain"):
            cells = "  ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in alone[training].items())
            lines.append(f"{kind:>13} prompt-only answer, {training}: {cells}")
    expected, echo = result["dimension_expected"], result["echo"]["least_probability_of_the_alternative"]
    lines.append(f"dimension of the conditioned optima: {result['dimension_of_optima']}, K(K-1)/2 = {expected}")
    lines.append(f"one of them repeats the alternative with a probability of at least {echo:.4f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.tabular", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--responses", type=int, default=4, help="K [4]")
    parser.add_argument("--worlds", type=int, default=100, help="random worlds of each kind [100]")
    options = parser.parse_args(arguments)
    if options.responses < 2 or options.worlds < 1:
        parser.error("--responses must be at least 2, and --worlds at least 1")
    result = measure(options.responses, options.worlds)
    print(table(result))
    if options.json:
        command = "python -m benchmarks.study.tabular " + " ".join(sys.argv[1:] if arguments is None else arguments)
        write_json(options.json, {**provenance(command), **result})


if __name__ == "__main__":
    main()
