"""Errors of a run, and the type of its log; the command line prints each as one line and exits with its status."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

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
