"""What a run can fail with; the command line turns each into one line and an exit status."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Bad input from the user: the message names the file, line or option and says what to change."""


class NotAtHandError(InputError):
    """A tokenizer or data that could not be read from where they are said to be, such as the hub without a network."""


class SaveError(RuntimeError):
    """A folder could not be written, for want of space for instance. What was there before is untouched."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm of a step was not finite. The step's update was not made."""


class Stopped(RuntimeError):
    """The run was asked to stop. The message says what it has saved and how to go on."""


def check_names(names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise InputError for the first name that is not known, with the nearest known name."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            raise InputError(f"unknown option {where}{name}{hint}")
