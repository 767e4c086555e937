"""Run ``benchmarks.loss`` and ``benchmarks.logps``: measure every contender at every shape and write one file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from .batches import PairBatch, Shape, shapes
from .contenders import CONTENDERS, PEER_PACKAGES, chosen
from .measure import LOSS, measure, measure_peaks
from .result_files import add_common_options, cell_of, checked_device, command, kept_on_interrupt, lacks, opened_result


def table(cell: dict[str, Any]) -> str:
    """Format one cell for a terminal."""
    lines = [f"{cell['name']}: {cell['scored_tokens']:,} scored tokens, H = {cell['hidden']}, V = {cell['vocab']:,}"]
    for name, row in cell["contenders"].items():
        if row["status"] != "measured" or "seconds" not in row:
            lines.append(f"  {name:<27}{row['status']}")
            continue
        ratio, peak, error = row["times_floor"], row.get("peak_bytes"), row.get("relative_error")
        times = f"{ratio['median']:6.2f}x floor ({ratio['q1']:.2f}-{ratio['q3']:.2f})" if ratio else " " * 25
        memory = " " * 11 if peak is None else f"{peak / 2**20:7,.0f} MiB"
        errors = f"  worst error {max(error.values()):.0e}" if error else ""
        if "errors_not_checked" in row:
            errors = f"  errors not checked: {row['errors_not_checked']}"
        lines.append(f"  {name:<27}{1e3 * row['seconds']['median']:9.2f} ms{times}{memory}{errors}")
    return "\n".join(lines)


def run(module: str, doc: str, what: str, modes: Sequence[str], arguments: Sequence[str] | None) -> None:
    """Parse the options, measure every shape in every mode, and save the file after each figure."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(f"python -m {module}", description=doc.splitlines()[0])
    known = shapes(torch.device("cpu"))
    names = [n for n, c in CONTENDERS.items() if (what == LOSS or c.logps) and c.variant_of is None]
    add_common_options(parser, rounds=15)
    parser.add_argument(
        "--shape",
        "--model-shape",
        nargs="+",
        choices=known,
        metavar="SHAPE",
        help=f"shapes to measure: {', '.join(known)} [reference real; with --quick the quick shapes]",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"contenders to measure in addition to the floor: {', '.join(names)} [all]",
    )
    options = parser.parse_args(arguments)
    device = checked_device(parser, options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    given = command(module, arguments, options.json)
    result, save = opened_result(parser, options, given, PEER_PACKAGES, str(dtype).removeprefix("torch."), what=what)
    chosen_shapes = options.shape or (["quick", "quick-real"] if options.quick else ["reference", "real"])
    todo = [(name, mode) for name in chosen_shapes for mode in modes]
    with kept_on_interrupt(save):
        for name, mode in tqdm(todo, desc="cells", disable=not sys.stderr.isatty()):
            cell = {"name": f"{name}, {mode}", "shape": name, "mode": mode, **shapes(device)[name].as_json()}
            cell["contenders"] = {}
            cell = cell_of(result, cell)
            fill(
                cell,
                shapes(device)[name],
                mode,
                what,
                options.contenders,
                options.rounds,
                dtype,
                device,
                save,
                options.only,
            )
            tqdm.write(table(cell))
        result["finished"] = True
        save()
    if options.json:
        print(f"written to {options.json}")


def fill(
    cell: dict[str, Any],
    shape: Shape,
    mode: str,
    what: str,
    names: Sequence[str],
    rounds: int,
    dtype: torch.dtype,
    device: torch.device,
    save: Callable[[], None],
    only: str | None,
) -> None:
    """Measure memory, then errors and times. On a CPU, fresh processes measure memory before the batch exists here."""
    rows, known = what == LOSS, cell.get("contenders", {})
    if device.type == "cpu" and only != "time":
        missing = [name for name in ("floor", *names) if lacks(known.get(name), "peak_bytes")]
        measure_peaks(shape, mode, missing, cell, what=what, rows=rows, save=save)
    if only == "memory" or not any(
        lacks(row := known.get(name), "seconds") or row.get("rounds", rounds) < rounds for name in names
    ):
        return
    # Only times from the same rounds are comparable, so contenders timed in earlier rounds are timed again.
    names = [*names, *(name for name, row in known.items() if "seconds" in row and name not in ("floor", *names))]
    batch = PairBatch(shape, dtype=dtype, device=device, rows=rows)
    measure(batch, mode, chosen(names, batch, per_token=not rows), rounds, what=what, cell=cell, save=save)
