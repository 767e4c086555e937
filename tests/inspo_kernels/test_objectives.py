"""Test each objective against its paper's formula in plain Python floats, and its gradient by finite differences."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from dataclasses import replace

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


def log_sigmoid(z):
    return min(z, 0.0) - math.log1p(math.exp(-abs(z)))


def dpo_of(f_prime):
    """Return -log sigma(0.5 [f'(pi/pi_ref of chosen) - f'(pi/pi_ref of rejected)]) with the f-DPO paper's f'."""
    return lambda w, l, rw, rl, nw, nl, m: -log_sigmoid(0.5 * (f_prime(math.exp(w - rw)) - f_prime(math.exp(l - rl))))


def exo(margin, eps):
    """Return KL(p || q) for p = softmax of (margin, 0) and q = (1 - eps, eps)."""
    p = [sigmoid(margin), sigmoid(-margin)]
    return sum(p_i * math.log(p_i / q_i) for p_i, q_i in zip(p, (1 - eps, eps)))


def discopop(margin, tau):
    modulation = sigmoid(margin / tau)
    return (1 - modulation) * -log_sigmoid(margin) + modulation * math.exp(-margin)


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
    ik.Robust(): lambda w, l, rw, rl, nw, nl, m: -log_sigmoid(0.1 * advantage_gap(w, l, rw, rl)),
    ik.Robust(beta=0.4, label_smoothing=0.2): lambda w, l, rw, rl, nw, nl, m: (
        (-0.8 * log_sigmoid(0.4 * advantage_gap(w, l, rw, rl)) + 0.2 * log_sigmoid(-0.4 * advantage_gap(w, l, rw, rl)))
        / 0.6
    ),
    ik.EXO(): lambda w, l, rw, rl, nw, nl, m: exo(0.1 * advantage_gap(w, l, rw, rl), 1e-3),
    ik.EXO(beta=0.3, label_smoothing=0.2): lambda w, l, rw, rl, nw, nl, m: exo(0.3 * advantage_gap(w, l, rw, rl), 0.2),
    ik.DiscoPOP(): lambda w, l, rw, rl, nw, nl, m: discopop(0.1 * advantage_gap(w, l, rw, rl), 0.05),
    ik.DiscoPOP(beta=0.3, tau=0.8): lambda w, l, rw, rl, nw, nl, m: discopop(0.3 * advantage_gap(w, l, rw, rl), 0.8),
    ik.SigmoidNorm(beta=3.0): lambda w, l, rw, rl, nw, nl, m: -log_sigmoid(3 * ((w - rw) / nw - (l - rl) / nl)),
    ik.IPOMean(tau=0.8): lambda w, l, rw, rl, nw, nl, m: ((w - rw) / nw - (l - rl) / nl - 0.625) ** 2,
    ik.NCA(): lambda w, l, rw, rl, nw, nl, m: (
        -log_sigmoid(0.1 * (w - rw)) - (log_sigmoid(-0.1 * (w - rw)) + log_sigmoid(-0.1 * (l - rl))) / 2
    ),
    ik.BCO(): lambda w, l, rw, rl, nw, nl, m: -log_sigmoid(0.1 * (w - rw)) - log_sigmoid(-0.1 * (l - rl)),
    ik.SPPO(beta=0.2): lambda w, l, rw, rl, nw, nl, m: (w - rw - 5 * (1 - 0.5)) ** 2 + (l - rl - 5 * (0 - 0.5)) ** 2,
    ik.APOZero(): lambda w, l, rw, rl, nw, nl, m: 1 - sigmoid(0.1 * (w - rw)) + sigmoid(0.1 * (l - rl)),
    ik.APODown(): lambda w, l, rw, rl, nw, nl, m: (
        1 + sigmoid(0.1 * (w - rw)) - sigmoid(0.1 * (w - rw) - 0.1 * (l - rl))
    ),
    # The two pairs' chosen responses have 8.5 tokens on average.
    ik.SFT(): lambda w, l, rw, rl, nw, nl, m: -m / 8.5,
    ik.SFT(sft="marginal"): lambda w, l, rw, rl, nw, nl, m: -m / 8.5,
    ik.SFT(sft="chosen"): lambda w, l, rw, rl, nw, nl, m: -w / 8.5,
    ik.DPO(beta=0.5, divergence="forward_kl"): dpo_of(lambda t: -1 / t),
    ik.DPO(beta=0.5, divergence="js"): dpo_of(lambda t: math.log(2 * t / (1 + t))),
    # TRL's 0.7 is the paper's 0.3.
    ik.DPO(beta=0.5, divergence="alpha", divergence_alpha=0.7): dpo_of(lambda t: (1 - t**-0.3) / 0.3),
    ik.DPO(beta=0.5, divergence="alpha", divergence_alpha=1.0): dpo_of(math.log),
    ik.Mixture([("dpo", 0.5), (ik.SFT(sft="chosen"), -2.0)]): lambda w, l, rw, rl, nw, nl, m: (
        -0.5 * log_sigmoid(0.1 * advantage_gap(w, l, rw, rl)) + 2 * w / 8.5
    ),
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
    assert {n for n, g in zip(names, touched) if g is not None} == set(objective.differentiated(marginals=True))
    assert set(objective.differentiated(marginals=True)) <= set(objective.gradient_fields)
    assert torch.autograd.gradcheck(lambda *v: loss(*v) + sum(v).sum() * 0, leaves)


# DiscoPOP's loss rises between its two branches, at small margins.
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "discopop"])
def test_preferring_the_chosen_response_never_raises_the_loss(name):
    """Check the direction of every gradient. An IPO with swapped signs would raise the rejected response."""
    objective = ik.SFT(sft="chosen") if name == "sft" else make_objective(name)
    near = [(-12.0, -12.5, -12.0, -12.0, 6, 6, -12.0)]  # IPO still raises the margin within its target gap
    s = sums(near)
    chosen, rejected = s.chosen.clone().requires_grad_(), s.rejected.clone().requires_grad_()
    loss = objective(ik.PairSums(**{**vars(s), "chosen": chosen, "rejected": rejected})).sum()
    d_chosen, d_rejected = torch.autograd.grad(loss, (chosen, rejected), allow_unused=True)
    # APO-down lowers both responses.
    assert d_chosen.item() > 0 if name == "apo_down" else d_chosen is None or d_chosen.item() < 0
    assert d_rejected is None or d_rejected.item() > 0
    assert (d_chosen is None, d_rejected is None) == (name == "one_sided", name == "sft")


DIVERGENCES = [{"divergence": "forward_kl"}, {"divergence": "js"}, {"divergence": "alpha", "divergence_alpha": 0.3}]
DIVERGENT = [ik.DPO, ik.Robust, ik.Hinge, ik.EXO, ik.DiscoPOP, ik.SigmoidNorm, ik.IPOMean]


@pytest.mark.parametrize(
    "objective",
    [
        *map(make_objective, OBJECTIVES),
        *(objective(**options) for objective in DIVERGENT for options in DIVERGENCES),
        *(objective(label_smoothing=0.2) for objective in (ik.DPO, ik.Robust, ik.EXO, ik.AOT, ik.AOTUnpaired)),
        ik.Mixture([(ik.DiscoPOP(), 1.0), (ik.EXO(), 1.0), (ik.SPPO(), 0.1)]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("far", [1e4, 1e5])
def test_extreme_margins_stay_finite(objective, far):
    s = sums(
        [(-far, -1.0, -1.0, -far, 3, 3, -2.0), (-1.0, -far, -far, -1.0, 3, 3, -2.0), (0.0, 0.0, 0.0, 0.0, 1, 1, 0.0)]
    )
    chosen, rejected = s.chosen.clone().requires_grad_(), s.rejected.clone().requires_grad_()
    marginal = s.marginal_chosen.clone().requires_grad_()
    fields = {"chosen": chosen, "rejected": rejected, "marginal_chosen": marginal}
    losses = objective(ik.PairSums(**{**vars(s), **fields}))
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected, marginal), allow_unused=True)
    for tensor in (losses, *gradients):
        assert tensor is None or tensor.isfinite().all()


@pytest.mark.parametrize("objective, total", [(ik.AOT(beta=0.3), "paired"), (ik.AOTUnpaired(beta=0.3), "unpaired")])
def test_aot_is_the_cheapest_matching(objective, total):
    """Sorting computes optimal transport on a line. By definition it is the cheapest of all matchings."""
    g = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = (-9 * torch.rand(4, 5, generator=g, dtype=torch.float64)).tolist()
    s = sums(list(zip(chosen, rejected, ref_chosen, ref_rejected, range(1, 6), range(1, 6), chosen)))
    if total == "paired":
        ours, theirs = s.chosen - s.rejected, s.ref_chosen - s.ref_rejected
    else:
        ours, theirs = s.chosen - s.ref_chosen, s.rejected - s.ref_rejected
    matchings = itertools.permutations(range(5))
    cheapest = min(-torch.nn.functional.logsigmoid(0.3 * (ours - theirs[list(p)])).sum().item() for p in matchings)
    assert objective(s).sum().item() == pytest.approx(cheapest, rel=1e-12)


@pytest.mark.parametrize("objective", [ik.AOT(), ik.AOTUnpaired(label_smoothing=0.1)])
def test_aot_losses_follow_their_pairs(objective):
    pairs = [(-12.5, -20.25, -14.0, -19.0, 5, 9, -1.0), (-30.0, -8.5, -22.0, -11.0, 12, 3, -1.0), (-3.0,) * 7]
    for order in itertools.permutations(range(3)):
        expected = objective(sums(pairs))[list(order)]
        torch.testing.assert_close(objective(sums([pairs[i] for i in order])), expected, rtol=1e-12, atol=0)
    s = sums(pairs)
    leaves = [getattr(s, name).clone().requires_grad_() for name in ("chosen", "rejected")]
    assert torch.autograd.gradcheck(
        lambda c, r: objective(ik.PairSums(**{**vars(s), "chosen": c, "rejected": r})), leaves
    )


def test_exo_of_an_impossible_response_is_finite():
    one = torch.ones(1, dtype=torch.float64)
    s = ik.PairSums(-torch.inf * one, -one, one, one, torch.arange(1), ref_chosen=-one, ref_rejected=-one)
    assert ik.EXO(label_smoothing=0.1)(s).item() == pytest.approx(-math.log(0.1))


def test_exponents_of_divergences_stop_at_trl_s_bound():
    s = sums([(-100.0, -1.0, -1.0, -1.0, 3, 3, -2.0)])
    assert ik.Hinge(beta=1.0, divergence="forward_kl")(s).item() == pytest.approx(math.exp(80), rel=1e-12)


class TestMixture:
    """Weighted sums of objectives."""

    def test_a_mixture_needs_what_its_parts_need(self):
        free = ik.Mixture([("simpo", 1.0), (ik.SFT(), 0.5)])
        assert not free.needs_reference and not free.needs_marginals and not free.batch_coupled
        assert free.gradient_fields == ("chosen", "rejected", "marginal_chosen")
        assert free.differentiated(marginals=False) == ("chosen", "rejected")
        assert free.differentiated(marginals=True) == ("chosen", "rejected", "marginal_chosen")
        assert ik.Mixture([("simpo", 1.0), ("dpo", 1.0)]).needs_reference
        assert ik.Mixture([("simpo", 1.0), ("orpo", 1.0)]).needs_marginals
        assert ik.Mixture([("simpo", 1.0), ("aot", 1.0)]).batch_coupled
        assert ik.Mixture([("one_sided", 1.0), (ik.SFT(), 0.5)]).differentiated(marginals=True) == (
            "rejected",
            "marginal_chosen",
        )

    def test_marginals_count_for_parts_that_need_them(self):
        """A custom objective's gradient_fields name all sums by default. Another part must not activate unused sums."""

        class Own(ik.Objective):
            def __call__(self, s):
                return s.rejected - s.chosen

        mixture = ik.Mixture([("orpo", 1.0), (Own(), 1.0)])
        assert mixture.differentiated(marginals=True) == ("chosen", "rejected", "marginal_chosen")

    def test_rewards_are_those_of_the_first_part(self):
        s = sums()
        for first, second in itertools.permutations([ik.SimPO(), ik.DPO(beta=0.7)]):
            chosen, rejected = ik.Mixture([(first, 0.5), (second, 2.0)]).rewards(s)
            assert torch.equal(chosen, first.rewards(s)[0]) and torch.equal(rejected, first.rewards(s)[1])

    def test_mixtures_hold_mixtures(self):
        inner = ik.Mixture([("dpo", 2.0), ("bco_pair", 1.0)])
        flat = ik.Mixture([("dpo", 1.0), ("bco_pair", 0.5), ("hinge", 3.0)])
        torch.testing.assert_close(ik.Mixture([(inner, 0.5), ("hinge", 3.0)])(sums()), flat(sums()))

    def test_parts_cannot_change_each_others_sums(self):
        class Careless(ik.Objective):
            def __call__(self, s):
                s.ref_chosen.add_(1)
                return s.chosen * 0

        mixture = ik.Mixture([(Careless(), 1.0), ("dpo", 1.0)])
        assert torch.equal(mixture(sums()), ik.DPO()(sums()))

    def test_a_part_must_return_one_loss_per_pair(self):
        class Scalar(ik.Objective):
            def __call__(self, s):
                return (s.rejected - s.chosen).mean()

        with pytest.raises(ValueError, match="objective Scalar must return one loss per pair"):
            ik.Mixture([("dpo", 1.0), (Scalar(), 1.0)])(sums())

    def test_copies_and_equal_parts_are_equal(self):
        mixture = ik.Mixture([("dpo", 1.0), (ik.EXO(), 0.5)])
        for same in (pickle.loads(pickle.dumps(mixture)), copy.deepcopy(mixture), ik.Mixture(list(mixture.parts))):
            assert same == mixture and hash(same) == hash(mixture)
        assert make_objective(mixture) is mixture


