"""Prepare the data of ``InSPOTrainer``: drop and count pairs that are too long, and lay out the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from ..layouts.alternative_dropout import keeps_alternative
from ..layouts.preference_batch import pair_positions
from .pair_layouts import CONDITIONED, REFERENCES, TEXT, conditioned, pair_ids

logger = logging.getLogger(__name__)

PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass
class Fits:
    """Return whether a tokenized pair can be conditioned: no empty part, and at most ``max_length`` tokens.

    ``reference_options`` does not change the answer. TRL caches the reference's log-probs by the data's fingerprint,
    which depends on the attributes of this filter. So options that change the log-probs make a new cache.
    """

    max_length: int | None
    separator_length: int
    reference_options: Any = None

    def __call__(self, example: Mapping[str, Any]) -> bool:
        lengths = [len(example[part]) for part in PARTS]
        total = sum(lengths) + self.separator_length
        return min(lengths) > 0 and (self.max_length is None or total <= self.max_length)

    def reason(self, dropped: str, name: str) -> str:
        """Return why ``dropped`` pairs of the dataset ``name`` do not fit."""
        why = f"{name}: dropped {dropped} pairs: an empty prompt or response"
        if self.max_length is None:
            return why
        return (
            f"{why}, or prompt, both responses and separator take more than max_length={self.max_length} tokens (raise "
            "it to keep these pairs; responses are never cut)"
        )


@dataclass
class KeepsAll:
    """Return True for every pair; ``reference_options`` as in ``Fits``."""

    reference_options: Any

    def __call__(self, example: Mapping[str, Any]) -> bool:
        return True


@dataclass
class CountingFits(Fits):
    """Filter a stream of unknown length; warn at the 1st, 2nd, 4th, 8th ... dropped pair."""

    name: str = ""
    dropped: int = 0

    def __call__(self, example: Mapping[str, Any]) -> bool:
        fits = super().__call__(example)
        if not fits:
            self.dropped += 1
            if self.dropped & (self.dropped - 1) == 0:
                logger.warning(self.reason(f"{self.dropped}", self.name))
        return fits


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


@dataclass(kw_only=True)
class ConditioningCollator:
    """Add the conditioned version of each batch of another collator, under ``"conditioned"``.

    The original batch stays: the reference reads it, and so does everything that counts rows.

    Args:
        collator: makes preference batches, text or vision, as TRL's collators do.
        layout: how text batches are laid out; other batches are laid out in rows.
        strict: refuse a batch that only rows can hold, if ``layout`` is not "rows".
        max_length: bound on prompt, both responses and separator; longer pairs are left out and counted.
        coins: chooses the pairs that are laid out plain; None conditions every pair.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    layout: str
    strict: bool
    pad_token_id: int
    separator_ids: Sequence[int]
    max_length: int | None
    coins: AlternativeCoins | None = None
    dropped: int = 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._fitting(examples)
        layout = self.layout
        if not set(batch) <= TEXT:
            if self.strict and layout != "rows":
                raise ValueError(f"layout={layout!r} holds only token ids, and this batch has more: use layout='rows'")
            layout = "rows"
        kept = None if self.coins is None else self.coins(batch)
        twin = conditioned(batch, layout, pad_token_id=self.pad_token_id, separator_ids=self.separator_ids, kept=kept)
        if all(name in batch for name in REFERENCES):  # as numbers: DeepSpeed would round tensors to its dtype
            twin["ref_logps"] = [logp for name in REFERENCES for logp in batch[name].tolist()]
        return batch | {CONDITIONED: twin}

    def _fitting(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate the examples that fit, in two passes: only a processor knows the length of a prompt with images."""
        batch = dict(self.collator([dict(example) for example in examples]))  # TRL's writes into its examples
        if self.max_length is None:
            return batch
        lengths = [sum(map(len, pair)) + len(self.separator_ids) for pair in pair_positions(batch)]
        kept = [example for example, length in zip(examples, lengths) if length <= self.max_length]
        if len(kept) == len(examples):
            return batch
        if not kept:
            raise ValueError(
                f"no pair of this batch fits max_length={self.max_length}: the shortest takes {min(lengths)} tokens "
                "with both responses; raise max_length, drop long pairs from the data, or use larger batches"
            )
        self.dropped += len(examples) - len(kept)
        logger.warning("dropped %d pairs so far: longer than max_length=%d", self.dropped, self.max_length)
        return dict(self.collator([dict(example) for example in kept]))
