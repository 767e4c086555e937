"""Test ``fused_inspo_loss`` against the float64 reference: forms, objectives, workspaces, dtypes, autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import IGNORE, OBJECTIVES, RAGGED, Case, gradients_of, make_case, relative_error, run
from hypothesis import given
from hypothesis import strategies as st

import inspo_kernels as ik
from inspo_kernels.objectives import make_objective

WORKSPACES = (None, 1, 29 * 8 * 4, 29 * 8 * 9)  # default, one row, smaller than most pairs, larger than some pairs
OUTPUTS = ("losses", "logps", "lengths", "marginal_logps", "chosen_rewards", "rejected_rewards", "margins")


def assert_same(got, expected, tolerance):
    """Assert equal loss, gradients and reported values. ``got`` and ``expected`` are (output, gradients)."""
    out, grads = got
    expected_out, expected_grads = expected
    assert relative_error(out.loss.detach(), expected_out.loss.detach()) <= tolerance
    for name in OUTPUTS:
        a, b = getattr(out, name), getattr(expected_out, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and relative_error(a, b) <= tolerance), name
    assert out.metrics().keys() == expected_out.metrics().keys()
    for i, (g, e) in enumerate(zip(grads, expected_grads, strict=True)):
        assert relative_error(g, e) <= tolerance, f"gradient {i}"


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("softcap, logit_scale", [(None, 1.0), (1.5, 0.7)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_reference_in_float64(objective, softcap, logit_scale, workspace):
    options = {"objective": objective, "softcap": softcap, "logit_scale": logit_scale}
    expected = run(RAGGED, backend="reference", **options)
    assert_same(run(RAGGED, backend="torch", max_workspace_bytes=workspace, **options), expected, 1e-11)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_reduction_and_anchor_equal_reference(objective, workspace):
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0])
    options = {"objective": objective, "marginal_weight": 0.25, "pair_weights": weights, "reduction": "sum"}
    expected = run(RAGGED, backend="reference", **options)
    got = run(RAGGED, backend="torch", max_workspace_bytes=workspace, **options)
    assert_same(got, expected, 1e-11)
    assert got[0].loss.item() == pytest.approx(got[0].losses.sum().item(), rel=1e-12)


segment = st.integers(1, 6)


@given(
    lengths=st.lists(st.tuples(segment, segment, segment), min_size=1, max_size=4),
    vocab=st.sampled_from([1, 2, 7, 33]),
    workspace_rows=st.integers(0, 30),
    objective=st.sampled_from(OBJECTIVES),
    seed=st.integers(0, 3),
)
def test_any_ragged_batch_in_every_form_equals_reference(lengths, vocab, workspace_rows, objective, seed):
    case = make_case(lengths, vocab=vocab, seed=seed)
    options = {"objective": objective, "ref_logps": case.ref_logps, "marginal_weight": 0.5}
    expected = ik.reference.fused_inspo_loss(
        case.hidden,
        case.weight,
        case.labels,
        bias=case.bias,
        marginal_labels=case.marginal_labels,
        **options,
    )
    rows = {"hidden": case.hidden, "labels": case.labels, "marginal_labels": case.marginal_labels}
    for backend in ("torch", "reference"):
        for form in (rows, case.packed(), case.compact(seed)):
            out = ik.fused_inspo_loss(
                form["hidden"],
                case.weight,
                form["labels"],
                **{k: v for k, v in form.items() if k not in ("hidden", "labels")},
                bias=case.bias,
                max_workspace_bytes=max(1, workspace_rows * vocab * 8),
                backend=backend,
                **options,
            )
            torch.testing.assert_close(out.loss, expected.loss, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(out.logps, expected.logps, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(out.marginal_logps, expected.marginal_logps, rtol=1e-11, atol=1e-11)
            assert torch.equal(out.lengths, expected.lengths)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_of_packed_and_compact_forms_equal_rows(backend):
    options = {"ref_logps": RAGGED.ref_logps, "marginal_weight": 0.5, "backend": backend}
    _, (_, rows_weight, _) = run(RAGGED, **options)
    for form in (RAGGED.packed(), RAGGED.compact()):
        hidden = form.pop("hidden").clone().requires_grad_()
        weight = RAGGED.weight.clone().requires_grad_()
        out = ik.fused_inspo_loss(hidden, weight, form.pop("labels"), bias=RAGGED.bias, **form, **options)
        d_hidden, d_weight = gradients_of(out.loss, hidden, weight)
        assert relative_error(d_weight, rows_weight) < 1e-12
        assert relative_error(d_hidden.sum(0), run(RAGGED, **options)[1][0].sum((0, 1))) < 1e-11


def test_packed_gradient_in_hidden_equals_rows_token_by_token():
    _, (rows_hidden, *_) = run(RAGGED, backend="torch")
    packed = RAGGED.packed()
    hidden = packed["hidden"].clone().requires_grad_()
    out = ik.fused_inspo_loss(
        hidden,
        RAGGED.weight,
        packed["labels"],
        cu_seqlens=packed["cu_seqlens"],
        bias=RAGGED.bias,
        ref_logps=RAGGED.ref_logps,
    )
    (d_hidden,) = gradients_of(out.loss, hidden)
    unpadded = torch.cat([rows_hidden[i, :n] for i, n in enumerate(RAGGED.lengths)])
    assert relative_error(d_hidden, unpadded) < 1e-12


def test_a_row_scored_for_two_segments_gets_both_gradients():
    """The last prompt token of a shared prefix predicts the first token of both responses."""
    g = torch.Generator().manual_seed(1)
    shared = torch.randn(1, 4, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, generator=g, dtype=torch.float64)
    options = {"segment_ids": torch.tensor([0, 1]), "num_pairs": 1, "ref_logps": torch.tensor([-1.0, -2.0])}
    results = []
    for backend in ("torch", "reference"):
        out = ik.fused_inspo_loss(shared.expand(2, 4), weight, torch.tensor([3, 8]), backend=backend, **options)
        results.append(gradients_of(out.loss, shared)[0])
    assert relative_error(*results) < 1e-12


def test_overlapping_labels_and_marginal_labels_add_up():
    """A position may be scored for both. Its row of hidden then gets the sum of both gradients."""
    case = replace(RAGGED, marginal_labels=torch.where(RAGGED.labels == IGNORE, RAGGED.marginal_labels, RAGGED.labels))
    options = {"marginal_weight": 1.0}
    assert_same(run(case, backend="torch", **options), run(case, backend="reference", **options), 1e-11)


def test_without_shift_hidden_predicts_its_own_label():
    case = replace(RAGGED, labels=RAGGED.labels.roll(-1, 1), marginal_labels=RAGGED.marginal_labels.roll(-1, 1))
    assert_same(run(case, backend="torch", shift=False), run(RAGGED, backend="reference"), 1e-11)


def test_a_label_at_position_zero_is_not_scored():
    labels = RAGGED.labels.clone()
    labels[:, 0] = 10**6  # would even be out of range
    out, _ = run(replace(RAGGED, labels=labels), backend="torch")
    assert torch.equal(out.logps, run(RAGGED, backend="torch")[0].logps)
    packed = RAGGED.packed()
    packed["labels"][packed["cu_seqlens"][:-1].long()] = 5
    out = ik.fused_inspo_loss(
        packed.pop("hidden"),
        RAGGED.weight,
        packed.pop("labels"),
        bias=RAGGED.bias,
        ref_logps=RAGGED.ref_logps,
        **packed,
    )
    assert torch.equal(out.lengths, run(RAGGED, backend="torch")[0].lengths)


class PlainTorch:
    """The loss without this package: logits, log_softmax and autograd, all in the inputs' dtype."""

    def __init__(self, case: Case):
        leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight)]
        hidden, weight = leaves
        logps = (hidden[:, :-1] @ weight.T).log_softmax(-1)
        labels = case.labels[:, 1:]
        token_logps = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        self.logps = (token_logps * (labels != IGNORE)).sum(-1)
        chosen, rejected = (self.logps - case.ref_logps.to(hidden.dtype)).chunk(2)
        self.loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        self.gradients = gradients_of(self.loss, *leaves)


