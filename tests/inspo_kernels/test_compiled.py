"""Test ``torch.compile(fullgraph=True)``: values and gradients of eager mode, and no new graph for a new length."""

from __future__ import annotations

import copy
import os
import pickle
import signal

import pytest
import torch
from cases import RAGGED, gradients_of, make_case, relative_error
from torch._dynamo.testing import CompileCounterWithBackend

import inspo_kernels as ik
from inspo_kernels.objectives import OBJECTIVES


class Mine(ik.Objective):
    needs_reference = False

    def __init__(self, slope):
        self.slope = slope

    def __call__(self, s):
        return self.slope * (1 - (s.chosen - s.rejected)).relu() * (1 + s.index)


MINE = Mine(2.0)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def compile_(function):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


# Every objective once, and every subset of gradients with two objectives, because a compilation takes a second.
@pytest.mark.parametrize(
    "needed, objective",
    [
        *(((0, 1, 2), objective) for objective in OBJECTIVES),
        *((some, objective) for some in ((0,), (1,), ()) for objective in ("orpo", ik.DPO(beta=0.3))),
        pytest.param((0, 1, 2), MINE, id="own"),
        pytest.param((0,), MINE, id="own, frozen head"),
    ],
    ids=str,
)
def test_pair_loss_equals_eager(objective, needed):
    def loss(hidden, weight, bias):
        out = ik.fused_inspo_loss(
            torch.tanh(hidden),
            weight,
            RAGGED.labels,
            bias=bias,
            objective=objective,
            ref_logps=RAGGED.ref_logps,
            marginal_labels=RAGGED.marginal_labels,
            marginal_weight=0.5,
            softcap=3.0,
            statistics=("entropy", "is_top1"),
        )
        return out, 3 * out.loss

    leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate((RAGGED.hidden, RAGGED.weight, RAGGED.bias))]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    expected, scaled = loss(*leaves)
    got, got_scaled = compile_(loss)[0](*leaves)
    fields = [vars(out) | out.statistics for out in (expected, got)]
    for name, value in fields[0].items():
        if name == "statistics":
            continue
        other = fields[1][name]
        assert other.dtype == value.dtype and other.shape == value.shape, name
        assert relative_error(other.detach(), value.detach()) < 1e-12, name
    assert got.metrics().keys() == expected.metrics().keys()
    if wanted:
        for a, b in zip(gradients_of(got_scaled, *wanted), gradients_of(scaled, *wanted), strict=True):
            assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("form", ["packed", "compact"])
def test_other_forms_equal_eager(form):
    batch = getattr(RAGGED, form)()
    hidden, labels = batch.pop("hidden").requires_grad_(), batch.pop("labels")

    def loss(hidden):
        return ik.fused_inspo_loss(hidden, RAGGED.weight, labels, ref_logps=RAGGED.ref_logps, **batch)

    expected, got = loss(hidden), compile_(loss)[0](hidden)
    assert relative_error(got.marginal_logps, expected.marginal_logps) < 1e-12
    assert relative_error(gradients_of(got.loss, hidden)[0], gradients_of(expected.loss, hidden)[0]) < 1e-12


def test_a_new_length_is_no_new_graph():
    def step(hidden, weight, labels, ref_logps):
        loss = ik.fused_inspo_loss(torch.tanh(hidden), weight, labels, ref_logps=ref_logps).loss
        return loss + ik.linear_logps(hidden, weight, labels).mean()

    compiled, counter = compile_(step)
    for length in range(3, 12):
        case = make_case([(2, length, 3), (1, 2, length + 1)], vocab=31)
        hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
        got = compiled(hidden, weight, case.labels, case.ref_logps)
        expected = step(hidden, weight, case.labels, case.ref_logps)
        for a, b in zip(gradients_of(got, hidden, weight), gradients_of(expected, hidden, weight)):
            assert relative_error(a, b) < 1e-12
    assert counter.frame_count <= 2  # one for the first length, one for all others


@pytest.mark.parametrize("needed", [(0, 1, 2), (0,), (1,), ()])
def test_linear_logps_equals_eager(needed):
    targets = RAGGED.labels

    def logps(hidden, weight, bias):
        return ik.linear_logps(hidden, weight, targets, bias=bias, logit_scale=0.7)

    leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate((RAGGED.hidden, RAGGED.weight, RAGGED.bias))]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    expected, got = logps(*leaves), compile_(logps)[0](*leaves)
    assert relative_error(got.detach(), expected.detach()) < 1e-12
    if wanted:
        for a, b in zip(gradients_of(got.square().sum(), *wanted), gradients_of(expected.square().sum(), *wanted)):
            assert relative_error(a, b) < 1e-12


def test_pair_logps_is_left_out_of_the_graphs():
    def sums(hidden, weight, labels):
        return 2 * ik.pair_logps(torch.tanh(hidden), weight, labels)[0]

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(sums, backend=counter)
    for length in range(3, 7):
        case = make_case([(2, length, 3), (1, 2, length + 1)], vocab=31)
        arguments = case.hidden, case.weight, case.labels
        assert relative_error(compiled(*arguments), sums(*arguments)) < 1e-12
    assert counter.frame_count <= 4  # before and after the call: for the first length, and for all others


