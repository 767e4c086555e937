"""Fit the small base models of the study and of the runs on real pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

LAST = 20  # steps whose losses are averaged


def fit(
    model: PreTrainedModel, batches: Iterable[Sequence[tuple[list[int], list[int]]]], pad: int, schedule: LRScheduler
) -> float:
    """Take one step of ``schedule`` and its optimizer per batch of (context, answer) ids. Only answers are learned.

    Returns the mean of the last losses, in nats per token.
    """
    losses: list[float] = []
    for batch in batches:
        ids = [torch.tensor(context + answer) for context, answer in batch]
        labels = [torch.tensor([-100] * len(context) + answer) for context, answer in batch]
        # Right padding and causal attention: no mask is needed.
        inputs = pad_sequence(ids, batch_first=True, padding_value=pad).to(model.device)
        targets = pad_sequence(labels, batch_first=True, padding_value=-100).to(model.device)
        loss = model(input_ids=inputs, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        schedule.optimizer.step()
        schedule.step()
        schedule.optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-LAST:]) / len(losses[-LAST:])
