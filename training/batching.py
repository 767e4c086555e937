"""Pairs assigned to steps, the pairs of a step to forward passes and ranks, and a pass to tensors in a layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

import inspo_kernels as ik
from inspo_kernels.layouts.tree import MAX_DENSE_TOKENS

from .engine import process_count, process_index
from .errors import InputError, Log
from .pairs import Pair, lengths_of

Lengths = NDArray[np.int64]
Conditioned = bool | Sequence[bool]  # of all pairs, or of each
_READ_BY_MODEL = ("input_ids", "attention_mask", "position_ids", "tree_ends", "paths", "path_of", "rows")
_EAGER_SHARE = 0.7  # of the tokens of rows: above it, eager attention over whole trees costs more than it saves


class EpochBatches:
    """Batches of ``size`` indices; each epoch is a permutation that depends only on seed and epoch.

    Every rank gets all of them, so the pairs of a step do not depend on the number of ranks.
    """

    def __init__(self, num_pairs: int, size: int, seed: int) -> None:
        self.num_pairs, self.size, self.seed, self.epoch = num_pairs, size, seed, 0

    def __len__(self) -> int:
        return math.ceil(self.num_pairs / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_pairs)
        for start in range(0, self.num_pairs, self.size):
            yield order[start : start + self.size].tolist()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def used_indices(num_pairs: int, wanted: int, seed: int) -> Sequence[int]:
    """Return, ascending, the pairs that a run of ``wanted`` pairs takes: all of them from one epoch on."""
    if wanted >= num_pairs:
        return range(num_pairs)
    return sorted(next(iter(EpochBatches(num_pairs, wanted, seed))))


class MicroBatch(NamedTuple):
    """Pairs of one forward pass, as positions in the planned list. Weight 0: a repeat that does not count."""

    pairs: list[int]
    weight: float


def micro_batches(
    sizes: Sequence[int], max_tokens: int, processes: int = 1, *, packed: bool = False
) -> list[list[MicroBatch]]:
    """Return the forward passes of each process for pairs of ``sizes`` tokens.

    Each pair is in exactly one pass of weight 1. A pass costs its count times its largest size, or the sum of its sizes
    if pairs are ``packed``; that is at most ``max_tokens``, and a larger pair goes alone. Pairs of similar size share a
    pass.

    Engines that communicate within a pass need the same number of passes on every rank. Passes are split until they
    can be dealt evenly. A rank that is still short repeats the smallest pair with weight 0. Passes of similar cost run
    at the same time, the costliest first.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])

    def cost(some: list[int]) -> int:
        return sum(sizes[i] for i in some) if packed else len(some) * sizes[some[0]]

    passes: list[list[int]] = []
    for i in order:
        if passes and cost([*passes[-1], i]) <= max_tokens:
            passes[-1].append(i)
        else:
            passes.append([i])
    while len(passes) % processes and (divisible := [some for some in passes if len(some) > 1]):
        costliest = max(divisible, key=cost)
        passes.remove(costliest)
        half = (len(costliest) + 1) // 2
        passes += [costliest[:half], costliest[half:]]
    passes.sort(key=cost, reverse=True)

    filler = MicroBatch(order[-1:], 0.0)
    dealt: list[list[MicroBatch]] = [[] for _ in range(processes)]
    for turn in range(math.ceil(len(passes) / processes)):
        some = [MicroBatch(pairs, 1.0) for pairs in passes[turn * processes : (turn + 1) * processes]]
        some += [filler] * (processes - len(some))
        # Reverse every other turn, so that no rank has the costliest pass of every turn.
        for process, item in zip(dealt, reversed(some) if turn % 2 else some):
            process.append(item)
    return dealt


