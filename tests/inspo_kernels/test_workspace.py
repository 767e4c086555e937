"""Test memory that calls on a CPU share: the workspace between calls, and gradients from forward to backward."""

from __future__ import annotations

import threading

import pytest
import torch
from cases import make_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import inspo_kernels as ik
from inspo_kernels import workspace

PAIRS = [(2, 5, 4), (1, 3, 6), (2, 4, 4)]
V = 500
CASE = make_case(PAIRS, hidden_size=16, vocab=V, bias=False).to(torch.float32)
# Groups have one pair each: with 16 features, E is not kept until the backward pass. Single tokens are all kept.
BOUND = 9 * V * 4
ALL_TOKENS = sum(w + l for _, w, l in PAIRS) * V * 4


@pytest.fixture(autouse=True)
def small_workspaces_are_kept(monkeypatch):
    monkeypatch.setattr(workspace, "_ALWAYS_MAPPED", 1000)
    ik.release_workspace()
    yield
    ik.release_workspace()


class Allocated(TorchDispatchMode):
    """Record the sizes of storages that operations return, one per new address."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.seen.setdefault(tensor.untyped_storage().nbytes(), []).append(str(function))
        return result


def leaves():
    return CASE.hidden.clone().requires_grad_(), CASE.weight.clone().requires_grad_()


def loss_of(hidden, weight, **options):
    options = {"max_workspace_bytes": BOUND} | options
    return ik.fused_inspo_loss(hidden, weight, CASE.labels, ref_logps=CASE.ref_logps, **options).loss


def loss_and_gradients(**options):
    hidden, weight = leaves()
    loss = loss_of(hidden, weight, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def per_token(sequences=6):
    hidden, weight = leaves()
    labels = CASE.labels[:sequences, 1:]
    logps = ik.linear_logps(hidden[:sequences, :-1], weight, labels, max_workspace_bytes=ALL_TOKENS)
    return [logps.detach(), *torch.autograd.grad(logps.square().sum(), (hidden, weight))]


def equal(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("call, size", [(loss_and_gradients, BOUND), (per_token, ALL_TOKENS)])
def test_a_second_call_allocates_no_workspace(call, size):
    for _ in range(2):
        with Allocated() as allocated:
            call()
    assert size not in allocated.seen
    ik.release_workspace()
    with Allocated() as allocated:
        call()
    assert len(allocated.seen[size]) == 1


@pytest.mark.parametrize("call", [loss_and_gradients, per_token])
def test_leftover_workspace_contents_change_no_bit(call):
    want = call()
    (idle,) = workspace._idle.values()
    idle.fill_(torch.nan)
    assert equal(call(), want)


def test_rows_that_wait_for_backward_keep_their_memory():
    hidden, weight = leaves()
    logps = ik.linear_logps(hidden[:, :-1], weight, CASE.labels[:, 1:], max_workspace_bytes=ALL_TOKENS)
    loss = logps.square().sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    loss_and_gradients()
    assert equal(torch.autograd.grad(loss, (hidden, weight)), first)


def test_threads_share_no_workspace():
    want, wrong = loss_and_gradients(), []

    def run():
        for _ in range(20):
            if not equal(loss_and_gradients(), want):
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_objective_may_call_the_loss():
    class Nested(ik.DPO):
        def __call__(self, s):
            loss_and_gradients()
            return super().__call__(s)

    assert equal(loss_and_gradients(objective=Nested()), loss_and_gradients())


def test_only_the_largest_workspace_is_kept():
    for rows in (3, 9, 5):
        loss_and_gradients(max_workspace_bytes=rows * V * 4)
    assert [t.numel() for t in workspace._idle.values()] == [9 * V]


def test_a_smaller_call_leaves_the_workspace_as_large():
    for sequences in (6, 2, 6):
        with Allocated() as allocated:
            per_token(sequences)
    assert ALL_TOKENS not in allocated.seen


def test_memory_of_saved_tensor_hooks_is_not_taken():
    unpacked = []

    def unpack(saved):
        unpacked.append(saved.clone())
        return unpacked[-1]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), unpack):
        per_token()
    assert unpacked
    theirs = {t.data_ptr() for t in unpacked}
    assert not theirs & {t.data_ptr() for t in workspace._idle.values()}


def test_a_device_of_another_kind_keeps_nothing():
    workspace.give_back(torch.empty(5000, device="meta"))
    assert not workspace._idle


# --- gradients that the forward pass computed ---


def test_backward_scales_in_place_only_without_retain_graph():
    size = CASE.weight.numel() * 4
    hidden, weight = leaves()
    loss = 3 * loss_of(hidden, weight)
    with Allocated() as allocated:
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert len(allocated.seen[size]) == 1
    copies = [g.clone() for g in first]
    with Allocated() as allocated:
        second = torch.autograd.grad(loss, (hidden, weight))
    assert size not in allocated.seen
    assert equal(first, copies) and equal(second, copies)


def test_gradients_may_be_written_to_between_backward_passes():
    hidden, weight = leaves()
    loss = loss_of(hidden, weight)
    loss.backward(retain_graph=True)
    want = weight.grad.clone()
    weight.grad.zero_()
    loss.backward()
    assert torch.equal(weight.grad, want)


def test_gradients_of_a_shared_graph_accumulate():
    hidden, weight = leaves()
    loss = loss_of(hidden, weight)
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (loss + 2 * loss).backward()
    torch.testing.assert_close(weight.grad, 3 * once)
