"""Pairs assigned to steps, and the pairs of a step to forward passes and ranks."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader


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


class EpochLoader(DataLoader):
    """Yields the lists of indices of ``EpochBatches`` to ``Trainer``."""

    def __init__(self, num_pairs: int, size: int, seed: int) -> None:
        super().__init__(range(num_pairs), batch_sampler=EpochBatches(num_pairs, size, seed), collate_fn=list)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


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
    pass; packed passes have nearly equal cost.

    Engines that communicate within a pass need the same number of passes on every rank. Passes are split until they
    can be dealt evenly. A rank that is still short repeats the smallest pair with weight 0. Passes of similar cost run
    at the same time, the costliest first.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])

    def cost(some: list[int]) -> int:
        return sum(sizes[i] for i in some) if packed else len(some) * sizes[some[0]]

    passes = _packed(order, sizes, max_tokens, processes) if packed else _padded(order, sizes, max_tokens)
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


def _padded(order: Sequence[int], sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return passes of neighbours in ``order``, which is by descending size."""
    passes: list[list[int]] = []
    for i in order:
        if passes and (len(passes[-1]) + 1) * sizes[passes[-1][0]] <= max_tokens:
            passes[-1].append(i)
        else:
            passes.append([i])
    return passes


def _packed(order: Sequence[int], sizes: Sequence[int], max_tokens: int, processes: int) -> list[list[int]]:
    """Return few passes, as many for each process: the largest pairs first, each into the emptiest pass."""
    count = processes * max(1, math.ceil(sum(sizes) / (max_tokens * processes)))
    while True:
        passes: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, number) for number in range(count)]  # a heap
        for i in order:
            tokens, number = heapq.heappop(filled)
            if tokens and tokens + sizes[i] > max_tokens:
                break
            passes[number].append(i)
            heapq.heappush(filled, (tokens + sizes[i], number))
        else:
            return [some for some in passes if some]
        count += processes
