"""Measure per-token log-probs under any upstream gradient, beside the floor and every other implementation.

    python -m benchmarks.logps --json benchmarks/results/logps_cpu.json

Three modes: forward + backward (dX and dW), frozen head (dX alone, as under LoRA) and forward without gradients. The
floor of each is its bare matmuls with preallocated outputs, three, two, one: the fastest of several groups of rows and
words. A general per-token op that keeps no logits cannot reach the first: its backward has to form them a second time.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import cells
from .measure import LOGPS, MODES


def main(arguments: Sequence[str] | None = None) -> None:
    cells.run("benchmarks.logps", __doc__, LOGPS, MODES, arguments)


if __name__ == "__main__":
    main()
