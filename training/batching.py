"""Which pairs make a step, and which of them go through the model together, and in which process."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader


class EpochBatches:
    """The indices of ``size`` pairs at a time; each epoch is a permutation that follows from seed and epoch alone.

    Every process gets all of them, so that the pairs of a step do not depend on the number of processes.
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
    """Lists of indices from ``EpochBatches``, as ``Trainer`` takes them."""

    def __init__(self, num_pairs: int, size: int, seed: int) -> None:
        super().__init__(range(num_pairs), batch_sampler=EpochBatches(num_pairs, size, seed), collate_fn=list)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def used_indices(num_pairs: int, wanted: int, seed: int) -> Sequence[int]:
    """The pairs that the first ``wanted`` places of a run take, ascending: all of them from an epoch on."""
    if wanted >= num_pairs:
        return range(num_pairs)
    return sorted(next(iter(EpochBatches(num_pairs, wanted, seed))))


class MicroBatch(NamedTuple):
    """Pairs of one forward pass, as positions in the list that was planned. Weight 0: only there to keep step."""

    pairs: list[int]
    weight: float


def micro_batches(
    sizes: Sequence[int], max_tokens: int, processes: int = 1, *, packed: bool = False
) -> list[list[MicroBatch]]:
    """Forward passes of each process for pairs of ``sizes`` tokens.

    A pass costs its count times its largest size, or the sum of its sizes where pairs are ``packed`` behind one
    another. Each pair is in exactly one pass of weight 1. Pairs of similar size share a pass (packed: any pairs, in
    passes of nearly equal cost), of at most ``max_tokens`` (a larger pair goes alone). Engines that communicate within
    a pass need the same number of passes in every process, so passes are split until they can be dealt evenly; a
    process that is still short repeats the smallest pair with weight 0. Passes of similar cost run at the same time,
    the costliest first.
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
        # Every other turn the other way round: nobody has the costliest pass of every turn.
        for process, item in zip(dealt, reversed(some) if turn % 2 else some):
            process.append(item)
    return dealt


def _padded(order: Sequence[int], sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Neighbours in ``order``, which is by falling size, together."""
    passes: list[list[int]] = []
    for i in order:
        if passes and (len(passes[-1]) + 1) * sizes[passes[-1][0]] <= max_tokens:
            passes[-1].append(i)
        else:
            passes.append([i])
    return passes


def _packed(order: Sequence[int], sizes: Sequence[int], max_tokens: int, processes: int) -> list[list[int]]:
    """As few passes as this finds, as many in each process: the largest pairs first, each to the emptiest pass."""
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
