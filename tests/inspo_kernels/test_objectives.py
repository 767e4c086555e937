"""Each objective against its formula in plain Python floats, and its gradient against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

import inspo_kernels as ik
from inspo_kernels.objectives import OBJECTIVES, make_objective

# Two pairs: chosen, rejected, ref_chosen, ref_rejected, |w|, |l|, marginal_chosen
PAIRS = [(-12.5, -20.25, -14.0, -19.0, 5, 9, -13.75), (-30.0, -8.5, -22.0, -11.0, 12, 3, -21.0)]


def sums(pairs=PAIRS, requires_grad=False):
    columns = [torch.tensor(c, dtype=torch.float64, requires_grad=requires_grad) for c in zip(*pairs)]
    chosen, rejected, ref_chosen, ref_rejected, chosen_len, rejected_len, marginal = columns
    return ik.PairSums(
        chosen=chosen,
        rejected=rejected,
        chosen_len=chosen_len,
        rejected_len=rejected_len,
        index=torch.arange(len(pairs)),
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        marginal_chosen=marginal,
        marginal_rejected=marginal - 1,
        marginal_chosen_len=chosen_len,
        marginal_rejected_len=rejected_len,
    )


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def advantage_gap(w, l, rw, rl):
    return (w - rw) - (l - rl)


def orpo(w, l, nw, nl, sft, lam):
    p, q = math.exp(w / nw), math.exp(l / nl)
    odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
    return -sft / nw - lam * math.log(sigmoid(odds))


FORMULAS = {
    ik.DPO(): lambda w, l, rw, rl, nw, nl, m: -math.log(sigmoid(0.1 * advantage_gap(w, l, rw, rl))),
    ik.DPO(beta=0.4, label_smoothing=0.2): lambda w, l, rw, rl, nw, nl, m: (
        -0.8 * math.log(sigmoid(0.4 * advantage_gap(w, l, rw, rl)))
        - 0.2 * math.log(sigmoid(-0.4 * advantage_gap(w, l, rw, rl)))
    ),
    ik.OneSided(): lambda w, l, rw, rl, nw, nl, m: -math.log(sigmoid(-0.1 * (l - rl))),
    ik.IPO(): lambda w, l, rw, rl, nw, nl, m: (advantage_gap(w, l, rw, rl) - 5.0) ** 2,
    ik.IPO(tau=1.0): lambda w, l, rw, rl, nw, nl, m: (advantage_gap(w, l, rw, rl) - 0.5) ** 2,
    ik.SimPO(): lambda w, l, rw, rl, nw, nl, m: -math.log(sigmoid(2 * w / nw - 2 * l / nl - 1.0)),
    ik.SimPO(beta=10, gamma=0.3): lambda w, l, rw, rl, nw, nl, m: -math.log(sigmoid(10 * (w / nw - l / nl) - 0.3)),
    ik.RDPO(): lambda w, l, rw, rl, nw, nl, m: -math.log(sigmoid(0.1 * advantage_gap(w, l, rw, rl) + 0.01 * (nw - nl))),
    ik.ORPO(): lambda w, l, rw, rl, nw, nl, m: orpo(w, l, nw, nl, m, 1.0),
    ik.ORPO(lam=0.3, sft="chosen"): lambda w, l, rw, rl, nw, nl, m: orpo(w, l, nw, nl, w, 0.3),
    ik.Hinge(): lambda w, l, rw, rl, nw, nl, m: max(0.0, 1 - 0.1 * advantage_gap(w, l, rw, rl)),
}


@pytest.mark.parametrize("objective", FORMULAS, ids=repr)
def test_formula(objective):
    expected = [FORMULAS[objective](*pair) for pair in PAIRS]
    assert objective(sums()).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("objective", FORMULAS, ids=repr)
def test_gradient_matches_finite_differences_and_declared_fields(objective):
    names = ("chosen", "rejected", "marginal_chosen", "marginal_rejected")
    s = sums()
    leaves = [getattr(s, name).clone().requires_grad_() for name in names]

    def loss(*values):
        return objective(ik.PairSums(**{**vars(s), **dict(zip(names, values))})).sum()

    touched = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
    assert {n for n, g in zip(names, touched) if g is not None} <= set(objective.gradient_fields)
    assert torch.autograd.gradcheck(lambda *v: loss(*v) + sum(v).sum() * 0, leaves)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_preferring_the_chosen_response_never_raises_the_loss(name):
    """The direction of every gradient; an IPO with swapped signs pushes the rejected response up."""
    objective = make_objective(name)
    near = [(-12.0, -12.5, -12.0, -12.0, 6, 6, -12.0)]  # within IPO's target gap, where its pull is still upward
    s = sums(near)
    chosen, rejected = s.chosen.clone().requires_grad_(), s.rejected.clone().requires_grad_()
    loss = objective(ik.PairSums(**{**vars(s), "chosen": chosen, "rejected": rejected})).sum()
    d_chosen, d_rejected = torch.autograd.grad(loss, (chosen, rejected), allow_unused=True)
    assert d_chosen is None or d_chosen.item() < 0
    assert d_rejected.item() > 0


def test_extreme_margins_stay_finite():
    far = [(-1e5, -1.0, -1.0, -1e5, 3, 3, -2.0), (-1.0, -1e5, -1e5, -1.0, 3, 3, -2.0), (0.0, 0.0, 0.0, 0.0, 1, 1, 0.0)]
    for name in OBJECTIVES:
        s = sums(far)
        chosen, rejected = s.chosen.clone().requires_grad_(), s.rejected.clone().requires_grad_()
        losses = make_objective(name)(ik.PairSums(**{**vars(s), "chosen": chosen, "rejected": rejected}))
        gradients = torch.autograd.grad(losses.sum(), (chosen, rejected), allow_unused=True)
        for tensor in (losses, *gradients):
            assert tensor is None or tensor.isfinite().all(), name


@pytest.mark.parametrize(
    "objective, chosen, rejected",
    [
        (ik.DPO(beta=0.2), 0.2 * 1.5, 0.2 * -1.25),
        (ik.IPO(tau=0.5), 0.5 * 1.5, 0.5 * -1.25),
        (ik.RDPO(beta=0.2), 0.2 * 1.5, 0.2 * -1.25),
        (ik.Hinge(beta=0.2), 0.2 * 1.5, 0.2 * -1.25),
        (ik.OneSided(beta=0.2), 0.2 * 1.5, 0.2 * -1.25),
        (ik.SimPO(beta=3.0), 3.0 * -12.5 / 5, 3.0 * -20.25 / 9),
        (ik.ORPO(lam=0.5), 0.5 * -12.5 / 5, 0.5 * -20.25 / 9),
    ],
    ids=repr,
)
def test_rewards(objective, chosen, rejected):
    got_chosen, got_rejected = objective.rewards(sums())
    assert (got_chosen[0].item(), got_rejected[0].item()) == pytest.approx((chosen, rejected))


def test_defaults_are_the_documented_ones():
    assert make_objective("dpo") == ik.DPO(beta=0.1, label_smoothing=0.0)
    assert make_objective("one_sided") == ik.OneSided(beta=0.1)
    assert make_objective("ipo") == ik.IPO(tau=0.1)
    assert make_objective("simpo") == ik.SimPO(beta=2.0, gamma=1.0)
    assert make_objective("rdpo") == ik.RDPO(beta=0.1, alpha=0.01)
    assert make_objective("orpo") == ik.ORPO(lam=1.0, sft="marginal")
    assert make_objective("hinge") == ik.Hinge(beta=0.1)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: make_objective("simpoo"), ValueError, "did you mean 'simpo'"),
        (lambda: make_objective("dpo", bta=1.0), ValueError, "did you mean 'beta'"),
        (lambda: make_objective("dpo", tau=1.0), ValueError, "takes no 'tau'"),
        (lambda: make_objective(ik.DPO), TypeError, "call the class"),
        (lambda: make_objective(ik.DPO(), beta=1.0), ValueError, "an instance already has its own"),
        (lambda: ik.DPO(beta=0.0), ValueError, "beta must be positive, got 0.0"),
        (lambda: ik.DPO(label_smoothing=0.5), ValueError, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (lambda: ik.IPO(tau=-1), ValueError, "tau must be positive, got -1"),
        (lambda: ik.SimPO(gamma=float("nan")), ValueError, "gamma must be a finite number, got nan"),
        (lambda: ik.DPO(beta="0.1"), ValueError, "beta must be a finite number, got '0.1'"),
        (lambda: ik.ORPO(sft="both"), ValueError, 'must be "marginal" or "chosen"'),
        (lambda: ik.Objective()(sums()), NotImplementedError, "must define __call__"),
    ],
)
def test_bad_objectives_say_what_to_change(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_impossible_chosen_response_costs_infinitely_much():
    one = torch.ones(1, dtype=torch.float64)
    sums = ik.PairSums(
        chosen=-torch.inf * one, rejected=-one, chosen_len=one, rejected_len=one, index=torch.arange(1),
        ref_chosen=-one, ref_rejected=-one,
    )  # fmt: skip
    for objective in (ik.DPO(), ik.RDPO(), ik.Hinge(), ik.SimPO()):
        assert objective(sums).item() == torch.inf
