"""Do everything that precedes the first matmul: check the arguments together, recognise the input form, plan.

``prepare`` plans a call on pairs, ``ScoredTokens`` a call of ``linear_logps``, eager or compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import passes, scored_rows
from .agreement import Split, splits_words
from .arguments import integer
from .backends import Backend, resolve_backend
from .gradients import Gradients, GradMask
from .groups import VocabGroup
from .head import LMHead, checked_head, plain_arithmetic
from .objectives import make_objective
from .options import PairOptions, PairTensors, TokenOptions
from .pair_loss import PairTerms
from .passes import HeadPass, KeptTokens
from .row_sums import TokenScores
from .scored_rows import checked_labels, read_counts, to_device

# If the user sets no bound, a pair that does not fit the default workspace gets one of up to this many times the rows:
# computing the logits twice would take up to a third more time.
PAIR_GROWTH = 4


@dataclass(frozen=True)
class Prepared:
    """Hold what the passes need to run a checked call on pairs. ``run`` is None for the reference.

    ``pair_capacity``: the number of rows that may be kept for a pair that is longer than the workspace.
    """

    run: HeadPass | None
    plan: scored_rows.ScoredRows
    terms: PairTerms
    needs: GradMask
    pair_capacity: int


def prepare(
    tensors: PairTensors, options: PairOptions, split: Split | None = None, *, sums_only: bool = False
) -> Prepared:
    """Plan a call with checked ``options``; raise the errors of ``fused_inspo_loss``.

    With ``sums_only`` there is no loss: no row needs gradients, and a response may have no scored token.
    """
    t, o = tensors, options
    hidden, objective = t.hidden, make_objective(o.objective)
    head = checked_head(hidden, t.weight, t.bias, o.softcap, o.logit_scale, is_shard=splits_words(split))
    backend = resolve_backend(o.backend, head, hidden.device)
    same = _common_arguments(split, hidden, head, backend, o, shift=o.shift and t.segment_ids is None)
    candidates = find_candidates(t, o)
    terms = PairTerms(
        objective=objective,
        ref_logps=_vector("ref_logps", t.ref_logps, 2 * candidates.num_pairs, hidden.device),
        pair_weights=_vector("pair_weights", t.pair_weights, candidates.num_pairs, hidden.device),
        marginal_weight=o.marginal_weight,
        mean=o.reduction == "mean",
    )
    if objective.needs_reference and t.ref_logps is None and not sums_only:
        raise ValueError(
            f"objective {type(objective).__name__} needs ref_logps: pass the reference model's summed log-probs, "
            "(2B,), choose a reference-free objective (SimPO, ORPO), or set needs_reference = False in your own"
        )
    if terms.uses_marginals and t.marginal_labels is None and t.segment_ids is None:
        raise ValueError(
            (f"marginal_weight={o.marginal_weight}" if o.marginal_weight else f"objective {type(objective).__name__}")
            + " needs the marginals: pass marginal_labels (condition_pairs makes them; plain pairs have none)"
        )
    same |= {"num_pairs": candidates.num_pairs, "objective": objective, "reduction": o.reduction}
    same |= {name: getattr(terms, name) for name in ("ref_logps", "pair_weights", "marginal_weight")}
    graded = None if sums_only else terms
    plan = scored_rows.plan(candidates, graded, head.vocab_size, hidden.device, split, same)
    run = None if backend is None else head_pass(backend, head, o, split)
    growth = PAIR_GROWTH if o.max_workspace_bytes is None else 1
    return Prepared(run, plan, terms, GradMask.of(hidden, head), 0 if run is None else run.capacity * growth)


def _common_arguments(
    split: Split | None,
    hidden: Tensor,
    head: LMHead,
    backend: Backend | None,
    options: TokenOptions,
    *,
    shift: bool = False,
) -> dict[str, Any]:
    """Return each public function's arguments that must be equal on all ranks; raise if they cannot share the call."""
    if split is None:
        return {}
    if backend is None:
        raise ValueError('backend="reference" takes no groups, it needs whole logits: use "torch" or "triton"')
    if shift and split.sequence is not None:
        raise ValueError(
            "sequence_group needs shift=False: the label of a rank's first position may belong to the hidden state of "
            "another rank. Shift the labels of the whole sequence, then split them"
        )
    return {
        "hidden": (tuple(hidden.shape), head.compute_dtype),
        "weight": (head.hidden_size, head.weight.dtype, head.bias is None),
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
        "temperature": head.temperature,
        "ignore_index": options.ignore_index,
        "statistics": options.statistics,
        "max_workspace_bytes": options.max_workspace_bytes,
        "backend": backend.name,
        "requires_grad": GradMask.of(hidden, head),
    }


