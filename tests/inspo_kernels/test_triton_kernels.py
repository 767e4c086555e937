"""Each Triton kernel against its formula: what the public functions cannot show."""

from __future__ import annotations

import pytest
import torch
import triton_setup
from cases import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from inspo_kernels.kernels import config
from inspo_kernels.kernels import linear_logps as linear_logps_module
from inspo_kernels.kernels.bias_gradient import bias_gradient
from inspo_kernels.kernels.label_logits import label_logits
from inspo_kernels.kernels.linear_logps import linear_logps
from inspo_kernels.kernels.row_pass import row_pass
from inspo_kernels.kernels.softcap import softcap

pytestmark = triton_setup.quiet
DEVICE = triton_setup.DEVICE
ARCH = config.architecture(DEVICE)
triton, tl = triton_setup.triton, triton_setup.tl


def rows_of_logits(vocab, n=4, scale=1.0, dtype=torch.float32, seed=0):
    """Raw products in rows of the padded stride, the padding full of NaN, and targets."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.full((n, config.padded_vocab(vocab)), torch.nan, dtype=dtype)
    raw[:, :vocab] = scale * torch.randn(n, vocab, generator=g)
    return raw.to(DEVICE), torch.randint(vocab, (n,), generator=g).to(DEVICE)


def run_row_pass(raw, targets, vocab, e=None, bias=None, softcap=None, logit_scale=1.0):
    logps, sums = (torch.full((len(raw),), -7.0, dtype=raw.dtype, device=DEVICE) for _ in range(2))
    labels = raw.gather(1, targets.clamp(0, vocab - 1)[:, None]).squeeze(1)
    row_pass(
        raw,
        targets,
        labels.masked_fill((targets < 0) | (targets >= vocab), torch.nan),
        logps,
        sums,
        vocab=vocab,
        e=e,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        arch=ARCH,
    )
    return logps, sums


def dlogits(raw, targets, vocab, softcap, logit_scale):
    """d logp / d(scaled logits before the cap), float64, by torch."""
    z = (logit_scale * raw[:, :vocab].double()).requires_grad_()
    capped = z if softcap is None else softcap * (z / softcap).tanh()
    logps = capped.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(logps.sum(), z)
    return logps.detach(), gradient


@pytest.mark.parametrize("vocab", [1, 63, 64, 500])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("e_dtype", [torch.bfloat16, torch.float16, torch.float32, None])
def test_row_pass(e_dtype, softcap, vocab):
    raw, targets = rows_of_logits(vocab, scale=3.0)
    original = raw.clone()
    in_place = e_dtype == torch.float32
    e = None if e_dtype is None else raw if in_place else torch.full_like(raw, torch.nan, dtype=e_dtype)
    logps, sums = run_row_pass(raw, targets, vocab, e=e, softcap=softcap, logit_scale=0.7)
    true_logps, gradient = dlogits(original, targets, vocab, softcap, 0.7)
    torch.testing.assert_close(logps.double(), true_logps, rtol=3e-7, atol=3e-7)
    if not in_place:
        assert torch.equal(raw.nan_to_num(1e9), original.nan_to_num(1e9)), "logits are for reading"
    if e is not None:
        assert (e[:, vocab:] == 0).all()
        got = -e[:, :vocab].double() / sums.double()[:, None]
        eps = torch.finfo(e_dtype).eps
        torch.testing.assert_close(got, gradient, rtol=max(2 * eps, 2e-6), atol=1e-7)


def test_offset_of_the_first_block_is_replaced_when_it_is_too_low():
    block = config.row_pass(ARCH, 10**5, torch.float32, None).block
    vocab = 2 * block + 100
    raw, targets = rows_of_logits(vocab)
    raw[0, block + 50] = 35.0  # near enough to stay
    raw[1, block + 50] = 60.0  # exp fits float32, not the bound
    raw[2, block + 50] = 200.0  # exp overflows
    raw[3, :block] = -torch.inf
    targets[3] = block + 20
    e = torch.empty_like(raw, dtype=torch.bfloat16)
    logps, sums = run_row_pass(raw, targets, vocab, e=e)
    torch.testing.assert_close(logps.double(), dlogits(raw, targets, vocab, None, 1.0)[0], rtol=3e-7, atol=2e-6)
    assert (e.abs().amax(1) < 2.0**58).all() and e.isfinite().all()
    # Row 0 alone has kept its first offset; that of row 3 is its label's.
    assert sums[0] > 1e10 and (sums[1:3] < vocab).all() and (sums[3] < 100 * vocab)


@pytest.mark.parametrize("position", ["label", "other"])
def test_nan_and_infinite_logits_are_not_hidden(position):
    for value in (torch.nan, torch.inf):
        raw, targets = rows_of_logits(200)
        raw[1, targets[1] if position == "label" else (targets[1] + 1) % 200] = value
        logps, _ = run_row_pass(raw, targets, 200, e=torch.empty_like(raw, dtype=torch.bfloat16))
        assert logps[1].isnan() and logps[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("e_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("label", [-1, -100, 100, 127, 128, 10**6, 2**31, 2**32, -(2**40)])
def test_labels_out_of_range_touch_no_memory_and_are_noticed(label, e_dtype):
    """2^32 is 0 in 32 bits; 100..127 is padding; the rows around the one in question are guards."""
    vocab, n = 100, 3
    raw, targets = rows_of_logits(vocab, n)
    targets[1] = label
    expected, _ = run_row_pass(raw, torch.zeros_like(targets), vocab)
    memory = torch.full((3 * n, raw.shape[1]), 3.0, dtype=e_dtype, device=DEVICE)
    e = memory[n : 2 * n]
    logps, _ = run_row_pass(raw, targets, vocab, e=e)
    assert logps[1].isnan() and logps[[0, 2]].isfinite().all()
    assert (memory[:n] == 3).all() and (memory[2 * n :] == 3).all() and (e[:, vocab:] == 0).all()
    assert expected.isfinite().all()


def test_float16_holds_the_complement_of_a_flat_row():
    """S' is 128,255 there, twice float16's largest number."""
    vocab = 128256 if ARCH != "interpreter" else 70000
    raw = torch.zeros(1, config.padded_vocab(vocab), device=DEVICE)
    e = torch.empty_like(raw, dtype=torch.float16)
    logps, sums = run_row_pass(raw, torch.tensor([5], device=DEVICE), vocab, e=e)
    assert logps.item() == pytest.approx(-torch.tensor(vocab).log().item(), rel=1e-6)
    assert e.isfinite().all()
    assert (e[0, 5] / sums).item() == pytest.approx(-(vocab - 1) / vocab, rel=1e-3)


@pytest.mark.parametrize("label", [-1, 100, 2**32, -(2**40)])
@pytest.mark.parametrize("hidden", [1, 64, 100])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 3e-7), (torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_label_logits(dtype, tolerance, hidden, label):
    """Of a weight in either order of memory; a label out of range is noticed."""
    x, weight, targets = (t.to(DEVICE) for t in matrices(5, hidden, 100, dtype))
    targets[3] = label
    expected = (x.double() * weight.double()[targets.clamp(0, 99)]).sum(1)
    scale = (x.double() * weight.double()[targets.clamp(0, 99)]).abs().sum(1)
    for laid_out in (weight, weight.t().contiguous().t()):
        got = label_logits(x, laid_out, targets, arch=ARCH)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got[3].isnan()
        others = [0, 1, 2, 4]
        assert ((got.double() - expected).abs() <= tolerance * scale)[others].all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bias_gradient(dtype, accumulate):
    g = torch.Generator().manual_seed(0)
    accumulate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    e = torch.full((11, 128), torch.nan, dtype=dtype)
    e[:, :100] = torch.randn(11, 100, generator=g)
    scale = torch.randn(11, generator=g).to(accumulate_dtype)
    memory = torch.full((300,), 2.0, dtype=accumulate_dtype)
    e, scale, memory = e.to(DEVICE), scale.to(DEVICE), memory.to(DEVICE)
    bias_gradient(e, scale, memory[100:200], accumulate=accumulate, arch=ARCH)
    expected = scale.double() @ e[:, :100].double() + 2.0 * accumulate
    assert relative_error(memory[100:200], expected) < (1e-15 if dtype == torch.float64 else 3e-7)
    assert (memory[:100] == 2).all() and (memory[200:] == 2).all()


def run_linear_logps(x, weight, targets, bias=None, softcap=None, logit_scale=1.0, multiprocessors=2):
    return linear_logps(
        x.to(DEVICE),
        weight.to(DEVICE),
        targets.to(DEVICE),
        bias=None if bias is None else bias.to(DEVICE),
        softcap=softcap,
        logit_scale=logit_scale,
        arch=ARCH,
        multiprocessors=multiprocessors,
    ).cpu()


def matrices(n, hidden, vocab, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(n, hidden, generator=g), torch.randn(vocab, hidden, generator=g)
    return x.to(dtype), weight.to(dtype), torch.randint(vocab, (n,), generator=g)


@settings(max_examples=20)
@given(
    n=st.sampled_from([1, 2, 16, 17]),
    hidden=st.sampled_from([1, 16, 21]),
    vocab=st.sampled_from([1, 31, 32, 100]),
    multiprocessors=st.sampled_from([1, 3]),
    transform=st.sampled_from([(False, None, 1.0), (True, None, -0.5), (True, 3.0, 0.7)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_linear_logps(n, hidden, vocab, multiprocessors, transform, dtype):
    with_bias, softcap, logit_scale = transform
    x, weight, targets = matrices(n, hidden, vocab, dtype)
    bias = torch.linspace(-2, 2, vocab).to(dtype) if with_bias else None
    logps = run_linear_logps(x, weight, targets, bias, softcap, logit_scale, multiprocessors)
    z = logit_scale * (x.double() @ weight.double().T + (0.0 if bias is None else bias.double()))
    z = z if softcap is None else softcap * (z / softcap).tanh()
    expected = z.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=2e-6)
    assert (logps <= 0).all()


def test_linear_logps_of_extreme_logits():
    """All negative; a first tile of -inf; rows that differ by more than exp can hold; NaN is not hidden."""
    x = torch.tensor([[1.0], [-1.0], [1e3], [torch.nan]])
    weight = torch.linspace(-300, -200, 200)[:, None]
    bias = torch.zeros(200)
    bias[:70] = -torch.inf
    targets = torch.tensor([150, 80, 199, 100])
    logps = run_linear_logps(x, weight, targets, bias)
    z = x.double() @ weight.double().T + bias
    expected = z.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-4, equal_nan=True)
    assert logps[3].isnan()


@pytest.mark.parametrize("label", [-1, 100, 127, 2**32 + 3, -(2**40)])
def test_linear_logps_notices_labels_out_of_range(label):
    x, weight, targets = matrices(3, 16, 100, torch.float32)
    targets[1] = label
    logps = run_linear_logps(x, weight, targets)
    assert logps[1].isnan() and logps[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "n, vocab, multiprocessors, grid",
    [
        (16, 3200, 4, (1, 8)),
        (16, 3200, 1000, (1, 100)),
        (33, 3200, 4, (3, 2)),
        (900, 3200, 4, (57, 1)),
        (1, 1, 9, (1, 1)),
    ],
)
def test_linear_logps_splits_the_vocabulary_to_fill_the_device(n, vocab, multiprocessors, grid, monkeypatch):
    class Recorder:
        def __getitem__(self, grid):
            self.grid = grid
            return lambda *args, **options: None

    recorder = Recorder()
    monkeypatch.setattr(linear_logps_module, "_linear_logps_kernel", recorder)
    x, weight, targets = matrices(n, 1, vocab, torch.float32)
    options = {"bias": None, "softcap": None, "logit_scale": 1.0, "arch": "interpreter"}
    linear_logps(x, weight, targets, multiprocessors=multiprocessors, **options)
    assert recorder.grid == grid


def test_linear_logps_of_strided_rows():
    x, weight, targets = matrices(5, 16, 100, torch.float32)
    wide_x, wide_weight = torch.full((5, 64), torch.nan), torch.full((100, 48), torch.nan)
    wide_x[:, 16:32], wide_weight[:, :16] = x, weight
    got = run_linear_logps(wide_x[:, 16:32], wide_weight[:, :16], targets)
    assert torch.equal(got, run_linear_logps(x, weight, targets))


@triton.jit
def _softcap_kernel(p_z, p_out, p_derivative, CAP: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    capped, derivative = softcap(tl.load(p_z + cols), CAP)
    tl.store(p_out + cols, capped)
    tl.store(p_derivative + cols, derivative)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 4e-7), (torch.float64, 1e-13)])
def test_softcap_is_accurate_everywhere(dtype, tolerance):
    z = torch.cat([torch.logspace(-6, 3, 511, dtype=dtype), torch.zeros(1, dtype=dtype)])
    z = torch.cat([z, -z]).to(DEVICE)
    out, derivative = torch.empty_like(z), torch.empty_like(z)
    _softcap_kernel[(1,)](z, out, derivative, CAP=30.0, BLOCK=1024)
    u = z.double() / 30
    # float64 promises an absolute error of the cap's last digit, float32 a relative one
    atol = 0.0 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(out.double(), 30 * u.tanh(), rtol=tolerance, atol=atol)
    torch.testing.assert_close(derivative.double(), u.cosh() ** -2, rtol=1e-5, atol=1e-30)
