"""Test gradients that are deferred until the upstream gradient is known: the loss's tests again, and special cases."""

from __future__ import annotations

import weakref

import pytest
import torch
import triton_setup
from cases import make_case, relative_error

# ruff: noqa: F401  (pytest runs what is imported)
from test_fused_loss import (
    test_any_ragged_batch_in_every_form_equals_reference,
    test_autocast_returns_unrounded_gradients,
    test_equals_reference_in_float64,
    test_error_at_most_twice_that_of_plain_torch,
    test_exactly_the_needed_gradients,
    test_gradcheck,
    test_non_contiguous_inputs,
    test_orpo_needs_only_the_marginal_that_it_reads,
    test_same_input_same_bits,
    test_upstream_gradient_and_retain_graph,
    test_weights_reduction_and_anchor_equal_reference,
)

import inspo_kernels as ik
from inspo_kernels.backends import BACKENDS
from inspo_kernels.gradients import DeferredGradients, GradMask
from inspo_kernels.head import checked_head

pytestmark = triton_setup.quiet

pays = DeferredGradients.worth_deferring
PAIRS = [(2, 5, 4), (1, 3, 6)]
N = sum(w + l for _, w, l in PAIRS)
# With as many rows as features, the torch backend defers gradients in float32 anyway.
CASE = make_case(PAIRS, hidden_size=N, vocab=50, bias=False).to(torch.float32)


@pytest.fixture(autouse=True)
def staged_where_they_can_be(monkeypatch):
    """Defer gradients regardless of their memory."""
    monkeypatch.setattr(
        DeferredGradients, "worth_deferring", staticmethod(lambda backend, head, rows, needs: needs.weight)
    )


@pytest.fixture
def only_where_they_pay(monkeypatch, staged_where_they_can_be):
    monkeypatch.setattr(DeferredGradients, "worth_deferring", staticmethod(pays))


def loss_of(case, **options):
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    out = ik.fused_inspo_loss(hidden, weight, case.labels, ref_logps=case.ref_logps, **options)
    return out, hidden, weight


def test_the_imported_tests_run_on_deferred_gradients(monkeypatch):
    """Otherwise the imported tests would show nothing here."""
    calls = []
    scaled = DeferredGradients.scaled
    monkeypatch.setattr(DeferredGradients, "scaled", lambda *a, **k: calls.append(1) or scaled(*a, **k))
    test_upstream_gradient_and_retain_graph()
    assert len(calls) == 3


@pytest.mark.parametrize("rows, staged", [(N, True), (N - 1, False)])
def test_gradients_are_deferred_if_one_group_suffices(only_where_they_pay, rows, staged):
    out, *_ = loss_of(CASE, max_workspace_bytes=rows * 50 * 4)
    assert isinstance(out.loss.grad_fn.gradients, DeferredGradients) == staged


@pytest.mark.parametrize(
    "backend, dtype, most",
    [
        ("torch", torch.float32, 64),
        ("torch", torch.bfloat16, 64),
        ("triton", torch.float32, 64),
        ("triton", torch.bfloat16, 128),
    ],
)
def test_deferred_gradients_take_no_extra_memory(backend, dtype, most):
    weight = torch.zeros(128, 64, dtype=dtype)
    head = checked_head(weight, weight, None, None, 1.0)
    trainable, frozen = GradMask(True, True, False), GradMask(True, False, True)
    assert pays(BACKENDS[backend], head, most, trainable)
    assert not pays(BACKENDS[backend], head, most + 1, trainable)
    assert not pays(BACKENDS[backend], head, 1, frozen)


