"""Check arguments that are not tensors: each function returns the value, or raises an error that names it."""

from __future__ import annotations

import difflib
import math
import operator
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def nearest(name: Any, known: Iterable[str]) -> str:
    """Return the end of an error message: "; did you mean 'dpo'? (known: dpo, ipo)".

    The question is left out if no known name is similar.
    """
    choices = list(known)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(choices)})"


def choice(name: str, value: Any, known: Iterable[str]) -> str:
    """Return ``value``; raise unless it is one of the ``known`` names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"unknown {name} {value!r}{nearest(value, known)}")
    return value


def integer(name: str, value: Any, *, minimum: int | None = None, hint: str = "") -> int:
    """Return ``value`` as an ``int``; raise unless it is an integer (not a bool) of at least ``minimum``.

    ``hint`` ends the error message.
    """
    number = None
    if not isinstance(value, bool | None):
        try:
            number = value if isinstance(value, int) else operator.index(value)  # an int may be symbolic
        except TypeError:  # a tensor that does not hold a single integer, or no number at all
            pass
    if number is None or (minimum is not None and number < minimum):
        bound = "" if minimum is None else f" of at least {minimum}"
        raise ValueError(f"{name} must be an integer{bound}, got {value!r}" + (f" ({hint})" if hint else ""))
    return number


def finite(name: str, value: Any) -> float:
    """Return ``value`` as a finite float. A tensor that requires grad is an error: it would get no gradient."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} requires grad, but would get no gradient here: pass a number")
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    # math.isfinite does not accept torch.compile's symbolic numbers.
    if not abs(number) <= sys.float_info.max:
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return number


def positive(name: str, value: Any, or_else: str = "") -> float:
    """Return ``value`` as a finite float above 0; ``or_else`` tells in the error what else is allowed."""
    number = finite(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive{or_else}, got {value!r}")
    return number
