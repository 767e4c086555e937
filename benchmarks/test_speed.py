"""The loss and the per-token log-probs under pytest-benchmark, a group per shape and mode.

    pytest benchmarks --benchmark-only

Interleaving, memory and errors are in ``benchmarks.loss`` and ``benchmarks.logps``; this is for those who keep their
timings with pytest-benchmark. The tests of the package do not collect this folder.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from .batches import PairBatch, shapes
from .contenders import CONTENDERS, Contender, chosen
from .measure import FORWARD, FROZEN, LOGPS, LOSS, PRODUCTS, TRAIN, products, step

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SHAPES = ("reference", "real")


@cache
def batch_of(shape: str, rows: bool) -> PairBatch:
    return PairBatch(shapes(DEVICE)[shape], dtype=DTYPE, device=DEVICE, rows=rows)


@pytest.mark.parametrize("name", ["floor", *CONTENDERS])
@pytest.mark.parametrize("what, mode", [(LOSS, TRAIN), (LOGPS, TRAIN), (LOGPS, FROZEN), (LOGPS, FORWARD)])
@pytest.mark.parametrize("shape", SHAPES)
def test_speed(benchmark, shape, what, mode, name):
    benchmark.group = f"{what}, {shape}, {mode}"
    batch = batch_of(shape, what == LOSS)
    if name == "floor":
        run = products(batch, PRODUCTS[mode])
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

    benchmark.pedantic(synchronized, rounds=5, warmup_rounds=1)
