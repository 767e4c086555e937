"""Format text, tables and values in Markdown for the studies' reports."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def filled(words: str) -> str:
    """Return the words as one paragraph of lines with at most 120 characters."""
    return textwrap.fill(" ".join(words.split()), 120, break_long_words=False, break_on_hyphens=False)


def item(words: str) -> str:
    """Return the words as a list item of lines with at most 120 characters."""
    return textwrap.fill(
        "- " + " ".join(words.split()), 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def mean_text(value: Mapping[str, float]) -> str:
    """Format a mean and its interval."""
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def signed(value: Mapping[str, float]) -> str:
    """Format a difference and its interval, with signs."""
    return f"{value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"


def p_value(value: float | None) -> str:
    """Format a p-value; empty for None."""
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def listed(names: Sequence[str]) -> str:
    """Join names with commas and "and"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def either(values: Iterable[Any]) -> str:
    """Join values with "or"."""
    return " or ".join(map(str, values))
