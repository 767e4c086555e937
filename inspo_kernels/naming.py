"""What to say when somebody asks for a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: Any, known: Iterable[str]) -> str:
    """The end of an error message: "; did you mean 'dpo'? (known: dpo, ipo)", the question only where one is close."""
    choices = list(known)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(choices)})"
