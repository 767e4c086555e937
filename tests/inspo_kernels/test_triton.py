"""Test ``backend="triton"`` through the public functions against the float64 reference, with interpretable sizes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import cases
import pytest
import test_logps
import torch
import triton_setup
from cases import OBJECTIVES, gradients_of, relative_error, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused_loss import PlainTorch, assert_same
from test_logps import plain
from torch.utils.flop_counter import FlopCounterMode

import inspo_kernels as ik
from inspo_kernels.backends import triton_backend
from inspo_kernels.backends.triton_backend import TritonBackend
from inspo_kernels.head import checked_head
from inspo_kernels.kernels import config

pytestmark = triton_setup.quiet

DEVICE = triton_setup.DEVICE


def make_case(*args, **options):
    return triton_setup.on_device(cases.make_case(*args, **options))


def inputs(*args, **options):
    return [t.to(DEVICE) for t in test_logps.inputs(*args, **options)]


RAGGED = triton_setup.on_device(cases.RAGGED)
SMALL = make_case([(2, 3, 2), (1, 1, 4)], vocab=150)


def head_of(case, dtype=torch.bfloat16):
    case = case.to(dtype)
    return checked_head(case.hidden, case.weight, case.bias, None, 1.0)


def rows_of_workspace(rows, case=SMALL, dtype=torch.float64):
    return 2 * TritonBackend().kept_bytes(head_of(case, dtype), rows)  # at most half of it is taken by logits


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_reference_in_float64(objective):
    options = {"objective": objective, "softcap": 1.5, "logit_scale": 0.7, "marginal_weight": 0.25}
    expected = run(SMALL, backend="reference", **options)
    assert_same(run(SMALL, backend="triton", **options), expected, 1e-11)


@pytest.mark.parametrize("rows", [1, 4])
def test_equals_reference_in_a_workspace_of_few_rows(rows):
    options = {"marginal_weight": 0.5, "reduction": "sum"}
    expected = run(SMALL, backend="reference", **options)
    got = run(SMALL, backend="triton", max_workspace_bytes=rows_of_workspace(rows), **options)
    assert_same(got, expected, 1e-11)


segment = st.integers(1, 3)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.tuples(segment, segment, segment), min_size=1, max_size=2),
    vocab=st.sampled_from([1, 2, 7, 64, 129, 300]),
    hidden_size=st.sampled_from([1, 6]),
    workspace_rows=st.sampled_from([1, 3, 50]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 3),
)
def test_any_shape_equals_reference(lengths, vocab, hidden_size, workspace_rows, bias, softcap, dtype, seed):
    case = make_case(lengths, vocab=vocab, hidden_size=hidden_size, bias=bias, seed=seed).to(dtype)
    out, gradients = run(
        case, backend="triton", softcap=softcap, max_workspace_bytes=rows_of_workspace(workspace_rows, case, dtype)
    )
    expected, expected_gradients = run(case.to(torch.float64), backend="reference", softcap=softcap)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out.logps, expected.logps, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.marginal_logps, expected.marginal_logps, rtol=tolerance, atol=tolerance)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_at_most_twice_that_of_plain_torch(dtype, scale):
    """Truth is float64 on the *rounded* inputs; scale 8 drives most label probabilities to 0 or 1."""
    case = make_case([(9, 12, 9), (3, 5, 17)], hidden_size=64, vocab=777, bias=False, scale=scale / 8, seed=3).to(dtype)
    truth = PlainTorch(case.to(torch.float64))
    base = PlainTorch(case)
    out, gradients = run(case, backend="triton", marginal_labels=None)
    assert out.loss.dtype == torch.float32 and out.logps.dtype == torch.float64
    floor = torch.finfo(dtype).eps / 2
    for got, plain_torch, true in zip(
        (out.loss.detach(), out.logps, *gradients),
        (base.loss.detach(), base.logps.detach(), *base.gradients),
        (truth.loss.detach(), truth.logps.detach(), *truth.gradients),
        strict=True,
    ):
        assert relative_error(got, true) <= 2 * max(relative_error(plain_torch, true), floor)


@pytest.mark.parametrize("rows, softcap", [(3, 3.0), (50, None)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_probs_are_float32_exact_in_any_workspace(dtype, rows, softcap):
    """Bias, soft-cap and tiles in reduced precision; float16's dW is rescaled between tiles."""
    case = RAGGED.to(dtype)
    truth, true_gradients = run(case.to(torch.float64), backend="reference", softcap=softcap)
    bytes_ = rows_of_workspace(rows, case, dtype)
    out, gradients = run(case, backend="triton", softcap=softcap, max_workspace_bytes=bytes_)
    assert relative_error(out.logps, truth.logps) < 3e-7
    assert relative_error(out.marginal_logps, truth.marginal_logps) < 3e-7
    for got, true in zip(gradients, true_gradients, strict=True):
        assert relative_error(got, true) < torch.finfo(dtype).eps


