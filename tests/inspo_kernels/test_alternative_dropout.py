"""Test alternative dropout in condition_pairs and condition_batch, and the loss of mixed batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_model

import inspo_kernels as ik
from inspo_kernels.layouts.alternative_dropout import keeps_alternative

PAD = 2
LAYOUTS = ("rows", "packed", "tree", "packed_tree")
ids = st.lists(st.integers(0, 9), min_size=1, max_size=5)
any_pairs = st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=5)
separators = st.lists(st.integers(0, 9), max_size=2)
PAIRS = [([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10, 11]), ([3, 4], [5, 6, 7], [8, 9]), ([5], [4, 4], [1, 1, 1])]
KEPT = [True, False, False, True]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
            assert found[name].dtype == value.dtype
        else:
            assert found[name] == value, name


def sequences(batch):
    """Return the unpadded ids, labels and marginal labels of each row."""
    found = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        parts = [batch[name] for name in ("input_ids", "labels", "marginal_labels")]
        found.append([[-100] * length if part is None else part[row, :length].tolist() for part in parts])
    return found


@settings(deadline=None)
@given(any_pairs, separators, st.sampled_from(LAYOUTS), st.integers(0, 9))
def test_dropout_zero_is_inspo_and_one_the_plain_layout(pairs, separator, layout, seed):
    options = {"pad_token_id": PAD, "separator_ids": separator, "layout": layout}
    for dropout, conditioned in ((0, True), (0.0, True), (1, False), (1.0, False)):
        found = ik.condition_pairs(pairs, alternative_dropout=dropout, dropout_seed=seed, **options)
        assert_same(found, ik.condition_pairs(pairs, conditioned=conditioned, **options))


@settings(deadline=None)
@given(any_pairs, separators, st.floats(0, 1), st.integers(0, 99))
def test_each_pair_is_laid_out_conditioned_or_plain(pairs, separator, dropout, seed):
    options = {"pad_token_id": PAD, "separator_ids": separator}
    batch = ik.condition_pairs(pairs, alternative_dropout=dropout, dropout_seed=seed, **options)
    layouts = [
        sequences(ik.condition_pairs(pairs, conditioned=conditioned, **options)) for conditioned in (False, True)
    ]
    kept = [keeps_alternative(dropout, seed, index) for index in range(len(pairs))]
    assert batch["plain"] == [index for index, keeps in enumerate(kept) if not keeps]
    assert sequences(batch) == [layouts[keeps][row] for row, keeps in enumerate(kept * 2)]


@settings(deadline=None)
@given(any_pairs, separators, st.data())
def test_packed_rows_and_trees_hold_the_same_mix(pairs, separator, data):
    kept = data.draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))
    options = {"pad_token_id": PAD, "separator_ids": separator, "conditioned": kept}
    rows = sequences(ik.condition_pairs(pairs, **options))
    packed = ik.condition_pairs(pairs, layout="packed", **options)
    assert packed["input_ids"][0].tolist() == [token for row, _, _ in rows for token in row]
    assert packed["labels"].tolist() == [label for _, row, _ in rows for label in row]
    tree, count = ik.condition_pairs(pairs, layout="tree", **options), len(pairs)
    for sequence, (row, labels, marginals) in enumerate(rows):
        path = tree["paths"][sequence, : len(row)]
        assert tree["input_ids"].flatten()[path].tolist() == row
        other = 2 * count + (sequence + count) % (2 * count)
        for segment, expected in ((sequence, labels), (other, marginals)):
            found = tree["labels"][tree["segment_ids"] == segment].tolist()
            assert found == [label for label in expected if label != -100]


def test_coins_drop_the_stated_share_and_nest():
    keys = [(seed, pair) for seed in range(20) for pair in range(500)]
    dropped = {p: {key for key in keys if not keeps_alternative(p, *key)} for p in (0.0, 0.1, 0.5, 0.9, 1.0)}
    for p, keys_dropped in dropped.items():
        assert abs(len(keys_dropped) / len(keys) - p) <= 4 * (p * (1 - p) / len(keys)) ** 0.5  # 0 and 1 are exact
    assert dropped[0.1] < dropped[0.5] < dropped[0.9]
    agreeing = sum(keeps_alternative(0.5, 0, i) == keeps_alternative(0.5, 1, i) for i in range(2000))
    assert 850 < agreeing < 1150  # seeds throw different coins


def test_coins_are_the_same_on_every_machine():
    """Runs that resume elsewhere, or with other versions, drop the same pairs."""
    kept = "".join("01"[keeps_alternative(0.5, 7, pair)] for pair in range(24))
    assert kept == "100111101111111011100111"


def test_left_out_pairs_do_not_shift_the_coins():
    long = [(list(range(30)), [1], [2]), *PAIRS]
    options = {"pad_token_id": PAD, "max_length": 12, "truncation": "drop"}
    kept = [True, *KEPT]
    batch = ik.condition_pairs(long, conditioned=kept, **options)
    assert (batch["dropped"], batch["plain"]) == ([0], [2, 3])
    assert torch.equal(batch["input_ids"], ik.condition_pairs(PAIRS, pad_token_id=PAD, conditioned=KEPT)["input_ids"])


def collated():
    """Return rows as TRL's preference collator makes them, with a different number for every token."""
    rows = [(x, w) for x, w, _ in PAIRS] + [(x, l) for x, _, l in PAIRS]
    width = max(len(x) + len(y) for x, y in rows)
    padded = lambda parts: torch.tensor([part + [0] * (width - len(part)) for part in parts])  # noqa: E731
    return {
        "input_ids": padded([x + y for x, y in rows]),
        "attention_mask": padded([[1] * len(x + y) for x, y in rows]),
        "completion_mask": padded([[0] * len(x) + [1] * len(y) for x, y in rows]),
    }


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_a_collated_batch_drops_the_same_pairs(dropout):
    options = {"pad_token_id": PAD, "alternative_dropout": dropout, "dropout_seed": 3, "separator_ids": [50]}
    expected = ik.condition_pairs(PAIRS, **options)
    assert 0 < len(expected["plain"]) < 4 or dropout != 0.5
    found = ik.condition_batch(collated(), marginals=True, **options)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["completion_mask"], (expected["labels"] != -100).long())
    other = expected["marginal_labels"]
    assert torch.equal(
        found["marginal_mask"], torch.zeros_like(found["input_ids"]) if other is None else (other != -100).long()
    )


