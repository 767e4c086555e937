"""Test ``linear_logps`` against plain torch: values, any upstream gradient, its three paths, shapes, errors."""

from __future__ import annotations

import pytest
import torch
from cases import certain_label, gradients_of, relative_error
from hypothesis import given
from hypothesis import strategies as st

import inspo_kernels as ik
from inspo_kernels.row_sums import STATISTICS


def inputs(shape=(3, 5), hidden_size=6, vocab=23, dtype=torch.float64, seed=0, ignored=0.3):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, hidden_size, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, hidden_size, generator=g, dtype=torch.float64)
    bias = torch.randn(vocab, generator=g, dtype=torch.float64)
    targets = torch.randint(vocab, shape, generator=g)
    targets[torch.rand(shape, generator=g) < ignored] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def plain(hidden, weight, targets, bias=None, softcap=None, logit_scale=1.0):
    """Compute log-probs without the package's reference, so that tests check both."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logps = logits.log_softmax(-1)
    picked = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return picked * (targets >= 0)


@pytest.mark.parametrize(
    "options",
    [{}, {"logit_scale": 1.1}, {"temperature": 0.7}, {"softcap": 30.0}, {"softcap": 15.0, "temperature": 1.3}],
    ids=str,
)
def test_float32_errors_cancel_over_many_tokens(options):
    # A constant rounded to float32 would scale all logits alike, and the errors of all tokens would add up.
    hidden, weight, _, targets = inputs((4000,), hidden_size=48, vocab=700, dtype=torch.float32, ignored=0.0)
    exact = ik.linear_logps(hidden.double(), weight.double(), targets, backend="reference", **options)
    errors = ik.linear_logps(hidden, weight, targets, backend="torch", **options).double() - exact
    assert errors.mean().abs() < 5 * errors.square().mean().sqrt() / len(errors) ** 0.5


@given(
    shape=st.sampled_from([(1,), (7,), (2, 3), (2, 1, 4), (0,), (3, 0)]),
    vocab=st.sampled_from([1, 2, 31]),
    with_bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    logit_scale=st.sampled_from([1.0, 0.3, -1.0, 0.0]),
    ignored=st.sampled_from([0.0, 0.5, 1.1]),
    frozen=st.booleans(),
    seed=st.integers(0, 5),
)
def test_values_and_gradients(shape, vocab, with_bias, softcap, logit_scale, ignored, frozen, seed):
    hidden, weight, bias, targets = inputs(shape, vocab=vocab, seed=seed, ignored=ignored)
    leaves = [hidden.requires_grad_()]
    if not frozen:
        leaves.append(weight.requires_grad_())
        if with_bias:
            leaves.append(bias.requires_grad_())
    options = {"bias": bias if with_bias else None, "softcap": softcap, "logit_scale": logit_scale}
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = plain(hidden, weight, targets, **options)
    expected_gradients = gradients_of((expected * upstream).sum(), *leaves)
    for backend in ("torch", "reference"):
        logps = ik.linear_logps(hidden, weight, targets, backend=backend, **options)
        torch.testing.assert_close(logps, expected, rtol=1e-11, atol=1e-12)
        for got, want in zip(gradients_of((logps * upstream).sum(), *leaves), expected_gradients):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_gradcheck_and_exactly_the_needed_gradients(needed):
    hidden, weight, bias, targets = inputs((4,), hidden_size=3, vocab=5)
    leaves = [hidden, weight, bias]
    for i in needed:
        leaves[i].requires_grad_()

    def logps(*leaves):
        return ik.linear_logps(leaves[0], leaves[1], targets, bias=leaves[2], softcap=3.0, logit_scale=0.7)

    assert torch.autograd.gradcheck(logps, leaves)
    logps(*leaves).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i in needed for i in range(3)]


def test_upstream_gradients_are_per_token_and_repeatable():
    """Another library once scaled every token by the first token's upstream gradient."""
    hidden, weight, _, targets = inputs((6,), ignored=0.0)
    for frozen in (False, True):
        hidden.requires_grad_()
        weight.requires_grad_(not frozen)
        logps = ik.linear_logps(hidden, weight, targets)
        each = [torch.autograd.grad(logps[i], hidden, retain_graph=True)[0] for i in range(6)]
        upstream = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5, -1.0], dtype=torch.float64)
        for _ in range(2):
            (got,) = torch.autograd.grad(logps, hidden, upstream, retain_graph=True)
            expected = sum(u * e for u, e in zip(upstream, each))
            torch.testing.assert_close(got, expected)