@dataclass(frozen=True)
class Batcher:
    """Turns pairs into the tensors of ``PairModel``, and knows how many tokens they take.

    Labels stay on the CPU, where planning needs no synchronisation. ``max_tokens`` bounds a forward pass.
    ``separator_ids`` separate the other response from the scored one. ``layout`` is a layout of ``condition_pairs``:
    rows, tree or packed_tree.
    """

    pad_token_id: int
    device: torch.device
    max_tokens: int
    separator_ids: tuple[int, ...] = ()
    layout: str = "rows"

    def __call__(self, pairs: Sequence[Pair], *, conditioned: Conditioned, marginals: bool = True) -> dict[str, Any]:
        """Return the batch; without ``marginals``, the log-probs given the prompt alone are not computed."""
        batch = ik.condition_pairs(
            [p[:3] for p in pairs],
            pad_token_id=self.pad_token_id,
            conditioned=conditioned,
            separator_ids=self.separator_ids,
            layout=self.layout,
        )
        if not marginals and "rows" in batch:
            scored = batch["segment_ids"] < 2 * batch["num_pairs"]
            batch |= {name: batch[name][scored] for name in ("rows", "labels", "segment_ids")}
        elif not marginals:
            batch["marginal_labels"] = None
        return batch | {name: batch[name].to(self.device) for name in _READ_BY_MODEL if name in batch}

    def tokens(self, lengths: Lengths, *, conditioned: Conditioned) -> Lengths:
        """Return (n,): the tokens that the model reads for pairs of ``lengths`` (n, 3), without padding."""
        prompt, both = lengths[:, 0], lengths[:, 1] + lengths[:, 2]
        in_rows = np.where(conditioned, 2 * (prompt + both + len(self.separator_ids)), 2 * prompt + both)
        return in_rows if self.layout == "rows" else in_rows - prompt

    def padded(self, lengths: Lengths, *, conditioned: Conditioned) -> Lengths:
        """Return (n,): the tokens that each pair takes in a forward pass in which it is the largest."""
        tokens = self.tokens(lengths, conditioned=conditioned)
        if self.layout != "rows":
            return tokens
        return np.where(conditioned, tokens, 2 * (lengths[:, 0] + lengths[:, 1:].max(1)))

    def plan(self, pairs: Sequence[Pair], *, conditioned: Conditioned) -> list[MicroBatch]:
        """Return the forward passes of this rank; each rank has the same number."""
        sizes = self.padded(lengths_of(pairs), conditioned=conditioned).tolist()
        packed = self.layout == "packed_tree"
        return micro_batches(sizes, self.max_tokens, process_count(), packed=packed)[process_index()]


def choose_layout(
    wanted: str, model: PreTrainedModel, batcher: Batcher, lengths: Lengths, *, conditioned: bool, log: Log
) -> Batcher:
    """Return ``batcher`` with the layout that ``wanted`` ("auto", "tree" or "rows") selects, and log the reason.

    ``lengths`` (n, 3) are the pairs' tokens. "auto" is a tree if the model can read one; with eager attention also only
    if it saves many tokens. Raises InputError if a tree is wanted and the model cannot read it.
    """
    rows = replace(batcher, layout="rows")
    if wanted == "rows":
        log("layout: rows, as set")
        return rows
    attention = model.config.get_text_config()._attn_implementation
    packed = attention == "flex_attention"
    tree = replace(batcher, layout="packed_tree" if packed else "tree")
    reason = ik.tree_unsupported(model)
    most = int(tree.tokens(lengths, conditioned=True).max())  # log-probs of held-out pairs are taken conditioned, too
    if reason is None and attention == "eager" and most > MAX_DENSE_TOKENS:
        reason = (
            f"the longest pair takes {most} tokens as a tree, above the {MAX_DENSE_TOKENS} of eager attention's mask; "
            "lower max_length, or set attn_implementation=sdpa or layout=rows"
        )
    if reason is not None and wanted == "tree":
        raise InputError(f"layout=tree: {reason}")
    if reason is not None:
        log(f"layout: rows, because {reason}")
        return rows
    read = [int(some.tokens(lengths, conditioned=conditioned).sum()) for some in (tree, rows)]
    if wanted == "auto" and attention == "eager" and read[0] > _EAGER_SHARE * read[1]:
        log("layout: rows, because eager attention computes what a tree's mask hides, and trees would save few tokens")
        return rows
    form = "many in a row" if packed else "one in a row"
    log(f"layout: tree, each pair's prompt read once, {form}: {read[0] / read[1]:.2f} times the tokens of rows")
    return tree
