"""Compute log-probs and statistics from the sums over the vocabulary that a backend returns for each row.

With z' a row's final logits, y its label and o any offset, the sums of a row are

    rest = sum of exp(z'_v - o) over v != y        label = z'_y        S = rest + exp(label - o)

so that logp = label - o - log S = log sigmoid(label - o - log rest). Keeping the label out of the rest costs nothing,
and loses no digit where p(y) is close to 1, because 1 - p(y) = rest / S.

Each statistic needs one or two more fields. All fields are sums or maxima over words. So tiles of the vocabulary can be
reduced one after another, and ranks that hold different words can combine their sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import choice

# Optional fields of RowSums.
Parts: TypeAlias = frozenset[str]
# Statistic -> fields of RowSums that it needs besides offset, rest and label.
STATISTICS: dict[str, tuple[str, ...]] = {
    "entropy": ("moment",),
    "mean_logit": ("logits",),
    "is_top1": ("before", "after"),
    "logsumexp": (),
    "log_sum_sq_probs": ("squares",),
}


def checked_statistics(names: Iterable[str]) -> tuple[str, ...]:
    """Return ``names`` as a tuple, each once; an unknown name raises an error that lists the known names."""
    if isinstance(names, str):
        raise TypeError(f'statistics must be a tuple of names, got the string {names!r}: write ("{names}",)')
    if not isinstance(names, Iterable):
        raise TypeError(f"statistics must be a tuple of names, got {names!r}")
    names = tuple(dict.fromkeys(names))
    for name in names:
        choice("statistic", name, STATISTICS)
    return names


def parts_of(names: Iterable[str]) -> Parts:
    """Return the fields of ``RowSums`` that these statistics need."""
    return frozenset(part for name in names for part in STATISTICS[name])


def above(offset: Tensor, other: Tensor) -> Tensor:
    """Return ``offset`` - ``other``, or 0 where it is only rounding, which exceeds a nat for logits of millions."""
    distance = offset - other
    noise = (distance.abs() > 1) & (distance.abs() < 2.0**-22 * other.abs())
    return distance.masked_fill(noise, 0.0)


@dataclass(frozen=True)
class TokenScores:
    """Log-probs (n,) of n rows, and their statistics by name, (n,) each; ``is_top1`` is bool."""

    logps: Tensor
    statistics: dict[str, Tensor]


@dataclass(frozen=True)
class RowSums:
    """Sums of n rows over the words that one rank holds: (n,) each, in nats; optional fields are None if not requested.

    - ``offset`` (o), ``rest``, ``label``: as above; ``label`` is -inf where the label is another rank's word.
    - ``moment``: sum of exp(z' - o) (z' - o) over v != y.
    - ``squares``: sum of exp(2 (z' - o)) over v != y.
    - ``logits``: sum of z' over all words.
    - ``before``, ``after``: largest z' of the words whose ids are lower, or higher, than the label.
    """

    offset: Tensor
    rest: Tensor
    label: Tensor
    moment: Tensor | None = None
    squares: Tensor | None = None
    logits: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None

    @classmethod
    def cat(cls, parts: list[RowSums]) -> RowSums:
        """Return the sums of consecutive blocks of rows."""
        if len(parts) == 1:
            return parts[0]
        return parts[0]._mapped(lambda name, _: torch.cat([getattr(part, name) for part in parts]))

    def __getitem__(self, rows: slice) -> RowSums:
        return self._mapped(lambda _, column: column[rows])

    def to(self, dtype: torch.dtype) -> RowSums:
        """Return these sums in another dtype."""
        return self._mapped(lambda _, column: column.to(dtype))

    def _mapped(self, change: Callable[[str, Tensor], Tensor]) -> RowSums:
        """Return sums with ``change(name, column)`` in place of each column that is there."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return RowSums(**{name: change(name, column) for name, column in columns.items() if column is not None})

    def rebased(self, offset: Tensor) -> RowSums:
        """Return these sums relative to another ``offset``, in float64; a row without finite logits contributes 0."""
        rest = self.rest.double()
        shift = torch.where(rest == 0, 0.0, above(self.offset.double(), offset))
        factor = shift.exp()
        moment = None
        if self.moment is not None:
            # The clamp makes 0 times infinity 0 where the offset is far below the new offset.
            moment = factor * (self.moment.double() + shift.clamp(min=-1e30) * rest)
        squares = None if self.squares is None else factor.square() * self.squares.double()
        return replace(self, offset=offset, rest=factor * rest, moment=moment, squares=squares)

    @cached_property
    def below(self) -> Tensor:
        """Return the label's logit minus the offset."""
        return self.label - self.offset

    @property
    def total(self) -> Tensor:
        """Return S, relative to ``offset``."""
        return self.rest + self.below.exp()

    def scores(self, dtype: torch.dtype, vocab_size: int, names: Iterable[str] = ()) -> TokenScores:
        """Return log-probs and the statistics ``names`` of softmax(z') over all ``vocab_size`` words, in ``dtype``."""
        below = self.below
        # p = sigmoid(below - log rest): no digit is lost where the label's probability is close to 1 or 0.
        logps = F.logsigmoid(below - self.rest.log())
        # Statistics need an offset of at least the label's logit: exp(label - offset) could overflow otherwise.
        at_top = self.rebased(torch.maximum(self.offset, self.label).double()) if names else self
        statistics = {name: at_top._statistic(name, vocab_size) for name in names}
        return TokenScores(
            logps.to(dtype), {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in statistics.items()}
        )

    def _statistic(self, name: str, vocab_size: int) -> Tensor:
        below = self.label - self.offset
        label_e = below.exp()
        log_total = (self.rest + label_e).log()
        if name == "entropy":
            assert self.moment is not None
            label_moment = torch.where(label_e > 0, label_e * below, 0.0)
            return log_total - (self.moment + label_moment) / (self.rest + label_e)
        if name == "mean_logit":
            assert self.logits is not None
            return self.logits / vocab_size
        if name == "is_top1":
            assert self.before is not None and self.after is not None
            return (self.label > self.before) & (self.label >= self.after)
        if name == "logsumexp":
            return self.offset + log_total
        assert self.squares is not None
        return (self.squares + label_e.square()).log() - 2 * log_total
