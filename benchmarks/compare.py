"""Report changes in time and memory, beyond the noise, between two result files of one command.

    python -m benchmarks.compare OLD.json NEW.json

Cells and their contenders are matched by name. If both files have times relative to the bare matmuls of the same round,
these ratios are compared, because they do not depend on the machine or its load. Otherwise seconds are compared. A
contender is slower if its lower quartile is above the old upper quartile and its median grew by more than ``--least``.
The test for faster is symmetric. Memory has almost no noise, so only ``--least`` decides. The exit status is 1 if
any contender got slower or larger, stopped working or is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .result_files import benchmark_of, differences, make_parser, read_result


def compare(old: dict[str, Any], new: dict[str, Any], least: float) -> Iterator[tuple[bool, str]]:
    """Yield each difference, and whether it is a regression."""
    before = {cell["name"]: cell for cell in old["cells"]}
    after = {cell["name"]: cell for cell in new["cells"]}
    for name, cell in before.items():
        if name not in after:
            yield True, f"{name}: missing from the new file"
            continue
        for contender, was in cell["contenders"].items():
            row = after[name]["contenders"].get(contender)
            if row is None:
                yield True, f"{name}, {contender}: missing from the new file"
                continue
            for worse, what in _differences(contender, was, row, least):
                yield worse, f"{name}, {contender}: {what}"
    for name in after:
        if name not in before:
            yield False, f"{name}: not in the old file"


def _differences(name: str, was: dict[str, Any], row: dict[str, Any], least: float) -> Iterator[tuple[bool, str]]:
    if was["status"] != row["status"]:
        yield was["status"] == "measured", f"{was['status']} -> {row['status']}"
        return
    # A baseline's ratio to itself is 1 in both files, so only its seconds can differ.
    ratios = [key for key in was if key.startswith("times_") and key != f"times_{name}"]
    kinds = [key for key in (*ratios, "seconds") if was.get(key) and row.get(key)]
    if kinds:
        a, b = was[kinds[0]], row[kinds[0]]
        ratio, unit = b["median"] / a["median"], "s" if kinds[0] == "seconds" else kinds[0].replace("_", " ")
        figures = f"{a['median']:.4g} ({a['q1']:.4g}-{a['q3']:.4g}) -> {b['median']:.4g} ({b['q1']:.4g}-{b['q3']:.4g})"
        if ratio > 1 + least and b["q1"] > a["q3"]:
            yield True, f"slower by {100 * (ratio - 1):.0f}%, {unit} {figures}"
        elif ratio < 1 / (1 + least) and b["q3"] < a["q1"]:
            yield False, f"faster by {100 * (1 - ratio):.0f}%, {unit} {figures}"
    a, b = was.get("peak_bytes"), row.get("peak_bytes")
    if a and b and max(a, b) > (1 + least) * min(a, b) and abs(a - b) > 2**20:
        yield b > a, f"peak memory {a / 2**20:,.0f} -> {b / 2**20:,.0f} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("compare", __doc__)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--least", type=float, default=0.03, help="smallest relative change to report [0.03]")
    options = parser.parse_args(arguments)
    try:
        old, new = read_result(options.old), read_result(options.new)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if (was := benchmark_of(old)) != (now := benchmark_of(new)):
        parser.error(f"{options.old} is of {was} and {options.new} of {now}; give two files of one benchmark")
    if other := differences(old, new, ("hardware", "versions", "dtype")):
        print(f"note: the files differ ({other})")
    found = list(compare(old, new, options.least))
    for worse, text in sorted(found, reverse=True):
        print(("WORSE  " if worse else "       ") + text)
    print(f"{sum(worse for worse, _ in found)} of {len(found)} differences are regressions")
    return int(any(worse for worse, _ in found))


if __name__ == "__main__":
    sys.exit(main())
