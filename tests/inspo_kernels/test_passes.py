"""Count the operations and memory of each path. ``check_pretend_device`` counts host reads."""

from __future__ import annotations

import pytest
import torch
from cases import make_case, relative_error
from cases import run as run_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import inspo_kernels as ik
from inspo_kernels.backends import torch_backend

PAIRS = [(9, 12, 20), (3, 16, 16), (8, 7, 5)]
N = sum(w + l for _, w, l in PAIRS)
H, V = 16, 211
CASE = make_case(PAIRS, hidden_size=H, vocab=V, bias=False).to(torch.float32)


def flops(function):
    """Count operations in units of one head matmul over the scored rows, 2NHV."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / (2 * N * H * V)


def pair_loss(hidden=True, weight=True, backward=True, **options):
    h, w = CASE.hidden.clone().requires_grad_(hidden), CASE.weight.clone().requires_grad_(weight)
    out = ik.fused_inspo_loss(h, w, CASE.labels, ref_logps=CASE.ref_logps, **options)
    if backward:
        out.loss.backward()


def per_token(hidden=True, weight=True, **options):
    h, w = CASE.hidden.clone().requires_grad_(hidden), CASE.weight.clone().requires_grad_(weight)
    logps = ik.linear_logps(h[:, :-1], w, CASE.labels[:, 1:], **options)
    if logps.requires_grad:
        logps.square().sum().backward()


ROW = 4 * V


@pytest.mark.parametrize(
    "run, products",
    [
        (lambda: pair_loss(), 3),
        (lambda: pair_loss(weight=False), 2),
        (lambda: pair_loss(hidden=False), 2),
        (lambda: pair_loss(hidden=False, weight=False, backward=False), 1),
        (lambda: per_token(), 3),
        (lambda: per_token(max_workspace_bytes=7 * ROW), 3 + (N - 7) / N),
        (lambda: per_token(weight=False), 2),
        (lambda: per_token(hidden=False, weight=False), 1),
        # groups of whole pairs recompute nothing
        (lambda: pair_loss(max_workspace_bytes=32 * ROW), 3),
        # 4 rows: all but the last 4 rows of each pair are computed twice
        (lambda: pair_loss(max_workspace_bytes=4 * ROW), 3 + (N - 12) / N),
        # a frozen head never recomputes
        (lambda: pair_loss(weight=False, max_workspace_bytes=4 * ROW), 2),
        # marginals that are only reported cost one matmul of their rows
        (lambda: pair_loss(marginal_labels=CASE.marginal_labels), 4),
        (lambda: pair_loss(marginal_labels=CASE.marginal_labels, marginal_weight=0.1), 6),
        # OneSided's chosen responses are forward-only
        (lambda: pair_loss(objective="one_sided"), (3 * 41 + 35) / N),
        # ORPO: the marginal of the rejected response is forward-only
        (lambda: pair_loss(objective="orpo", marginal_labels=CASE.marginal_labels), 3 + (3 * 35 + 41) / N),
    ],
    ids=lambda v: None if callable(v) else f"{v:.2f}",
)
def test_products(run, products):
    assert flops(run) == pytest.approx(products, rel=1e-3)


COUPLED = ("aot", "aot_unpaired", ik.Mixture([("dpo", 1.0), ("aot", 1.0)]))
FROM_TRL = (
    *("dpo", "hinge", "robust", "exo_pair", "nca_pair", "sppo_hard", "bco_pair", "apo_zero", "apo_down"),
    *("discopop", "sigmoid_norm", "ipo_mean", ik.DPO(divergence="js"), ik.Mixture([("dpo", 1.0), ("sft", 1.0)])),
)


@pytest.mark.parametrize("rows", [32, N])
@pytest.mark.parametrize("objective", [*FROM_TRL, *COUPLED], ids=str)
def test_only_coupled_objectives_stage_rows_twice(objective, rows):
    """Workspaces of 32 rows hold each pair, but not the batch."""
    products = 3 + (N - rows) / N if objective in COUPLED else 3
    assert flops(lambda: pair_loss(objective=objective, max_workspace_bytes=rows * ROW)) == pytest.approx(
        products, rel=1e-3
    )


@pytest.mark.parametrize(
    "objective, marginals, products",
    [
        ("sft", False, (3 * 35 + 41) / N),  # the rejected responses are forward-only
        ("sft", True, (3 * 35 + 41 + N) / N),  # all but the marginals of the chosen responses are forward-only
        (ik.Mixture([("one_sided", 1.0), ("sft", 1.0)]), True, (3 * 41 + 35 + 3 * 35 + 41) / N),
    ],
    ids=str,
)
def test_sft_differentiates_one_sum_a_pair(objective, marginals, products):
    labels = CASE.marginal_labels if marginals else None
    assert flops(lambda: pair_loss(objective=objective, marginal_labels=labels)) == pytest.approx(products, rel=1e-3)


@pytest.mark.parametrize(("rows", "products"), [(32, 3), (8, 3), (7, 3 + (4 + 4) / N), (4, 3 + (16 + 16) / N)])
def test_long_pairs_get_up_to_four_times_the_default(monkeypatch, rows, products):
    """Pairs have 32, 32 and 12 rows. A user's limit is never exceeded."""
    monkeypatch.setattr(torch_backend.TorchBackend, "default_workspace_bytes", lambda *shape: rows * ROW)
    with Allocations() as seen:
        assert flops(lambda: pair_loss()) == pytest.approx(products, rel=1e-3)
    assert seen.largest <= max(4 * rows * ROW, CASE.hidden.numel() * 4, CASE.weight.numel() * 4)
    assert flops(lambda: pair_loss(max_workspace_bytes=4 * ROW)) == pytest.approx(3 + (N - 12) / N, rel=1e-3)


class Allocations(TorchDispatchMode):
    """Record the largest tensor that any operation returns, in bytes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("rows", [1, 5, 33, 10**6])
@pytest.mark.parametrize("options", [{}, {"weight": False}, {"hidden": False, "weight": False, "backward": False}])
def test_no_tensor_exceeds_the_workspace_or_the_inputs(rows, options):
    largest_input = max(t.numel() * 8 for t in (CASE.hidden, CASE.weight))
    with Allocations() as seen:
        pair_loss(max_workspace_bytes=rows * ROW, **options)
    assert seen.largest <= max(min(rows, N) * ROW, largest_input)
    assert N * ROW > largest_input  # otherwise this test shows nothing


def test_default_workspace_depends_only_on_shapes(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: pytest.fail("looked at the machine"))
    from inspo_kernels.backends import BACKENDS
    from inspo_kernels.head import checked_head

    for backend in BACKENDS.values():
        head = checked_head(CASE.hidden, CASE.weight, None, None, 1.0)
        sizes = {backend.default_workspace_bytes(head, torch.device("cpu")) for _ in range(3)}
        assert len(sizes) == 1 and sizes.pop() >= 64 << 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_slices_and_blocks_change_only_rounding(dtype, monkeypatch):
    """Reduced-precision weights are converted tile by tile, and rows are processed in blocks."""
    case = CASE.to(dtype)
    whole = run_case(case, backend="torch")
    monkeypatch.setattr(torch_backend, "TILE_WORDS", 64)
    monkeypatch.setattr(torch_backend, "TILE_ROWS", 3)
    sliced = run_case(case, backend="torch")
    assert relative_error(sliced[0].loss.detach(), whole[0].loss.detach()) < 1e-6
    for got, want in zip(sliced[1], whole[1]):
        assert relative_error(got, want) <= (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