@pytest.mark.parametrize("call", ["loss", "tokens"])
def test_compiled_second_derivatives_raise(call):
    def total(hidden, weight):
        if call == "loss":
            return ik.fused_inspo_loss(hidden, weight, RAGGED.labels, ref_logps=RAGGED.ref_logps).loss
        return ik.linear_logps(hidden, weight, RAGGED.labels).sum()

    hidden, weight = RAGGED.hidden.clone().requires_grad_(), RAGGED.weight.clone().requires_grad_()
    loss = torch.compile(total, fullgraph=True, backend="eager")(hidden, weight)
    (d_hidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
    for wanted in (hidden, weight):
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(loss + d_hidden.square().sum(), wanted, retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_scaled_upstream(dtype):
    case = make_case([(4, 9, 7), (2, 5, 12)], hidden_size=16, vocab=101).to(torch.float32)

    def loss(hidden, weight):
        with torch.autocast("cpu", dtype=dtype):
            return 65536 * ik.fused_inspo_loss(hidden, weight, case.labels, ref_logps=case.ref_logps).loss

    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    expected, got = loss(*leaves), compile_(loss)[0](*leaves)
    for a, b in zip(gradients_of(got, *leaves), gradients_of(expected, *leaves)):
        assert a.dtype == torch.float32 and relative_error(a, b) < 1e-6


def test_low_precision_gradients_are_rounded_once():
    case = make_case([(4, 9, 7), (2, 5, 12)], hidden_size=16, vocab=101, bias=False).to(torch.float16)

    def loss(hidden, weight):
        return 65536 * ik.fused_inspo_loss(hidden, weight, case.labels, ref_logps=case.ref_logps).loss

    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    expected, got = loss(*leaves), compile_(loss)[0](*leaves)
    for a, b in zip(gradients_of(got, *leaves), gradients_of(expected, *leaves)):
        assert torch.equal(a, b)


def test_everything_but_the_loss_is_detached():
    hidden = RAGGED.hidden.clone().requires_grad_()

    def output(hidden):
        return ik.fused_inspo_loss(
            hidden, RAGGED.weight, RAGGED.labels, ref_logps=RAGGED.ref_logps, marginal_labels=RAGGED.marginal_labels
        )

    eager, compiled = output(hidden), compile_(output)[0](hidden)
    for name, value in vars(eager).items():
        if name == "statistics":
            continue
        assert getattr(compiled, name).requires_grad == value.requires_grad == (name == "loss"), name
    assert not any(value.requires_grad for value in compiled.metrics().values())


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_autocast_of_mixed_dtypes(dtypes):
    hidden, weight = RAGGED.hidden.to(dtypes[0]), RAGGED.weight.to(dtypes[1])

    def loss(hidden, weight):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ik.fused_inspo_loss(hidden, weight, RAGGED.labels, ref_logps=RAGGED.ref_logps).loss

    assert torch.equal(compile_(loss)[0](hidden, weight), loss(hidden, weight))


def test_shapes_hold_where_no_marginal_is_scored():
    nothing = torch.full_like(RAGGED.labels, -100)

    def output(hidden, marginal_labels):
        return ik.fused_inspo_loss(
            hidden, RAGGED.weight, RAGGED.labels, ref_logps=RAGGED.ref_logps, marginal_labels=marginal_labels
        )

    eager, compiled = output(RAGGED.hidden, nothing), compile_(output)[0](RAGGED.hidden, nothing)
    for name, value in vars(eager).items():
        torch.testing.assert_close(getattr(compiled, name), value, equal_nan=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_forked_process_can_go_on():
    compiled = compile_(
        lambda h: ik.fused_inspo_loss(h, RAGGED.weight, RAGGED.labels, ref_logps=RAGGED.ref_logps).loss
    )[0]
    expected = compiled(RAGGED.hidden)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # after a process has used more threads, any matmul may hang in its forked children
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(120)
            os._exit(0 if torch.equal(compiled(RAGGED.hidden), expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)


def test_a_call_on_the_cpu_leaves_gpus_alone(monkeypatch):
    """The first use of CUDA would take memory of a GPU, and raise in a forked process."""
    arguments = RAGGED.hidden, RAGGED.weight, RAGGED.labels
    compiled, _ = compile_(lambda *given: ik.fused_inspo_loss(*given, ref_logps=RAGGED.ref_logps).loss)
    expected = compiled(*arguments)

    def fails():
        raise AssertionError("CUDA was used")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", fails)
    assert torch.equal(compiled(*arguments), expected)


def test_the_reference_says_that_it_does_not_compile():
    compiled, _ = compile_(lambda h: ik.linear_logps(h, RAGGED.weight, RAGGED.labels, backend="reference"))
    with pytest.raises(ValueError, match=r"outside torch\.compile"):
        compiled(RAGGED.hidden)


def test_compiled_functions_name_bad_input():
    compiled, _ = compile_(lambda labels: ik.fused_inspo_loss(RAGGED.hidden, RAGGED.weight, labels).loss)
    with pytest.raises(ValueError, match="DPO needs ref_logps"):
        compiled(RAGGED.labels)
    wrong = compile_(
        lambda h: ik.fused_inspo_loss(h, RAGGED.weight, RAGGED.labels, objective="simpo", num_pairs=7).loss
    )
    with pytest.raises(ValueError, match="num_pairs=7 does not fit 8 rows"):
        wrong[0](RAGGED.hidden)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copied_objective_is_independent(duplicate):
    other = duplicate(MINE)
    other.slope = -7.0
    loss = torch.compile(
        lambda o: ik.fused_inspo_loss(RAGGED.hidden, RAGGED.weight, RAGGED.labels, objective=o).loss,
        fullgraph=True,
        backend="aot_eager",
    )
    assert loss(other) == pytest.approx(-3.5 * loss(MINE).item())
    assert duplicate(ik.DPO(beta=0.2)) == ik.DPO(beta=0.2)


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, False, False]])
def test_operators_pass_torchs_opchecks(needs):
    """Run torch's own checks of schema, fake shapes and autograd registration."""
    leaves = [t.clone().requires_grad_(n) for t, n in zip((RAGGED.hidden, RAGGED.weight, RAGGED.bias), needs)]
    hidden, weight, bias = leaves
    tensors = (hidden, weight, RAGGED.labels, bias, RAGGED.marginal_labels, None, None, RAGGED.ref_logps, None)
    options = (None, 1.0, 1.0, -100, "entropy", None, "torch", "dpo", True, 4, torch.tensor(0.5), "mean")
    torch.library.opcheck(torch.ops.inspo_kernels.pair_loss.default, (needs, False, torch.float64, *tensors, *options))
    options = (None, 1.0, 0.7, -100, "entropy,is_top1", None, "torch")
    torch.library.opcheck(
        torch.ops.inspo_kernels.linear_logps.default, (needs, torch.float64, *leaves, RAGGED.labels, *options)
    )


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"shift": 1}, ValueError, "shift must be True or False"),
        ({"objective": ik.DPO}, TypeError, "call the class to make one"),
        ({"objective": "dop"}, ValueError, "did you mean 'dpo'"),
        ({"reduction": None}, ValueError, "reduction must be"),
        ({"ignore_index": None}, ValueError, "ignore_index must be an integer"),
        ({"marginal_weight": None}, ValueError, "marginal_weight must be a finite number"),
        ({"ref_logps": [0.0] * 8}, TypeError, "ref_logps must be a floating-point tensor, got list"),
        ({"labels": [[0]]}, TypeError, "labels must be a tensor, got list"),
    ],
)
def test_bad_input_is_named_as_in_eager_mode(changes, error, message):
    arguments = {"labels": RAGGED.labels, "ref_logps": RAGGED.ref_logps} | changes

    def loss(weight):
        return ik.fused_inspo_loss(RAGGED.hidden, weight, **arguments).loss

    for call in (loss, compile_(loss)[0]):
        with pytest.raises(Exception) as caught:
            call(RAGGED.weight)
        chain, one = [], caught.value
        while one is not None:
            chain.append(one)
            one = one.__cause__ or one.__context__
        assert any(message in str(e) for e in chain), caught.value
        assert call is not loss or isinstance(caught.value, error)


