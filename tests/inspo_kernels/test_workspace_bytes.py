"""Compare ``workspace_bytes`` with the memory that a call really takes."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import inspo_kernels as ik

H, V = 128, 5000
LENGTHS = [(200, 180), (220, 160), (256, 256), (100, 300)]
N, LONGEST = sum(w + l for w, l in LENGTHS), 512


class LiveBytes(TorchDispatchMode):
    """Track the bytes of live storages, and their peak."""

    def __init__(self, inputs):
        super().__init__()
        self.sizes = dict.fromkeys((t.untyped_storage()._cdata for t in inputs), 0)
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self.release, key)
        return result

    def release(self, key):
        self.now -= self.sizes.pop(key)


def peak(dtype, frozen, bound, words=V):
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    weight = torch.randn(words, H).to(dtype).requires_grad_(not frozen)
    counts = torch.tensor(LENGTHS).T.flatten()
    labels, segments = torch.randint(words, (N,)), torch.arange(len(counts)).repeat_interleave(counts)
    with LiveBytes((hidden, weight, labels, segments)) as live:
        out = ik.fused_inspo_loss(
            hidden, weight, labels, objective="simpo", segment_ids=segments, num_pairs=4, max_workspace_bytes=bound
        )
        out.loss.backward()
    return live.peak


@pytest.mark.parametrize("bound", [None, 140_000, 4_000_000, 10_500_000])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_estimate_is_within_a_tenth_of_the_peak(dtype, frozen, bound):
    options = {"dtype": dtype, "device": "cpu", "longest_pair": LONGEST, "frozen": frozen}
    estimate = ik.workspace_bytes(N, H, V, max_workspace_bytes=bound, **options)
    assert estimate == pytest.approx(peak(dtype, frozen, bound), rel=0.1)


@pytest.mark.parametrize(("dtype", "frozen"), [(torch.float32, False), (torch.bfloat16, True)])
def test_estimate_holds_for_a_small_vocabulary(dtype, frozen):
    """Rows of hidden states take more memory here than logits, and one slice holds the whole head."""
    options = {"dtype": dtype, "device": "cpu", "longest_pair": LONGEST, "frozen": frozen}
    estimate = ik.workspace_bytes(N, H, 300, max_workspace_bytes=8400, **options)
    assert estimate == pytest.approx(peak(dtype, frozen, 8400, words=300), rel=0.1)


def test_deferred_gradients_are_counted():
    pairs, hidden_size = [(20, 30)], 512
    hidden, weight = torch.randn(50, hidden_size, requires_grad=True), torch.randn(V, hidden_size, requires_grad=True)
    labels, segments = torch.randint(V, (50,)), torch.tensor([0] * 20 + [1] * 30)
    with LiveBytes((hidden, weight, labels, segments)) as live:
        ik.fused_inspo_loss(
            hidden, weight, labels, objective="simpo", segment_ids=segments, num_pairs=len(pairs)
        ).loss.backward()
    estimate = ik.workspace_bytes(50, hidden_size, V, dtype=torch.float32, device="cpu")
    assert estimate == pytest.approx(live.peak, rel=0.1)


def test_rows_beyond_the_workspace_cost_no_logits():
    options = {"dtype": torch.float32, "device": "cpu", "longest_pair": 512, "max_workspace_bytes": 64 << 20}
    small, large = (ik.workspace_bytes(n, 512, 32000, **options) for n in (2048, 8192))
    assert large - small < 6144 * 512 * 4 * 4


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_rows": 0}, ValueError, "num_rows must be an integer of at least 1"),
        ({"dtype": torch.int8}, TypeError, "dtype must be"),
        ({"backend": "tritn"}, ValueError, "did you mean 'triton'"),
        ({"device": "cuda:99"}, ValueError, "device 'cuda:99' is not available here"),
    ],
)
def test_bad_input_is_named(change, error, message):
    options = {"num_rows": 4, "hidden_size": 8, "vocab_size": 16, "dtype": torch.float32, "device": "cpu"} | change
    with pytest.raises(error, match=message):
        ik.workspace_bytes(**options)
