"""Format rows of result files: in Markdown for the README and docs, and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .contenders import CONTENDERS

TITLES = {"floor": "floor: the bare matmuls, outputs preallocated"} | {n: c.title for n, c in CONTENDERS.items()}
# Times and rates that a row may have, with their units. "idle" and "busy" are the device's state when a call begins.
TIMES = {"seconds": "ms", "idle": "ms idle", "busy": "ms busy"}
RATES = {
    "tflops": "TFLOP/s",
    "terabytes_per_second": "TB/s",
    "positions_per_step": "positions",
    "scored_tokens_per_second": "scored tokens/s",
}


# --- Markdown ---


def paragraphs(*parts: str) -> str:
    """Join the parts of a generated section that are not empty."""
    return "\n\n".join(filter(None, parts))


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = (f"| {' | '.join(row)} |" for row in rows)
    head = f"| {' | '.join(titles)} |".replace("|  |", "| |")
    return "\n".join([head, "|---" * len(titles) + "|", *lines])


def ratio_text(ratio: Mapping[str, float], is_base: bool = False) -> str:
    around = "one round" if ratio["q1"] == ratio["q3"] else f"{ratio['q1']:.2f}-{ratio['q3']:.2f}"
    return f"{ratio['median']:.2f}" + ("" if is_base else f" ({around})")


def mebibytes(row: Mapping[str, Any]) -> str:
    return "not measured" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"


def source(result: Mapping[str, Any], file: str) -> str:
    """Return the line with a measurement's hardware, versions and date. The file holds the full command."""
    hardware, versions = result["hardware"], result["versions"]
    where, packages = f"{hardware['cpu']}, {hardware['cores']} cores", ["torch"]
    if gpu := result.get("device", {}).get("name"):
        where, packages = gpu, ["torch", "triton"]
    used = ", ".join(f"{package} {versions[package]}" for package in packages)
    commit = result.get("package", {}).get("commit")
    at = f", commit {commit}" if commit else ""
    return (
        f"<sub>{where}, {used}, {result['date'][:10]}{at}; command and all figures: "
        f"[{file}](benchmarks/results/{file})</sub>"
    )


# --- terminal ---


def shape_title(cell: Mapping[str, Any]) -> str:
    return f"{cell['name']}: {cell['scored_tokens']:,} scored tokens, H = {cell['hidden']}, V = {cell['vocab']:,}"


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    return "\n".join([title, *(line(name, row) for name, row in rows.items())])


def line(name: str, row: Mapping[str, Any]) -> str:
    """Format one row with all its figures, or with the reason why it has none."""
    return f"  {name:<42}{'  '.join(figures(row)) or row['status']}"


def figures(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row's times, ratios, rates, memory and errors."""
    found = [f"{1e3 * row[key]['median']:9.3f} {unit}" for key, unit in TIMES.items() if key in row]
    ratios = {key.removeprefix("times_"): ratio for key, ratio in row.items() if key.startswith("times_")}
    if idle := row.get("from_idle"):
        ratios["floor from idle"] = idle["times_floor"]
    # Only a base has ratios of exactly 1.
    found += [f"times {base} {ratio_text(r, set(r.values()) == {1})}" for base, r in ratios.items() if r]
    found += [f"{row[key]:,.3g} {unit}" for key, unit in RATES.items() if key in row]
    if row.get("peak_bytes") is not None:
        found.append(mebibytes(row))
    if errors := row.get("relative_error"):
        found.append(f"worst error {max(errors.values()):.0e}")
    if "errors_not_checked" in row:
        found.append(f"errors not checked: {row['errors_not_checked']}")
    return found
