"""Everything that happens before any product runs: check the arguments of the loss, recognise the input form, plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import scored_rows
from .agreement import Split
from .arguments import finite, integer
from .backends import Backend, check_backend, resolve_backend
from .gradients import Needs
from .groups import VocabGroup
from .head import FLOATS, LMHead, checked_head, checked_softcap
from .objectives import Objective, make_objective
from .pair_loss import PairTerms
from .passes import HeadPass
from .row_sums import checked_statistics
from .scored_rows import checked_labels

# Without a bound by the user, a pair longer than the default workspace gets one of up to so many times its rows:
# staging them twice would cost up to a third more time.
PAIR_GROWTH = 4


@dataclass(frozen=True)
class Prepared:
    """A checked call of the loss: what the passes need. ``run`` is None for the reference.

    ``pair_capacity``: rows that may be kept for a pair that is longer than the workspace.
    """

    head: LMHead
    run: HeadPass | None
    plan: scored_rows.ScoredRows
    terms: PairTerms
    pair_capacity: int


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the loss's plain arguments that are given, converted; an error for one that is wrong by itself."""
    checked = dict(options)
    for name, value in options.items():
        if name == "objective" and not isinstance(value, (str, Objective)):
            make_objective(value)  # which says what is wrong
        elif name == "reduction" and value not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", got {value!r}')
        elif name == "shift" and not isinstance(value, bool):
            raise ValueError(f"shift must be True or False, got {value!r}")
        elif name == "backend":
            check_backend(value)
        elif name == "ignore_index":
            checked[name] = integer(name, value)
        elif name in ("max_workspace_bytes", "num_pairs") and value is not None:
            checked[name] = integer(name, value, minimum=1)
        elif name == "marginal_weight" and not (torch.compiler.is_compiling() and isinstance(value, (int, float))):
            # A compiler would make a new graph of every value that is looked at.
            checked[name] = finite(name, value)
        elif name in ("softcap", "logit_scale"):
            checked[name] = checked_softcap(value) if name == "softcap" else finite(name, value)
        elif name == "statistics":
            checked[name] = checked_statistics(value)
    return checked


def check_tensors(*, ref_logps: Any, pair_weights: Any, **labels: Any) -> None:
    """Raise for what is no tensor of its kind; ``labels`` are those, segment_ids and cu_seqlens."""
    for name, value in (("ref_logps", ref_logps), ("pair_weights", pair_weights)):
        if value is not None and (not isinstance(value, Tensor) or value.dtype not in FLOATS):
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if pair_weights is not None and pair_weights.requires_grad:
        raise ValueError("pair_weights requires grad, but would get no gradient here: pass pair_weights.detach()")
    for name, value in labels.items():
        if not isinstance(value, Tensor) and (value is not None or name == "labels"):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def prepare(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: str | Objective,
    ref_logps: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    shift: bool,
    cu_seqlens: Tensor | None,
    segment_ids: Tensor | None,
    num_pairs: int | None,
    marginal_labels: Tensor | None,
    marginal_weight: float,
    pair_weights: Tensor | None,
    reduction: str,
    statistics: tuple[str, ...],
    max_workspace_bytes: int | None,
    backend: str,
    split: Split | None = None,
) -> Prepared:
    """Arguments, of which ``checked_options`` and ``check_tensors`` approve, and errors as for ``fused_inspo_loss``."""
    head = checked_head(hidden, weight, bias, softcap, logit_scale)
    resolved = resolve_backend(backend, head, hidden.device)
    objective = make_objective(objective)
    check_split(split, resolved, shift=shift and segment_ids is None)
    candidates = find_candidates(
        hidden,
        labels,
        marginal_labels=marginal_labels,
        cu_seqlens=cu_seqlens,
        segment_ids=segment_ids,
        num_pairs=num_pairs,
        ref_logps=ref_logps,
        shift=shift,
        ignore_index=ignore_index,
    )
    terms = PairTerms(
        objective=objective,
        ref_logps=_vector("ref_logps", ref_logps, 2 * candidates.num_pairs, hidden.device),
        pair_weights=_vector("pair_weights", pair_weights, candidates.num_pairs, hidden.device),
        marginal_weight=marginal_weight,
        mean=reduction == "mean",
    )
    if objective.needs_reference and ref_logps is None:
        raise ValueError(
            f"objective {type(objective).__name__} needs ref_logps: pass the reference model's summed log-probs, "
            "(2B,), choose a reference-free objective (SimPO, ORPO), or set needs_reference = False in your own"
        )
    if terms.uses_marginals and marginal_labels is None and segment_ids is None:
        raise ValueError(
            (f"marginal_weight={marginal_weight}" if marginal_weight else f"objective {type(objective).__name__}")
            + " needs the marginals: pass marginal_labels (condition_pairs makes them; plain pairs have none)"
        )
    plan = scored_rows.plan(
        candidates,
        vocab_size=head.vocab_size,
        gradient_kinds=terms.gradient_kinds,
        required_kinds=terms.required_kinds,
        device=hidden.device,
        split=split,
        same=None
        if split is None
        else {
            **common_arguments(hidden, head, resolved, max_workspace_bytes, ignore_index, statistics),
            "objective": objective,
            "num_pairs": candidates.num_pairs,
            "ref_logps": terms.ref_logps,
            "pair_weights": terms.pair_weights,
            "marginal_weight": marginal_weight,
            "reduction": reduction,
        },
    )
    run = head_pass(resolved, head, hidden.device, max_workspace_bytes, statistics, split)
    growth = PAIR_GROWTH if max_workspace_bytes is None else 1
    return Prepared(head, run, plan, terms, 0 if run is None else run.capacity * growth)


