"""The passes over the head that the public functions are made of, on any backend.

Cost in floating point operations, for N scored rows, hidden size H, vocabulary V:

    score           2NHV   log-probs alone
    unit_gradients  4NHV   log-probs and d logp_t / d x_t, one H-vector a row, from which any upstream gradient follows
    regradients     6NHV   gradients for given per-token coefficients, recomputing the logits (8NHV with ``score``)
    pair_losses     6NHV   log-probs, pair losses and their gradients at once (2NHV without gradients, 4NHV frozen head)

``pair_losses`` is the heart. dloss/dlogp_t is the same c for all tokens of a segment and depends on a pair's sums
alone, so whole pairs are taken in groups that fit the workspace: score the group, sum per segment, evaluate and
differentiate the objective on those few sums, and turn the logits, still in the workspace, into gradients. Nothing is
recomputed. A pair longer than the default workspace gets a larger one, within limits. Of a pair longer than the
workspace C, all but the last C rows are scored first and staged again once c is known: 2HV more per such row, and never
more memory. dW is written by the first tile and added to by the others, in the accumulate dtype.

Where one group is the whole batch, its rows may stay staged until the upstream gradient is known: ``StagedGradients``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .backends import Backend
from .backends.base import chunks
from .gradients import Gradients, Needs, StagedGradients
from .head import LMHead, plain_arithmetic
from .pair_loss import PairTerms
from .prepare import Prepared
from .scored_rows import ScoredRows


def score(backend: Backend, head: LMHead, x: Tensor, targets: Tensor, capacity: int) -> Tensor:
    """Log-probs (N,) in the accumulate dtype."""
    if not len(x):
        return torch.empty(0, dtype=head.accumulate_dtype, device=x.device)
    return backend.open_tile(head, min(capacity, len(x))).score(x, targets)


def unit_gradients(
    backend: Backend, head: LMHead, x: Tensor, targets: Tensor, num_rows: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Log-probs (num_rows,) of the first rows of x and the gradient of each with respect to its own row.

    The gradients come in a tensor as large as x, (N, H), whose other rows are left to the caller.
    """
    logps = torch.empty(num_rows, dtype=head.accumulate_dtype, device=x.device)
    dx = torch.empty(x.shape, dtype=head.accumulate_dtype, device=x.device)
    if num_rows:
        tile = backend.open_tile(head, min(capacity, num_rows))
        ones = torch.ones(tile.capacity, dtype=head.accumulate_dtype, device=x.device)
        for rows in chunks(0, num_rows, capacity):
            logps[rows] = tile.stage(x[rows], targets[rows])
            tile.gradients(ones[: rows.stop - rows.start], dx=dx[rows])
    return logps, dx


def regradients(
    backend: Backend, head: LMHead, x: Tensor, targets: Tensor, coefficients: Tensor, capacity: int, needs: Needs
) -> Gradients:
    """Gradients of sum(coefficients * log-probs), the logits computed anew tile by tile."""
    gradients = Gradients.empty(head, len(x), needs)
    if len(x):
        tile = _GradientTile(backend, head, min(capacity, len(x)), gradients)
        for rows in chunks(0, len(x), capacity):
            tile.stage(x[rows], targets[rows])
            tile.add(rows, coefficients[rows])
    else:
        for tensor in (gradients.weight, gradients.bias):
            if tensor is not None:
                tensor.zero_()
    return gradients


def pair_losses(p: Prepared, x: Tensor, needs: Needs) -> tuple[Tensor, Tensor, Gradients | StagedGradients]:
    """Losses (B,), sums (kinds, B), both float64, and the gradients of the reduced loss that ``needs`` asks for.

    ``x`` (N, H) are the planned rows, gathered; rows that the loss does not depend on get zero gradient.
    """
    assert p.backend is not None
    plan, sums = p.plan, _Sums(p.plan, p.terms)
    graded = sum(plan.pair_rows) if needs.any else 0
    rest = slice(graded, len(x))
    with plain_arithmetic(x.device):
        # Forward-only segments first, so that an objective may look at them when its pair's turn comes.
        rest_logps = score(p.backend, p.head, x[rest], plan.targets[rest], p.capacity)
        if not needs.any:
            sums.fill(slice(0, len(plan.counts)), rest_logps)
            return p.terms.losses(p.terms.sums(sums.table, sums.lengths)), sums.table, Gradients(None, None, None)
        sums.fill(slice(plan.kinds_per_pair * plan.num_pairs, len(plan.counts)), rest_logps)

        if not graded:
            losses, _ = sums.differentiate(slice(0, plan.num_pairs), rest_logps[:0])
            gradients: Gradients | StagedGradients = Gradients.zeros(p.head, len(x), needs)
        elif needs.head:
            losses, gradients = _one_pass(p, x, sums, needs)
        else:
            # A frozen head: per-token gradients are stored unscaled and meet their coefficients afterwards.
            logps, dx = unit_gradients(p.backend, p.head, x, plan.targets, graded, p.capacity)
            losses, by_row = sums.differentiate(slice(0, plan.num_pairs), logps)
            dx[:graded].mul_(by_row.unsqueeze(1))
            dx[rest].zero_()
            gradients = Gradients(dx, None, None)
    return losses, sums.table, gradients


