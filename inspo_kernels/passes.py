"""Passes over the head, the same for every backend.

A matmul over N rows costs 2NHV operations. Log-probs alone cost 2NHV, in a workspace of one tile. A frozen head costs
4NHV: dlogp/dx of each row is one H-vector, computed with the log-prob and multiplied by its coefficient afterwards.

``pair_losses`` costs 6NHV, in one pass. The loss is a function of few sums. So each group of whole pairs that fits the
workspace goes through four steps, which recompute nothing:

1. ``stage`` its rows, which leaves log-probs, dlogp/dx and the kept E.
2. Sum the log-probs per segment.
3. Evaluate and differentiate the objective on these sums, which gives the coefficients c.
4. Turn E into dW. The first group writes dW, the others add to it, in the accumulate dtype.

A pair longer than the default workspace gets a larger workspace, within limits. If a pair is longer than the workspace
of C rows, only its last C rows are kept. The logits of its other rows are recomputed once c is known, which costs 2HV
more per row and no more memory.

If one group is the whole batch, its rows may stay kept until the upstream gradient is known: ``DeferredGradients``. The
dX of a frozen head waits for it, too.
Single tokens with a trainable head always wait for their upstream gradients: ``token_logps`` keeps the last C rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backends import Backend, HeadTile, open_tile
from .backends.base import chunks, cut
from .gradients import DeferredGradients, Gradients, GradMask
from .groups import VocabGroup, sequence_totals
from .head import LMHead, plain_arithmetic
from .pair_loss import PairTerms, columns
from .row_sums import RowSums, TokenScores, parts_of
from .scored_rows import ScoredRows


@dataclass(frozen=True)
class HeadPass:
    """A head with its backend, its workspace, and the statistics to compute in addition to log-probs.

    ``capacity``: the rows that can be kept in ``workspace_bytes``. ``group``: the ranks that hold the other words, if
    any; all ranks make the same calls for the same rows.
    """

    head: LMHead
    backend: Backend
    capacity: int
    workspace_bytes: int
    statistics: tuple[str, ...] = ()
    group: VocabGroup | None = None

    def open(self, capacity: int = 0) -> HeadTile:
        """Return a tile that keeps ``capacity`` rows."""
        return open_tile(self.backend, self.head, capacity, self.workspace_bytes)

    def stage(
        self, tile: HeadTile, x: Tensor, targets: Tensor, *, keep: bool = False, dx: Tensor | None = None
    ) -> RowSums:
        """Run rows through ``stage`` and ``finish``, and return their sums over the whole vocabulary."""
        most = len(x) if keep or dx is None else tile.dx_rows
        if self.group is not None and most == tile.dx_rows < sys.maxsize:
            most = min(most, self.capacity)  # the same on every rank
        blocks = []
        for rows in chunks(0, len(x), most):
            of_rows, parts = cut(targets, rows), parts_of(self.statistics)
            sums = tile.stage(cut(x, rows), of_rows, keep=keep, dx=cut(dx, rows), parts=parts)
            if self.group is not None:
                sums = self.group.combine(sums, of_rows, self.head.accumulate_dtype)
            tile.finish(sums)
            blocks.append(sums)
        return RowSums.cat(blocks)

    def scores(self, sums: RowSums) -> TokenScores:
        return sums.scores(self.head.accumulate_dtype, self.head.all_words, self.statistics)

    def score(self, x: Tensor, targets: Tensor, dx: Tensor | None = None) -> TokenScores:
        """Return log-probs and statistics of x (N, H); write the gradient of each in its row to ``dx``, if given."""
        if not len(x):
            empty = torch.empty(0, dtype=self.head.accumulate_dtype, device=x.device)
            return TokenScores(
                empty, {name: empty.bool() if name == "is_top1" else empty.clone() for name in self.statistics}
            )
        return self.scores(self.stage(self.open(), x, targets, dx=dx))

    def start_sum(self, dx: Tensor | None) -> Callable[[], Any]:
        """Start to sum ``dx`` over the ranks, which hold the parts of their words; return a function that waits."""
        return _nothing if self.group is None or dx is None else self.group.start_sum(dx)

    def without_weight(self) -> HeadPass:
        """Return a pass that can only read kept rows, so that an engine may free the weight."""
        return replace(self, head=self.head.without_weight())

    def empty_rows(self, x: Tensor) -> Tensor:
        """Return an uninitialised tensor for the gradients of x, in the accumulate dtype."""
        return torch.empty(x.shape, dtype=self.head.accumulate_dtype, device=x.device)


def _nothing() -> None:
    """Wait for nothing."""


@dataclass(frozen=True)
class KeptTokens:
    """State of tokens whose upstream gradients are not known yet.

    ``sums``: sums of the first tokens, which are not kept. ``dx``: d logp / d x of the kept tokens, the last rows of x.
    """

    sums: RowSums | None
    dx: Tensor | None
    kept: tuple[Tensor, ...]


def token_logps(run: HeadPass, x: Tensor, targets: Tensor, needs: GradMask) -> tuple[TokenScores, KeptTokens]:
    """Return log-probs of x (N, H) with a trainable head, and the state that their gradients need."""
    first = max(0, len(x) - run.capacity)
    parts, early = [], None
    if first:
        # In the tile that recomputes them: another shape would round their logits differently, and E would not fit S.
        early = run.stage(run.open(), x[:first], targets[:first])
        parts.append(early)
    tile = run.open(len(x) - first)
    dx: Tensor | None = None
    kept: tuple[Tensor, ...] = ()
    if first < len(x):
        dx = run.empty_rows(x[first:]) if needs.x else None
        parts.append(run.stage(tile, x[first:], targets[first:], keep=True, dx=dx))
        kept = tile.staged()
    scores = run.scores(RowSums.cat(parts)) if parts else run.score(x, targets)
    return scores, KeptTokens(early, dx, kept)


def token_gradients(
    run: HeadPass,
    x: Tensor,
    targets: Tensor,
    kept: KeptTokens,
    coefficients: Tensor,
    needs: GradMask,
    *,
    reads_last: bool,
) -> Gradients:
    """Return gradients of sum(coefficients * log-probs), from the state ``kept`` that ``token_logps`` returned.

    ``reads_last``: whether nobody reads ``kept`` again, so that its memory may be reused.
    """
    first = 0 if kept.sums is None else len(kept.sums.offset)
    gradients = Gradients.empty(run.head, len(x), needs) if len(x) else Gradients.zeros(run.head, 0, needs)
    coefficients = coefficients.to(run.head.accumulate_dtype)
    if first < len(x):
        tile = run.open(len(x) - first)
        tile.restore(kept.kept)
        pending = _nothing
        if gradients.x is not None and kept.dx is not None:
            torch.mul(kept.dx, coefficients[first:].unsqueeze(1), out=gradients.x[first:])
            pending = run.start_sum(gradients.x[first:])
        tile.head_gradients(coefficients[first:], gradients)
        if reads_last:
            tile.release()
        pending()
        del tile
    if kept.sums is not None:
        rows = slice(0, first)
        out = replace(gradients, x=cut(gradients.x, rows))
        run.open().recompute_gradients(x[rows], targets[rows], kept.sums, coefficients[rows], out, first < len(x))
        run.start_sum(out.x)()
    return gradients


def pair_sums(run: HeadPass, plan: ScoredRows, x: Tensor) -> SegmentSums:
    """Return the sums of every segment, without gradients."""
    sums = SegmentSums(plan, run.statistics)
    with plain_arithmetic(x.device):
        sums.fill(slice(0, len(plan.counts)), run.score(x, plan.targets))
        sums.add_other_ranks()
    return sums


def pair_losses(
    run: HeadPass, plan: ScoredRows, terms: PairTerms, pair_capacity: int, x: Tensor, needs: GradMask
) -> tuple[Tensor, SegmentSums, Gradients | DeferredGradients]:
    """Return losses (B,) in float64, the segments' sums, and the gradients in ``needs`` of the reduced loss.

    ``x`` (N, H) are the planned rows, gathered. Rows that the loss does not depend on get zero gradient. A pair longer
    than the workspace may take ``pair_capacity`` rows.
    """
    if not needs.any:
        sums = pair_sums(run, plan, x)
        return terms.losses(terms.sums(sums.table, sums.lengths)), sums, Gradients(None, None, None)
    sums = SegmentSums(plan, run.statistics)
    graded = sum(plan.pair_rows)
    rest = slice(graded, len(x))
    with plain_arithmetic(x.device):
        # Forward-only segments come first, because the objective may read them when it evaluates a pair.
        if graded < len(x):
            rest_scores = run.score(x[rest], plan.targets[rest])
            sums.fill(slice(plan.kinds_per_pair * plan.num_pairs, len(plan.counts)), rest_scores)
        gradients: Gradients | DeferredGradients
        if not graded:
            no_scores = run.score(x[:0], plan.targets[:0])
            losses, _ = sums.differentiate(terms, slice(0, plan.num_pairs), no_scores)
            gradients = Gradients.zeros(run.head, len(x), needs)
        elif needs.head:
            losses, gradients = _one_pass(run, plan, terms, pair_capacity, x, sums, needs)
        else:
            first = slice(0, graded)
            dx = run.empty_rows(cut(x, first))
            scores = run.score(cut(x, first), cut(plan.targets, first), dx)
            losses, by_row = sums.differentiate(terms, slice(0, plan.num_pairs), scores)
            gradients = DeferredGradients(run.without_weight(), needs, len(x), dx, by_row)
    return losses, sums, gradients


def _one_pass(
    run: HeadPass, plan: ScoredRows, terms: PairTerms, pair_capacity: int, x: Tensor, sums: SegmentSums, needs: GradMask
) -> tuple[Tensor, Gradients | DeferredGradients]:
    """Return losses (B,) and gradients, computed group by group."""
    targets = plan.targets
    together = plan.num_pairs if terms.objective.batch_coupled or plan.sequence is not None else 1
    groups = list(_groups(plan.pair_rows, together, run.capacity))
    largest = max(rows.stop - rows.start for _, rows in groups)
    capacity = min(largest, pair_capacity)
    tile = run.open(capacity)
    head = run.head if run.group is None else run.group.largest(run.head)  # all ranks decide alike
    deferred = DeferredGradients.worth_deferring(run.backend, head, largest, needs)
    if len(groups) == 1 and largest <= capacity and deferred:
        pairs, rows = groups[0]
        dx = run.empty_rows(cut(x, rows)) if needs.x else None
        scores = run.scores(run.stage(tile, cut(x, rows), cut(targets, rows), keep=True, dx=dx))
        losses, by_row = sums.differentiate(terms, pairs, scores)
        return losses, DeferredGradients(run.without_weight(), needs, len(x), dx, by_row, tile.staged())

    gradients = Gradients.empty(run.head, len(x), needs)
    group_losses, accumulate, pending = [], False, _nothing
    for pairs, rows in groups:
        kept = slice(max(rows.start, rows.stop - capacity), rows.stop)
        early = slice(rows.start, kept.start)
        parts = []
        for part in (early, kept):
            if part.start < part.stop:
                dx = cut(gradients.x, part)
                parts.append(run.stage(tile, cut(x, part), cut(targets, part), keep=part is kept, dx=dx))
        losses, by_row = sums.differentiate(terms, pairs, run.scores(RowSums.cat(parts)))
        group_losses.append(losses)
        if gradients.x is not None:
            cut(gradients.x, rows).mul_(by_row.unsqueeze(1))
            if rows.stop == groups[-1][1].stop:  # while the last group's dW is computed
                pending = run.start_sum(cut(gradients.x, slice(0, rows.stop)))
        num_early = early.stop - early.start
        if kept.start < kept.stop:
            tile.head_gradients(cut(by_row, slice(num_early, len(by_row))), gradients, accumulate)
            accumulate = True
        if num_early:
            out = replace(gradients, x=None)
            tile.recompute_gradients(x[early], targets[early], parts[0], by_row[:num_early], out, accumulate)
            accumulate = True
    tile.release()
    graded = sum(plan.pair_rows)
    if gradients.x is not None and graded < len(x):
        gradients.x[graded:].zero_()
    pending()
    return group_losses[0] if len(group_losses) == 1 else torch.cat(group_losses), gradients


class SegmentSums:
    """The (kinds, B) tables of summed log-probs and statistics, filled group by group, and their derivatives."""

    def __init__(self, plan: ScoredRows, statistics: tuple[str, ...] = ()) -> None:
        self.plan = plan
        self.lengths = plan.lengths.double()
        self.table = torch.zeros_like(self.lengths)
        self.statistics = {name: torch.zeros_like(self.lengths) for name in statistics}

    def fill(self, segments: slice, scores: TokenScores) -> None:
        """Enter the sums of the segments ``plan.order[segments]``, given the scores of their rows.

        A segment's rows are consecutive and are summed in float64 in a fixed order: deterministic on every device.
        """
        counts = cut(self.plan.device_counts, segments)
        if not len(counts):
            return
        order = cut(self.plan.order, segments)
        values = {name: (table, scores.statistics[name]) for name, table in self.statistics.items()}
        for table, rows in ((self.table, scores.logps), *values.values()):
            table.view(-1)[order] = torch.segment_reduce(rows.double(), "sum", lengths=counts, unsafe=True)

    def add_other_ranks(self) -> None:
        """Add the sums of the tokens that other ranks hold; this rank must have entered all pairs."""
        if self.plan.sequence is not None:
            names = list(self.statistics)
            self.table, *others = sequence_totals(self.plan.sequence, self.table, *self.statistics.values())
            self.statistics = dict(zip(names, others))

    def differentiate(self, terms: PairTerms, pairs: slice, scores: TokenScores) -> tuple[Tensor, Tensor]:
        """Return the losses of ``pairs`` and dloss/dlogp of each of their gradient rows, given the rows' scores."""
        k = self.plan.kinds_per_pair
        segments = slice(k * pairs.start, k * pairs.stop)
        self.fill(segments, scores)
        self.add_other_ranks()
        table = columns(self.table, pairs)
        losses, coefficients = terms.coefficients(table, self.lengths, pairs.start, self.plan.num_pairs)
        by_segment = coefficients.flatten().to(scores.logps.dtype)
        counts = cut(self.plan.device_counts, segments)
        return losses, by_segment.repeat_interleave(counts, output_size=len(scores.logps))


def _groups(pair_rows: list[int], pairs_together: int, capacity: int) -> Iterator[tuple[slice, slice]]:
    """Yield (pairs, rows) of each group: as many whole pairs as fit, and always at least ``pairs_together``."""
    pair = row = 0
    while pair < len(pair_rows):
        end, rows = pair + pairs_together, sum(pair_rows[pair : pair + pairs_together])
        while end < len(pair_rows) and rows + pair_rows[end] <= capacity:
            rows += pair_rows[end]
            end += 1
        yield slice(pair, end), slice(row, row + rows)
        pair, row = end, row + rows
