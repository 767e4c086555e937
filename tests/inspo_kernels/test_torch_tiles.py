"""Test the offsets of the torch backend's tiles: logits far from 0, and maxima in later tiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import make_case, relative_error

import inspo_kernels as ik
from inspo_kernels.backends import torch_backend

# Tiles of 56, 56 and 38 words.
V, WORDS = 150, 64
CASE = make_case([(2, 5, 4), (1, 3, 6), (2, 4, 4)], hidden_size=16, vocab=V, bias=True)
FIRST, LAST = slice(0, 56), slice(112, V)


@pytest.fixture(autouse=True)
def raised(monkeypatch):
    """Record the tiles in which each block of rows raised an offset."""
    monkeypatch.setattr(torch_backend, "TILE_WORDS", WORDS)
    monkeypatch.setattr(torch_backend, "MOST_LONGER", 1)
    seen = []
    stage = torch_backend.TorchTile.stage

    def recorded(self, *args, **kwargs):
        sums = stage(self, *args, **kwargs)
        seen.append(set(self.raised))
        return sums

    monkeypatch.setattr(torch_backend.TorchTile, "stage", recorded)
    return seen


def results(case, bias, call, backend, dtype=torch.float32, **options):
    """Return log-probs and gradients."""
    hidden, weight = (t.to(dtype).requires_grad_() for t in (case.hidden.clone(), case.weight.clone()))
    bias = bias.to(dtype).requires_grad_()
    options |= {"bias": bias, "backend": backend}
    if call == "loss":
        out = ik.fused_inspo_loss(hidden, weight, case.labels, ref_logps=case.ref_logps, **options)
        logps, loss = out.logps, out.loss
    else:
        logps = ik.linear_logps(hidden[:, :-1], weight, case.labels[:, 1:].clone(), **options)
        loss = (logps / 100).square().sum()
    return [logps.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))]


def bias_of(where, height):
    bias = torch.zeros(V, dtype=torch.float64)
    bias[where] = height
    return bias


@pytest.mark.parametrize("call", ["loss", "tokens"])
@pytest.mark.parametrize("rows", [3, 9, 100])
@pytest.mark.parametrize(
    "where, height, tiles",
    [
        (slice(None), 0.0, set()),
        (slice(None), 10.0, set()),
        (slice(None), -10.0, set()),
        (slice(None), 300.0, set()),
        (slice(None), -300.0, set()),
        (FIRST, 60.0, set()),
        (FIRST, -500.0, {1}),
        (LAST, 10.0, set()),
        (LAST, 60.0, {2}),
        (LAST, 300.0, {2}),
    ],
)
def test_any_height_of_the_logits_equals_reference(raised, where, height, tiles, rows, call):
    bias, bound = bias_of(where, height), {"max_workspace_bytes": rows * V * 4}
    want = results(CASE, bias, call, "reference", torch.float64)
    raised.clear()
    got = results(CASE, bias, call, "torch", **bound)
    assert set().union(*raised) == tiles
    # Logits of 300 have errors of 2e-5 in float32.
    tolerance = 1e-6 * max(2.0, abs(height))
    for mine, other in zip(got, want, strict=True):
        assert relative_error(mine, other) < tolerance


@pytest.mark.parametrize("call", ["loss", "tokens"])
@pytest.mark.parametrize("where", [FIRST, slice(30, 90), LAST])
@pytest.mark.parametrize("logit_scale", [1.0, 0.3])
def test_words_of_bias_minus_infinity_have_no_share(where, logit_scale, call):
    labels = CASE.labels.masked_fill((CASE.labels >= where.start) & (CASE.labels < where.stop), 100)
    case = dataclasses.replace(CASE, labels=labels)
    bias, options = bias_of(where, -torch.inf), {"logit_scale": logit_scale}
    want = results(case, bias, call, "reference", torch.float64, **options)
    assert all(t.isfinite().all() for t in want)
    for mine, other in zip(results(case, bias, call, "torch", **options), want, strict=True):
        assert relative_error(mine, other) < 1e-6


@pytest.mark.parametrize("height", [0.0, 15.0, 300.0])
def test_entropy_is_as_exact_at_any_height(height):
    bias = bias_of(slice(None), height)
    hidden, weight, labels = CASE.hidden[:, :-1].float(), CASE.weight.float(), CASE.labels[:, 1:].clone()
    names = ("entropy", "log_sum_sq_probs", "is_top1")
    _, got = ik.linear_logps(hidden, weight, labels, bias=bias.float(), statistics=names, backend="torch")
    _, want = ik.linear_logps(
        hidden.double(), weight.double(), labels, bias=bias, statistics=names, backend="reference"
    )
    for name in names[:2]:
        torch.testing.assert_close(got[name].double(), want[name], rtol=0, atol=2e-6 + 1e-6 * height)
    assert torch.equal(got["is_top1"], want["is_top1"])