def test_repr_shows_a_divergence_that_is_chosen():
    assert repr(ik.DPO()) == "DPO(beta=0.1, label_smoothing=0.0)"
    assert repr(ik.Hinge(divergence="js")) == "Hinge(beta=0.1, divergence='js')"
    chosen = ik.IPOMean(divergence="alpha", divergence_alpha=0.3)
    assert repr(chosen) == "IPOMean(tau=0.1, divergence='alpha', divergence_alpha=0.3)"


@pytest.mark.parametrize("marginals", [True, False])
def test_sft_uses_marginals_if_given(marginals):
    s = sums()
    if not marginals:
        s = replace(s, marginal_chosen=None, marginal_rejected=None)
    named = ik.SFT(sft="marginal" if marginals else "chosen")
    assert torch.equal(ik.SFT()(s), named(s))
    assert ik.SFT().differentiated(marginals) == named.differentiated(marginals)


def test_sft_divides_by_the_batchs_mean_length():
    s = replace(sums(), chosen_len_mean=torch.full((2,), 4.0), marginal_chosen_len_mean=torch.full((2,), 2.0))
    assert ik.SFT(sft="chosen")(s).tolist() == [12.5 / 4, 30.0 / 4]
    assert ik.SFT()(s).tolist() == [13.75 / 2, 21.0 / 2]


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
        *(
            (objective(beta=0.2), 0.2 * 1.5, 0.2 * -1.25)
            for objective in (ik.Robust, ik.EXO, ik.NCA, ik.SPPO, ik.BCO, ik.APOZero, ik.APODown, ik.AOT)
        ),
        *((objective(beta=0.2), 0.2 * 1.5, 0.2 * -1.25) for objective in (ik.AOTUnpaired, ik.DiscoPOP, ik.SFT)),
        (ik.SigmoidNorm(beta=0.2), 0.2 * 1.5, 0.2 * -1.25),
        (ik.IPOMean(tau=0.2), 0.2 * 1.5, 0.2 * -1.25),
        (ik.DPO(beta=0.2, divergence="js"), 0.2 * 1.5, 0.2 * -1.25),
    ],
    ids=repr,
)
def test_rewards(objective, chosen, rejected):
    got_chosen, got_rejected = objective.rewards(sums())
    assert (got_chosen[0].item(), got_rejected[0].item()) == pytest.approx((chosen, rejected))