@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_the_mixed_loss_is_that_of_its_parts(layout):
    """Each pair has the loss and gradient of its own layout."""
    model, ref = make_model("llama").double(), torch.linspace(-9, -4, 8, dtype=torch.float64)

    def losses(pairs, ref_logps, **options):
        batch = ik.condition_pairs(pairs, pad_token_id=PAD, layout=layout, **options)
        mask = ik.tree_attention_mask(batch, model) if layout == "tree" else batch["attention_mask"]
        hidden, head = ik.hidden_and_head(
            model, input_ids=batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"]
        )
        if layout == "tree":
            names = ("labels", "segment_ids", "num_pairs")
            hidden = hidden.flatten(0, 1)[batch["rows"]]
        else:
            names = ("labels", "marginal_labels")
        scored = {name: batch[name] for name in names}
        return ik.fused_inspo_loss(hidden, ref_logps=ref_logps, reduction="sum", **scored, **head)

    def graded(out):
        return torch.autograd.grad(out.loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)

    mixed = losses(PAIRS, ref, conditioned=KEPT)
    parts = []
    for kept in (True, False):
        chosen = [index for index, keeps in enumerate(KEPT) if keeps is kept]
        parts.append(
            (chosen, losses([PAIRS[i] for i in chosen], ref.view(2, -1)[:, chosen].flatten(), conditioned=kept))
        )
    for chosen, part in parts:
        torch.testing.assert_close(mixed.losses[chosen], part.losses)
        torch.testing.assert_close(mixed.logps.view(2, -1)[:, chosen].flatten(), part.logps)
    sums = [sum(gradients) for gradients in zip(*(graded(part) for _, part in parts)) if gradients[0] is not None]
    for found, expected in zip([g for g in graded(mixed) if g is not None], sums, strict=True):
        torch.testing.assert_close(found, expected)
    kept_pairs = parts[0][1]
    assert mixed.marginal_chosen_rewards.isnan().tolist() == [not keeps for keeps in KEPT]
    for name, value in kept_pairs.metrics().items():
        if name.startswith("marginal/"):
            torch.testing.assert_close(mixed.metrics()[name], value)


@pytest.mark.parametrize("options", [{"objective": "orpo"}, {"marginal_weight": 0.5}], ids=["orpo", "marginal_weight"])
@pytest.mark.parametrize("kept", [KEPT, [False] * 4], ids=["some dropped", "all dropped"])
def test_a_loss_on_missing_marginals_is_refused(options, kept):
    batch = ik.condition_pairs(PAIRS, pad_token_id=PAD, conditioned=kept)
    hidden = torch.randn(*batch["input_ids"].shape, 8)
    scored = {name: batch[name] for name in ("labels", "marginal_labels")}
    with pytest.raises(ValueError, match=r"marginal.*plain"):
        ik.fused_inspo_loss(hidden, torch.randn(12, 8), ref_logps=torch.zeros(8), **scored, **options)


@pytest.mark.parametrize("call", ["condition_pairs", "condition_batch"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alternative_dropout": -0.1}, r"alternative_dropout must be in 0..1, got -0.1.*share of pairs"),
        ({"alternative_dropout": 1.5}, "alternative_dropout must be in 0..1"),
        ({"alternative_dropout": float("nan")}, "alternative_dropout must be a finite number"),
        ({"alternative_dropout": "half"}, "alternative_dropout must be a finite number, got 'half'"),
        ({"alternative_dropout": 0.5, "dropout_seed": 0.5}, "dropout_seed must be an integer"),
        ({"alternative_dropout": 0.5, "conditioned": False}, "alternative_dropout needs conditioned=True"),
        ({"alternative_dropout": 0.5, "conditioned": KEPT}, "both choose the plain pairs"),
        ({"conditioned": KEPT[:3]}, "conditioned holds 3 values for 4 pairs"),
        ({"conditioned": [1, 0, 0, 1]}, "conditioned must hold True or False for each pair, got 1"),
    ],
)
def test_bad_dropout_is_named_with_what_to_change(call, options, message):
    given = PAIRS if call == "condition_pairs" else collated()
    with pytest.raises(ValueError, match=message):
        getattr(ik, call)(given, pad_token_id=PAD, **options)