def test_dynamic_numbers_of_pairs_do_not_recompile():
    def loss(hidden, weight, targets, segments, ref_logps):
        return ik.fused_inspo_loss(
            hidden, weight, targets, segment_ids=segments, num_pairs=len(ref_logps) // 2, ref_logps=ref_logps
        ).loss

    compiled_loss, counter = compile_(loss)
    for n in (4, 6, 8, 10):
        inputs = (torch.randn(n, 4), torch.randn(5, 4), torch.ones(n).long(), torch.arange(n), torch.zeros(n))
        torch.testing.assert_close(compiled_loss(*inputs), loss(*inputs))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "name, values, most_graphs",
    [
        ("marginal_weight", [0.1 * i for i in range(1, 13)], 2),
        ("marginal_weight", [0, 1, 2, 3], 3),  # 0 and 1 have graphs of their own
        ("max_workspace_bytes", [1, 2, 3], 3),
        ("softcap", [1.0, 2.5, 4.0], 4),  # graphs of the model itself, and one that is not used
        ("logit_scale", [1.0, 2.5, 4.0], 4),
    ],
)
def test_options_may_change_from_call_to_call(name, values, most_graphs):
    """A scheduled marginal weight needs no new graph for each value."""

    def loss(weight, value):
        return ik.fused_inspo_loss(
            RAGGED.hidden,
            weight,
            RAGGED.labels,
            ref_logps=RAGGED.ref_logps,
            marginal_labels=RAGGED.marginal_labels,
            **{name: value},
        ).loss

    compiled_loss, counter = compile_(loss)
    for value in values:
        torch.testing.assert_close(compiled_loss(RAGGED.weight, value), loss(RAGGED.weight, value))
    assert counter.frame_count <= most_graphs
