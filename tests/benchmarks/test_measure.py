"""Test that all contenders agree, that the oracle is right, and that tables name failing and missing contenders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import inspo_kernels as ik
from benchmarks import contenders, measure, tables
from benchmarks.batches import HeadShape, PairBatch, Shape, equal, real_lengths, sample_lengths
from benchmarks.contenders import CONTENDERS, Contender, chosen

HEAD = HeadShape(16, 50)
RAGGED = Shape(HEAD, ((3, 5, 9), (7, 12, 4), (5, 8, 8)))
CPU = torch.device("cpu")


def batch_of(shape=RAGGED, rows=False, dtype=torch.float32):
    return PairBatch(shape, dtype=dtype, device=CPU, rows=rows)


def with_softcap(shape, softcap):
    return replace(shape, head=replace(shape.head, softcap=softcap))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [False, True])
def test_truth_is_the_reference_in_float64(rows, softcap):
    batch = batch_of(with_softcap(RAGGED, softcap), rows, torch.float64)
    reference = Contender("reference", contenders.our_logps("reference"), contenders.ours("reference"))
    for what in (measure.LOSS, measure.LOGPS):
        got = measure.step(batch, measure.TRAIN, reference, what)
        assert max(measure.Truth(batch, what).errors(got).values()) < 1e-12
        got["dweight"] = got["dweight"] * 1.01
        assert measure.Truth(batch, what).errors(got)["dweight"] == pytest.approx(0.01)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", [name for name, c in CONTENDERS.items() if not c.compiles_per_shape])
def test_contenders_compute_the_same(name, rows, softcap):
    batch, ran = batch_of(with_softcap(RAGGED, softcap), rows), 0
    for what in (measure.LOSS, measure.LOGPS):
        contender = chosen([name], batch, per_token=what == measure.LOGPS)[name]
        if isinstance(contender, str):
            continue
        truth = measure.Truth(batch, what, knows_reference=contender.knows_reference)
        errors = truth.errors(measure.step(batch, measure.TRAIN, contender, what))
        assert all(0 <= error < 2e-5 for error in errors.values()), errors
        ran += 1
    if not ran:
        pytest.skip(f"{name}: {CONTENDERS[name].unavailable(batch)}")


def test_liger_is_judged_without_a_reference():
    """It is compiled on GPUs and CPUs. This test uses eager mode for speed."""
    pytest.importorskip("liger_kernel")
    batch = batch_of(equal(HEAD, 2, 3, 4), rows=True)
    with torch.compiler.set_stance("force_eager"):
        got = measure.step(batch, measure.TRAIN, CONTENDERS["liger"])
    assert max(measure.Truth(batch, knows_reference=False).errors(got).values()) < 2e-5
    assert measure.Truth(batch).errors(got)["loss_nat"] > 1e-3


def test_rows_and_scored_rows_are_the_same_batch():
    rows, compact = batch_of(rows=True), batch_of()
    assert rows.hidden.shape == (6, max(map(sum, RAGGED.lengths)), HEAD.hidden)
    assert torch.equal(rows.scored_rows(rows.hidden), compact.hidden) and len(compact.hidden) == RAGGED.scored
    out = ik.fused_inspo_loss(rows.hidden, rows.weight, rows.labels, ref_logps=rows.ref_logps)
    assert torch.equal(out.lengths, torch.tensor(rows.response_lengths))
    assert out.margins.abs().max() < 2  # no loss saturates


def test_real_lengths_are_drawn_without_replacement_and_bounded():
    lengths = sample_lengths(40, longest=300)
    assert len(lengths) == 40 and max(map(sum, lengths)) <= 300 and set(lengths) <= set(real_lengths())
    assert lengths == sample_lengths(40, longest=300) != sample_lengths(40, longest=300, seed=1)


def test_failing_contenders_do_not_stop_the_others():
    calls = []

    def runs_out(x, weight, batch):
        calls.append(None)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("tried to allocate much")
        return contenders.plain_logps(x, weight, batch)

    def broken(x, weight, batch):
        raise RuntimeError("no kernel image\nand more")

    found = {
        "late": Contender("late", runs_out),
        "broken": Contender("broken", broken),
        "absent": "not installed",
        "log_softmax": CONTENDERS["log_softmax"],
    }
    saved = []
    cell = measure.measure(batch_of(), measure.TRAIN, found, 4, save=lambda: saved.append(1))
    rows = cell["contenders"]
    assert {name: row["status"] for name, row in rows.items()} == {
        "floor": "measured",
        "late": "out of memory",
        "broken": "failed: RuntimeError: no kernel image",
        "absent": "not installed",
        "log_softmax": "measured",
    }
    assert len(calls) == 4  # not called again
    assert rows["log_softmax"]["rounds"] == 4 == len(saved) and rows["log_softmax"]["times_floor"]["median"] > 0
    assert set(rows["log_softmax"]["relative_error"]) == {"loss", "sums", "dhidden", "dweight"}


def test_missing_peers_are_named(monkeypatch):
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None if name == "trl" else object())
    found = chosen(["trl", "cut_cross_entropy", "full_log_softmax", "torch"], batch_of())
    assert found["trl"] == "not installed: pip install trl"
    assert found["cut_cross_entropy"] == "needs a GPU"
    assert found["full_log_softmax"] == "not measured: the batch has only scored positions"
    assert found["torch"] is CONTENDERS["torch"]
    assert chosen(["liger"], batch_of(), per_token=True)["liger"] == "gives no per-token log-probs"


def test_running_out_of_memory_is_reported():
    """The first contender's logits need 4 TB. Its process has a memory limit and reports the failure."""
    huge = equal(HeadShape(4, 1_000_000), 2, 4, 500_000)
    cell: dict = {}
    measure.measure_peaks(huge, measure.TRAIN, ["log_softmax"], cell, rows=False)
    measure.measure_peaks(RAGGED, measure.TRAIN, ["torch"], cell)
    assert cell["contenders"]["log_softmax"] == {"status": "out of memory"}
    assert cell["contenders"]["torch"]["status"] == "measured"
    measure.measure(batch_of(), measure.TRAIN, chosen(["log_softmax", "torch"], batch_of()), 1, cell=cell)
    assert cell["contenders"]["log_softmax"] == {"status": "out of memory"}
    assert cell["contenders"]["torch"]["seconds"]["median"] > 0