def test_defaults_match_the_documentation():
    assert make_objective("dpo") == ik.DPO(beta=0.1, label_smoothing=0.0)
    assert make_objective("one_sided") == ik.OneSided(beta=0.1)
    assert make_objective("ipo") == ik.IPO(tau=0.1)
    assert make_objective("simpo") == ik.SimPO(beta=2.0, gamma=1.0)
    assert make_objective("rdpo") == ik.RDPO(beta=0.1, alpha=0.01)
    assert make_objective("orpo") == ik.ORPO(lam=1.0, sft="marginal")
    assert make_objective("hinge") == ik.Hinge(beta=0.1)
    assert make_objective("robust") == ik.Robust(beta=0.1, label_smoothing=0.0)
    assert make_objective("exo_pair") == ik.EXO(beta=0.1, label_smoothing=1e-3)
    assert make_objective("discopop") == ik.DiscoPOP(beta=0.1, tau=0.05)
    assert make_objective("aot") == ik.AOT(beta=0.1, label_smoothing=0.0)
    assert make_objective("aot_unpaired") == ik.AOTUnpaired(beta=0.1, label_smoothing=0.0)
    assert make_objective("sft") == ik.SFT(beta=0.1, sft="auto")
    assert make_objective("ipo_mean") == ik.IPOMean(tau=0.1)
    assert ik.DPO() == ik.DPO(divergence="reverse_kl", divergence_alpha=0.5)


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
        (lambda: make_objective("bco"), ValueError, "did you mean 'bco_pair'"),
        (lambda: make_objective("mixture"), ValueError, "unknown objective 'mixture'"),
        (lambda: make_objective("dpo", divergance="js"), ValueError, "did you mean 'divergence'"),
        (lambda: make_objective("discopop", discopop_tau=1.0), ValueError, "takes no 'discopop_tau'.*tau"),
        (lambda: ik.DPO(divergence="kl"), ValueError, 'divergence=\'kl\': must be "reverse_kl" or "forward_kl" or'),
        (lambda: ik.Hinge(divergence_alpha=math.inf), ValueError, "divergence_alpha must be a finite number, got inf"),
        (lambda: ik.Robust(label_smoothing=0.5), ValueError, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (lambda: ik.AOT(label_smoothing=-0.1), ValueError, r"label_smoothing must be in \[0, 0.5\), got -0.1"),
        (lambda: ik.AOTUnpaired(beta=0), ValueError, "beta must be positive, got 0"),
        (lambda: ik.EXO(label_smoothing=0), ValueError, "label_smoothing must be above 0 for EXO"),
        (lambda: ik.EXO(label_smoothing=0.7), ValueError, r"label_smoothing must be in \[0, 0.5\), got 0.7"),
        (lambda: ik.DiscoPOP(tau=0), ValueError, "tau must be positive, got 0"),
        (lambda: ik.IPOMean(tau=-1), ValueError, "tau must be positive, got -1"),
        (lambda: ik.SFT(sft="rejected"), ValueError, 'must be "auto" or "marginal" or "chosen"'),
        *(
            (lambda cls=cls: cls(beta=-0.1), ValueError, "beta must be positive, got -0.1")
            for cls in (ik.NCA, ik.BCO, ik.SPPO, ik.APOZero, ik.APODown, ik.SigmoidNorm, ik.SFT)
        ),
        (lambda: ik.Mixture([]), ValueError, r"parts must be a list of at least one \(objective, weight\), got \[\]"),
        (lambda: ik.Mixture(["dpo"]), ValueError, r"parts must hold pairs \(objective, weight\), got 'dpo'"),
        (lambda: ik.Mixture([("dpo", "1")]), ValueError, "a weight in parts must be a finite number, got '1'"),
        (lambda: ik.Mixture([("dop", 1.0)]), ValueError, "did you mean 'dpo'"),
        (lambda: ik.Objective()(sums()), NotImplementedError, "must define __call__"),
    ],
)
def test_bad_objectives_say_what_to_change(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_impossible_chosen_response_has_infinite_loss():
    one = torch.ones(1, dtype=torch.float64)
    sums = ik.PairSums(
        chosen=-torch.inf * one,
        rejected=-one,
        chosen_len=one,
        rejected_len=one,
        index=torch.arange(1),
        ref_chosen=-one,
        ref_rejected=-one,
    )
    for objective in (ik.DPO(), ik.RDPO(), ik.Hinge(), ik.SimPO(), ik.NCA(), ik.BCO(), ik.SPPO(), ik.SigmoidNorm()):
        assert objective(sums).item() == torch.inf
