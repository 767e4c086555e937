"""Decide at random for each pair whether its responses are scored given each other, or plain (alternative dropout).

Both sequences of a dropped pair are laid out as in the plain baseline, and the pair has no marginals. Dropout 0 is
InSPO (arXiv 2512.23126), and dropout 1 is the baseline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from ..arguments import finite, integer


def keeps_alternative(dropout: float, *key: object) -> bool:
    """Return whether the pair that ``key`` names keeps its alternative; it loses it with probability ``dropout``.

    The coin depends on ``key`` alone: not on the other pairs, the process or the platform. A pair that is dropped at
    one ``dropout`` is dropped at any larger one.
    """
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >= dropout * 2**64


def checked_dropout(value: Any) -> float:
    """Return ``value`` as a float. Raises ValueError where it is no probability."""
    dropout = finite("alternative_dropout", value)
    if not 0 <= dropout <= 1:
        raise ValueError(
            f"alternative_dropout must be in 0..1, got {value!r}: it is the share of pairs laid out plain, 0 for InSPO "
            "and 1 for the plain baseline"
        )
    return dropout


def keeps_alternatives(conditioned: bool | Sequence[bool], dropout: float, seed: int, count: int) -> list[bool]:
    """Return for each of ``count`` pairs whether it is conditioned, as ``condition_pairs`` documents its arguments."""
    dropout, seed = checked_dropout(dropout), integer("dropout_seed", seed)
    if isinstance(conditioned, bool):
        if dropout and not conditioned:
            raise ValueError("alternative_dropout needs conditioned=True: plain pairs have no alternative to drop")
        return [conditioned and keeps_alternative(dropout, seed, index) for index in range(count)]
    if isinstance(conditioned, str) or not isinstance(conditioned, Sequence):
        raise ValueError(f"conditioned must be True or False, or a list with one of them per pair, got {conditioned!r}")
    for value in conditioned:
        if not isinstance(value, bool):
            raise ValueError(f"conditioned must hold True or False for each pair, got {value!r}")
    if len(conditioned) != count:
        raise ValueError(f"conditioned holds {len(conditioned)} values for {count} pairs: give one per pair")
    if dropout:
        raise ValueError("alternative_dropout and a list of conditioned both choose the plain pairs: give one of them")
    return list(conditioned)
