"""Measure the pairwise loss, forward and backward: ours, every other implementation and the floor.

    python -m benchmarks.loss --json benchmarks/results/loss_cpu.json

``benchmarks.logps`` measures per-token log-probs by the same functions.

All contenders get the same double-conditioned batch: hidden states of every position of prompt + alternative +
response, and labels of the response. Contenders that work on scored rows select them first, and this is timed. The
``floor`` is the three matmuls of the scored rows with the head, X W^T, E W and E^T X, with preallocated outputs, in the
fastest of several groupings of rows and words. Any loss that computes dX and dW must run these matmuls.

The same run measures errors against float64. Times are medians over interleaved rounds, and ratios are taken within
rounds. On a CPU, each contender's peak memory is measured in a fresh process, on the second call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from .batches import PairBatch, Shape, dtype_of, shapes
from .contenders import CONTENDERS, PEER_PACKAGES, chosen
from .measure import LOSS, TRAIN, measure, measure_peaks
from .result_files import Run, add_common_options, add_names, lacks, make_parser, measuring
from .tables import shape_title, table


def main(arguments: Sequence[str] | None = None) -> None:
    measure_all("loss", __doc__, LOSS, [TRAIN], arguments)


def measure_all(module: str, doc: str, what: str, modes: Sequence[str], arguments: Sequence[str] | None) -> None:
    """Parse the options, measure every shape in every mode, and save the file after each figure."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser(module, doc)
    names = [n for n, c in CONTENDERS.items() if (what == LOSS or c.logps) and c.variant_of is None]
    add_common_options(parser, rounds=15)
    about = "shapes to measure [reference real; with --quick the quick shapes]"
    add_names(parser, "--shape", shapes(torch.device("cpu")), about)
    add_names(parser, "--contenders", names, "contenders to measure in addition to the floor [all]", default=names)
    options = parser.parse_args(arguments)
    chosen_shapes = options.shape or (["quick", "quick-real"] if options.quick else ["reference", "real"])
    todo = [(name, mode) for name in chosen_shapes for mode in modes]
    with measuring(parser, options, arguments, PEER_PACKAGES, dtype_of, what=what) as run:
        known = shapes(run.device)
        for name, mode in tqdm(todo, desc="cells", disable=not sys.stderr.isatty()):
            cell = run.cell(f"{name}, {mode}", shape=name, mode=mode, **known[name].as_json())
            fill(run, cell, known[name], mode, what, options.contenders)
            tqdm.write(table(shape_title(cell), cell["contenders"]))


def fill(run: Run, cell: dict[str, Any], shape: Shape, mode: str, what: str, names: Sequence[str]) -> None:
    """Measure memory, then errors and times. On a CPU, fresh processes measure memory before the batch exists here."""
    rows, known, rounds, only = what == LOSS, cell["contenders"], run.options.rounds, run.options.only
    if run.device.type == "cpu" and only != "time":
        missing = [name for name in ("floor", *names) if lacks(known.get(name), "peak_bytes")]
        measure_peaks(shape, mode, missing, cell, what=what, rows=rows, save=run.save)
    if only == "memory" or not any(
        lacks(row := known.get(name), "seconds") or row.get("rounds", rounds) < rounds for name in names
    ):
        return
    # Only times from the same rounds are comparable, so contenders timed in earlier rounds are timed again.
    names = [*names, *(name for name, row in known.items() if "seconds" in row and name not in ("floor", *names))]
    batch = PairBatch(shape, dtype=dtype_of(run.device), device=run.device, rows=rows)
    measure(batch, mode, chosen(names, batch, per_token=not rows), rounds, what=what, cell=cell, save=run.save)


if __name__ == "__main__":
    main()
