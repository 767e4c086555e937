"""Test alternative_dropout in InSPOTrainer: per run, epoch and pair, between conditioned and plain."""

from __future__ import annotations

import copy

import pytest
import torch
from test_trl_conditioned import LAYOUTS, assert_equal_gradients, ids_of, trainer
from trl_setup import VOCAB, model, pairs

import inspo_kernels as ik
from inspo_kernels.integrations.pair_layouts import pair_ids
from inspo_kernels.layouts.alternative_dropout import keeps_alternative

SEED = 42  # transformers' default


def expected_coins(dropout, epoch):
    return {str(triple): keeps_alternative(dropout, SEED, epoch, *triple) for triple in map(list, ids_of(pairs()))}


def seen_coins(made):
    """Return {pair: whether it is conditioned} for each batch that the trainer's loss reads."""
    seen, compute_loss = [], made.compute_loss

    def spy(model, inputs, *args, **kwargs):
        batch = {name: value for name, value in inputs.items() if name != "conditioned"}
        triples = [[part.tolist() for part in triple] for triple in pair_ids(batch)]
        kept = inputs["conditioned"].get("kept")
        values = [True] * len(triples) if kept is None else kept.tolist()
        seen.append(dict(zip(map(str, triples), values, strict=True)))
        return compute_loss(model, inputs, *args, **kwargs)

    made.compute_loss = spy
    return seen


def step(made):
    """Return the loss and gradients of the first batch."""
    made.model.zero_grad()
    loss = made.compute_loss(made.model, next(iter(made.get_train_dataloader())))
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_zero_is_inspo_and_one_the_baseline(tmp_path, layout):
    for dropout, plain in ((0.0, {}), (1.0, {"conditioned": False})):
        expected, found = trainer(tmp_path, **plain), trainer(tmp_path, layout=layout, alternative_dropout=dropout)
        assert step(found) == pytest.approx(step(expected), rel=1e-5)
        assert_equal_gradients(found.model, expected.model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_pairs_loss_follows_its_layout(tmp_path, layout):
    policy, reference = model(), model(seed=5)
    made = trainer(tmp_path, copy.deepcopy(policy), reference, layout=layout, alternative_dropout=0.5)
    made.state.logging_steps = 1
    loss = step(made)
    triples = ids_of(pairs())[:4]
    kept = [expected_coins(0.5, 0)[str(list(triple))] for triple in triples]
    assert 0 < sum(kept) < 4

    def hidden(model, conditioned):
        batch = ik.condition_pairs(triples, pad_token_id=VOCAB - 2, conditioned=conditioned)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        return *ik.hidden_and_head(model, **inputs), batch

    with torch.no_grad():
        states, head, batch = hidden(reference, False)
        ref_logps = ik.linear_logps(states[:, :-1], targets=batch["labels"][:, 1:], **head).double().sum(1)
    states, head, batch = hidden(policy, kept)
    out = ik.fused_inspo_loss(
        states, labels=batch["labels"], marginal_labels=batch["marginal_labels"], ref_logps=ref_logps, **head
    )
    out.loss.backward()
    assert loss == pytest.approx(out.loss.item(), rel=1e-5)
    assert_equal_gradients(made.model, policy)
    logs = {}
    made.log(logs)
    alone = [
        own if not keeps else marginal
        for own, marginal, keeps in zip(out.logps.tolist(), out.marginal_logps.tolist(), kept * 2, strict=True)
    ]
    assert logs["marginal/logps/chosen"] == pytest.approx(sum(alone[:4]) / 4, rel=1e-5)
    gaps = [(out.logps[b] - out.marginal_logps[b]) / out.lengths[b] for b in range(4) if kept[b]]
    assert logs["marginal/conditioning_gap/chosen"] == pytest.approx(sum(gaps).item() / len(gaps), rel=1e-4)
    assert logs["num_tokens"] == {
        "rows": batch["attention_mask"].sum(),
        "packed": batch["attention_mask"].sum(),
    }.get(layout, batch["attention_mask"].sum() - sum(len(x) for x, _, _ in triples))


@pytest.mark.parametrize("workers", [0, 1])
def test_each_epoch_throws_new_coins_also_in_workers(tmp_path, workers):
    made = trainer(
        tmp_path,
        alternative_dropout=0.5,
        max_steps=6,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
    )
    seen = seen_coins(made)
    made.train()
    assert len(seen) == 6  # two batches an epoch
    for epoch in range(3):
        assert seen[2 * epoch] | seen[2 * epoch + 1] == expected_coins(0.5, epoch)


def test_resuming_within_an_epoch_gives_the_same_bits(tmp_path):
    def weights(resume):
        made = trainer(tmp_path / "run", save_strategy="steps", save_steps=3, max_steps=6, alternative_dropout=0.5)
        seen = seen_coins(made)
        made.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3") if resume else None)
        return seen, copy.deepcopy(made.model.state_dict())

    (seen, whole), (seen_again, again) = weights(False), weights(True)
    assert seen_again == seen[3:]
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_evaluation_conditions_every_pair(tmp_path):
    held_out = {"trainer": {"eval_dataset": pairs(seed=9)}}
    found = trainer(tmp_path, alternative_dropout=0.9, **held_out).evaluate()
    expected = trainer(tmp_path, **held_out).evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert found["eval_marginal/logps/chosen"] == pytest.approx(expected["eval_marginal/logps/chosen"], rel=1e-6)


def test_a_fully_dropped_batch_logs_every_metric(tmp_path):
    made = trainer(tmp_path, alternative_dropout=1.0, max_steps=1)
    made.train()
    logs = made.state.log_history[0]
    assert logs["marginal/logps/chosen"] == pytest.approx(logs["logps/chosen"])
    assert "marginal/conditioning_gap/chosen" not in logs  # no pair is conditioned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alternative_dropout": 1.5}, "alternative_dropout must be in 0..1, got 1.5"),
        ({"alternative_dropout": 0.5, "conditioned": False}, "alternative_dropout needs conditioned=True"),
        ({"alternative_dropout": 0.5, "marginal_weight": 0.5}, "marginal_weight needs log-probs with and without"),
        ({"alternative_dropout": 0.5, "loss_type": ["sigmoid", "sft"]}, 'loss_type "sft" needs log-probs'),
    ],
)
def test_unsupported_dropout_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)
