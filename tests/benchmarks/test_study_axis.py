"""The over-training study: what its runs train on, and what its summary concludes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.study import model as models
from benchmarks.study import runs
from benchmarks.study.arms import AXIS_ARMS
from benchmarks.study.axis import AxisJob, AxisPlan
from benchmarks.study.runs import Example, Size
from benchmarks.study.world import Judge, encode

SIZE = Size(
    hidden_size=16, layers=1, word_lengths=(3,), fit_prompts=80, fit_steps=3, fit_rows=8, pairs=24, updates=2,
    update_pairs=8, validation_prompts=8, test_prompts=8, held_out_pairs=8, samples=2,
)  # fmt: skip
PLAN = AxisPlan(SIZE, pairs=(8, 24), checkpoints=(1, 2), tested_updates=2, tested_seeds=2, seeds=1)
EXAMPLES = [
    Example(encode("Rabc="), encode("cba$"), encode("a$"), (-1.0, -2.0), (encode("a$"), encode("cba$"))),
    Example(encode("Nab="), encode("bc~~$"), encode("c$"), (-3.0, -4.0), (encode("c$"), encode("bc~~$"))),
]


def losses(arm, examples, dropped, updates=3):
    """Losses and final weights of a short training run whose coins are ``dropped``."""
    begun = models.build(16, 1, 0)
    arm = replace(arm, alternative_dropout=dropped) if dropped is not None else arm
    runs.train(
        begun, examples, arm, arm.make_objective(0.1), learning_rate=1e-2, updates=updates, update_pairs=2, seed=0
    )
    return torch.cat([p.detach().flatten() for p in begun.parameters()])


def test_dropping_no_alternative_is_the_conditioned_arm():
    arm = AXIS_ARMS["dropout"]
    assert torch.equal(losses(arm, EXAMPLES, 0.0), losses(AXIS_ARMS["conditioned reference"], EXAMPLES, None))


def test_dropping_every_alternative_is_the_plain_arm():
    dropped, plain = losses(AXIS_ARMS["dropout"], EXAMPLES, 1.0), losses(AXIS_ARMS["plain"], EXAMPLES, None)
    torch.testing.assert_close(dropped, plain, rtol=1e-4, atol=1e-5)
    assert (dropped - losses(AXIS_ARMS["conditioned reference"], EXAMPLES, None)).abs().max() > 1e-3


def test_a_dropped_pair_is_laid_out_plain():
    batch = runs.training_batch(EXAMPLES, AXIS_ARMS["dropout"], [True, False])
    plain = runs.make_batch(EXAMPLES, conditioned=False)
    both = runs.make_batch(EXAMPLES, conditioned=True)
    width = plain["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "position_ids", "labels"):
        for row in (0, 2):
            assert torch.equal(batch[name][row, :width], plain[name][row])
        for row in (1, 3):
            assert torch.equal(batch[name][row], both[name][row])
    assert not batch["attention_mask"][0, width:].any() and (batch["labels"][0, width:] == -100).all()
    assert batch["marginal_labels"] is None


def test_coins_differ_between_passes_and_pairs():
    arm = AXIS_ARMS["dropout"]
    coins = [[arm.drops_alternative(1, number, pair) for pair in range(200)] for number in range(3)]
    assert all(70 < sum(row) < 130 for row in coins) and coins[0] != coins[1]
    assert coins[0] == [arm.drops_alternative(1, 0, pair) for pair in range(200)]
    assert coins[0] != [arm.drops_alternative(2, 0, pair) for pair in range(200)]


def test_greedy_answers_need_no_seed_and_cold_ones_come_close():
    model = models.build(16, 1, 0)
    for p in model.parameters():
        p.data.mul_(3)
    prompts = runs.draw_prompts((3,), training=8, validation=8, test=8, seed=0).test
    greedy = models.sample(model, prompts, count=1, seed=0, temperature=0)
    assert greedy == models.sample(model, prompts, count=1, seed=1, temperature=0)
    assert greedy == models.sample(model, prompts, count=1, seed=1, temperature=1e-6)
    with pytest.raises(ValueError, match="temperature must be 0"):
        models.sample(model, prompts, count=1, seed=0, temperature=-1.0)


def test_the_learning_rate_stays_so_checkpoints_are_prefixes(tmp_path):
    short = replace(PLAN, checkpoints=(2,))
    long = replace(PLAN, checkpoints=(2, 4))
    a, b = (AxisJob("inspo", 24, 7).execute(plan, tmp_path, "cpu") for plan in (short, long))
    assert a["checkpoints"][0] == b["checkpoints"][0] and len(b["checkpoints"]) == 2


def test_alternatives_of_other_pairs_come_from_the_cells_own_pairs(tmp_path):
    begun = runs.start(SIZE, 3, drafts=True, cache=tmp_path)
    few = begun.training[:8]
    mine = {answer for pair in few for answer in pair.answers}
    for example in runs.label(few, Judge(), AXIS_ARMS["other"].own_alternative):
        assert {runs.decode(ids) for ids in example.alternatives} <= mine
