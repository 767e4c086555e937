"""Measure the pairwise loss, forward and backward, beside its floor and every other implementation.

    python -m benchmarks.loss --json benchmarks/results/loss_cpu.json

All contenders get the same double-conditioned batch: hidden states of every position of prompt + alternative +
response, and labels of the response. Those that work on scored rows pick them first, as part of what is timed. Beside
them stands

- ``floor``: the three matmuls of the scored rows with the head, X W^T, E W and E^T X, into preallocated outputs: the
  fastest of several groups of rows and words. Any loss that computes dX and dW must do these.

Errors are those against float64 in the same run. Time is the median over interleaved rounds, ratios are taken within
rounds, and on a CPU peak memory is measured in a fresh process per contender, on its second call.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import cells
from .measure import LOSS, TRAIN


def main(arguments: Sequence[str] | None = None) -> None:
    cells.run("benchmarks.loss", __doc__, LOSS, [TRAIN], arguments)


if __name__ == "__main__":
    main()
