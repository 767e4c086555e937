"""Which pairs go through the model together, and in which process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class MicroBatch(NamedTuple):
    """Pairs of one forward pass, as positions in the list that was planned. Weight 0: only there to keep step."""

    pairs: list[int]
    weight: float


def micro_batches(sizes: Sequence[int], max_tokens: int, processes: int = 1) -> list[list[MicroBatch]]:
    """Forward passes of each process for pairs of ``sizes`` tokens; a pass costs its count times its largest size.

    Each pair is in exactly one pass of weight 1. Pairs of similar size share a pass, of at most ``max_tokens`` (a
    larger pair goes alone). Engines that communicate within a pass need the same number of passes in every process, so
    passes are split until they can be dealt evenly; a process that is still short repeats the smallest pair with
    weight 0. Passes of similar cost run at the same time, the costliest first.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    passes: list[list[int]] = []
    for i in order:
        if passes and (len(passes[-1]) + 1) * sizes[passes[-1][0]] <= max_tokens:
            passes[-1].append(i)
        else:
            passes.append([i])

    def cost(some: list[int]) -> int:
        return len(some) * sizes[some[0]]

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