def _one_pass(p: Prepared, x: Tensor, sums: _Sums, needs: Needs) -> tuple[Tensor, Gradients | StagedGradients]:
    """Losses (B,) and gradients, group by group."""
    assert p.backend is not None
    targets = p.plan.targets
    groups = list(_groups(p.plan.pair_rows, p.plan.num_pairs if p.terms.objective.batch_coupled else 1, p.capacity))
    largest = max(rows.stop - rows.start for _, rows in groups)
    capacity = min(largest, p.pair_capacity)
    if len(groups) == 1 and largest <= capacity and StagedGradients.pay(p.backend, p.head, largest, needs):
        pairs, rows = groups[0]
        staging = p.backend.open_tile(p.head, capacity)
        losses, by_row = sums.differentiate(pairs, staging.stage(x[rows], targets[rows]))
        return losses, StagedGradients(p.backend, p.head, needs, len(x), by_row, staging.staged())

    gradients = Gradients.empty(p.head, len(x), needs)
    tile = _GradientTile(p.backend, p.head, capacity, gradients)
    group_losses = []
    for pairs, rows in groups:
        resident = slice(max(rows.start, rows.stop - capacity), rows.stop)
        too_many = list(chunks(rows.start, resident.start, capacity))
        logps = [tile.stage(x[part], targets[part]) for part in (*too_many, resident)]
        losses, by_row = sums.differentiate(pairs, torch.cat(logps))
        group_losses.append(losses)
        tile.add(resident, by_row[resident.start - rows.start :])
        for part in too_many:
            tile.stage(x[part], targets[part])
            tile.add(part, by_row[part.start - rows.start : part.stop - rows.start])
    if gradients.x is not None:
        gradients.x[sum(p.plan.pair_rows) :].zero_()
    return torch.cat(group_losses), gradients


class _Sums:
    """The (kinds, B) table of summed log-probs as it fills up, and what follows from its complete columns."""

    def __init__(self, plan: ScoredRows, terms: PairTerms) -> None:
        self.plan, self.terms = plan, terms
        self.lengths = plan.lengths.double()
        self.table = torch.zeros_like(self.lengths)

    def fill(self, segments: slice, logps: Tensor) -> None:
        """Enter the sums of ``plan.order[segments]``, whose rows' log-probs these are.

        Sums of consecutive runs, in float64, in an order that does not vary: deterministic on every device.
        """
        counts = self.plan.device_counts[segments]
        if not len(counts):
            return
        sums = torch.segment_reduce(logps.double(), "sum", lengths=counts, unsafe=True)
        self.table.view(-1)[self.plan.order[segments]] = sums

    def differentiate(self, pairs: slice, logps: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of ``pairs`` and dloss/dlogp of each of their gradient rows, whose log-probs are given."""
        k = self.plan.kinds_per_pair
        segments = slice(k * pairs.start, k * pairs.stop)
        self.fill(segments, logps)
        losses, coefficients = self.terms.coefficients(
            self.table[:, pairs], self.lengths[:, pairs], pairs.start, self.plan.num_pairs
        )
        by_segment = coefficients.flatten().to(logps.dtype)
        counts = self.plan.device_counts[segments]
        return losses, by_segment.repeat_interleave(counts, output_size=len(logps))


class _GradientTile:
    """A tile, its gradients' destination, and whether dW and db have been written yet."""

    def __init__(self, backend: Backend, head: LMHead, capacity: int, gradients: Gradients) -> None:
        self.tile = backend.open_tile(head, capacity)
        self.gradients = gradients
        self.stage = self.tile.stage
        self.accumulate = False

    def add(self, rows: slice, coefficients: Tensor) -> None:
        g = self.gradients
        dx = None if g.x is None else g.x[rows]
        self.tile.gradients(coefficients, dx=dx, dweight=g.weight, dbias=g.bias, accumulate=self.accumulate)
        self.accumulate = True


def _groups(pair_rows: list[int], pairs_together: int, capacity: int) -> Iterator[tuple[slice, slice]]:
    """(pairs, rows) of each group: as many whole pairs as fit, and always at least ``pairs_together``."""
    pair = row = 0
    while pair < len(pair_rows):
        end, rows = pair + pairs_together, sum(pair_rows[pair : pair + pairs_together])
        while end < len(pair_rows) and rows + pair_rows[end] <= capacity:
            rows += pair_rows[end]
            end += 1
        yield slice(pair, end), slice(row, row + rows)
        pair, row = end, row + rows
