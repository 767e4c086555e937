"""Time the loss and the per-token log-probs under pytest-benchmark: one shape, a group per mode.

    pytest benchmarks --benchmark-only

``benchmarks.loss`` and ``benchmarks.logps`` interleave contenders and also measure memory and errors. This file is for
users who track timings with pytest-benchmark. From the medians in ``results``, it takes about five minutes on two CPU
cores. The package's tests do not collect this folder.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from .batches import PairBatch, shapes
from .contenders import CONTENDERS, Contender, chosen
from .measure import FORWARD, FROZEN, LOGPS, LOSS, TRAIN, products_of, step

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SHAPE = "reference"


@cache
def batch_of(rows: bool) -> PairBatch:
    return PairBatch(shapes(DEVICE)[SHAPE], dtype=DTYPE, device=DEVICE, rows=rows)


@pytest.mark.parametrize("name", ["floor", *CONTENDERS])
@pytest.mark.parametrize("what, mode", [(LOSS, TRAIN), (LOGPS, TRAIN), (LOGPS, FROZEN), (LOGPS, FORWARD)])
def test_speed(benchmark, what, mode, name):
    benchmark.group = f"{what}, {SHAPE}, {mode}"
    batch = batch_of(what == LOSS)
    if name == "floor":
        run = products_of(batch, mode)
    else:
        contender = chosen([name], batch, per_token=what == LOGPS)[name]
        if not isinstance(contender, Contender):
            pytest.skip(contender)

        def run():
            return step(batch, mode, contender, what)

    def synchronized():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronized, rounds=3, warmup_rounds=1)
