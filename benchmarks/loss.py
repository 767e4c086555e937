"""Measure the pairwise loss, forward and backward: ours, every other implementation and the floor.

    python -m benchmarks.loss --json benchmarks/results/loss_cpu.json

All contenders get the same double-conditioned batch: hidden states of every position of prompt + alternative +
response, and labels of the response. Contenders that work on scored rows select them first, and this is timed. The
``floor`` is the three matmuls of the scored rows with the head, X W^T, E W and E^T X, with preallocated outputs, in the
fastest of several groupings of rows and words. Any loss that computes dX and dW must run these matmuls.

The same run measures errors against float64. Times are medians over interleaved rounds, and ratios are taken within
rounds. On a CPU, each contender's peak memory is measured in a fresh process, on the second call.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import cells
from .measure import LOSS, TRAIN


def main(arguments: Sequence[str] | None = None) -> None:
    cells.run("benchmarks.loss", __doc__, LOSS, [TRAIN], arguments)


if __name__ == "__main__":
    main()
