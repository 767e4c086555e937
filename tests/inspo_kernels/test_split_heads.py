"""Test that a head whose words are split over ranks gives the results of one process."""

from __future__ import annotations

import exchange_checks
import pytest
import split_checks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import ranks

from inspo_kernels.objectives import DPO, OBJECTIVES, SFT, Mixture

LENGTHS = [(3, 5, 2), (1, 1, 7), (4, 3, 3), (2, 6, 1)]
UNEQUAL = [17, 2, 10]
ROW = 8 * 17  # bytes of a row of logits on the rank with most words


three = ranks(3)
two = ranks(2)


@pytest.mark.parametrize("objective", [*OBJECTIVES, Mixture([(DPO(), 1.0), (SFT(), 0.3)])], ids=str)
def test_every_objective(three, objective):
    three.run(split_checks.vocabulary_loss, LENGTHS, sizes=UNEQUAL, objective=objective, marginal_weight=0.5)


@pytest.mark.parametrize("needs", ["xwb", "xw", "x", "w", "b", ""])
@pytest.mark.parametrize("workspace", [None, 5 * ROW, 1])
def test_every_mode_within_any_workspace(three, needs, workspace):
    three.run(split_checks.vocabulary_loss, LENGTHS, sizes=UNEQUAL, needs=needs, max_workspace_bytes=workspace)


