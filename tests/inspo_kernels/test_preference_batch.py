"""Test condition_batch against condition_pairs, and its treatment of the other entries of a batch."""

from __future__ import annotations

import pytest
import torch

import inspo_kernels as ik

PAIRS = [([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10, 11])]
PAD, IGNORED = 99, -100


def collated(side="right", **more):
    """Return TRL's collated batch of PAIRS, optionally with left padding."""
    rows = [(x, w) for x, w, _ in PAIRS] + [(x, l) for x, _, l in PAIRS]
    width = max(len(x) + len(y) for x, y in rows)
    batch = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for x, y in rows:
        padding = width - len(x) - len(y)

        def padded(values, fill, padding=padding):
            return [fill] * padding + values if side == "left" else values + [fill] * padding

        batch["input_ids"].append(padded(x + y, PAD))
        batch["attention_mask"].append(padded([1] * len(x + y), 0))
        batch["completion_mask"].append(padded([0] * len(x) + [1] * len(y), 0))
    return {name: torch.tensor(values) for name, values in batch.items()} | more


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("separator", [[], [50, 51]], ids=str)
def test_batch_becomes_the_rows_of_condition_pairs(side, separator):
    expected = ik.condition_pairs(PAIRS, pad_token_id=PAD, separator_ids=separator)
    found = ik.condition_batch(collated(side), pad_token_id=PAD, separator_ids=separator, marginals=True)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    assert torch.equal(found["completion_mask"], (expected["labels"] != IGNORED).long())
    assert torch.equal(found["marginal_mask"], (expected["marginal_labels"] != IGNORED).long())


def test_token_types_follow_their_tokens():
    batch = collated()
    types = batch["input_ids"] * 2  # a different number for every token
    found = ik.condition_batch(batch | {"token_type_ids": types}, pad_token_id=PAD, separator_ids=[50])
    read = found["attention_mask"].bool() & (found["input_ids"] != 50)
    assert torch.equal(found["token_type_ids"][read], 2 * found["input_ids"][read])
    assert not found["token_type_ids"][~read].any()


def test_positions_and_labels_are_recomputed():
    batch = collated()
    more = {"position_ids": torch.zeros_like(batch["input_ids"]), "labels": batch["input_ids"].clone()}
    expected = ik.condition_pairs(PAIRS, pad_token_id=PAD)
    found = ik.condition_batch(batch | more, pad_token_id=PAD)
    assert torch.equal(found["position_ids"], expected["position_ids"])
    assert torch.equal(found["labels"], expected["labels"])


def test_images_and_their_dtypes_are_passed_on():
    pixels, grid = torch.randn(4, 3, 8, 8), torch.ones(4, 3, dtype=torch.int64)
    batch = collated(pixel_values=pixels, image_grid_thw=grid)
    batch["attention_mask"] = batch["attention_mask"].bool()
    found = ik.condition_batch(batch, pad_token_id=PAD)
    assert found["pixel_values"] is pixels and found["image_grid_thw"] is grid
    assert found["attention_mask"].dtype == torch.bool and "marginal_mask" not in found


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: b.pop("completion_mask"), KeyError, "no 'completion_mask'"),
        (lambda b: b.update(completion_mask=b["completion_mask"][:, 1:]), ValueError, "one shape"),
        (lambda b: b.update({k: v[:3] for k, v in b.items()}), ValueError, "3 rows"),
        (lambda b: b["input_ids"].__setitem__((0, 0), 42), ValueError, "rows 0 and 2 are one pair"),
        (lambda b: b["completion_mask"][1].zero_(), ValueError, "prompts differ"),
        (lambda b: b.update(position_ids=torch.zeros(3, 4, 6)), ValueError, "leave them out"),
    ],
    ids=["missing", "shapes", "odd", "prompts", "unscored", "position_ids of 3 axes"],
)
def test_batches_of_other_forms_are_refused(change, error, message):
    batch = collated()
    change(batch)
    with pytest.raises(error, match=message):
        ik.condition_batch(batch, pad_token_id=PAD)


def test_an_empty_response_names_the_pair():
    batch = collated()
    batch["attention_mask"][1, 1:] = 0
    with pytest.raises(ValueError, match="pair 1: chosen response is empty"):
        ik.condition_batch(batch, pad_token_id=PAD)
