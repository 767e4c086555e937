"""Pairs whose tokens are split over ranks, alone and together with a head that is split, and ranks that disagree."""

from __future__ import annotations

import time

import pytest
import split_checks
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import RankPool

import inspo_kernels as ik
from inspo_kernels.objectives import OBJECTIVES

LENGTHS = [(3, 5, 2), (1, 1, 7), (4, 3, 3)]


@pytest.fixture(scope="module")
def three():
    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def four():
    pool = RankPool(4)
    yield pool
    pool.close()


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
    four.run(split_checks.sequence_loss, LENGTHS, empty=True, words=words, marginal_weight=0.3)


@settings(max_examples=8)
@given(
    lengths=st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=3),
    words=st.sampled_from([1, 2]),
    form=st.sampled_from(["rows", "compact"]),
    rows=st.integers(0, 6),
)
def test_any_batch(four, lengths, words, form, rows):
    four.run(
        split_checks.sequence_loss, lengths, words=words, form=form, max_workspace_bytes=max(1, rows * 29 * 8),
        marginal_weight=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["labels", "hidden", "objective", "ref_logps", "requires_grad", "pairs", "refused"])
def test_disagreement_is_an_error_on_every_rank(three, kind):
    start = time.monotonic()
    errors = three.run(split_checks.error_of, kind, 1)
    assert time.monotonic() - start < 20  # none waits for the group's timeout
    argument = "hidden" if kind == "pairs" else kind
    for rank, error in enumerate(errors):
        if kind == "refused":
            wanted = "softcap must be positive" if rank == 1 else "rank 1 of process_group refused its arguments"
        else:
            wanted = f"process_group: rank 1 got another {argument} than rank 0"
        assert error.startswith("ValueError") and wanted in error


def test_disagreement_within_a_mesh_reaches_every_rank(four):
    errors = four.run(split_checks.error_in_mesh, 3)
    assert all(error.startswith("ValueError") for error in errors), errors
    assert "another objective" in errors[3] and "another objective" in errors[2]


def test_unscored_response_is_refused_after_the_sum(three):
    errors = three.run(split_checks.unscored)
    assert all("the rejected response of pair(s) 1 has no scored token" in error for error in errors)


def test_shifting_local_labels_is_refused(three):
    errors = three.run(split_checks.shifted)
    assert all("sequence_group needs shift=False" in error for error in errors)


def test_bytes_sent(three):
    """12 bytes a row and rank, 4 more a statistic, one dX; nothing of the vocabulary's size."""
    three.run(split_checks.bytes_sent)


def test_group_of_one_is_no_group(three):
    three.run(split_checks.group_of_one)


def test_other_objects_are_no_group():
    case = split_checks.make_case([(1, 1, 1)])
    with pytest.raises(TypeError, match=r"sequence_group must be a torch\.distributed ProcessGroup or None, got str"):
        ik.pair_logps(case.hidden, case.weight, case.labels, sequence_group="sp")
