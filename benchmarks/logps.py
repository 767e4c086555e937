"""Measure per-token log-probs with an arbitrary upstream gradient: ours, every other implementation and the floor.

    python -m benchmarks.logps --json benchmarks/results/logps_cpu.json

There are three modes: forward + backward (dX and dW), frozen head (only dX, as with LoRA) and forward without
gradients. The floor of a mode is its three, two or one bare matmuls with preallocated outputs, in the fastest of
several groupings of rows and words. A general per-token op that keeps no logits cannot reach the floor of forward +
backward, because its backward pass recomputes the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import loss
from .measure import LOGPS, MODES


def main(arguments: Sequence[str] | None = None) -> None:
    loss.measure_all("logps", __doc__, LOGPS, MODES, arguments)


if __name__ == "__main__":
    main()
