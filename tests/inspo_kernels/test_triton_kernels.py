"""Test each Triton kernel against its formula, in cases that the public functions cannot produce."""

from __future__ import annotations

import pytest
import torch
import triton_setup
from cases import relative_error

from inspo_kernels.kernels import config
from inspo_kernels.kernels.bias_gradient import bias_gradient
from inspo_kernels.kernels.label_logits import label_logits
from inspo_kernels.kernels.row_pass import PARTS, row_pass
from inspo_kernels.kernels.scale_rows import scale_rows
from inspo_kernels.kernels.softcap import softcap
from inspo_kernels.row_sums import STATISTICS, RowSums

pytestmark = triton_setup.quiet
DEVICE = triton_setup.DEVICE
ARCH = config.architecture(DEVICE)
triton, tl = triton_setup.triton, triton_setup.tl


def rows_of_logits(vocab, n=4, scale=1.0, dtype=torch.float32, seed=0):
    """Return raw logits in rows with the padded stride (padding is NaN), and targets."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.full((n, config.padded_vocab(vocab)), torch.nan, dtype=dtype)
    raw[:, :vocab] = scale * torch.randn(n, vocab, generator=g)
    return raw.to(DEVICE), torch.randint(vocab, (n,), generator=g).to(DEVICE)


def run_row_pass(raw, targets, vocab, e=None, bias=None, softcap=None, logit_scale=1.0, words=None, wanted=frozenset()):
    """Return the rows' sums, computed in tiles of ``words`` columns, and how often each offset was raised."""
    n, stride = raw.shape
    words = words or stride
    outside = (targets < 0) | (targets >= vocab)
    label = logit_scale * raw.gather(1, targets.clamp(0, vocab - 1)[:, None]).squeeze(1)
    label = label if softcap is None else softcap * torch.tanh(label / softcap)
    label = label.masked_fill(outside, torch.nan)
    offset, rest = (torch.full((n,), -7.0, dtype=raw.dtype, device=DEVICE) for _ in range(2))
    parts, raised = raw.new_full((len(PARTS), n), -7.0), torch.zeros(n, dtype=torch.int32, device=DEVICE)
    for first in range(0, stride, words):
        tile = raw if words == stride else raw[:, first : first + words].contiguous()
        row_pass(
            tile,
            targets,
            label,
            offset,
            rest,
            parts,
            raised,
            first=first,
            vocab=vocab,
            e=e,
            bias=bias,
            softcap=softcap,
            outer=1.0 if softcap is None else softcap,
            scale=logit_scale,
            wanted=wanted,
            arch=ARCH,
        )
    sums = RowSums(offset, rest, label, **{name: parts[PARTS.index(name)] for name in wanted})
    return sums, raised


def logps_of(sums, vocab):
    return sums.scores(sums.offset.dtype, vocab).logps


def dlogits(raw, targets, vocab, softcap, logit_scale):
    """Return d logp / d(scaled logits before the cap) in float64, by torch."""
    z = (logit_scale * raw[:, :vocab].double()).requires_grad_()
    capped = z if softcap is None else softcap * (z / softcap).tanh()
    logps = capped.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(logps.sum(), z)
    return logps.detach(), gradient


@pytest.mark.parametrize("vocab", [1, 63, 64, 500])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "e_dtype, words",
    [
        (torch.bfloat16, None),
        (torch.bfloat16, 64),
        (torch.float16, None),
        (torch.float32, None),
        (None, None),
        (None, 128),
    ],
)
def test_row_pass(e_dtype, words, softcap, vocab):
    if words and e_dtype in (torch.float16, torch.float32):
        pytest.skip("E of these dtypes comes as one tile of the whole vocabulary")
    raw, targets = rows_of_logits(vocab, scale=3.0)
    original = raw.clone()
    in_place = e_dtype == torch.float32
    e = None if e_dtype is None else raw if in_place else torch.full_like(raw, torch.nan, dtype=e_dtype)
    sums, _ = run_row_pass(raw, targets, vocab, e=e, softcap=softcap, logit_scale=0.7, words=words)
    true_logps, gradient = dlogits(original, targets, vocab, softcap, 0.7)
    torch.testing.assert_close(logps_of(sums, vocab).double(), true_logps, rtol=4e-7, atol=4e-7)
    if not in_place:
        assert torch.equal(raw.nan_to_num(1e9), original.nan_to_num(1e9)), "logits are for reading"
    if e is not None:
        assert (e[:, vocab:] == 0).all() and (e.gather(1, targets[:, None]) == 0).all()
        got = -e[:, :vocab].double() / sums.total.double()[:, None]
        gradient.scatter_(1, targets[:, None], 0.0)
        eps = torch.finfo(e_dtype).eps
        torch.testing.assert_close(got, gradient, rtol=max(2 * eps, 2e-6), atol=1e-7)