def test_changing_a_saved_weight_is_an_error():
    hidden, weight, _, targets = inputs((4,), ignored=0.0)
    logps = ik.linear_logps(hidden.requires_grad_(), weight.requires_grad_(), targets, max_workspace_bytes=1)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_saved_rows_survive_a_changed_weight():
    hidden, weight, _, targets = inputs((4,), ignored=0.0)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(ik.linear_logps(*leaves, targets).sum(), leaves)
    logps = ik.linear_logps(*leaves, targets)
    with torch.no_grad():
        weight.add_(1.0)
    for got, want in zip(torch.autograd.grad(logps.sum(), leaves), expected):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("workspace", [None, 1])
def test_frozen_bias_may_change_or_be_inference_mode(workspace):
    hidden, weight, bias, targets = inputs((4,), ignored=0.0)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with torch.inference_mode():
        inferred = bias.clone()
    expected = None
    for one in (bias, inferred, bias):
        loss = ik.linear_logps(*leaves, targets, bias=one, max_workspace_bytes=workspace).sum()
        if expected is not None:
            bias.zero_()
        got = torch.autograd.grad(loss, leaves)
        expected = expected or got
        bias.copy_(inferred)
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("gap", [1, 10, 16, 20, 25, 60])
def test_log_probs_of_almost_certain_tokens_keep_their_digits(gap):
    logp = ik.linear_logps(torch.tensor([[float(gap)]]), torch.tensor([[1.0], [0.0]]), torch.tensor([0]))
    exact = -torch.tensor(-float(gap), dtype=torch.float64).exp().log1p()
    assert logp.item() == pytest.approx(exact.item(), rel=2e-6)