def head_pass(backend: Backend, head: LMHead, options: TokenOptions, split: Split | None = None) -> HeadPass:
    """Return the head with its backend and workspace."""
    device, max_workspace_bytes = head.weight.device, options.max_workspace_bytes
    vocab: VocabGroup | None = None if split is None else split.vocab
    head = backend.prepared(head.detach())
    largest = head
    if vocab is not None:
        head, largest = replace(head, whole_vocab=vocab.vocab_size), vocab.largest(head)
    if max_workspace_bytes is None:
        max_workspace_bytes = backend.default_workspace_bytes(largest, device)
        if vocab is not None:
            # Keep as many rows as the whole head would: this rank's part of that workspace.
            whole = head.without_weight(vocab.vocab_size)
            rows = backend.capacity(whole, device, backend.default_workspace_bytes(whole, device))
            more = backend.capacity(largest, device, max_workspace_bytes) - rows
            max_workspace_bytes -= backend.kept_bytes(largest, max(0, more))
    capacity = backend.capacity(largest, device, max_workspace_bytes)
    return HeadPass(head, backend, capacity, max_workspace_bytes, options.statistics, vocab)


def find_candidates(tensors: PairTensors, options: PairOptions) -> scored_rows.Candidates:
    """Recognise the input form, check its shapes and reduce it to candidates."""
    hidden, labels, marginal_labels = tensors.hidden, tensors.labels, tensors.marginal_labels
    cu_seqlens, segment_ids, ref_logps = tensors.cu_seqlens, tensors.segment_ids, tensors.ref_logps
    num_pairs, shift, ignore_index = options.num_pairs, options.shift, options.ignore_index
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
    return scored_rows.from_sequences(labels, marginal_labels, cu_seqlens, shift=shift, ignore_index=ignore_index)


def _even(what: str, number: int) -> int:
    if number % 2:
        raise ValueError(
            f"{what}: got {number}, an odd number; the first half belongs to the chosen responses, the second to the "
            "rejected responses"
        )
    return number


def _vector(name: str, tensor: Tensor | None, length: int, device: torch.device) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.shape != (length,):
        # A table of pair_logps is in the right order; a table with one row for each pair would not be.
        in_order = tensor.numel() == length and tensor.shape[:1].numel() in (1, 2, length)
        remedy = f": pass {name}.flatten()" if in_order else ""
        raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}{remedy}")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device, which holds no data")
    # A copy: objectives are the user's code, and might write to it.
    return tensor.detach().to(device, torch.float64, non_blocking=tensor.device.type == "cpu", copy=True)


@dataclass(frozen=True)
class ScoredTokens:
    """Hold the scored tokens of a call: positions (N,) among all targets, rows x (N, H) of hidden, targets (N,)."""

    run: HeadPass
    index: Tensor
    x: Tensor
    targets: Tensor

    @classmethod
    def find(
        cls, hidden: Tensor, targets: Tensor, head: LMHead, options: TokenOptions, split: Split | None = None
    ) -> ScoredTokens | None:
        """Check ``targets`` and return those that are scored, with their rows of ``hidden``; None for the reference."""
        device, flat = hidden.device, checked_labels("targets", targets, hidden.shape[:-1], hidden.device).flatten()
        backend = resolve_backend(options.backend, head, device)
        same = _common_arguments(split, hidden, head, backend, options)
        scored = flat != options.ignore_index
        number = scored.sum().view(1)
        (count,) = read_counts("targets", number, scored, (flat,), head.vocab_size, device, split, same)
        if backend is None:
            return None
        index = torch.nonzero_static(scored, size=count).squeeze(1)
        flat, index = to_device(flat[index], device), to_device(index, device)
        run = head_pass(backend, head, options, split)
        if run.group is not None:
            flat = flat - run.group.first
        return cls(run, index, hidden.reshape(-1, head.hidden_size).index_select(0, index), flat)

    def forward(self, needs: GradMask, *, may_keep: bool = True) -> tuple[TokenScores, Tensor | KeptTokens | None]:
        """Return the scores of the tokens, and what their gradients need.

        A frozen head needs the gradient (N, H) of each log-prob with respect to its own row. A trainable head needs
        kept rows, or None if ``may_keep`` is false. Without gradients it is None.
        """
        with plain_arithmetic(self.x.device):
            if needs.x and not needs.head:
                dx = self.run.empty_rows(self.x)
                scores = self.run.score(self.x, self.targets, dx)
                self.run.start_sum(dx)()
                return scores, dx
            if needs.head and may_keep:
                return passes.token_logps(self.run, self.x, self.targets, needs)
            return self.run.score(self.x, self.targets), None

    def backward(self, upstream: Tensor, kept: KeptTokens, needs: GradMask, *, reads_last: bool) -> Gradients:
        """Return the gradients of sum(upstream * log-probs), upstream (N,).

        ``reads_last``: whether nobody reads ``kept`` again, so that its memory may be reused.
        """
        with plain_arithmetic(self.x.device):
            return passes.token_gradients(self.run, self.x, self.targets, kept, upstream, needs, reads_last=reads_last)

    def scatter(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Return a tensor of that shape with ``values`` (N, ...) at the scored positions and 0 elsewhere."""
        total = shape.numel() if values.dim() == 1 else shape[:-1].numel()
        return values.new_zeros(total, *values.shape[1:]).index_copy(0, self.index, values).view(shape)