@pytest.mark.parametrize("workspace", [None, 5000])
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_at_most_twice_that_of_plain_torch(dtype, scale, workspace):
    """Truth is float64 on the *rounded* inputs; scale 8 drives most label probabilities to 0 or 1."""
    lengths = [(9, 30, 22), (3, 14, 41)]
    case = make_case(lengths, hidden_size=64, vocab=777, bias=False, scale=scale / 8, seed=3).to(dtype)
    truth = PlainTorch(case.to(torch.float64))
    plain = PlainTorch(case)
    out, gradients = run(case, backend="torch", max_workspace_bytes=workspace)
    assert out.loss.dtype == torch.float32 and out.logps.dtype == torch.float64
    # No implementation can avoid rounding the result to its dtype once.
    floor = torch.finfo(dtype).eps / 2
    for got, base, true in zip(
        (out.loss.detach(), out.logps, *gradients),
        (plain.loss.detach(), plain.logps.detach(), *plain.gradients),
        (truth.loss.detach(), truth.logps.detach(), *truth.gradients),
        strict=True,
    ):
        assert relative_error(got, true) <= 2 * max(relative_error(base, true), floor)


def test_gradient_of_almost_certain_labels_is_exact():
    """E_y - S would cancel completely at p = 1 - 1e-9; the complement keeps every digit."""
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[20.0], [0.0], [-1.0]])
    results = []
    for dtype in (torch.float32, torch.float64):
        w = weight.to(dtype).requires_grad_()
        out = ik.fused_inspo_loss(
            hidden.to(dtype),
            w,
            torch.tensor([0, 0]),
            segment_ids=torch.tensor([0, 1]),
            ref_logps=torch.tensor([0.0, 30.0]),
        )
        results.append(gradients_of(out.loss, w)[0])
    expected, got = results[1], results[0]
    assert expected.abs().max() < 1e-9
    # chosen and rejected have equal and opposite coefficients on the same row here, so compare per-token gradients
    logp = ik.linear_logps(hidden, weight.requires_grad_(), torch.tensor([0, 0]))
    (d32,) = gradients_of(logp[0], weight)
    w64 = weight.detach().double().requires_grad_()
    (d64,) = gradients_of(ik.linear_logps(hidden.double(), w64, torch.tensor([0, 0]))[0], w64)
    assert got.abs().max() < 1e-9
    assert relative_error(d32, d64) < 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck(objective):
    # Small, because each of the inputs' entries takes two calls. The workspace holds 4 of the 14 rows.
    case = make_case([(1, 2, 1), (1, 1, 3)], hidden_size=2, vocab=5)

    def loss(hidden, weight, bias):
        return ik.fused_inspo_loss(
            hidden,
            weight,
            case.labels,
            bias=bias,
            objective=objective,
            ref_logps=case.ref_logps,
            marginal_labels=case.marginal_labels,
            marginal_weight=0.5,
            softcap=4.0,
            logit_scale=0.8,
            max_workspace_bytes=4 * 5 * 8,
        ).loss

    leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_exactly_the_needed_gradients(needed):
    """Check every subset of hidden, weight and bias. A frozen head (only hidden) takes its own path."""
    full = run(RAGGED, backend="reference", marginal_weight=0.5)[1]
    leaves = [RAGGED.hidden.clone(), RAGGED.weight.clone(), RAGGED.bias.clone()]
    for i in needed:
        leaves[i].requires_grad_()
    out = ik.fused_inspo_loss(
        leaves[0],
        leaves[1],
        RAGGED.labels,
        bias=leaves[2],
        ref_logps=RAGGED.ref_logps,
        marginal_labels=RAGGED.marginal_labels,
        marginal_weight=0.5,
    )
    out.loss.backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in needed)
        assert leaf.grad is None or relative_error(leaf.grad, full[i]) < 1e-11


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same_values_and_no_graph(mode):
    expected, _ = run(RAGGED, backend="torch")
    weight = RAGGED.weight.clone().requires_grad_()
    with mode():
        out = ik.fused_inspo_loss(
            RAGGED.hidden,
            weight,
            RAGGED.labels,
            bias=RAGGED.bias,
            ref_logps=RAGGED.ref_logps,
            marginal_labels=RAGGED.marginal_labels,
        )
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.logps, expected.logps, rtol=1e-12, atol=0)