def test_log_probs_never_exceed_zero_and_survive_extreme_logits():
    hidden = torch.tensor([[3e4], [-3e4], [1e-4]])
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    logps = ik.linear_logps(hidden, weight, torch.tensor([0, 1, 2]))
    assert (logps <= 0).all() and logps.isfinite().all()
    all_negative = ik.linear_logps(torch.ones(1, 1), torch.tensor([[-500.0], [-501.0]]), torch.tensor([0]))
    torch.testing.assert_close(all_negative, torch.tensor([-0.31326169]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frozen", [False, True])
def test_error_at_most_twice_that_of_plain_torch(dtype, frozen):
    hidden, weight, bias, targets = inputs((70,), hidden_size=48, vocab=901, dtype=dtype, ignored=0.1)
    weight = weight / 4
    upstream = torch.linspace(-1, 2, 70)
    results = []
    for compute, cast in ((plain, torch.float64), (plain, dtype), (ik.linear_logps, dtype)):
        leaves = [
            t.detach().to(cast).requires_grad_(not frozen or i == 0) for i, t in enumerate((hidden, weight, bias))
        ]
        logps = compute(leaves[0], leaves[1], targets, bias=leaves[2])
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        results.append([logps.detach(), *gradients_of((logps * upstream.to(logps.dtype)).sum(), *needed)])
    truth, base, ours = results
    assert ours[0].dtype == torch.float32
    for got, plain_torch, true in zip(ours, base, truth, strict=True):
        floor = torch.finfo(dtype).eps / 2
        assert relative_error(got, true) <= 2 * max(relative_error(plain_torch, true), floor)


def test_bias_gradient_of_many_tokens_is_exact():
    hidden, weight, bias, targets = inputs((3000,), hidden_size=8, vocab=200, dtype=torch.float32)
    errors = []
    exact = None
    for compute, dtype in ((plain, torch.float64), (plain, torch.float32), (ik.linear_logps, torch.float32)):
        leaf = bias.detach().to(dtype).requires_grad_()
        logps = compute(hidden.to(dtype), weight.to(dtype), targets, bias=leaf)
        (gradient,) = gradients_of(logps.mean(), leaf)
        exact = gradient if exact is None else exact
        errors.append(relative_error(gradient, exact))
    assert errors[2] <= 2 * errors[1]


def test_recomputed_gradients_of_large_logits_are_exact():
    hidden, weight, _, targets = inputs((64,), hidden_size=64, vocab=100, dtype=torch.float32, ignored=0.0)
    results = []
    for compute, dtype in ((plain, torch.float64), (ik.linear_logps, torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in (100 * hidden, weight)]
        options = {} if compute is plain else {"max_workspace_bytes": 4 * 100 * 21}
        results.append(gradients_of(compute(*leaves, targets, **options).mean(), *leaves))
    for exact, got in zip(*results):
        assert relative_error(got, exact) < 5e-6


def test_autocast():
    hidden, weight, _, targets = inputs((9,), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = ik.linear_logps(hidden.requires_grad_(), weight.requires_grad_(), targets)
    d_hidden, d_weight = gradients_of(logps.sum(), hidden, weight)
    h64, w64 = (
        hidden.detach().bfloat16().double().requires_grad_(),
        weight.detach().bfloat16().double().requires_grad_(),
    )
    truth = plain(h64, w64, targets)
    assert logps.dtype == d_weight.dtype == torch.float32
    assert relative_error(logps.detach(), truth.detach()) < 1e-6
    for got, true in zip((d_hidden, d_weight), gradients_of(truth.sum(), h64, w64)):
        assert relative_error(got, true) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_labels_may_have_any_integer_dtype(backend):
    hidden, weight, _, targets = inputs((4, 5))
    marginals = targets.roll(1, 0)
    expected = ik.pair_logps(hidden, weight, targets, marginal_labels=marginals, backend=backend)
    got = ik.pair_logps(hidden, weight, targets.short(), marginal_labels=marginals.short(), backend=backend)
    assert all(map(torch.equal, got, expected))
    tokens = [ik.linear_logps(hidden, weight, t, backend=backend) for t in (targets, targets.short())]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda h, w, t: (h, w, t.float()), TypeError, "targets must be int64"),
        (lambda h, w, t: (h, w, t[:1]), ValueError, "targets must have shape"),
        (lambda h, w, t: (h, w, torch.full_like(t, 23)), ValueError, "targets contain 23"),
        (lambda h, w, t: (h, w, torch.full_like(t, -7)), ValueError, "targets contain -7"),
        (lambda h, w, t: (h[..., 1:], w, t), ValueError, "must end in H = 6"),
        (lambda h, w, t: (h.float(), w, t), TypeError, "share a dtype"),
    ],
)
def test_bad_input(change, error, message, backend):
    hidden, weight, _, targets = inputs()
    hidden, weight, targets = change(hidden, weight, targets)
    with pytest.raises(error, match=message):
        ik.linear_logps(hidden, weight, targets, backend=backend)


def test_dtensor_weight_says_how_to_unshard():
    class DTensor(torch.Tensor):
        pass

    hidden, weight, _, targets = inputs()
    with pytest.raises(TypeError, match="full_tensor"):
        ik.linear_logps(hidden, weight.as_subclass(DTensor), targets)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("ignore_index", [None, 1.5, "0"])
def test_ignore_index_must_be_an_integer(ignore_index, backend):
    hidden, weight, _, targets = inputs((4,))
    with pytest.raises(ValueError, match="ignore_index must be an integer"):
        ik.linear_logps(hidden, weight, targets, ignore_index=ignore_index, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_statistics_of_no_token_leave_logps_differentiable(backend):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    ignored = torch.full((3,), -100)
    logps, found = ik.linear_logps(hidden, weight, ignored, statistics=("entropy", "is_top1"), backend=backend)
    gradients = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert not any(g.any() for g in gradients) and not found["entropy"].any() and not found["is_top1"].any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_statistic_named_twice_is_found_once(backend):
    hidden, weight, _, targets = inputs()
    names = ("entropy", "is_top1")
    _, expected = ik.linear_logps(hidden, weight, targets, statistics=names, backend=backend)
    _, found = ik.linear_logps(hidden, weight, targets, statistics=("entropy", *names), backend=backend)
    assert tuple(found) == names
    assert all(torch.equal(found[name], expected[name]) for name in names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_statistics_of_an_all_but_certain_label(dtype):
    hidden, weight, targets = certain_label(dtype)
    _, expected = ik.reference.linear_logps(hidden, weight, targets, statistics=STATISTICS)
    _, found = ik.linear_logps(hidden, weight, targets, statistics=STATISTICS, backend="torch")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)
