"""Reading the files of a model: what goes wrong names the file and how to mend it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from .errors import InputError, one_line


def local_path(name: str) -> str:
    """``name`` with ``~`` and variables replaced, as a shell does. Raises InputError for a variable that is not set."""
    path = os.path.expandvars(os.path.expanduser(name))
    if (unset := re.search(r"\$(?:\w+|\{\w+\})", path)) and not Path(path).exists():
        raise InputError(f"{name}: the environment has no variable {unset[0]}; set it, or write the path out")
    return path


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """What goes wrong while ``what`` of the model ``name`` is read becomes an InputError that says how to mend it.

    A path that is not there is refused at once: the hub would be asked for it for half a minute, or call it ill-formed.
    """
    if not Path(name).is_dir():
        first, _, rest = name.partition("/")
        is_path = name.startswith((".", "/", "~")) or "/" in rest
        is_below = rest != "" and Path(first).is_dir()
        if is_path or is_below:
            hint = "" if is_path else f"; {first!r} is a local folder, so the hub was not searched"
            raise InputError(f"model {name!r}: no such folder (working directory: {Path.cwd()}){hint}")
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file makes its readers fail in any way
        remedy = (
            ""
            if Path(name).is_dir()
            else (
                f". Without the hub: give a local folder instead (elsewhere, `hf download {name} --local-dir DIR` "
                "fills one), or set HF_HUB_OFFLINE=1 where HF_HOME holds a cache that has it"
            )
        )
        damaged = damaged_file(Path(name), "*.json", "*.safetensors")
        raise InputError(
            f"model {name!r}: its {what} could not be loaded as a local folder or from the hub "
            f"({one_line(error)[:500]}){remedy}" + (f". {damaged} is damaged: copy it again" if damaged else "")
        ) from None


def damaged_file(folder: Path, *patterns: str) -> Path | None:
    """Return the first file of ``folder``, of those that match ``patterns``, that is not what its name says."""
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        try:
            if file.suffix == ".json" and not json.loads(file.read_text(encoding="utf-8")):
                return file
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            if file.suffix == ".parquet":
                pq.read_metadata(file)
            if file.suffix == ".arrow":
                pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        except (OSError, ValueError, SafetensorError):  # pyarrow's errors are of these classes, too
            return file
    return None
