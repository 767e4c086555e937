"""Test pairs whose tokens are split over ranks, with a whole head and with a split head."""

from __future__ import annotations

import exchange_checks
import pytest
import split_checks
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import ranks

from inspo_kernels.objectives import OBJECTIVES

LENGTHS = [(3, 5, 2), (1, 1, 7), (4, 3, 3)]


three = ranks(3)
four = ranks(4)


@pytest.mark.parametrize("objective", [*OBJECTIVES])
def test_every_objective(three, objective):
    three.run(split_checks.sequence_loss, LENGTHS, objective=objective, marginal_weight=0.5)


@pytest.mark.parametrize("form", ["rows", "compact"])
@pytest.mark.parametrize("needs", ["xwb", "x", "w", ""])
@pytest.mark.parametrize("words", [1, 2])
def test_every_mode_with_the_head_split_or_whole(four, form, needs, words):
    for workspace in (None, 29 * 8 * 2):
        four.run(
            split_checks.sequence_loss, LENGTHS, form=form, needs=needs, words=words, max_workspace_bytes=workspace
        )


@pytest.mark.parametrize("words", [1, 2])
def test_ranks_without_any_token(four, words):
    options = {"marginal_weight": 0.3, "softcap": 3.0, "logit_scale": -0.7}
    four.run(split_checks.sequence_loss, LENGTHS, empty=True, words=words, **options)


@pytest.mark.parametrize("words", [1, 2])
def test_triton_backend(four, words):
    four.run(split_checks.sequence_loss, [(2, 3, 2), (1, 2, 4)], words=words, backend="triton", marginal_weight=0.5)


@settings(max_examples=8)
@given(
    lengths=st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=3),
    words=st.sampled_from([1, 2]),
    form=st.sampled_from(["rows", "compact"]),
    rows=st.integers(0, 6),
)
def test_any_batch(four, lengths, words, form, rows):
    four.run(
        split_checks.sequence_loss,
        lengths,
        words=words,
        form=form,
        max_workspace_bytes=max(1, rows * 29 * 8),
        marginal_weight=0.5,
    )


def test_unscored_response_is_refused_after_the_sum(three):
    errors = three.run(exchange_checks.unscored)
    assert all("the rejected response of pair(s) 1 has no scored token" in error for error in errors)


def test_shifting_local_labels_is_refused(three):
    errors = three.run(exchange_checks.shifted)
    assert all("sequence_group needs shift=False" in error for error in errors)
