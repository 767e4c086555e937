"""Reduce rows, packed or compact input to the scored rows, pair by pair: only these go through the LM head.

Every form first becomes ``Candidates``. Each label position gets the row of the flattened hidden states that predicts
it, its target and its segment. Segments are numbered kind * B + pair, with the kinds of ``pair_loss.KINDS``. ``plan``
then counts, checks and sorts the candidates. It waits for labels on an accelerator once, in one host read, and never
for labels on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .agreement import Split, fingerprint
from .pair_loss import KINDS, PairTerms


@dataclass(frozen=True)
class Candidates:
    """Hold all label positions, scored or not: (K,) tensors on the labels' device.

    ``marginals``: whether marginals are scored; None means that they are if there are any. ``valid``: 0-d bool tensor,
    whether cu_seqlens or segment_ids are well-formed; None if neither was given.
    """

    rows: Tensor
    targets: Tensor
    segments: Tensor
    scored: Tensor
    num_pairs: int
    marginals: bool | None
    valid: Tensor | None
    invalid_message: str


@dataclass(frozen=True)
class ScoredRows:
    """Hold the rows to score: first the rows that need gradients, pair by pair, then the forward-only rows.

    - ``rows``, ``targets``: (N,) int64 on the compute device: row of the flattened hidden states; label. Labels count
      from the first word that this rank holds.
    - ``lengths``: (kinds, B) int64 on the compute device: scored tokens of each segment, on all ranks.
    - ``order``: (kinds * B,) int64 on the compute device: the segments in the order of their rows.
    - ``counts``: the number of rows of each segment, in that order, on the host. ``device_counts`` (kinds * B,) holds
      the same numbers on the device.
    - ``kinds_per_pair``: how many segments of each pair need gradients, so that pair p owns the segments
      ``order[p * kinds_per_pair : (p + 1) * kinds_per_pair]``.
    - ``sequence``: the process group whose ranks hold the pairs' other tokens, or None.
    - ``distinct``: whether no row of the hidden states is scored twice, as a response and as a marginal.
    """

    rows: Tensor
    targets: Tensor
    lengths: Tensor
    order: Tensor
    counts: list[int]
    device_counts: Tensor
    kinds_per_pair: int
    sequence: Any
    distinct: bool

    @property
    def num_pairs(self) -> int:
        return self.lengths.shape[1]

    @property
    def pair_rows(self) -> list[int]:
        """Return the number of rows of each pair that need gradients."""
        k = self.kinds_per_pair
        return [sum(self.counts[p * k : (p + 1) * k]) for p in range(self.num_pairs)]

    def take(self, hidden: Tensor) -> Tensor:
        """Return the rows (N, H) of ``hidden`` (..., H)."""
        return _TakeRows.apply(hidden, self.rows, self.distinct)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, distinct: bool) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape, ctx.distinct = hidden.shape, distinct
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return spread_rows(x, rows, ctx.shape, distinct=ctx.distinct), None, None


def spread_rows(x: Tensor, rows: Tensor, shape: torch.Size, *, distinct: bool) -> Tensor:
    """Return zeros of ``shape`` (..., H) with x (N, H) added at ``rows``; ``distinct``: no row occurs twice."""
    flat = x.new_zeros(shape[:-1].numel(), shape[-1])
    # Copies are faster: on an H100, additions take 1% as long as the matmuls.
    place = flat.index_copy_ if distinct else flat.index_add_
    return place(0, rows, x).view(shape)


def from_sequences(
    labels: Tensor, marginal_labels: Tensor | None, cu_seqlens: Tensor | None, *, shift: bool, ignore_index: int
) -> Candidates:
    """Return the candidates of the rows form, labels (2B, T), or with ``cu_seqlens`` of the packed form, labels (N,).

    Sequence b scores y_w of pair b, and y_l as a marginal. Sequence B + b does the reverse. Packed sequence s holds
    positions cu_seqlens[s] to cu_seqlens[s + 1].
    """
    positions = torch.arange(labels.numel(), device=labels.device)
    valid, message = None, ""
    if cu_seqlens is None:
        num_sequences, length = labels.shape
        sequence, place = positions // length, positions % length
    else:
        cu_seqlens = cu_seqlens.to(labels.device, torch.int64)
        num_sequences = len(cu_seqlens) - 1
        # Positions outside a malformed cu_seqlens get the number 2B, which is in bounds until the host read reports it.
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
        place = positions - cu_seqlens[sequence]
        valid = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == len(labels)) & (cu_seqlens.diff() >= 0).all()
        message = f"cu_seqlens must start at 0, never decrease and end at the number of positions, {len(labels)}"
    rows = positions - 1 if shift else positions
    targets, segments = labels.flatten(), sequence
    if marginal_labels is not None:
        # Sequence b < B holds y_l as its alternative, so its marginal segment is 3B + b; sequence B + b gives 2B + b.
        segments = torch.cat([sequence, num_sequences + (sequence + num_sequences // 2) % num_sequences])
        targets = torch.cat([targets, marginal_labels.flatten()])
        rows, place = rows.repeat(2), place.repeat(2)
    scored = targets != ignore_index
    if shift:
        scored &= place != 0  # nothing predicts the first token of a sequence
    marginals = marginal_labels is not None
    return Candidates(rows, targets, segments, scored, num_sequences // 2, marginals, valid, message)


def from_compact(labels: Tensor, segment_ids: Tensor, num_pairs: int, *, ignore_index: int) -> Candidates:
    """Return the candidates of the compact form: row i of hidden predicts labels[i] for segment segment_ids[i]."""
    limit = 4 * num_pairs
    return Candidates(
        rows=torch.arange(len(labels), device=labels.device),
        targets=labels,
        segments=segment_ids.to(torch.int64).clamp(0, limit - 1),
        scored=labels != ignore_index,
        num_pairs=num_pairs,
        marginals=None,
        valid=((segment_ids >= 0) & (segment_ids < limit) | (labels == ignore_index)).all(),
        invalid_message=f"segment_ids must be in 0..{limit - 1}, four segments for each of {num_pairs} pairs",
    )


def plan(
    candidates: Candidates,
    terms: PairTerms | None,
    vocab_size: int,
    device: torch.device,
    split: Split | None,
    same: Mapping[str, Any],
) -> ScoredRows:
    """Count, check and sort the candidates. Ranks of ``split`` must agree on ``same`` and on the labels.

    ``terms`` say which rows need gradients, and where every pair must have scored tokens; None: none and nowhere.

    Raises:
        ValueError: for labels outside the vocabulary, malformed cu_seqlens or segment_ids, and pairs with a response
            that the loss needs but no label scores.
    """
    c, num_pairs = candidates, candidates.num_pairs
    counts_device = torch.zeros(4 * num_pairs, dtype=torch.int64, device=c.targets.device)
    counts_device.scatter_add_(0, c.segments, c.scored.long())
    name, columns = "labels or marginal_labels" if c.marginals else "labels", (c.targets, c.rows, c.segments)
    form = (c.valid, c.invalid_message)
    counts = read_counts(name, counts_device, c.scored, columns, vocab_size, device, split, same, *form)
    lengths, all_counts = counts_device, counts
    if split is not None and split.sequence is not None:
        lengths, all_counts = split.total_counts(to_device(counts_device, device))
    num_kinds = 4 if c.marginals or (c.marginals is None and any(all_counts[2 * num_pairs :])) else 2
    if terms is not None:
        _check_scored(all_counts, num_pairs, terms.required_kinds(num_kinds))

    graded_kinds = () if terms is None else terms.gradient_kinds(num_kinds)
    forward_kinds = tuple(kind for kind in range(num_kinds) if kind not in graded_kinds)
    segments = [
        kind * num_pairs + pair
        for kinds in (graded_kinds, forward_kinds)
        for pair in range(num_pairs)
        for kind in kinds
    ]
    order = torch.tensor(segments, device="cpu")
    rank = to_device(order.argsort(), c.targets.device)
    index = torch.nonzero_static(c.scored, size=sum(counts)).squeeze(1)
    index = index[rank[c.segments[index]].argsort(stable=True)]
    order, counts_device = to_device(order, device), to_device(counts_device, device)
    targets = to_device(c.targets[index], device)
    return ScoredRows(
        rows=to_device(c.rows[index], device),
        targets=targets if split is None or split.vocab is None else targets - split.vocab.first,
        lengths=to_device(lengths, device).view(4, num_pairs)[:num_kinds],
        order=order,
        counts=[counts[segment] for segment in segments],
        device_counts=counts_device[order],
        kinds_per_pair=len(graded_kinds),
        sequence=None if split is None else split.sequence,
        distinct=not c.marginals,
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move ``tensor`` without waiting for the device. That is safe: pageable memory is read before the call returns."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def checked_labels(name: str, labels: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Return ``labels`` as int64; raise unless it is an integer tensor of that shape on the CPU or on ``device``."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be int64, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.device.type != "cpu" and labels.device != device:
        raise ValueError(f"{name} is on {labels.device}: move it to the CPU or to hidden's device, {device}")
    return labels.to(torch.int64)


def read_counts(
    name: str,
    counts: Tensor,
    scored: Tensor,
    columns: tuple[Tensor, ...],
    vocab_size: int,
    device: torch.device,
    split: Split | None,
    same: Mapping[str, Any],
    valid: Tensor | None = None,
    invalid_message: str = "",
) -> list[int]:
    """Return ``counts`` on the host, in the only host read: it holds everything that the plan and the checks need.

    ``columns``: the targets, and where they are; the ranks of ``split`` must have the same where ``scored``.
    """
    targets = columns[0]
    # The range of the scored targets and 0, which stands for the other targets.
    lowest_highest = torch.stack((targets * scored).aminmax()) if len(targets) else targets.new_zeros(2)
    numbers = torch.cat([lowest_highest.new_ones(1) if valid is None else valid.view(1), lowest_highest, counts])
    if split is None:
        is_valid, lowest, highest, *found = numbers.tolist()
    else:
        labels = fingerprint(torch.stack([scored * (column + 1) for column in columns]))
        is_valid, lowest, highest, *found = split.agree(numbers, {**same, "labels": labels}, vocab_size, device)
        vocab_size = split.vocab_size(vocab_size)
    if not is_valid:
        raise ValueError(invalid_message)
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"{name} contain {lowest if lowest < 0 else highest}, outside 0..{vocab_size - 1} (the rows of weight); "
            "positions that are not scored must hold ignore_index"
        )
    return found


def _check_scored(counts: list[int], num_pairs: int, required_kinds: tuple[int, ...]) -> None:
    for kind in required_kinds:
        empty = [p for p in range(num_pairs) if counts[kind * num_pairs + p] == 0]
        if empty:
            shown = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
            name = KINDS[kind].replace("_", " ")
            if kind >= 2:
                raise ValueError(
                    f"the {name} response of pair(s) {shown} has no scored token, but the loss needs it. A pair laid "
                    "out plain (conditioned=False, or dropped by alternative_dropout) has no marginals: condition "
                    "these pairs, or use an objective without marginals and marginal_weight=0"
                )
            raise ValueError(
                f"the {name} response of pair(s) {shown} has no scored token; its loss would be a constant: drop these "
                "pairs or correct their labels (with shift=True the label at a sequence's first position is not scored)"
            )
