"""Read and write files of JSON lines: a first line, then one line per finished run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_lines(file: Path) -> list[Any]:
    """Return the complete lines of ``file``, or none if it does not exist. A kill may cut off the last line."""
    text = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line]


def write_lines(file: Path, lines: Iterable[Any]) -> None:
    """Write ``lines`` to ``file`` and make its folder if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def append_line(file: Path, line: Any) -> None:
    """Append one line to ``file``."""
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")


def check_settings(file: Path, held: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError with the names of settings that differ from those ``held`` in ``file``."""
    if held != settings:
        other = ", ".join(name for name in settings if held.get(name) != settings[name])
        raise ValueError(f"{file} holds runs with other settings ({other}); move it or choose another folder")