def test_a_backend_that_cannot_build_is_named(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    contenders._backend_unavailable.cache_clear()
    monkeypatch.setattr(contenders.ik, "linear_logps", no_compiler)
    assert chosen(["torch"], batch_of())["torch"] == "failed: RuntimeError: Failed to find C compiler"
    contenders._backend_unavailable.cache_clear()


def test_errors_are_skipped_if_float64_does_not_fit(monkeypatch):
    tried = []

    def too_large(*_, **__):
        tried.append(1)
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(measure, "Truth", too_large)
    found = {name: CONTENDERS["log_softmax"] for name in ("one", "two")}
    cell = measure.measure(batch_of(), measure.TRAIN, found, 1)
    for name in found:
        row = cell["contenders"][name]
        assert row["errors_not_checked"] == "out of memory" and row["seconds"]["median"] > 0
        assert "relative_error" not in row
    assert len(tried) == 1  # not once per contender
    assert "errors not checked: out of memory" in tables.table("cell", cell["contenders"])


def test_every_cell_compiles_and_the_limit_raises(monkeypatch):
    """Without a reset the ninth shape would run eagerly and be reported as compiled."""
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(contenders.log_probs, backend=counter, dynamic=False)
    monkeypatch.setattr(contenders, "_compiled", lambda: compiled)
    batches = [batch_of(equal(HEAD, 1, 2, n)) for n in range(2, 12)]
    found = {"compiled_log_softmax": CONTENDERS["compiled_log_softmax"]}
    for batch in batches:
        row = measure.measure(batch, measure.TRAIN, found, 1)["contenders"]["compiled_log_softmax"]
        assert row["status"] == "measured"
    assert counter.frame_count == len(batches)
    with pytest.raises(FailOnRecompileLimitHit):
        for batch in batches:
            measure.step(batch, measure.TRAIN, CONTENDERS["compiled_log_softmax"])


def test_cpu_labels_need_scored_rows():
    on_host = contenders._our_contender("torch", on_host=True)
    assert on_host.unavailable(batch_of(rows=True)) == "not measured: the batch has every position"
    assert on_host.unavailable(batch_of()) is None


@pytest.mark.parametrize("mode, gradients", [(measure.FORWARD, 0), (measure.FROZEN, 1), (measure.TRAIN, 2)])
def test_modes_match_their_floors(mode, gradients):
    seen = []

    def logps_of(x, weight, batch):
        seen.append((torch.is_grad_enabled(), x.requires_grad, weight.requires_grad))
        return contenders.plain_logps(x, weight, batch)

    batch = batch_of()
    result = measure.step(batch, mode, Contender("plain", logps_of))
    assert seen == [(gradients > 0, gradients > 0, gradients > 1)] and len(result) == 2 + gradients
    with FlopCounterMode(display=False) as counter:
        measure.products_of(batch, mode)()
    assert counter.get_total_flops() == (1 + gradients) * 2 * RAGGED.scored * HEAD.hidden * HEAD.vocab