@pytest.mark.parametrize("sizes", [[0, 12, 17], [29, 0, 0], [12, 17, 0]], ids=str)
@pytest.mark.parametrize("needs", ["xwb", "xw", "x", "w", ""])
def test_rank_without_any_word(three, sizes, needs):
    """Equal blocks of 5 words for 4 ranks have 2, 2, 1 and 0 words."""
    for workspace in (None, 5 * 29 * 8):
        limit = {"max_workspace_bytes": workspace}
        three.run(split_checks.vocabulary_loss, LENGTHS, sizes=sizes, needs=needs, softcap=3.0, **limit)
        three.run(split_checks.vocabulary_tokens, *tokens(), sizes=sizes, needs=needs.replace("b", ""), **limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rank_without_any_word_on_triton(two, dtype):
    for needs, workspace in (("xw", None), ("x", 4096), ("xw", 4096)):
        two.run(
            split_checks.vocabulary_tokens,
            *tokens(),
            sizes=[0, 29],
            needs=needs,
            dtype=dtype,
            backend="triton",
            max_workspace_bytes=workspace,
        )


def test_head_without_any_word_is_refused(two):
    for error in two.run(exchange_checks.no_words):
        assert error == "ValueError: weight has no rows on any rank of process_group"


@pytest.mark.parametrize("form", ["rows", "packed", "compact"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": -0.7}], ids=["plain", "capped"])
def test_every_form(three, form, options):
    three.run(split_checks.vocabulary_loss, LENGTHS, sizes=UNEQUAL, form=form, **options)
    three.run(split_checks.vocabulary_sums, LENGTHS, form=form)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_error_at_most_twice_that_of_plain_torch(two, backend, dtype):
    shape = {"vocab": 300, "sizes": [180, 120], "scale": 0.5}
    two.run(split_checks.vocabulary_loss, [(3, 9, 12)], dtype=dtype, backend=backend, **shape)


def tokens(n=9, vocab=29, hidden=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(vocab, hidden, generator=g), torch.randn(n, hidden, generator=g)
    return weight, x, torch.randint(vocab, (n,), generator=g)


@pytest.mark.parametrize("needs", ["xwb", "xw", "x", "b", ""])
@pytest.mark.parametrize("workspace", [None, 4 * ROW])
def test_single_tokens_with_any_upstream_gradient(three, needs, workspace):
    weight, hidden, targets = tokens()
    targets[2] = -100
    options = {"temperature": 1.7, "softcap": 4.0, "bias": weight[:, 0]}
    three.run(
        split_checks.vocabulary_tokens,
        weight,
        hidden,
        targets,
        sizes=UNEQUAL,
        needs=needs,
        max_workspace_bytes=workspace,
        **options,
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nats", [-100.0, 100.0, -5000.0])
def test_label_whose_shard_lies_far_from_the_others(two, backend, dtype, nats):
    """The label's entry in E would overflow relative to its own shard's offset."""
    weight, hidden, targets = tokens(vocab=40)
    hidden[:, 0] = 1.0
    weight[:15, 0] += nats
    targets = targets % 15
    two.run(split_checks.vocabulary_tokens, weight, hidden, targets, sizes=[15, 25], dtype=dtype, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shard", [0, 1])
def test_shard_of_which_every_logit_is_minus_infinity(two, backend, shard):
    weight, hidden, _ = tokens(vocab=40)
    bias = torch.zeros(40)
    bias[slice(0, 15) if shard == 0 else slice(15, 40)] = -torch.inf
    targets = torch.arange(9) + (20 if shard == 0 else 0)
    for dtype in (torch.float64, torch.bfloat16):
        two.run(
            split_checks.vocabulary_tokens,
            weight,
            hidden,
            targets,
            sizes=[15, 25],
            dtype=dtype,
            bias=bias,
            backend=backend,
            check_statistics=False,
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "dtype, size", [(torch.float64, 1e300), (torch.float32, 1e37), (torch.bfloat16, 1e37)], ids=str
)
def test_shard_whose_logits_are_huge(two, backend, dtype, size):
    """The logits are near the largest float, above or below all others, and the label is in or outside this shard."""
    weight, hidden, _ = tokens(vocab=40)
    two.run(split_checks.huge_shard, weight, hidden, size, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_recomputed_rows_of_16_bits(two, dtype, scale):
    """Rows beyond the workspace are scored with one offset, and get their gradients with another."""
    weight, hidden, targets = tokens(n=12, vocab=300, hidden=16)
    if scale > 1:
        targets = (hidden @ weight.t()).argmax(1)
    options = {"sizes": [180, 120], "dtype": dtype, "max_workspace_bytes": 4096, "backend": "triton"}
    two.run(split_checks.vocabulary_tokens, weight, scale * hidden, targets, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_recomputed_rows_with_large_logits(two, backend):
    """float32 rounds an offset of 1000 nats by up to 3e-5, far more than a probability's own error."""
    weight, hidden, targets = tokens(n=12, vocab=300, hidden=16)
    options = {"sizes": [180, 120], "dtype": torch.float32, "max_workspace_bytes": 4096, "backend": backend}
    two.run(split_checks.vocabulary_tokens, weight, 100 * hidden, targets, check_statistics=False, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace", [None, 4096])
def test_label_far_below_where_all_logits_are_low(two, backend, dtype, workspace):
    """Words of the other rank are e^-41, which suits an offset of 0; the label's rank has an offset far below."""
    weight, hidden, targets = tokens(vocab=40)
    hidden[:, 0], weight = 1.0, 0.1 * weight
    weight[:, 0], weight[0, 0], weight[1, 0] = -41.0, -36.0, -105.0
    options = {"sizes": [15, 25], "dtype": dtype, "max_workspace_bytes": workspace, "backend": backend}
    two.run(split_checks.vocabulary_tokens, weight, hidden, torch.ones_like(targets), **options)


ANY_BATCH = given(
    lengths=st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=1, max_size=3),
    sizes=st.tuples(*[st.integers(1, 20)] * 3),
    rows=st.integers(0, 12),
    seed=st.integers(0, 3),
    form=st.sampled_from(["rows", "packed", "compact"]),
)


def check_batch(three, lengths, sizes, rows, seed, form):
    three.run(
        split_checks.vocabulary_loss,
        lengths,
        sizes=list(sizes),
        vocab=sum(sizes),
        seed=seed,
        form=form,
        max_workspace_bytes=max(1, rows * max(sizes) * 8),
        marginal_weight=0.3,
    )


@settings(max_examples=12)
@ANY_BATCH
def test_any_batch_over_any_shards(three, lengths, sizes, rows, seed, form):
    check_batch(three, lengths, sizes, rows, seed, form)


@pytest.mark.sweep
@settings(max_examples=150)
@ANY_BATCH
def test_many_batches_over_any_shards(three, lengths, sizes, rows, seed, form):
    check_batch(three, lengths, sizes, rows, seed, form)