def test_upstream_gradient_and_retain_graph():
    hidden, weight = RAGGED.hidden.clone().requires_grad_(), RAGGED.weight.clone().requires_grad_()
    out = ik.fused_inspo_loss(hidden, weight, RAGGED.labels, ref_logps=RAGGED.ref_logps)
    first = torch.autograd.grad(out.loss, (hidden, weight), retain_graph=True)
    tripled = torch.autograd.grad(3 * out.loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(out.loss, (hidden, weight), retain_graph=True)
    for a, b, c in zip(first, tripled, again):
        torch.testing.assert_close(3 * a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("call", ["loss", "tokens", "frozen tokens"])
@pytest.mark.parametrize("is_leaf", [True, False])
@pytest.mark.parametrize("end", ["backward", "grad", "loss changed in place"])
def test_second_derivatives_raise(call, is_leaf, end):
    leaf, weight = RAGGED.hidden.clone().requires_grad_(), RAGGED.weight.clone().requires_grad_("frozen" not in call)
    hidden = leaf if is_leaf else leaf * 1.0
    if call == "loss":
        loss = ik.fused_inspo_loss(hidden, weight, RAGGED.labels, ref_logps=RAGGED.ref_logps).loss
    else:
        loss = ik.linear_logps(hidden, weight, RAGGED.labels).sum()
    if end == "loss changed in place":
        loss /= 2
    (d_hidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
    penalised = loss + d_hidden.square().sum()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        penalised.backward() if end == "backward" else torch.autograd.grad(penalised, hidden)


@pytest.mark.parametrize("call", ["loss", "tokens", "frozen tokens"])
def test_a_checkpointed_call_takes_create_graph(call):
    hidden, weight = RAGGED.hidden.clone().requires_grad_(), RAGGED.weight.clone().requires_grad_("frozen" not in call)

    def total(hidden):
        if call == "loss":
            return ik.fused_inspo_loss(hidden, weight, RAGGED.labels, ref_logps=RAGGED.ref_logps).loss
        return ik.linear_logps(hidden, weight, RAGGED.labels).sum()

    (expected,) = torch.autograd.grad(total(hidden), hidden)
    checkpointed = torch.utils.checkpoint.checkpoint(total, hidden, use_reentrant=False)
    (found,) = torch.autograd.grad(checkpointed, hidden, create_graph=True)
    assert torch.equal(found.detach(), expected)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        found.square().sum().backward()


@pytest.mark.parametrize("name", ["fused_inspo_loss", "linear_logps"])
def test_transforms_are_refused_with_advice_that_works(name):
    hidden, weight, labels = RAGGED.hidden, RAGGED.weight, RAGGED.labels
    options = {"ref_logps": RAGGED.ref_logps} if name == "fused_inspo_loss" else {}

    def total(module, hidden):
        result = getattr(module, name)(hidden, weight, labels, **options)
        return result.loss if name == "fused_inspo_loss" else result.sum()

    for transform in (torch.func.grad, torch.func.vmap, lambda f: torch.func.vmap(torch.func.grad(f))):
        batched = hidden if transform is torch.func.grad else hidden[None]
        with pytest.raises(RuntimeError, match=f"torch.func.*inspo_kernels.reference.{name}"):
            transform(lambda h: total(ik, h))(batched)
        transform(lambda h: total(ik.reference, h))(batched)
    if name == "fused_inspo_loss":
        with pytest.raises(RuntimeError, match=r"call inspo_kernels\.reference\.fused_inspo_loss"):
            options["backend"] = "reference"
            torch.func.grad(lambda h: total(ik, h))(hidden)
        del options["backend"]
    leaf = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(ik, leaf), leaf)
    torch.testing.assert_close(torch.func.grad(lambda h: total(ik.reference, h))(hidden), expected)


def test_same_input_same_bits():
    case = RAGGED.to(torch.float32)
    first, second = (run(case, backend="torch", marginal_weight=0.5) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


def test_non_contiguous_inputs():
    wide = torch.randn(len(RAGGED.labels), RAGGED.labels.shape[1], 12, dtype=torch.float64)
    wide[..., ::2] = RAGGED.hidden
    strided = replace(
        RAGGED,
        labels=RAGGED.labels.t().contiguous().t(),
        weight=RAGGED.weight.t().contiguous().t(),
        marginal_labels=RAGGED.marginal_labels.t().contiguous().t(),
    )
    hidden = wide[..., ::2].detach().requires_grad_()
    assert not hidden.is_contiguous() and not strided.weight.is_contiguous()
    weight = strided.weight.requires_grad_()
    out = ik.fused_inspo_loss(hidden, weight, strided.labels, bias=RAGGED.bias, ref_logps=RAGGED.ref_logps)
    expected, (d_hidden, d_weight, _) = run(RAGGED, backend="reference")
    assert relative_error(out.loss.detach(), expected.loss.detach()) < 1e-12
    for got, want in zip(gradients_of(out.loss, hidden, weight), (d_hidden, d_weight)):
        assert relative_error(got, want) < 1e-11


def test_autocast_returns_unrounded_gradients():
    case = make_case([(4, 9, 7), (2, 5, 12)], hidden_size=32, vocab=101, bias=True).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gradients = run(case, backend="torch")
    rounded = replace(case.to(torch.bfloat16).to(torch.float64))
    truth, true_gradients = run(rounded, backend="reference")
    assert out.loss.dtype == torch.float32
    assert relative_error(out.loss.detach(), truth.loss.detach()) < 1e-5
    for got, true in zip(gradients, true_gradients):
        assert got.dtype == torch.float32
        assert relative_error(got, true) < 1e-5  # rounding through bfloat16 would leave 2e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ik.fused_inspo_loss(
            case.hidden.bfloat16(), case.weight, case.labels, bias=case.bias, ref_logps=case.ref_logps
        )
    torch.testing.assert_close(mixed.loss, out.loss, rtol=1e-6, atol=0)


def test_autocast_does_not_touch_float64():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(RAGGED, backend="torch")
    assert_same(got, run(RAGGED, backend="reference"), 1e-11)


def test_long_sequences_keep_their_margin():
    """Sums of thousands of log-probs in float32 would put 1e-3 into a margin."""
    case = make_case([(1, 3000, 2900)], hidden_size=4, vocab=11, bias=False).to(torch.float32)
    out, _ = run(case, backend="torch")
    truth, _ = run(case.to(torch.float64), backend="reference")
    assert (out.margins - truth.margins).abs().max() < 1e-4


def exact_near_one(gap):
    """Return log p of a label whose logit exceeds that of the only other word by ``gap``."""
    return -torch.tensor(-float(gap), dtype=torch.float64).exp().log1p()


@pytest.mark.parametrize("gaps", [(16, 18), (19, 22), (3, 25)])
def test_orpo_of_almost_certain_responses_keeps_its_digits(gaps):
    """logit p = log p - log(1 - p) needs the digits of 1 - p, which log(1 + rest) would lose."""
    hidden = torch.tensor([[float(gap)] for gap in gaps])
    weight = torch.tensor([[1.0], [0.0]])
    out = ik.fused_inspo_loss(
        hidden,
        weight,
        torch.tensor([0, 0]),
        segment_ids=torch.tensor([0, 1]),
        num_pairs=1,
        objective=ik.ORPO(sft="chosen"),
    )
    # With two words, logit p is the gap itself.
    exact = -exact_near_one(gaps[0]) - F.logsigmoid(torch.tensor(float(gaps[0] - gaps[1])))
    assert out.loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_marginals_are_reported_only_where_present():
    marginal_labels = RAGGED.marginal_labels.clone()
    marginal_labels[1] = IGNORE  # log pi(y_l | x) of pair 1
    keep = torch.tensor([True, False, True, True])
    whole, _ = run(RAGGED, backend="reference")
    for backend in ("torch", "reference"):
        out, _ = run(replace(RAGGED, marginal_labels=marginal_labels), backend=backend)
        assert out.marginal_chosen_rewards.isnan().tolist() == (~keep).tolist()
        margins = (whole.marginal_chosen_rewards - whole.marginal_rejected_rewards)[keep]
        torch.testing.assert_close(out.metrics()["marginal/rewards/margins"], margins.mean())
        torch.testing.assert_close(out.metrics()["marginal/rewards/accuracies"], (margins > 0).double().mean())
        torch.testing.assert_close(
            out.metrics()["marginal/logps/rejected"], whole.marginal_logps.view(2, -1)[1][keep].mean()
        )
        assert not any(value.isnan() for value in out.metrics().values())


def test_requested_marginals_are_reported_even_if_unscored():
    nothing = torch.full_like(RAGGED.labels, IGNORE)
    for backend in ("torch", "reference"):
        out, _ = run(replace(RAGGED, marginal_labels=nothing), backend=backend)
        assert out.marginal_logps.eq(0).all() and out.marginal_logps.shape == (8,)


def test_orpo_needs_only_the_marginal_that_it_reads():
    compact = RAGGED.compact()
    keep = compact["segment_ids"] < 12
    compact = {name: tensor[keep] for name, tensor in compact.items()}
    results = [
        ik.fused_inspo_loss(
            compact["hidden"],
            RAGGED.weight,
            compact["labels"],
            segment_ids=compact["segment_ids"],
            num_pairs=4,
            bias=RAGGED.bias,
            objective="orpo",
            backend=backend,
        ).loss
        for backend in ("torch", "reference")
    ]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[0], run(RAGGED, backend="reference", objective="orpo")[0].loss.detach())


def test_ignored_compact_rows_may_have_any_segment():
    compact = RAGGED.compact()
    compact["segment_ids"][compact["labels"] == IGNORE] = -1
    out = ik.fused_inspo_loss(
        compact.pop("hidden"),
        RAGGED.weight,
        compact.pop("labels"),
        bias=RAGGED.bias,
        ref_logps=RAGGED.ref_logps,
        **compact,
    )
    torch.testing.assert_close(out.loss, run(RAGGED, backend="reference")[0].loss.detach())


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
def test_other_integer_labels(dtype, backend):
    ignore = 200 if dtype == torch.uint8 else IGNORE
    labels = RAGGED.labels.masked_fill(RAGGED.labels == IGNORE, ignore).to(dtype)
    case = replace(RAGGED, labels=labels)
    out, _ = run(case, backend=backend, marginal_labels=None, ignore_index=ignore)
    torch.testing.assert_close(out.loss.detach(), run(RAGGED, backend="reference")[0].loss.detach())


def test_a_default_device_changes_nothing():
    expected, _ = run(RAGGED, backend="torch")
    with torch.device("meta"):
        out, _ = run(RAGGED, backend="torch")
        batch = ik.condition_pairs([([1], [2], [3])], pad_token_id=0)
    assert torch.equal(out.loss, expected.loss) and batch["input_ids"].device.type == "cpu"


class TestCustomObjectives:
    class Mine(ik.Objective):
        needs_reference = False

        def __call__(self, s):
            return (1 - (s.chosen - s.rejected)).relu() * (1 + s.index) + 0.01 * s.chosen_len

    class Anchored(ik.Objective):
        needs_marginals = True

        def __call__(self, s):
            return F.softplus(s.rejected - s.chosen) - s.marginal_chosen / s.marginal_chosen_len

    class Contrast(ik.Objective):
        """An objective of the whole batch: every chosen response against every rejected response."""

        needs_reference = False
        batch_coupled = True

        def __call__(self, s):
            return F.softplus(s.rejected[None, :] - s.chosen[:, None]).mean(1)

    @pytest.mark.parametrize("workspace", WORKSPACES)
    @pytest.mark.parametrize("cls", [Mine, Anchored, Contrast])
    def test_equals_reference(self, cls, workspace):
        options = {"objective": cls()}
        got = run(RAGGED, backend="torch", max_workspace_bytes=workspace, **options)
        assert_same(got, run(RAGGED, backend="reference", **options), 1e-11)

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_learnable_parameter_is_an_error(self, backend):
        scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        class Learnable(ik.Objective):
            def __call__(self, s):
                return scale * (s.rejected - s.chosen)

        with pytest.raises(ValueError, match="would get no gradient"):
            run(RAGGED, backend=backend, objective=Learnable())

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_undeclared_dependence_is_an_error(self, backend):
        class Sneaky(ik.Objective):
            gradient_fields = ("rejected",)

            def __call__(self, s):
                return s.rejected - s.chosen

        class Marginal(ik.Objective):
            def __call__(self, s):
                return s.rejected - s.marginal_chosen

        with pytest.raises(ValueError, match="'chosen' without declaring"):
            run(RAGGED, backend=backend, objective=Sneaky())
        with pytest.raises(ValueError, match="needs_marginals = True"):
            run(RAGGED, backend=backend, objective=Marginal())

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_wrong_shape_is_an_error(self, backend):
        class Scalar(ik.Objective):
            def __call__(self, s):
                return (s.rejected - s.chosen).mean()

        with pytest.raises(ValueError, match="one loss per pair"):
            run(RAGGED, backend=backend, objective=Scalar())

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_objectives_get_copies_of_the_sums(self, backend):
        class Careless(ik.Objective):
            def __call__(self, s):
                s.ref_chosen.add_(1)
                s.chosen_len.mul_(0)
                return s.rejected - s.chosen.sub_(s.ref_chosen)

        case = replace(RAGGED, ref_logps=RAGGED.ref_logps.clone())
        out, _ = run(case, backend=backend, objective=Careless())
        clean, _ = run(RAGGED, backend="reference")
        assert torch.equal(case.ref_logps, RAGGED.ref_logps)
        torch.testing.assert_close(out.logps, clean.logps)
        with torch.no_grad():
            evaluated = ik.fused_inspo_loss(
                case.hidden,
                case.weight,
                case.labels,
                bias=case.bias,
                ref_logps=case.ref_logps,
                objective=Careless(),
                backend=backend,
            )
        torch.testing.assert_close(evaluated.logps, clean.logps)
        torch.testing.assert_close(evaluated.loss, out.loss.detach())

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_objectives_see_real_sums_only(self, backend):
        class Strict(ik.Objective):
            def __call__(self, s):
                assert (s.chosen < 0).all()
                return s.rejected - s.chosen

        run(RAGGED, backend=backend, objective=Strict())

    @pytest.mark.parametrize("fields", [ik.Objective.gradient_fields, ("chosen",), ()])
    def test_constant_loss_has_zero_gradients(self, fields):
        class Constant(ik.Objective):
            gradient_fields = fields

            def __call__(self, s):
                return torch.ones_like(s.chosen) * s.chosen.detach().sign()

        out, gradients = run(RAGGED, backend="torch", objective=Constant())
        assert out.loss == -1 and all(g.eq(0).all() for g in gradients)

    @pytest.mark.parametrize("fields", [("choosen", "rejected"), "chosen", ["chosen"], ("chosen_len",)])
    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_gradient_fields_must_be_names_of_sums(self, backend, fields):
        class Typo(ik.Objective):
            gradient_fields = fields

            def __call__(self, s):
                return s.rejected.detach() - s.chosen

        with pytest.raises(ValueError, match=r"Typo.gradient_fields must be a tuple of 'chosen', 'rejected'"):
            run(RAGGED, backend=backend, objective=Typo())

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_objectives_that_read_marginals_need_them(self, backend):
        class ByValue(ik.Objective):
            needs_marginals = True
            gradient_fields = ("chosen", "rejected")

            def __call__(self, s):
                return s.marginal_chosen.detach() - s.chosen

        unscored = torch.full_like(RAGGED.labels, IGNORE)
        with pytest.raises(ValueError, match=r"marginal chosen response of pair.s. 0, 1, 2, 3 has no scored token"):
            run(RAGGED, backend=backend, objective=ByValue(), marginal_labels=unscored)
        compact = {k: v[RAGGED.compact()["segment_ids"] < 8] for k, v in RAGGED.compact().items()}
        with pytest.raises(ValueError, match=r"marginal chosen response of pair.s. 0, 1, 2, 3 has no scored token"):
            call(objective=ByValue(), backend=backend, marginal_labels=None, **compact)

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_losses_must_be_real_numbers(self, backend):
        class Accuracy(ik.Objective):
            def __call__(self, s):
                return s.chosen > s.rejected

        with pytest.raises(ValueError, match=r"floating-point.*got torch.bool"):
            run(RAGGED, backend=backend, objective=Accuracy())

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_rewards_must_be_two_vectors(self, backend):
        class One(ik.DPO):
            def rewards(self, s):
                return s.chosen[:2]

        with pytest.raises(ValueError, match=r"One.rewards must return two tensors of shape \(4,\)"):
            run(RAGGED, backend=backend, objective=One())

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_learnable_parameter_is_an_error_with_frozen_inputs(self, backend):
        class Learnable(ik.Objective):
            def __init__(self):
                self.w = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

            def __call__(self, s):
                return self.w * (s.rejected - s.chosen)

        with pytest.raises(ValueError, match="requires grad; it would get no gradient"):
            call(objective=Learnable(), backend=backend)
        with torch.no_grad():
            assert call(objective=Learnable(), backend=backend).loss.isfinite()


def test_module_is_the_function_with_fixed_options():
    module = ik.InSPOLoss("simpo", logit_scale=0.5)
    out = module(RAGGED.hidden, RAGGED.weight, RAGGED.labels, bias=RAGGED.bias)
    expected, _ = run(RAGGED, backend="reference", objective="simpo", logit_scale=0.5)
    torch.testing.assert_close(out.loss, expected.loss.detach())
    assert "SimPO" in repr(module) and "logit_scale=0.5" in repr(module)
    with pytest.raises(TypeError, match="no 'logitscale'"):
        ik.InSPOLoss(logitscale=0.5)
    assert make_objective("simpo") == module.objective


def call(**changes):
    arguments = {
        "hidden": RAGGED.hidden,
        "weight": RAGGED.weight,
        "labels": RAGGED.labels,
        "bias": RAGGED.bias,
        "ref_logps": RAGGED.ref_logps,
        "marginal_labels": RAGGED.marginal_labels,
    } | changes
    return ik.fused_inspo_loss(**arguments)


def with_label(value):
    labels = RAGGED.labels.clone()
    labels[2, -1] = value
    return labels


PACKED, COMPACT = RAGGED.packed(), RAGGED.compact()
UNSCORED = RAGGED.labels.clone()
UNSCORED[1] = IGNORE
NESTED = torch.nested.as_nested_tensor(list(RAGGED.hidden), layout=torch.jagged)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"labels": with_label(29)}, ValueError, r"labels contain 29, outside 0\.\.28"),
        ({"labels": with_label(-1)}, ValueError, "labels contain -1"),
        ({"labels": RAGGED.labels.float()}, TypeError, "labels must be int64"),
        ({"labels": RAGGED.labels[:, 1:]}, ValueError, r"labels must have shape \(8, "),
        ({"labels": UNSCORED}, ValueError, "chosen response of pair.s. 1 has no scored token"),
        ({"labels": torch.full_like(RAGGED.labels, IGNORE)}, ValueError, "pair.s. 0, 1, 2, 3 has no scored token"),
        (
            {"marginal_labels": UNSCORED, "marginal_weight": 1.0},
            ValueError,
            "marginal rejected response of pair.s. 1",
        ),
        ({"hidden": RAGGED.hidden[:7], "labels": RAGGED.labels[:7], "marginal_labels": None}, ValueError, "odd number"),
        ({"hidden": RAGGED.hidden[0]}, ValueError, r"hidden must be \(2B, T, H\)"),
        ({"hidden": RAGGED.hidden[..., :5]}, ValueError, "must end in H = 6"),
        ({"hidden": RAGGED.hidden.float()}, TypeError, "share a dtype"),
        ({"hidden": RAGGED.hidden.long()}, TypeError, "hidden must be float16"),
        ({"hidden": [1.0]}, TypeError, "hidden must be a tensor"),
        ({"weight": RAGGED.weight[0]}, ValueError, r"weight must be \(V, H\)"),
        ({"weight": RAGGED.weight.to("meta")}, ValueError, "weight is on meta"),
        ({"hidden": RAGGED.hidden.to("meta"), "weight": RAGGED.weight.to("meta"), "bias": None}, ValueError, "no data"),
        ({"ref_logps": RAGGED.ref_logps.to("meta")}, ValueError, "ref_logps is on the meta device"),
        ({"bias": RAGGED.bias[1:]}, ValueError, r"bias must be \(29,\)"),
        ({"ref_logps": None}, ValueError, "DPO needs ref_logps"),
        ({"ref_logps": RAGGED.ref_logps[:4]}, ValueError, r"ref_logps must have shape \(8,\)"),
        ({"ref_logps": RAGGED.ref_logps.view(2, 4)}, ValueError, r"pass ref_logps.flatten\(\)"),
        ({"ref_logps": RAGGED.ref_logps.view(4, 2)}, ValueError, r"got \(4, 2\)$"),  # would be out of order
        ({"ref_logps": RAGGED.ref_logps.long()}, TypeError, "ref_logps must be a floating-point"),
        ({"ref_logps": [0.0] * 8}, TypeError, "ref_logps must be a floating-point tensor, got list"),
        ({"hidden": NESTED}, TypeError, "hidden is a nested tensor.*packed form"),
        ({"weight": RAGGED.weight.to_sparse()}, TypeError, r"weight must be a dense tensor.*to_dense\(\)"),
        ({"pair_weights": torch.ones(8)}, ValueError, r"pair_weights must have shape \(4,\)"),
        ({"marginal_labels": None, "marginal_weight": 0.5}, ValueError, "marginal_weight=0.5 needs the marginals"),
        ({"marginal_labels": None, "objective": "orpo"}, ValueError, "ORPO needs the marginals"),
        ({"objective": ik.DPO}, TypeError, "call the class to make one"),
        ({"objective": None}, TypeError, "objective must be a name"),
        ({"objective": "dop"}, ValueError, "did you mean 'dpo'"),
        ({"objective": "sigmoid"}, ValueError, "TRL's 'sigmoid' is 'dpo'"),  # not the similar 'sigmoid_norm'
        ({"reduction": "none"}, ValueError, "reduction must be"),
        ({"reduction": RAGGED.labels.numpy()}, ValueError, "reduction must be"),
        ({"statistics": None}, TypeError, "statistics must be a tuple of names, got None"),
        ({"backend": "tourch"}, ValueError, "did you mean 'torch'"),
        ({"backend": ["torch"]}, ValueError, "unknown backend"),
        ({"max_workspace_bytes": 0}, ValueError, "max_workspace_bytes must be"),
        ({"max_workspace_bytes": 1e9}, ValueError, "max_workspace_bytes must be an integer"),
        ({"softcap": -1.0}, ValueError, "softcap must be"),
        ({"softcap": "30"}, ValueError, "softcap must be a finite number, got '30'"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale must be"),
        ({"logit_scale": torch.ones((), requires_grad=True)}, ValueError, "logit_scale requires grad"),
        ({"marginal_weight": float("nan")}, ValueError, "marginal_weight must be a finite number"),
        ({"marginal_weight": None}, ValueError, "marginal_weight must be a finite number"),
        ({"pair_weights": torch.ones(4, requires_grad=True)}, ValueError, "pair_weights requires grad"),
        ({"ignore_index": None}, ValueError, "ignore_index must be an integer"),
        ({"shift": 2}, ValueError, "shift must be True or False"),
        ({"shift": None}, ValueError, "shift must be True or False"),
        ({"num_pairs": 2.0}, ValueError, "num_pairs must be an integer"),
        ({"marginal_labels": with_label(31)}, ValueError, "labels or marginal_labels contain 31"),
        (
            {"hidden": RAGGED.hidden[:, :0], "labels": RAGGED.labels[:, :0], "marginal_labels": None},
            ValueError,
            "no scored",
        ),
        ({"process_group": object()}, TypeError, "process_group must be a"),
        ({"num_pairs": 3}, ValueError, "num_pairs=3 does not fit 8 rows"),
        ({**PACKED, "cu_seqlens": PACKED["cu_seqlens"][:-1]}, ValueError, "odd number"),
        ({**PACKED, "cu_seqlens": PACKED["cu_seqlens"] + 1}, ValueError, "cu_seqlens must start at 0"),
        ({**PACKED, "cu_seqlens": PACKED["cu_seqlens"].flip(0)}, ValueError, "cu_seqlens must start at 0"),
        ({**PACKED, "segment_ids": PACKED["labels"]}, ValueError, "exclude each other"),
        ({**PACKED, "hidden": PACKED["hidden"][None]}, ValueError, r"packed row is hidden\[0\]"),
        ({**COMPACT}, ValueError, "omit marginal_labels"),
        ({**COMPACT, "marginal_labels": None, "ref_logps": [0.0] * 8}, TypeError, "got list"),
        ({**COMPACT, "marginal_labels": None, "ref_logps": None}, ValueError, "needs num_pairs"),
        ({**COMPACT, "marginal_labels": None, "num_pairs": 3}, ValueError, r"segment_ids must be in 0\.\.11"),
    ],
)
def test_bad_input_is_named_before_any_product(changes, error, message, backend):
    changes = {"backend": backend} | changes
    if changes.get("num_pairs") == 3 and "segment_ids" in changes:
        changes["ref_logps"] = RAGGED.ref_logps[:6]
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reduction": "none"}, "reduction must be"),
        ({"shift": 1}, "shift must be"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"backend": "cuda"}, "unknown backend"),
        ({"max_workspace_bytes": 0}, "max_workspace_bytes must be"),
    ],
)
def test_the_module_refuses_bad_options_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        ik.InSPOLoss("dpo", **options)


def test_the_module_says_where_an_objectives_parameters_go():
    with pytest.raises(TypeError, match=r"takes no 'beta'.*objective=ik\.DPO\(beta=\.\.\.\)"):
        ik.InSPOLoss("dpo", beta=0.2)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_unscored_positions_do_not_matter(backend):
    hidden = RAGGED.hidden.clone()
    scored = (RAGGED.labels != IGNORE).roll(-1, 1)
    hidden[~scored] = torch.nan
    case = replace(RAGGED, hidden=hidden)
    options = {"backend": backend, "marginal_labels": None}
    assert_same(run(case, **options), run(RAGGED, **options), 1e-15)