@pytest.mark.parametrize("words", [None, 64])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_statistics_of_a_row(softcap, words):
    vocab = 200
    raw, targets = rows_of_logits(vocab, n=6, scale=4.0)
    raw[0, 70] = 90.0  # raises the offset
    raw[1, [3, 150]] = 40.0
    targets[1], targets[2] = 150, raw[2, :vocab].argmax()
    wanted = frozenset(PARTS)
    sums, _ = run_row_pass(raw, targets, vocab, softcap=softcap, words=words, wanted=wanted)
    got = sums.scores(torch.float32, vocab, STATISTICS).statistics
    z = raw[:, :vocab].double()
    z = z if softcap is None else softcap * (z / softcap).tanh()
    p = z.softmax(-1)
    torch.testing.assert_close(got["entropy"].double(), torch.special.entr(p).sum(-1), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got["mean_logit"].double(), z.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["logsumexp"].double(), z.logsumexp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["log_sum_sq_probs"].double(), p.square().sum(-1).log(), rtol=1e-5, atol=2e-6)
    assert got["is_top1"].tolist() == (z.argmax(-1) == targets).tolist()
    assert got["is_top1"][2] and not got["is_top1"][1]  # the lowest id of two equal ones


@pytest.mark.parametrize("words", [None, 256])
def test_low_offsets_are_raised_exactly(words):
    block = config.row_pass(ARCH, 10**5, torch.float32, None).block
    vocab = 2 * block + 100
    raw, targets = rows_of_logits(vocab)
    raw[0, block + 50] = 35.0  # near enough to stay
    raw[1, block + 50] = 60.0  # exp fits float32, not the bound
    raw[2, block + 50] = 200.0  # exp overflows
    raw[3, :block] = -torch.inf
    targets[3] = block + 20
    e = torch.empty_like(raw, dtype=torch.bfloat16)
    sums, raised = run_row_pass(raw, targets, vocab, e=e, words=words)
    truth = dlogits(raw, targets, vocab, None, 1.0)
    torch.testing.assert_close(logps_of(sums, vocab).double(), truth[0], rtol=4e-7, atol=2e-6)
    got = -e[:, :vocab].double() / sums.total.double()[:, None]
    torch.testing.assert_close(got, truth[1].scatter_(1, targets[:, None], 0.0), rtol=1e-2, atol=1e-7)
    assert (e.abs().amax(1) < 2.0**58).all() and e.isfinite().all()
    assert raised.tolist() == [0, 1, 1, 0]


def test_ordinary_rows_never_raise_their_offset():
    raw, targets = rows_of_logits(2000, n=32, scale=6.0)
    _, raised = run_row_pass(raw, targets, 2000, e=torch.empty_like(raw, dtype=torch.bfloat16), words=256)
    assert raised.sum() == 0