def check_split(split: Split | None, backend: Backend | None, *, shift: bool = False) -> None:
    """Raise for what split heads and sequences cannot do."""
    if split is None:
        return
    if backend is None:
        raise ValueError('backend="reference" takes no groups, it needs whole logits: use "torch" or "triton"')
    if shift and split.sequence is not None:
        raise ValueError(
            "sequence_group needs shift=False: the label of a rank's first position may belong to the hidden state of "
            "another rank. Shift the labels of the whole sequence, then split them"
        )


def common_arguments(
    hidden: Tensor,
    head: LMHead,
    backend: Backend | None,
    max_workspace_bytes: int | None,
    ignore_index: int,
    statistics: tuple[str, ...],
) -> dict[str, Any]:
    """What the ranks of a split head must have in common, whichever function they call."""
    return {
        "hidden": (tuple(hidden.shape), head.compute_dtype),
        "weight": (head.hidden_size, head.weight.dtype, head.bias is None),
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
        "temperature": head.temperature,
        "ignore_index": ignore_index,
        "statistics": statistics,
        "max_workspace_bytes": max_workspace_bytes,
        "backend": None if backend is None else backend.name,
        "requires_grad": Needs.of(hidden, head),
    }


def head_pass(
    backend: Backend | None,
    head: LMHead,
    device: torch.device,
    max_workspace_bytes: int | None,
    statistics: tuple[str, ...] = (),
    split: Split | None = None,
) -> HeadPass | None:
    """The head on its backend, with its workspace; None for the reference."""
    if backend is None:
        return None
    vocab: VocabGroup | None = None if split is None else split.vocab
    head = backend.prepared(head.detach())
    largest = head
    if vocab is not None:
        head, largest = vocab.shard(head), vocab.largest(head)
    if max_workspace_bytes is None:
        max_workspace_bytes = backend.default_workspace_bytes(largest, device)
        if vocab is not None:
            # Room for the rows that a whole head would keep: a rank's share of its workspace.
            whole = vocab.whole(head)
            rows = backend.capacity(whole, device, backend.default_workspace_bytes(whole, device))
            more = backend.capacity(largest, device, max_workspace_bytes) - rows
            max_workspace_bytes -= backend.kept_bytes(largest, max(0, more))
    capacity = backend.capacity(largest, device, max_workspace_bytes)
    return HeadPass(head, backend, capacity, max_workspace_bytes, statistics, vocab)


def find_candidates(
    hidden: Tensor,
    labels: Tensor,
    *,
    marginal_labels: Tensor | None,
    cu_seqlens: Tensor | None,
    segment_ids: Tensor | None,
    num_pairs: int | None,
    ref_logps: Tensor | None,
    shift: bool,
    ignore_index: int,
) -> scored_rows.Candidates:
    """Recognise the input form, check its shapes and reduce it to candidates."""
    if cu_seqlens is not None and segment_ids is not None:
        raise ValueError("cu_seqlens (packed form) and segment_ids (compact form) exclude each other: pass one")
    if segment_ids is not None and marginal_labels is not None:
        raise ValueError("in the compact form marginals are segments 2B..4B-1 of segment_ids: omit marginal_labels")
    packed_or_compact = cu_seqlens is not None or segment_ids is not None
    if hidden.dim() != (2 if packed_or_compact else 3):
        raise ValueError(
            f"hidden must be {'(N, H) with cu_seqlens or segment_ids' if packed_or_compact else '(2B, T, H)'}, "
            f"got shape {tuple(hidden.shape)}"
            + ("" if packed_or_compact else "; for (N, H) pass cu_seqlens (packed) or segment_ids (compact)")
            + ("; a batch of one packed row is hidden[0]" if packed_or_compact and hidden.shape[:1] == (1,) else "")
        )
    labels = checked_labels("labels", labels, hidden.shape[:-1], hidden.device)
    if marginal_labels is not None:
        marginal_labels = checked_labels("marginal_labels", marginal_labels, hidden.shape[:-1], hidden.device)
        marginal_labels = marginal_labels.to(labels.device)

    if segment_ids is not None:
        segment_ids = checked_labels("segment_ids", segment_ids, labels.shape, hidden.device).to(labels.device)
        if num_pairs is None:
            if ref_logps is None:
                raise ValueError("the compact form needs num_pairs (or ref_logps, whose length is 2B) to know B")
            num_pairs = integer("half of ref_logps' length", _even("ref_logps", ref_logps.numel()) // 2, minimum=1)
        return scored_rows.from_compact(labels, segment_ids, num_pairs, ignore_index=ignore_index)

    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            raise ValueError("cu_seqlens must be a 1-D int32 tensor of 2B + 1 sequence boundaries")
        num_sequences, what = len(cu_seqlens) - 1, "sequences in cu_seqlens"
    else:
        num_sequences, what = len(hidden), "rows of hidden"
    if _even(what, num_sequences) < 2:
        raise ValueError(f"there must be at least one pair, got {num_sequences} {what}")
    if num_pairs is not None and 2 * num_pairs != num_sequences:
        raise ValueError(f"num_pairs={num_pairs} does not fit {num_sequences} {what}")
    if cu_seqlens is not None:
        return scored_rows.from_packed(labels, marginal_labels, cu_seqlens, shift=shift, ignore_index=ignore_index)
    return scored_rows.from_rows(labels, marginal_labels, shift=shift, ignore_index=ignore_index)


def _even(what: str, number: int) -> int:
    if number % 2:
        raise ValueError(
            f"{what}: got {number}, an odd number; the first half belongs to the chosen responses, the second to the "
            "rejected ones"
        )
    return number


def _vector(name: str, tensor: Tensor | None, length: int, device: torch.device) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}")
    # A copy: objectives are the user's code, and might write to it.
    return tensor.detach().to(device, torch.float64, non_blocking=tensor.device.type == "cpu", copy=True)