def test_float16_gradients_survive_tiny_coefficients():
    """c s / S of 1e-9 does not fit float16. A pair weight imitates the mean over a million pairs."""
    case = make_case([(2, 6, 5)], vocab=150, hidden_size=16).to(torch.float16)
    leaves = [t.clone().requires_grad_() for t in (case.hidden.double(), case.weight.double())]
    tiny = torch.tensor([1e-6])
    options = {"ref_logps": case.ref_logps, "pair_weights": tiny}
    truth = ik.reference.fused_inspo_loss(*leaves, case.labels, **options)
    (_, true_weight) = gradients_of(truth.loss, *leaves)
    hidden, weight = case.hidden, case.weight.requires_grad_()
    with torch.autocast(DEVICE.type, enabled=False):
        out = ik.fused_inspo_loss(hidden, weight, case.labels, backend="triton", **options)
        (d_weight,) = torch.autograd.grad(out.loss, weight, torch.tensor(2.0**16, device=DEVICE))
    assert relative_error(d_weight.double() / 2**16, true_weight) < 2e-3


@pytest.mark.parametrize("far", [0.0, 850.0, 1200.0])
def test_float16_groups_of_very_different_coefficients(far):
    """The second pair has a margin of far / 10, so its coefficients are almost or exactly 0."""
    hidden, weight, _, targets = inputs((8,), hidden_size=16, vocab=150, dtype=torch.float16, ignored=0.0)
    segments = torch.tensor([0, 0, 2, 2, 1, 1, 3, 3], device=DEVICE)
    options = {"segment_ids": segments, "ref_logps": torch.tensor([0.0, -far, 0.0, 0.0], device=DEVICE)}
    gradients = []
    for backend, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        w = weight.detach().to(dtype).requires_grad_()
        workspace = (
            {}
            if backend == "reference"
            else {
                "max_workspace_bytes": 8 * TritonBackend().kept_bytes(checked_head(hidden, weight, None, None, 1.0), 1)
            }
        )
        out = ik.fused_inspo_loss(hidden.detach().to(dtype), w, targets, backend=backend, **options, **workspace)
        gradients += gradients_of(out.loss, w)
    assert relative_error(*gradients) < 2e-3