@pytest.mark.parametrize("position", ["label", "other"])
def test_nan_and_infinite_logits_are_not_hidden(position):
    for value in (torch.nan, torch.inf):
        raw, targets = rows_of_logits(200)
        raw[1, targets[1] if position == "label" else (targets[1] + 1) % 200] = value
        sums, _ = run_row_pass(raw, targets, 200, e=torch.empty_like(raw, dtype=torch.bfloat16))
        logps = logps_of(sums, 200)
        assert logps[1].isnan() and logps[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("e_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("label", [-1, -100, 100, 127, 128, 10**6, 2**31, 2**32, -(2**40)])
def test_out_of_range_labels_read_no_memory(label, e_dtype):
    """2^32 is 0 in 32 bits, and 100..127 is padding. The neighbouring rows are guards."""
    vocab, n = 100, 3
    raw, targets = rows_of_logits(vocab, n)
    targets[1] = label
    memory = torch.full((3 * n, raw.shape[1]), 3.0, dtype=e_dtype, device=DEVICE)
    e = memory[n : 2 * n]
    sums, _ = run_row_pass(raw, targets, vocab, e=e)
    logps = logps_of(sums, vocab)
    assert logps[1].isnan() and logps[[0, 2]].isfinite().all()
    assert (memory[:n] == 3).all() and (memory[2 * n :] == 3).all() and (e[:, vocab:] == 0).all()


def test_float16_holds_the_complement_of_a_flat_row():
    """S' of a flat row is 128,255, twice float16's largest number."""
    vocab = 128256 if ARCH != "interpreter" else 70000
    raw = torch.zeros(1, config.padded_vocab(vocab), device=DEVICE)
    e = torch.empty_like(raw, dtype=torch.float16)
    sums, _ = run_row_pass(raw, torch.tensor([5], device=DEVICE), vocab, e=e)
    assert logps_of(sums, vocab).item() == pytest.approx(-torch.tensor(vocab).log().item(), rel=1e-6)
    assert e.isfinite().all() and sums.rest.to(torch.float16).isfinite().all()
    assert (sums.rest / sums.total).item() == pytest.approx((vocab - 1) / vocab, rel=1e-3)


@pytest.mark.parametrize("label", [-1, 100, 2**32, -(2**40)])
@pytest.mark.parametrize("hidden", [1, 64, 100])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 3e-7), (torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_label_logits(dtype, tolerance, hidden, label):
    """Test weights in both memory orders. A label out of range raises an error."""
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


@pytest.mark.parametrize("n, hidden", [(1, 1), (17, 65), (40, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scaled_rows_equal_torchs(dtype, n, hidden):
    """In the same dtype, in another one, in place, and between other memory."""
    wide = torch.promote_types(dtype, torch.float32)
    x, scale = matrices(n, hidden, n, dtype)[0].to(DEVICE), torch.linspace(-2, 3, n).to(DEVICE, wide)
    expected = x.to(wide) * scale.unsqueeze(1)
    for target in (dtype, wide):
        memory = torch.full((n + 2, hidden + 3), 7.0, dtype=target, device=DEVICE)
        scale_rows(x, scale, memory[1:-1, :hidden], arch=ARCH)
        assert torch.equal(memory[1:-1, :hidden], expected.to(target))
        assert (memory[[0, -1]] == 7).all() and (memory[:, hidden:] == 7).all()
    scale_rows(x, scale, x, arch=ARCH)
    assert torch.equal(x, expected.to(dtype))


APART = 2**30  # elements from row to row: the third row starts where 32 bits end


@pytest.fixture
def far_rows(request, tmp_path):
    """Return a function that moves three rows of a matrix far apart; on a CPU they lie in a sparse file."""
    if request.config.getoption("--sanitize", False):
        pytest.skip("the sanitizer copies all memory of a launch")

    def moved(matrix):
        elements = 2 * APART + matrix.shape[1]
        if DEVICE.type == "cpu":
            file = tmp_path / str(len(list(tmp_path.iterdir())))
            memory = torch.from_file(str(file), shared=True, size=elements, dtype=matrix.dtype)
        else:
            memory = torch.empty(elements, dtype=matrix.dtype, device=DEVICE)
        return memory.as_strided(matrix.shape, (APART, 1)).copy_(matrix)

    return moved


@pytest.mark.parametrize("kernel", ["row_pass", "label_logits", "scale_rows", "bias_gradient"])
def test_rows_may_lie_beyond_32_bits(kernel, far_rows):
    """Row 16,743 of 128,256 words lies there."""
    raw, targets = rows_of_logits(100, n=3)
    if kernel == "row_pass":
        e = torch.zeros_like(raw, dtype=torch.bfloat16)
        far, far_e = far_rows(raw), far_rows(e)
        expected, got = (run_row_pass(z, targets, 100, e=out)[0] for z, out in ((raw, e), (far, far_e)))
        assert torch.equal(got.rest, expected.rest) and torch.equal(far_e, e) and e[2].count_nonzero() == 99
    elif kernel == "label_logits":
        x, weight, _ = (t.to(DEVICE) for t in matrices(3, 40, 3, torch.bfloat16))
        targets = torch.tensor([2, 0, 2], device=DEVICE)
        operands = ((x, weight), (far_rows(x), far_rows(weight)))
        expected, got = (label_logits(*pair, targets, arch=ARCH) for pair in operands)
        assert torch.equal(got, expected)
    elif kernel == "scale_rows":
        x, scale = raw[:, :70].contiguous(), torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
        far = far_rows(x)
        scale_rows(far, scale, far, arch=ARCH)
        assert torch.equal(far, x * scale.unsqueeze(1))
    else:
        e, scale = raw[:, :64].contiguous().to(torch.bfloat16), torch.ones(3, device=DEVICE)
        expected, got = torch.empty(64, device=DEVICE), torch.empty(64, device=DEVICE)
        for matrix, out in ((e, expected), (far_rows(e), got)):
            bias_gradient(matrix, scale, out, accumulate=False, arch=ARCH)
        assert torch.equal(got, expected)


def matrices(n, hidden, vocab, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(n, hidden, generator=g), torch.randn(vocab, hidden, generator=g)
    return x.to(dtype), weight.to(dtype), torch.randint(vocab, (n,), generator=g)


@triton.jit
def _softcap_kernel(p_z, p_out, p_derivative, CAP: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    capped, derivative = softcap(tl.load(p_z + cols), CAP, CAP)
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
