"""The fused matmul and row pass against float64, and where the backend uses it."""

from __future__ import annotations

import pytest
import torch
import triton_setup
from cases import make_case, relative_error, run

import inspo_kernels as ik
from inspo_kernels.backends.triton_backend import TritonBackend
from inspo_kernels.head import checked_head
from inspo_kernels.kernels import config, fused_pass
from inspo_kernels.kernels.row_pass import PARTS
from inspo_kernels.row_sums import STATISTICS, RowSums, parts_of

pytestmark = triton_setup.quiet
DEVICE = triton_setup.DEVICE
ARCH = config.architecture(DEVICE)
if config.fused_pass(ARCH, None) is None:
    pytest.skip(f"{ARCH} does not use the fused pass", allow_module_level=True)


def operands(n, hidden, vocab, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(n, hidden, generator=g)
    weight, bias = torch.randn(vocab, hidden, generator=g) / hidden**0.5, torch.randn(vocab, generator=g)
    targets = torch.randint(vocab, (n,), generator=g)
    return (x.to(DEVICE, torch.bfloat16), *(t.to(DEVICE, torch.bfloat16) for t in (weight, bias)), targets.to(DEVICE))


def logits(x, weight, bias, softcap, scale):
    z = scale * (x.double() @ weight.double().t() + (0 if bias is None else bias.double()))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def launch(x, weight, targets, *, bias=None, softcap=None, scale=1.0, store=True, label=None, wanted=frozenset()):
    """Sums, E (None without ``store``) and the flags of rows whose first offset did not suit."""
    n, stride = len(x), config.padded_vocab(len(weight))
    if label is None:
        label = logits(x, weight, bias, softcap, scale).gather(1, targets[:, None]).squeeze(1).float()
    e = torch.full((n, stride), torch.nan, dtype=torch.bfloat16, device=DEVICE) if store else None
    offset, sums = torch.full((n,), -7.0, device=DEVICE), torch.full((1 + len(wanted), n), -7.0, device=DEVICE)
    raised = torch.full((n,), -7, dtype=torch.int32, device=DEVICE)
    fused_pass.fused_pass(
        x,
        weight,
        targets,
        label,
        offset,
        sums,
        raised,
        e=e,
        bias=None if bias is None else torch.nn.functional.pad(bias, (0, stride - len(bias))),
        softcap=softcap,
        outer=1.0 if softcap is None else softcap,
        scale=scale,
        wanted=wanted,
        arch=ARCH,
    )
    parts = dict(zip([name for name in PARTS if name in wanted], sums[1:], strict=True))
    return RowSums(offset, sums[0], label, **parts), e, raised


@pytest.mark.parametrize("n, hidden, vocab", [(1, 8, 1), (17, 40, 64), (40, 64, 65), (33, 24, 300), (130, 72, 257)])
@pytest.mark.parametrize("softcap, with_bias, scale", [(None, False, 1.0), (None, True, 0.7), (2.0, True, 0.7)])
def test_sums_and_e(n, hidden, vocab, softcap, with_bias, scale):
    x, weight, bias, targets = operands(n, hidden, vocab)
    transform = {"bias": bias if with_bias else None, "softcap": softcap, "scale": scale}
    z = logits(x, weight, **transform)
    truth = z.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    for store in (True, False):
        sums, e, raised = launch(x, weight, targets, **transform, store=store)
        torch.testing.assert_close(sums.scores(torch.float64, vocab).logps, truth, rtol=1e-6, atol=1e-6)
        assert not raised.any()
        if e is not None:
            slope = 1.0 if softcap is None else 1 - (z / softcap).square()
            expected = (slope * (z - sums.offset[:, None].double()).exp()).scatter(1, targets[:, None], 0.0)
            assert relative_error(e[:, :vocab], expected) < 3e-3 or vocab == 1
            assert (e[:, vocab:] == 0).all() and (e.gather(1, targets[:, None]) == 0).all()


@pytest.mark.parametrize("asked", [[name] for name in STATISTICS] + [list(STATISTICS)])
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("far", [False, True])
def test_statistics(asked, store, far):
    """As float64 has them, in rows that are repaired, too."""
    x, weight, bias, targets = operands(20, 16, 150, scale=20.0 if far else 1.0)
    z = logits(x, weight, bias, None, 1.0)
    targets = z.argmin(1) if far else torch.where(torch.arange(20, device=DEVICE) < 5, z.argmax(1), targets)
    sums, _, raised = launch(x, weight, targets, bias=bias, store=store, wanted=parts_of(asked))
    assert raised.any() == far
    found = sums.scores(torch.float64, 150, tuple(asked)).statistics
    logps = z.log_softmax(1)
    truth = {
        "entropy": -(logps.exp() * logps).sum(1),
        "mean_logit": z.mean(1),
        "is_top1": targets == z.argmax(1),
        "logsumexp": z.logsumexp(1),
        "log_sum_sq_probs": (2 * logps).logsumexp(1),
    }
    for name in asked:
        torch.testing.assert_close(found[name], truth[name].to(found[name].dtype), rtol=2e-6, atol=2e-6)


def test_unsuitable_offsets_are_repaired():
    """Labels 100 nats below the rest, of logit -inf, and beyond the vocabulary; other rows keep their bits."""
    x, weight, _, targets = operands(48, 16, 100, scale=30.0)
    z = logits(x, weight, None, None, 1.0)
    targets = z.topk(3, dim=1).indices[:, 2].contiguous()
    usual, e_usual, _ = launch(x, weight, targets)
    lowest = targets.clone()
    lowest[3], lowest[20] = z[3].argmin(), z[20].argmin()
    assert (z.amax(1) - z.amin(1))[[3, 20]].min() > 70
    label = z.gather(1, lowest[:, None]).squeeze(1).float()
    label[40], lowest[40] = -torch.inf, -5
    sums, e, raised = launch(x, weight, lowest, label=label)
    assert raised.nonzero().squeeze(1).tolist() in ([3, 20], [3, 20, 40])
    kept = torch.ones(48, dtype=torch.bool, device=DEVICE)
    kept[[3, 20, 40]] = False
    assert torch.equal(e[kept], e_usual[kept]) and torch.equal(sums.rest[kept], usual.rest[kept])
    expected = (z - sums.offset[:, None].double()).exp()
    expected[[3, 20]] = expected[[3, 20]].scatter(1, lowest[[3, 20], None], 0.0)
    for row in (3, 20, 40):
        assert relative_error(e[row, :100], expected[row]) < 3e-3
        assert relative_error(sums.rest[row], expected[row].sum()) < 1e-5
    logp = sums.scores(torch.float64, 100).logps[3].item()
    assert logp == pytest.approx(z[3].log_softmax(0)[lowest[3]].item(), rel=1e-6)


@pytest.mark.parametrize("wanted", [frozenset(), parts_of(STATISTICS)], ids=["sums", "statistics"])
def test_rows_beside_a_repaired_one_keep_their_bits(wanted):
    """In a vocabulary of so many tiles that the order of their sums matters."""
    x, weight, bias, targets = operands(16, 32, 3000)
    bias[0] = -100.0
    usual, e_usual, none = launch(x, weight, targets.clamp(min=1), bias=bias, wanted=wanted)
    targets = targets.clamp(min=1).index_fill(0, torch.tensor([5], device=DEVICE), 0)
    sums, e, raised = launch(x, weight, targets, bias=bias, wanted=wanted)
    assert not none.any() and raised.nonzero().squeeze(1).tolist() == [5]
    others = torch.arange(16, device=DEVICE) != 5
    assert torch.equal(e[others], e_usual[others])
    for name in ("offset", "rest", *wanted):
        assert torch.equal(getattr(sums, name)[others], getattr(usual, name)[others]), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_in_their_row(value):
    x, weight, _, targets = operands(20, 16, 100)
    spoilt = x.clone()
    spoilt[7, 0] = value
    (expected, e, _), (sums, e_spoilt, _) = launch(x, weight, targets), launch(spoilt, weight, targets)
    others = torch.arange(20, device=DEVICE) != 7
    assert torch.equal(e[others], e_spoilt[others]) and torch.equal(expected.rest[others], sums.rest[others])
    assert not sums.scores(torch.float64, 100).logps[7].isfinite()


def test_squares_of_low_logits_do_not_vanish():
    """Labels of another rank give no offset, and exp(-49)^2 has few digits in float32."""
    x, weight, bias, targets = operands(4, 16, 3000, scale=0.1)
    bias.fill_(-49.25)
    label = torch.full((4,), -torch.inf, device=DEVICE)
    sums, _, _ = launch(x, weight, targets - 3000, bias=bias, label=label, wanted=parts_of(STATISTICS))
    e = (logits(x, weight, bias, None, 1.0) - sums.offset[:, None].double()).exp()
    torch.testing.assert_close(sums.rest.double(), e.sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.squares.double(), e.square().sum(1), rtol=1e-5, atol=0)


def test_a_vocabulary_without_any_finite_logit():
    x, weight, bias, targets = operands(20, 16, 100)
    sums, e, _ = launch(x, weight, targets, bias=torch.full_like(bias, -torch.inf))
    assert (sums.rest == 0).all() and (e == 0).all()


@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("with_marginals", [False, True])
def test_the_loss_is_that_of_the_row_pass(workspace, with_marginals, monkeypatch):
    case = triton_setup.on_device(make_case([(3, 5, 2), (1, 1, 7), (4, 3, 3)], hidden_size=16, vocab=90))
    case = case.to(torch.bfloat16)
    options = {"backend": "triton", "max_workspace_bytes": workspace, "softcap": 5.0}
    options |= {"marginal_weight": 0.5} if with_marginals else {"marginal_labels": None}
    called = []
    launched = fused_pass.fused_pass
    monkeypatch.setattr(fused_pass, "fused_pass", lambda *a, **k: (called.append(1), launched(*a, **k))[1])
    fused, fused_gradients = run(case, **options)
    assert called
    monkeypatch.setattr(config, "fused_pass", lambda *_: None)
    apart, gradients = run(case, **options)
    assert relative_error(fused.logps, apart.logps) < 1e-6
    for got, want in zip(fused_gradients, gradients, strict=True):
        assert relative_error(got, want) < 6e-3


def test_it_runs_where_its_operands_allow():
    x, weight, _, _ = operands(20, 16, 100)

    def tile(x, weight, dtype=torch.bfloat16, keep=False, parts=frozenset()):
        x, weight = x.to(dtype), weight.to(dtype)
        head = checked_head(x, weight, None, None, 1.0)
        opened = TritonBackend().open_tile(head, 20, 1 << 20)
        opened.x, opened.e = x, opened._rows_of_e(20) if keep else None
        return opened._fused_pass(parts)

    assert tile(x, weight) and tile(x, weight, keep=True) and tile(x, weight, torch.float16)
    assert tile(x, weight, torch.float16, keep=True) is None and tile(x, weight, torch.float32) is None
    assert tile(x, weight, parts=frozenset({"moment"}))
    assert tile(x, weight.t().contiguous().t()) is None and tile(x[:, :12], weight[:, :12].contiguous()) is None
    assert tile(x, weight[:1].expand(100, 16)) is None and tile(x, weight.flatten().unfold(0, 16, 8)[:100]) is None
    assert tile(x[:, :8], weight[:, :8]) and tile(x[:, 4:12], weight[:, 4:12]) is None


def test_float16_scores_alike_with_and_without_gradients():
    x, weight, _, targets = operands(30, 16, 100)
    x, weight = x.half(), weight.half()
    with torch.no_grad():
        scored = ik.linear_logps(x, weight, targets, backend="triton")
    graded = ik.linear_logps(x.requires_grad_(), weight.requires_grad_(), targets, backend="triton")
    torch.testing.assert_close(scored, graded.detach(), rtol=1e-6, atol=1e-6)
