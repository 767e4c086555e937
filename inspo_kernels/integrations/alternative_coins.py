"""Choose the pairs that ``InSPOTrainer`` lays out plain under alternative dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from ..layouts.alternative_dropout import keeps_alternative
from .pair_layouts import pair_ids


class AlternativeCoins(TrainerCallback):
    """Decide which pairs of a batch keep their alternative, by seed, epoch and the pair's own token ids.

    The decision depends neither on the pair's batch or rank nor on where a run was resumed. As a callback, this object
    learns of each epoch before the data loader reads its first batch.
    """

    def __init__(self, dropout: float, seed: int) -> None:
        self.dropout, self.seed = dropout, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers of a data loader read it

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._epoch.fill_(int(state.epoch or 0))

    def __call__(self, batch: Mapping[str, Any]) -> list[bool]:
        epoch = int(self._epoch)
        pairs = ([part.tolist() for part in pair] for pair in pair_ids(batch))
        return [keeps_alternative(self.dropout, self.seed, epoch, *pair) for pair in pairs]
