"""Test condition_pairs: the tokens and scored tokens of each sequence, in every layout, truncation and bad input."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inspo_kernels import condition_pairs

PAD = 2  # also the end-of-sequence id of the generated pairs
token_ids = st.lists(st.integers(0, 9), min_size=1, max_size=6)
responses = token_ids.map(lambda ids: [*ids, PAD])
any_pairs = st.lists(
    st.tuples(token_ids, st.one_of(token_ids, responses), st.one_of(token_ids, responses)), min_size=1, max_size=4
)
separators = st.lists(st.integers(0, 9), max_size=3)


def unpad(batch, row):
    """Return the ids, labels and marginal labels of one row of a padded batch as lists."""
    length = int(batch["attention_mask"][row].sum())
    keys = ("input_ids", "labels", "marginal_labels")
    return [None if batch[key] is None else batch[key][row, :length].tolist() for key in keys]


@settings(deadline=None)
@given(any_pairs, separators)
def test_rows_hold_conditioned_sequences(pairs, separator):
    batch = condition_pairs(pairs, pad_token_id=PAD, separator_ids=separator)
    for row in range(2 * len(pairs)):
        prompt, chosen, rejected = pairs[row % len(pairs)]
        scored, other = (chosen, rejected) if row < len(pairs) else (rejected, chosen)
        ids, labels, marginal = unpad(batch, row)
        assert ids == [*prompt, *other, *separator, *scored]
        assert labels == [-100] * (len(ids) - len(scored)) + scored
        tail = len(separator) + len(scored)
        assert marginal == [-100] * len(prompt) + other + [-100] * tail


@settings(deadline=None)
@given(any_pairs, separators)
def test_unconditioned_rows_hold_prompt_and_response(pairs, separator):
    batch = condition_pairs(pairs, pad_token_id=PAD, conditioned=False, separator_ids=separator)
    assert batch["marginal_labels"] is None
    for row in range(2 * len(pairs)):
        prompt, *both = pairs[row % len(pairs)]
        scored = both[row // len(pairs)]
        ids, labels, _ = unpad(batch, row)
        assert ids == prompt + scored
        assert labels == [-100] * len(prompt) + scored


@settings(deadline=None)
@given(any_pairs, separators, st.booleans())
def test_right_padding_is_neither_attended_nor_scored(pairs, separator, conditioned):
    batch = condition_pairs(pairs, pad_token_id=PAD, separator_ids=separator, conditioned=conditioned)
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == (5 if conditioned else 4)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    assert len({tensor.shape for tensor in tensors}) == 1
    lengths = batch["attention_mask"].sum(1)
    extra = sum(map(len, pairs[0])) + len(separator)
    assert not conditioned or lengths[0] == lengths[len(pairs)] == extra
    assert lengths.max() == batch["input_ids"].shape[1]
    for row, length in enumerate(lengths.tolist()):
        assert batch["attention_mask"][row, :length].eq(1).all()
        assert batch["position_ids"][row].tolist() == [*range(length)] + [0] * (lengths.max() - length)
        assert batch["input_ids"][row, length:].eq(PAD).all()
        assert batch["labels"][row, length:].eq(-100).all()
        assert not conditioned or batch["marginal_labels"][row, length:].eq(-100).all()


@settings(deadline=None)
@given(any_pairs, separators, st.booleans())
def test_packed_equals_rows_without_their_padding(pairs, separator, conditioned):
    options = {"pad_token_id": PAD, "separator_ids": separator, "conditioned": conditioned}
    rows, packed = condition_pairs(pairs, **options), condition_pairs(pairs, layout="packed", **options)
    real = rows["attention_mask"].bool()
    assert torch.equal(packed["input_ids"], rows["input_ids"][real][None])
    assert torch.equal(packed["position_ids"], rows["position_ids"][real][None])
    assert torch.equal(packed["labels"], rows["labels"][real])
    if conditioned:
        assert torch.equal(packed["marginal_labels"], rows["marginal_labels"][real])
    else:
        assert packed["marginal_labels"] is None
    assert packed["cu_seqlens"].dtype == torch.int32
    assert packed["cu_seqlens"][0] == 0
    assert packed["cu_seqlens"].diff().tolist() == real.sum(1).tolist()
    assert packed["attention_mask"] is None
    assert (packed["dropped"], packed["truncated"]) == ([], 0)


def test_eos_equal_to_pad_stays_scored():
    batch = condition_pairs([([5], [6, PAD], [7, 8, PAD])], pad_token_id=PAD, conditioned=False)
    assert batch["input_ids"].tolist() == [[5, 6, PAD, PAD], [5, 7, 8, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, PAD, -100], [-100, 7, 8, PAD]]


def test_containers_of_ids_are_interchangeable():
    pair = ([5, 6], [7], [8, 9])
    expected = condition_pairs([pair], pad_token_id=0, separator_ids=[3])["input_ids"]
    read_only = np.array([5, 6], dtype=np.int32)
    read_only.flags.writeable = False
    others = [
        tuple(map(tuple, pair)),
        [torch.tensor(ids, dtype=torch.int32) for ids in pair],
        (read_only, np.array([7], dtype=np.uint16), torch.tensor([8, 9], dtype=torch.uint8)),
    ]
    for other in others:
        batch = condition_pairs(iter([other]), pad_token_id=np.int64(0), separator_ids=torch.tensor([3]))
        assert torch.equal(batch["input_ids"], expected)


def test_the_callers_tensors_are_copied():
    prompt, chosen, rejected = torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5])
    batch = condition_pairs(
        [(prompt, chosen, rejected)], pad_token_id=0, max_length=4, truncation="prompt_left", layout="packed"
    )
    batch["input_ids"].fill_(9)
    batch["labels"].fill_(9)
    assert [t.tolist() for t in (prompt, chosen, rejected)] == [[1, 2, 3], [4], [5]]


def test_identical_responses_are_accepted():
    assert condition_pairs([([1], [2], [2])], pad_token_id=0)["input_ids"].tolist() == [[1, 2, 2], [1, 2, 2]]


LONG = [([1, 2, 3, 4], [5, 6], [7]), ([1], [2], [3]), ([1, 2], [3, 4, 5], [6, 7, 8])]  # 7, 3 and 8 tokens


@pytest.mark.parametrize("conditioned", [True, False])
def test_a_pair_of_exactly_max_length_is_kept(conditioned):
    options = {"pad_token_id": 0, "conditioned": conditioned, "separator_ids": [9]}
    for truncation in ("error", "prompt_left", "drop"):
        batch = condition_pairs(LONG, max_length=9, truncation=truncation, **options)
        assert torch.equal(batch["input_ids"], condition_pairs(LONG, **options)["input_ids"])
        assert (batch["dropped"], batch["truncated"]) == ([], 0)


@pytest.mark.parametrize("conditioned", [True, False])
def test_truncation_error_names_the_pair_and_both_lengths(conditioned):
    with pytest.raises(ValueError, match=r"pair 2: .*take 9 tokens, above max_length=8; raise max_length, or use"):
        condition_pairs(LONG, pad_token_id=0, max_length=8, separator_ids=[9], conditioned=conditioned)


@settings(deadline=None)
@given(any_pairs, separators, st.integers(6, 24), st.booleans())
def test_truncation_drop_keeps_exactly_the_pairs_that_fit(pairs, separator, max_length, conditioned):
    options = {"pad_token_id": PAD, "separator_ids": separator, "conditioned": conditioned}
    fits = [sum(map(len, pair)) + len(separator) <= max_length for pair in pairs]
    kept = [pair for pair, fit in zip(pairs, fits, strict=True) if fit]
    if not kept:
        with pytest.raises(ValueError, match=f"all {len(pairs)} are longer than max_length={max_length}"):
            condition_pairs(pairs, max_length=max_length, truncation="drop", **options)
        return
    batch = condition_pairs(pairs, max_length=max_length, truncation="drop", **options)
    assert batch["dropped"] == [index for index, fit in enumerate(fits) if not fit]
    assert batch["truncated"] == 0
    assert torch.equal(batch["input_ids"], condition_pairs(kept, **options)["input_ids"])


@settings(deadline=None)
@given(any_pairs, separators, st.integers(6, 24))
def test_prompt_left_scores_the_same_ids_when_conditioned(pairs, separator, max_length):
    options = {"pad_token_id": PAD, "separator_ids": separator, "max_length": max_length, "truncation": "prompt_left"}
    rooms = [max_length - len(chosen) - len(rejected) - len(separator) for _, chosen, rejected in pairs]
    if min(rooms) < 1:
        index = next(index for index, room in enumerate(rooms) if room < 1)
        with pytest.raises(ValueError, match=f"pair {index}: .*responses are never cut.*truncation='drop'"):
            condition_pairs(pairs, **options)
        return
    cut = [(prompt[-room:], *both) for (prompt, *both), room in zip(pairs, rooms, strict=True)]
    for conditioned in (True, False):
        batch = condition_pairs(pairs, conditioned=conditioned, **options)
        whole = condition_pairs(cut, pad_token_id=PAD, separator_ids=separator, conditioned=conditioned)
        assert torch.equal(batch["input_ids"], whole["input_ids"])
        assert torch.equal(batch["labels"], whole["labels"])
        assert batch["truncated"] == sum(len(pair[0]) > room for pair, room in zip(pairs, rooms, strict=True))
        assert batch["dropped"] == []


GOOD = ([1], [2], [3])


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [2], [3]), "pair 1: prompt is empty"),
        (([1], torch.tensor([], dtype=torch.int64), [3]), "pair 1: chosen response is empty"),
        (([1], [2], []), "pair 1: rejected response is empty"),
        (([1], [2]), "pair 1: expected (prompt_ids, chosen_ids, rejected_ids), got 2 elements"),
        (([1], [2], [3], [4]), "pair 1: expected (prompt_ids, chosen_ids, rejected_ids), got 4 elements"),
        ({"prompt": [1], "chosen": [2], "rejected": [3]}, "got a mapping with keys ['prompt', 'chosen', 'rejected']"),
        (None, "pair 1: expected (prompt_ids, chosen_ids, rejected_ids), got NoneType"),
        (("a prompt", "yes", "no"), "pair 1: prompt is text; tokenize it first"),
        (([1], [2.0], [3]), "pair 1: chosen response must hold integer ids, got torch.float32"),
        (([1], [2], [True]), "pair 1: rejected response must hold integer ids, got torch.bool"),
        (([1], [[2, 3]], [3]), "a flat list or 1-D tensor of integer ids, got shape (1, 2)"),
        (([1], 2, [3]), "pair 1: chosen response must be a flat list or 1-D tensor of integer ids, got shape ()"),
        (([1], [2], [3, None]), "pair 1: rejected response must be a flat list or 1-D tensor of integer ids"),
        (([1], [2], [2**70]), "pair 1: rejected response must be a flat list or 1-D tensor of integer ids"),
        (([1], [-100, 2], [3]), "pair 1: chosen response holds the negative id -100"),
    ],
)
def test_a_bad_pair_is_named_with_the_error(pair, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        condition_pairs([GOOD, pair], pad_token_id=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "prompt_lef"}, "unknown truncation 'prompt_lef'; did you mean 'prompt_left'.*drop"),
        ({"layout": "row"}, "unknown layout 'row'.*did you mean 'rows'"),
        ({"layout": None}, r"unknown layout None \(known: rows, packed, tree, packed_tree\)"),
        ({"max_length": 2}, "max_length must be an integer of at least 3, got 2"),
        ({"max_length": 4, "separator_ids": [7, 8]}, "max_length must be an integer of at least 5, got 4"),
        ({"max_length": 8.0}, "max_length must be an integer of at least 3, got 8.0"),
        ({"pad_token_id": None}, "pad_token_id must be an integer of at least 0, got None.*eos_token_id"),
        ({"pad_token_id": -1}, "pad_token_id must be an integer of at least 0, got -1"),
        ({"pad_token_id": True}, "pad_token_id must be an integer of at least 0, got True"),
        ({"separator_ids": [-1]}, "separator_ids holds the negative id -1"),
        ({"separator_ids": "\n"}, "separator_ids is text"),
    ],
)
def test_a_bad_option_is_named_with_the_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        condition_pairs([GOOD], **{"pad_token_id": 0} | options)


def test_no_pairs_at_all_is_an_error():
    with pytest.raises(ValueError, match="no pair left to score: pairs is empty"):
        condition_pairs([], pad_token_id=0)


@pytest.mark.parametrize("conditioned", [None, "false", 1])
def test_conditioned_must_be_true_or_false(conditioned):
    with pytest.raises(ValueError, match="conditioned must be True or False"):
        condition_pairs([([1], [2], [3])], pad_token_id=0, conditioned=conditioned)


@pytest.mark.parametrize("pairs", [5, None])
def test_pairs_must_be_iterable(pairs):
    with pytest.raises(TypeError, match=r"pairs must be an iterable of \(prompt_ids, chosen_ids, rejected_ids\)"):
        condition_pairs(pairs, pad_token_id=0)


def test_an_empty_tensor_of_any_dtype_is_empty():
    with pytest.raises(ValueError, match="pair 0: chosen response is empty"):
        condition_pairs([([1], torch.tensor([]), [3])], pad_token_id=0)
