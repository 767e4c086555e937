"""Test which pairs share a forward pass, for any lengths, budget and number of processes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.batching import micro_batches

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(SIZES, st.integers(1, 900), st.integers(1, 9), st.booleans())
def test_every_pair_once_with_equal_passes_per_rank(sizes, budget, processes, packed):
    dealt = micro_batches(sizes, budget, processes, packed=packed)
    assert len(dealt) == processes and len({len(passes) for passes in dealt}) == 1
    passes = [some for of_one in dealt for some in of_one]
    assert sorted(i for some in passes if some.weight for i in some.pairs) == list(range(len(sizes)))
    for some in passes:
        largest = max(sizes[i] for i in some.pairs)
        cost = sum(sizes[i] for i in some.pairs) if packed else largest * len(some.pairs)
        assert cost <= budget or len(some.pairs) == 1
        if not some.weight:
            assert [sizes[i] for i in some.pairs] == [min(sizes)]
    # No rank repeats a pair while another pass could be divided.
    assert all(some.weight for some in passes) or all(len(some.pairs) == 1 for some in passes)


@given(SIZES, st.integers(1, 900), st.integers(1, 9))
def test_passes_are_as_few_as_possible(sizes, budget, processes):
    dealt = micro_batches(sizes, budget, processes)
    fewest, start, order = 0, 0, sorted(sizes, reverse=True)
    while start < len(order):  # neighbours by length, as many as fit
        start += max(1, budget // order[start])
        fewest += 1
    assert len(dealt[0]) == math.ceil(fewest / processes)


@given(SIZES, st.integers(1, 900), st.integers(1, 9))
def test_similar_lengths_share_a_pass_costliest_first(sizes, budget, processes):
    dealt = micro_batches(sizes, budget, processes)
    spans = sorted(
        (min(sizes[i] for i in some.pairs), max(sizes[i] for i in some.pairs))
        for of_one in dealt
        for some in of_one
        if some.weight
    )
    assert all(after[0] >= before[1] for before, after in zip(spans, spans[1:]))
    turns = [[len(p.pairs) * max(sizes[i] for i in p.pairs) for p in turn if p.weight] for turn in zip(*dealt)]
    assert all(min(now) >= max(later) for now, later in zip(turns, turns[1:]))


@pytest.mark.parametrize(
    ("sizes", "budget", "processes", "expected"),
    [
        ([5, 9, 7], 100, 1, [[([1, 2, 0], 1.0)]]),
        ([5, 9, 7], 14, 1, [[([2, 0], 1.0), ([1], 1.0)]]),  # 2 passes: 9 alone, 7 and 5 as 2 x 7
        ([5, 9, 7], 100, 2, [[([1, 2], 1.0)], [([0], 1.0)]]),
        (
            [9, 8, 7, 6],
            1,
            2,
            [[([0], 1.0), ([3], 1.0)], [([1], 1.0), ([2], 1.0)]],
        ),  # turns alternate
        ([5], 1, 3, [[([0], 1.0)], [([0], 0.0)], [([0], 0.0)]]),  # more processes than pairs, a pair above the budget
    ],
)
def test_known_plans(sizes, budget, processes, expected):
    dealt = micro_batches(sizes, budget, processes)
    assert [[(some.pairs, some.weight) for some in of_one] for of_one in dealt] == expected
