"""Measure how time and memory of the pairwise loss scale with tokens, vocabulary, hidden size, length and workspace.

    python -m benchmarks.scaling --json benchmarks/results/scaling_cpu.json

Each sweep changes one quantity from a common base. The exponent b of time = a n^b and memory = a n^b is fitted on
logarithms: 1 is linear, 0 constant. The sweep over pair lengths keeps the number of scored tokens constant, so that
only costs of the length itself grow. The last sweep limits the workspace of our loss at the reference shape.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from scipy.stats import linregress
from tqdm import tqdm

from . import speed_tables
from .batches import HeadShape, PairBatch, Shape, dtype_of, equal, shapes
from .contenders import PEER_PACKAGES, Contender, ours
from .gpu_tuning import head_and_backend
from .harness import compared
from .loss import fill
from .measure import LOSS, TRAIN, step
from .result_files import add_common_options, add_names, make_parser, measuring

CONTENDERS = ("torch", "full_log_softmax", "trl")
# Base: 8 pairs of prompt 64 and responses of 64 tokens, H 256, V 16,000. Each sweep has three points, 4x apart.
SWEEPS: dict[str, dict[int, Shape]] = {
    "scored tokens": {128 * b: equal(HeadShape(256, 16_000), b, 64, 64) for b in (2, 8, 32)},
    "vocabulary": {v: equal(HeadShape(256, v), 8, 64, 64) for v in (4_000, 16_000, 64_000)},
    "hidden size": {h: equal(HeadShape(h, 16_000), 8, 64, 64) for h in (64, 256, 1024)},
    "pair length": {3 * y: equal(HeadShape(256, 16_000), 1024 // (2 * y), y, y) for y in (32, 128, 512)},
}
QUICK_SWEEPS = {name: {n: equal(HeadShape(16, 100), n, 4, 4) for n in (2, 4)} for name in SWEEPS}
WORKSPACE_ROWS = (64, 128, 256, 512, 1024, 2048)


def exponent(points: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """Return the slope on logarithms and its standard error, or None for fewer than three points."""
    points = [(n, value) for n, value in points if value > 0]
    if len(points) < 3:
        return None
    fit = linregress([math.log(n) for n, _ in points], [math.log(v) for _, v in points])
    return {"exponent": float(fit.slope), "standard_error": float(fit.stderr)}


def fits(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fit the exponents of time and memory of each contender over the sweep ``cells``."""
    result: dict[str, Any] = {}
    for name in dict.fromkeys(name for cell in cells for name in cell["contenders"]):
        rows = [(cell["value"], cell["contenders"].get(name, {})) for cell in cells]
        result[name] = {
            "seconds": exponent([(n, row["seconds"]["median"]) for n, row in rows if "seconds" in row]),
            "peak_bytes": exponent([(n, row["peak_bytes"]) for n, row in rows if row.get("peak_bytes")]),
        }
    return result


def workspace_sweep(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    """Time our loss with the default workspace and with each number of rows in ``WORKSPACE_ROWS``."""
    batch = PairBatch(shape, dtype=dtype_of(device), device=device, rows=True)
    head, backend, default_bytes = head_and_backend(batch, "auto")
    shipped = backend.capacity(head, device, default_bytes)
    sizes = {f"default ({shipped})": shipped, **{str(rows): rows for rows in WORKSPACE_ROWS}}
    first, runs = next(iter(sizes)), {}
    for name, size in sizes.items():
        limit = None if name == first else backend.kept_bytes(head, size)
        runs[name] = partial(step, batch, TRAIN, Contender("ours", loss=ours("auto", max_workspace_bytes=limit)))
    found = compared(runs, first, str(device), rounds, ratio="times_default")
    return {n: {"rows": sizes[n], "bytes": backend.kept_bytes(head, sizes[n])} | row for n, row in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser("scaling", __doc__)
    add_common_options(parser, rounds=5)
    known = [*SWEEPS, "workspace"]
    add_names(parser, "--sweeps", known, "sweeps to run [all]", default=known)
    options = parser.parse_args(arguments)
    sweeps = {name: s for name, s in (QUICK_SWEEPS if options.quick else SWEEPS).items() if name in options.sweeps}
    todo = [(name, value, shape) for name, sweep in sweeps.items() for value, shape in sweep.items()]
    fields: dict[str, Any] = {"fits": {}, "workspace": {}}
    with measuring(parser, options, arguments, PEER_PACKAGES, dtype_of, **fields) as run:
        result = run.result
        for name, value, shape in tqdm(todo, desc="shapes", disable=not sys.stderr.isatty()):
            cell = run.cell(f"{name} {value}", sweep=name, value=value, mode=TRAIN, **shape.as_json())
            fill(run, cell, shape, TRAIN, LOSS, CONTENDERS)
            result["fits"][name] = fits([c for c in result["cells"] if c["sweep"] == name])
        if "workspace" in options.sweeps and not result["workspace"]:
            shape = shapes(run.device)["quick" if options.quick else "reference"]
            result["workspace"] = workspace_sweep(shape, options.rounds, run.device)
    print(speed_tables.scaling(result))


if __name__ == "__main__":
    main()