def test_backward_releases_the_workspace(only_where_they_pay):
    out, *_ = loss_of(CASE)
    kept = [weakref.ref(t.untyped_storage()) for t in out.loss.grad_fn.saved_tensors if t is not None]
    assert all(ref() is not None for ref in kept)
    assert len(kept) == 6  # the losses, dx, coefficients, and what the tile kept
    out.loss.backward()
    assert not any(ref() is not None for ref in kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.loss.backward()


def test_a_weight_may_vanish_before_the_backward(only_where_they_pay):
    """ZeRO-3 releases the weight after the forward pass."""
    out, hidden, weight = loss_of(CASE)
    expected = torch.autograd.grad(out.loss, (hidden, weight), retain_graph=True)
    weight.data = torch.full_like(weight, torch.nan)
    for got, want in zip(torch.autograd.grad(out.loss, (hidden, weight)), expected):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_deferred_gradients_equal_computed_gradients(monkeypatch, backend, dtype):
    case = triton_setup.on_device(CASE.to(dtype)) if backend == "triton" else CASE.to(dtype)
    results = []
    for staged in (True, False):
        monkeypatch.setattr(DeferredGradients, "worth_deferring", staticmethod(lambda *_, staged=staged: staged))
        out, *leaves = loss_of(case, marginal_labels=case.marginal_labels, backend=backend)
        assert isinstance(out.loss.grad_fn.gradients, DeferredGradients) == staged
        results.append(torch.autograd.grad(out.loss, leaves, torch.tensor(0.3, device=out.loss.device)))
    for one, other in zip(*results):
        assert one.dtype == dtype and relative_error(one, other) < torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_autocast_of_any_dtypes(autocast, weight_dtype, hidden_dtype, backend):
    case = triton_setup.on_device(CASE) if backend == "triton" else CASE
    hidden = case.hidden.clone().to(hidden_dtype).requires_grad_()
    weight = case.weight.clone().to(weight_dtype).requires_grad_()
    with torch.autocast(hidden.device.type, dtype=autocast):
        out = ik.fused_inspo_loss(hidden, weight, case.labels, ref_logps=case.ref_logps, backend=backend)
    out.loss.backward()
    exact = [t.detach().to(autocast).double().requires_grad_() for t in (hidden, weight)]
    ik.reference.fused_inspo_loss(*exact, case.labels, ref_logps=case.ref_logps).loss.backward()
    for got, want in zip((hidden, weight), exact):
        assert got.grad.dtype == got.dtype and relative_error(got.grad, want.grad) < 1e-2


def test_a_frozen_bias_may_change_or_be_inference_mode():
    hidden, weight = CASE.hidden.clone().requires_grad_(), CASE.weight.clone().requires_grad_()
    bias = torch.randn(len(weight))
    (expected,) = torch.autograd.grad(
        ik.fused_inspo_loss(hidden, weight, CASE.labels, bias=bias, ref_logps=CASE.ref_logps).loss, weight
    )
    with torch.inference_mode():
        inferred = bias.clone()
    changed = bias.clone()
    for one in (inferred, changed):
        loss = ik.fused_inspo_loss(hidden, weight, CASE.labels, bias=one, ref_logps=CASE.ref_logps).loss
        changed.zero_()
        assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)
        changed.copy_(bias)


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("call", ["loss", "logps"])
def test_hooks_may_share_memory_between_calls(monkeypatch, call, trainable, staged):
    """A hook that stores equal tensors once gives both backward passes the same memory."""
    monkeypatch.setattr(DeferredGradients, "worth_deferring", staticmethod(lambda *_: staged and trainable))
    leaves = [CASE.hidden.clone().requires_grad_(), CASE.weight.clone().requires_grad_(trainable)]
    stored: dict[object, torch.Tensor] = {}

    def pack(t):
        key = (t.shape, t.detach().numpy().tobytes())
        stored.setdefault(key, t)
        return key

    def scalar():
        if call == "logps":
            return ik.linear_logps(*leaves, CASE.labels).sum()
        return 3 * ik.fused_inspo_loss(*leaves, CASE.labels, ref_logps=CASE.ref_logps).loss

    with torch.autograd.graph.saved_tensors_hooks(pack, stored.get):
        first, second = scalar(), scalar()
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    for got, want in zip(torch.autograd.grad(first, inputs), torch.autograd.grad(second, inputs)):
        assert torch.equal(got, want)
