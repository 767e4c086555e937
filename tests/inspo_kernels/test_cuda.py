"""Test what only a GPU can show. If there is a GPU, the Triton tests also run on it."""

from __future__ import annotations

import pytest
import torch
from cases import RAGGED, gradients_of, relative_error

import inspo_kernels as ik

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")


def loss(hidden, weight, labels):
    marginal_labels = RAGGED.marginal_labels.to(labels.device)
    return ik.fused_inspo_loss(
        hidden, weight, labels, ref_logps=RAGGED.ref_logps.float(), marginal_labels=marginal_labels, marginal_weight=0.5
    ).loss


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_labels_on_the_cpu_need_no_synchronisation(backend):
    hidden, weight = RAGGED.hidden.float().cuda().requires_grad_(), RAGGED.weight.float().cuda().requires_grad_()
    ref_logps = RAGGED.ref_logps.cuda()

    def step():
        out = ik.fused_inspo_loss(hidden, weight, RAGGED.labels, ref_logps=ref_logps, backend=backend)
        out.loss.backward()
        return out.metrics()

    step()  # compiles the kernels and creates library handles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_labels_may_live_on_either_side(device):
    leaves = [RAGGED.hidden.float().cuda().requires_grad_(), RAGGED.weight.float().cuda().requires_grad_()]
    truth = [RAGGED.hidden.clone().requires_grad_(), RAGGED.weight.clone().requires_grad_()]
    got, expected = loss(*leaves, RAGGED.labels.to(device)), loss(*truth, RAGGED.labels)
    for a, b in zip(gradients_of(got, *leaves), gradients_of(expected, *truth)):
        assert a.device.type == "cuda" and relative_error(a.cpu(), b) < 1e-5
