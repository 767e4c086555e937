"""Test the loop that fits the small models of the benchmarks."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.fitting import LAST, fit
from benchmarks.study import model as models

BATCH = [([1, 2, 3], [4, 5]), ([6], [7]), ([8, 9], [1, 2, 3, 4])]


def with_schedule(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def test_a_step_learns_only_answers_despite_padding():
    fitted = models.build(16, 1, 0)
    by_hand = copy.deepcopy(fitted)
    loss = fit(fitted, [BATCH], 0, with_schedule(fitted))
    nats = []
    for context, answer in BATCH:
        logits = by_hand(input_ids=torch.tensor([context + answer])).logits[0].log_softmax(-1)
        nats += [-logits[len(context) + i - 1, token] for i, token in enumerate(answer)]
    mean = torch.stack(nats).mean()
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    mean.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    for ours, theirs in zip(fitted.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)
        assert ours.grad is None


def test_the_schedule_runs_and_last_losses_are_averaged():
    model = models.build(16, 1, 0)
    step_by_step = copy.deepcopy(model)
    schedules = [with_schedule(one) for one in (model, step_by_step)]
    mean = fit(model, [BATCH] * (LAST + 5), 0, schedules[0])
    losses = [fit(step_by_step, [BATCH], 0, schedules[1]) for _ in range(LAST + 5)]
    assert mean == pytest.approx(sum(losses[5:]) / LAST) and losses[-1] < losses[0]
    assert schedules[0].get_last_lr() == [pytest.approx(0.1 / (1 + LAST + 5))]