@pytest.mark.parametrize("low, high", [(-90.0, 90.0), (-20.0, 15.0), (90.0, -90.0), (-300.0, -310.0), (0.0, 95.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_whose_maximum_comes_late(low, high, dtype):
    """Logits of the first half of the words are around ``low``, of the others around ``high``."""
    g = torch.Generator().manual_seed(0)
    bias = torch.where(torch.arange(600) < 300, low, high).to(DEVICE, dtype)
    weight = torch.randn(600, 4, generator=g).to(DEVICE, dtype)
    hidden = torch.randn(6, 4, generator=g).to(DEVICE, dtype)
    targets = torch.tensor([0, 1, 599, 598, 300, 5], device=DEVICE)
    results = []
    for compute, cast in ((plain, torch.float64), (plain, dtype), (None, dtype)):
        leaves = [t.to(cast).requires_grad_() for t in (hidden, weight)]
        options = {"bias": bias.to(cast)}
        if compute is None:
            logps = ik.linear_logps(*leaves, targets, backend="triton", **options)
        else:
            logps = compute(*leaves, targets, **options)
        results.append([logps.detach(), *gradients_of(logps.sum(), *leaves)])
    truth, base, ours = results
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=3e-7, atol=3e-5)  # one ulp of a logit of 310
    for got, plain_torch, true in zip(ours, base, truth, strict=True):
        assert relative_error(got, true) <= 2 * max(relative_error(plain_torch, true), torch.finfo(dtype).eps / 2)


def test_bias_of_minus_infinity_removes_words():
    """Models with padded vocabularies have such biases. Here they remove the first block and the last word."""
    case = make_case([(2, 3, 2)], vocab=300).to(torch.float32)
    bias = case.bias.clone()
    bias[:260] = bias[-1] = -torch.inf
    labels = torch.where(case.labels < 0, case.labels, 260 + case.labels % 39)
    case = replace(case, bias=bias, labels=labels, marginal_labels=torch.full_like(labels, -100))
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        out = ik.fused_inspo_loss(hidden, weight, labels, bias=bias, ref_logps=case.ref_logps, backend=backend)
        results.append((out.logps, *gradients_of(out.loss, hidden, weight)))
    for got, want in zip(*results):
        assert got.isfinite().all() and relative_error(got, want) < 1e-5


def test_the_label_logit_does_not_use_the_matmul(monkeypatch):
    """Matmuls on tensor cores err toward zero, most for labels. Here the matmul is wrong only for labels."""
    hidden, weight, bias, targets = inputs((8,), hidden_size=16, vocab=90, dtype=torch.bfloat16, ignored=0.0)
    matmul, spoilt = triton_backend._matmul, []

    def wrong_for_labels(a, b, out, accumulate=False):
        matmul(a, b, out, accumulate)
        column = targets - 64 * len(spoilt)
        inside = (column >= 0) & (column < out.shape[1])
        out[inside, column[inside]] = 99.0
        spoilt.append(int(inside.sum()))

    monkeypatch.setattr(triton_backend, "_matmul", wrong_for_labels)
    monkeypatch.setattr(config, "fused_pass", lambda *_: None)  # its products are not the library's
    monkeypatch.setattr(config, "logits_tile", lambda *_: config.LogitsTile(rows=16, words=64))
    head = checked_head(hidden, weight, bias, 20.0, 0.9)
    logps = TritonBackend().open_tile(head, 0, 1 << 20).stage(hidden, targets).scores(torch.float32, 90).logps
    assert len(spoilt) == 2 and sum(spoilt) == 8
    truth = plain(hidden.double(), weight.double(), targets, bias.double(), 20.0, 0.9)
    torch.testing.assert_close(logps.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_logits(dtype):
    """At logits of 1e9, the matmul's label logit differs from the exact one by more than exp can hold."""
    g = torch.Generator().manual_seed(1)
    hidden = (torch.rand(40, 64, generator=g) * 6e4).to(DEVICE, dtype).requires_grad_()
    weight = (-torch.rand(50, 64, generator=g) * 6e4).to(DEVICE, dtype).requires_grad_()
    targets = (hidden.detach().double() @ weight.detach().double().T).argmax(1)
    logps = ik.linear_logps(hidden, weight, targets, backend="triton")
    assert (logps <= 0).all() and all(g.isfinite().all() for g in gradients_of(logps.sum(), hidden, weight))


def test_gradient_of_almost_certain_labels_is_exact():
    hidden, weight = torch.tensor([[1.0]], device=DEVICE), torch.tensor([[20.0], [0.0], [-1.0]], device=DEVICE)
    truth = None
    for dtype, tolerance in ((torch.float64, 0), (torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 2e-3)):
        w = weight.to(dtype).requires_grad_()
        logp = ik.linear_logps(hidden.to(dtype), w, torch.tensor([0]), backend="triton")
        (gradient,) = torch.autograd.grad(logp.sum(), w, retain_graph=True)
        if truth is None:
            truth = gradient, logp.detach()
            assert 0 < gradient.abs().max() < 1e-8
            assert relative_error(gradient, plain_gradient(weight.double())) < 1e-7
        elif dtype != torch.float16:  # whose result cannot hold 3e-9
            assert relative_error(gradient, truth[0]) < tolerance
        assert relative_error(logp.detach(), truth[1]) < 1e-6


def plain_gradient(weight):
    """Return d log p_0 / d weight for hidden = 1, without cancellation."""
    p = weight.softmax(0)
    return torch.cat([p[1:].sum(0, keepdim=True), -p[1:]])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_linear_logps_error_at_most_twice_plain_torchs(dtype, frozen):
    hidden, weight, bias, targets = inputs((3, 8), hidden_size=48, vocab=301, dtype=dtype)
    weight = weight / 4
    upstream = torch.linspace(-1, 2, 24, device=DEVICE).view(3, 8)
    results = []
    for compute, cast in ((plain, torch.float64), (plain, dtype), (None, dtype)):
        leaves = [
            t.detach().to(cast).requires_grad_(not frozen or i == 0) for i, t in enumerate((hidden, weight, bias))
        ]
        if compute is None:
            logps = ik.linear_logps(leaves[0], leaves[1], targets, bias=leaves[2], backend="triton")
        else:
            logps = compute(leaves[0], leaves[1], targets, bias=leaves[2])
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        results.append([logps.detach(), *gradients_of((logps * upstream.to(logps.dtype)).sum(), *needed)])
    truth, base, ours = results
    for got, plain_torch, true in zip(ours, base, truth, strict=True):
        floor = 1e-15 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
        assert relative_error(got, true) <= 2 * max(relative_error(plain_torch, true), floor)
    with torch.no_grad():
        scored = ik.linear_logps(hidden, weight, targets, bias=bias, backend="triton")
    torch.testing.assert_close(scored, ours[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1, 2)])
def test_exactly_the_needed_gradients(needed):
    full = run(SMALL, backend="reference")[1]
    leaves = [SMALL.hidden.clone(), SMALL.weight.clone(), SMALL.bias.clone()]
    for i in needed:
        leaves[i].requires_grad_()
    ik.fused_inspo_loss(
        leaves[0], leaves[1], SMALL.labels, bias=leaves[2], ref_logps=SMALL.ref_logps, backend="triton"
    ).loss.backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in needed)
        assert leaf.grad is None or relative_error(leaf.grad, full[i]) < 1e-11


def test_non_contiguous_inputs():
    wide = torch.randn(*SMALL.hidden.shape[:2], 12, dtype=torch.float64, device=DEVICE)
    wide[..., ::2] = SMALL.hidden
    wide_bias = torch.stack([SMALL.bias, SMALL.bias], 1)
    strided = replace(
        SMALL,
        hidden=wide[..., ::2],
        weight=SMALL.weight.t().contiguous().t(),
        bias=wide_bias[:, 0],
        labels=SMALL.labels.t().contiguous().t(),
    )
    leaves = [t.detach().requires_grad_() for t in (strided.hidden, strided.weight, strided.bias)]
    assert not any(leaf.is_contiguous() for leaf in leaves)
    out = ik.fused_inspo_loss(
        leaves[0], leaves[1], strided.labels, bias=leaves[2], ref_logps=SMALL.ref_logps, backend="triton"
    )
    expected, expected_gradients = run(SMALL, backend="reference")
    assert relative_error(out.loss.detach(), expected.loss.detach()) < 1e-12
    for got, want in zip(gradients_of(out.loss, *leaves), expected_gradients):
        assert relative_error(got, want) < 1e-11


def test_autocast_computes_in_its_dtype():
    case = SMALL.to(torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out, gradients = run(case, backend="triton")
    truth, true_gradients = run(case.to(torch.bfloat16).to(torch.float64), backend="reference")
    assert relative_error(out.logps, truth.logps) < 1e-6
    for got, true in zip(gradients, true_gradients):
        assert got.dtype == torch.float32 and relative_error(got, true) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_input_same_bits(dtype):
    case = SMALL.to(dtype)
    first, second = (run(case, backend="triton", marginal_weight=0.5) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


def flops_of_addmm(added, a, b, *_, **__):
    """Count addmm with an out_dtype, as on a GPU. torch's own formula mistakes it for the result's shape."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("fused", [False, True])
def test_one_pass_is_three_products(fused, monkeypatch):
    """The fused pass is one of them, and no counter of torch sees it."""
    if not fused:
        monkeypatch.setattr(config, "fused_pass", lambda *_: None)
    elif config.fused_pass(config.architecture(DEVICE), None) is None:
        pytest.skip("this device does not use the fused pass")
    case = make_case([(2, 7, 4), (3, 5, 5)], hidden_size=16, vocab=64, bias=False).to(torch.bfloat16)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm: flops_of_addmm}) as counter:
        run(case, backend="triton", marginal_labels=None)
    assert counter.get_total_flops() == (2 if fused else 3) * 2 * 21 * 16 * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bound", [1, 10_000, 37_000, 10**6])
def test_workspace_stays_within_its_bound(dtype, bound):
    head = head_of(SMALL, dtype)
    rows = TritonBackend().capacity(head, DEVICE, bound)
    tile = TritonBackend().open_tile(head, rows, bound)
    logits = tile._tile_shape(rows, True)
    assert logits.words % config.ROW_ALIGNMENT == 0 and tile._tile_shape(10**6, False).words % config.ROW_ALIGNMENT == 0
    logits_bytes = 0 if dtype == torch.float32 else 4 * logits.rows * logits.words
    assert rows == 1 or TritonBackend().kept_bytes(head, rows) + logits_bytes <= bound
    alone = tile._tile_shape(10**6, False)
    assert 4 * alone.rows * alone.words <= max(bound, 4 * 64)


@pytest.mark.parametrize("most", [3, 100, 1024])
def test_blocks_of_rows_are_even_and_whole(most):
    for n in (0, 1, 7, 1024, 1025, 2100, 7200, 8192, 8200):
        blocks = triton_backend._even(n, most)
        sizes = [block.stop - block.start for block in blocks]
        assert [i for s in blocks for i in range(s.start, s.stop)] == list(range(n))
        assert all(size <= most for size in sizes) and len(blocks) == -(-n // most)
        if most == 1024 and len(blocks) > 1:
            assert all(block.start % 128 == 0 for block in blocks) and min(sizes) > max(sizes) - 256


@pytest.mark.parametrize("tile", [(4, 64), (3, 128), (16, 4096)])
def test_tiles_of_logits_change_only_rounding(tile, monkeypatch):
    case = RAGGED.to(torch.bfloat16)
    expected = run(case, backend="triton")
    monkeypatch.setattr(config, "logits_tile", lambda *_: config.LogitsTile(*tile))
    assert_same(run(case, backend="triton"), expected, 1e-2)
    got, want = (run(RAGGED.to(torch.bfloat16), backend=backend)[0].logps for backend in ("triton", "torch"))
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("workspace", [300, 3000, 10**6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scoring_needs_no_row_of_logits(dtype, workspace):
    hidden, weight, bias, targets = inputs((24,), hidden_size=20, vocab=301, dtype=dtype, ignored=0.0)
    head = checked_head(hidden, weight, bias, 20.0, 0.9)
    tile = TritonBackend().open_tile(head, 0, workspace)
    logps = tile.stage(hidden, targets).scores(head.accumulate_dtype, 301).logps
    truth = plain(hidden.double(), weight.double(), targets, bias.double(), 20.0, 0.9)
    torch.testing.assert_close(logps.double(), truth, rtol=1e-6, atol=1e-6)
    assert logps.dtype == head.accumulate_dtype and tile.e_rows is None
    assert torch.equal(logps, tile.stage(hidden, targets).scores(head.accumulate_dtype, 301).logps)


def test_a_weight_without_unit_stride_is_copied_once():
    wide = torch.zeros(150, 12, device=DEVICE)
    for weight, copied in ((wide[:, ::2], True), (wide[:, :6], False), (torch.zeros(6, 150, device=DEVICE).t(), False)):
        prepared = TritonBackend().prepared(checked_head(torch.zeros(1, 6, device=DEVICE), weight, None, None, 1.0))
        assert (prepared.weight is not weight) == copied and 1 in prepared.weight.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_casts_the_head_once_a_call(dtype, monkeypatch):
    calls = []
    prepared = TritonBackend.prepared
    monkeypatch.setattr(TritonBackend, "prepared", lambda self, head: calls.append(1) or prepared(self, head))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        run(RAGGED.to(dtype), backend="triton")
    assert len(calls) == 1


class TestUnsupported:
    def test_cpu_without_the_interpreter(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match=r"needs a CUDA or ROCm device.*use backend=\"torch\""):
            run(cases.RAGGED, backend="triton")

    def test_triton_not_installed(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install triton.*use backend=\"torch\""):
            run(SMALL, backend="triton")

    def test_other_devices(self):
        assert "not on mps" in TritonBackend().unsupported(head_of(SMALL), torch.device("mps"))

    def test_old_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
        assert "T4 has less" in TritonBackend().unsupported(head_of(SMALL), torch.device("cuda"))

    def test_package_imports_and_computes_without_triton(self):
        code = (
            "import sys; sys.modules['triton'] = None\n"
            "import torch, inspo_kernels as ik, inspo_kernels.backends.triton_backend as b\n"
            "assert 'not installed' in b.TritonBackend().unsupported(None, torch.device('cuda'))\n"
            "print(ik.linear_logps(torch.ones(1, 1), torch.zeros(2, 1), torch.zeros(1).long()).item())"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert float(out.stdout) == pytest.approx(-0.6931, abs=1e-4)


def test_bad_input_gives_torchs_errors():
    for change in ({"labels": SMALL.labels + 150}, {"labels": SMALL.labels.float()}, {"ref_logps": None}):
        messages = []
        for backend in ("triton", "torch"):
            with pytest.raises((TypeError, ValueError)) as error:
                ik.fused_inspo_loss(
                    **{"hidden": SMALL.hidden, "labels": SMALL.labels, "ref_logps": SMALL.ref_logps} | change,
                    weight=SMALL.weight,
                    backend=backend,
                )
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_statistics_of_an_all_but_certain_label(dtype):
    hidden, weight, targets = (t.to(triton_setup.DEVICE) for t in cases.certain_label(dtype))
    _, expected = ik.reference.linear_logps(hidden, weight, targets, statistics=test_logps.STATISTICS)
    _, found = ik.linear_logps(hidden, weight, targets, statistics=test_logps.STATISTICS, backend="triton")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("softcap", [None, 30.0, 15.0])
def test_float32_errors_cancel_over_many_tokens(softcap, monkeypatch):
    monkeypatch.setattr(config, "logits_tile", lambda *_: config.LogitsTile(1000, 256))  # one launch
    hidden, weight, _, targets = inputs((1000,), hidden_size=32, vocab=250, dtype=torch.float32, ignored=0.0)
    exact = plain(hidden.double(), weight.double(), targets, softcap=softcap)
    spread = (plain(hidden, weight, targets, softcap=softcap).double() - exact).square().mean().sqrt()
    errors = ik.linear_logps(hidden, weight, targets, softcap=softcap, backend="triton").double() - exact
    assert errors.mean().abs() < 6 * spread / len(targets) ** 0.5


@pytest.mark.parametrize("softcap", [15.0, 30.0, 32.0])
def test_softcap_of_infinite_logits_is_finite(softcap):
    hidden, weight, bias, targets = inputs((6,), hidden_size=8, vocab=70, dtype=torch.float32, ignored=0.0)
    bias[3], bias[65] = -torch.inf, torch.inf
    hidden.requires_grad_(), weight.requires_grad_()
    found = ik.linear_logps(hidden, weight, targets, bias=bias, softcap=softcap, backend="triton")
    expected = plain(hidden, weight, targets, bias, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients_of(found.sum(), hidden, weight), gradients_of(expected.sum(), hidden, weight)):
        assert want.isfinite().all() and relative_error(got, want) < 1e-5
