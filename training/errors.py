"""Errors of a run, and the type of its log; the command line prints each as one line and exits with its status.

``as_input_error`` and ``reading`` turn what libraries raise into these errors.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

Log = Callable[[str], None]  # takes a line for the terminal and log.txt


class InputError(ValueError):
    """Bad input: the message names the file, line or option and says what to change."""


class SaveError(RuntimeError):
    """A folder could not be written, for example on a full disk. Its earlier content is unchanged."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm of a step was not finite. The step made no update."""


class Stopped(RuntimeError):
    """The run was asked to stop. The message says what is saved and how to resume."""


def one_line(error: BaseException) -> str:
    """Return the message of a library's error as one line."""
    return " ".join(str(error).split()) or repr(error)


@contextmanager
def as_input_error(prefix: str, remedy: str = "") -> Iterator[None]:
    """Raise InputError with ``prefix``, the message and ``remedy`` for any error in the block.

    Libraries reject input with many classes of errors.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{prefix}{one_line(error)}{remedy}") from None


@contextmanager
def reading(path: str, what: str) -> Iterator[None]:
    """Raise InputError with a remedy for any error while ``what`` of ``path``, local or on the hub, is read."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # network, missing, gated or damaged files: each reader fails in ways of its own
        problem = f"{type(error).__name__}: {one_line(error.__cause__ or error)[:500]}"
        remedy = ""
        if damaged := damaged_file(Path(path)):
            remedy = f". {damaged} is damaged: copy it again"
        elif not Path(path).exists():
            remedy = (
                f". Without the hub: give a local path instead (elsewhere, `hf download {path} --local-dir DIR` fills "
                "a folder), or set HF_HUB_OFFLINE=1 where HF_HOME holds a cache that has it"
            )
        raise InputError(f"{what} could not be loaded ({problem}){remedy}") from None


def damaged_file(folder: Path) -> Path | None:
    """Return the first file of a model or a data set in ``folder`` that is not what its name says.

    A file .json may hold JSON lines.
    """
    kinds = ("*.json", "*.safetensors", "**/*.parquet", "**/*.arrow")
    for file in sorted(file for kind in kinds for file in folder.glob(kind)):
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
        except (OSError, ValueError, SafetensorError) as error:  # pyarrow's errors are of these classes, too
            if not (isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"):
                return file
    return None


def first_of(names: Sequence[str]) -> str:
    """List the first three names, and say whether there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name most similar to ``name``, or "" if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), "")


def check_names(names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise InputError for the first unknown name, with the nearest known one."""
    for name in names:
        if name not in known:
            close = nearest(name, known)
            hint = f"; did you mean {close!r}?" if close else f"; known: {', '.join(known)}"
            raise InputError(f"unknown option {where}{name}{hint}")
