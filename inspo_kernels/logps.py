"""The public log-probs: ``linear_logps`` per token, ``pair_logps`` summed over the responses of pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import compiled, reference
from .agreement import Split, errors_shared, splits_words
from .gradients import GradMask, dtypes_of, first_order_only, graph_is_freed, hooks_see_saved_tensors, refuse_transforms
from .groups import local_shard
from .head import checked_head
from .options import PairOptions, PairTensors, TokenOptions, arguments_of
from .passes import KeptTokens, pair_sums
from .prepare import ScoredTokens, prepare
from .row_sums import RowSums


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    temperature: float = 1.0,
    max_workspace_bytes: int | None = None,
    statistics: Iterable[str] = (),
    process_group: Any = None,
    backend: str = "auto",
) -> Any:
    """Compute per-token log-probs log softmax(z' / temperature)[target] without the logits of all tokens.

    z = logit_scale * (hidden @ weight.T + bias). z' = softcap * tanh(z / softcap) with a soft-cap, else z' = z.

    Args:
        hidden: (..., H) hidden states after the model's final norm: float16, bfloat16, float32 or float64.
        weight: (V, H) LM head on hidden's device, with hidden's dtype (any under autocast).
        targets: (...) int64 token ids, *not* shifted: hidden[i] is scored on targets[i]. May live on the CPU.
        bias: (V,) or None.
        softcap: positive or None.
        logit_scale: finite.
        ignore_index: targets with this value are skipped: log-prob 0, no gradient, no head work.
        temperature: positive.
        max_workspace_bytes: bound on the logits workspace, as for ``fused_inspo_loss``.
        statistics: names of statistics of softmax(z' / temperature) to return from the same pass: "entropy" (nats),
            "mean_logit" and "logsumexp" of z' / temperature, "is_top1" (bool: the target is the lowest id among the
            largest logits), "log_sum_sq_probs" (log of the sum of squared probabilities).
        process_group: vocabulary-parallel head, as for ``fused_inspo_loss``. Log-probs and statistics are the same on
            every rank. What you compute from them must be, too: the backward pass sums dX over the ranks.
        backend: "auto", "triton", "torch" or "reference", as for ``fused_inspo_loss``.

    Returns:
        (...) log-probs in nats, float32 (float64 for float64 inputs), differentiable in hidden, weight and bias; a
        second derivative raises. With ``statistics``, a tuple of the log-probs and {name: (...)}: same dtype, no
        gradient, 0 (False) where ignored.

    Raises:
        TypeError, ValueError: for shapes, dtypes, devices or targets that do not fit. The message says which.

    Cost for N scored tokens: 2NHV operations without gradients. If weight and bias need none (LoRA), each token keeps
    d logp / d hidden, one H-vector, and backward recomputes nothing: 4NHV. With a trainable head, the C tokens that the
    workspace holds are kept until the backward pass: 6NHV + 2HV max(0, N - C).
    """
    if backend != "reference":
        refuse_transforms("linear_logps")
    split = Split.of(process_group)
    with errors_shared(split, hidden):
        weight, bias = local_shard("weight", weight, process_group), local_shard("bias", bias, process_group)
        options = TokenOptions.checked(
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            ignore_index=ignore_index,
            statistics=statistics,
            max_workspace_bytes=max_workspace_bytes,
            backend=backend,
        )
        names = options.statistics
        transform = (options.softcap, options.logit_scale, options.temperature)
        head = checked_head(hidden, weight, bias, *transform, is_shard=splits_words(split))
        if torch.compiler.is_compiling():
            logps, found = compiled.linear_logps(hidden, head, targets, options)
            return (logps, found) if names else logps
        needs = GradMask.of(hidden, head)
        scored = ScoredTokens.find(hidden, targets, head, options, split)
    if scored is None:
        given = arguments_of(options, without=("max_workspace_bytes", "backend"))
        return reference.linear_logps(hidden, weight, targets.to(hidden.device, torch.int64), bias=bias, **given)
    logps, *values = _LinearLogps.apply(scored.x, weight, bias, scored, needs)
    logps = scored.scatter(logps, targets.shape)
    return (logps, {name: scored.scatter(v, targets.shape) for name, v in zip(names, values)}) if names else logps


@torch.compiler.disable(reason="pair_logps plans from the labels, whose values a graph does not know")
@torch.no_grad()
def pair_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_pairs: int | None = None,
    marginal_labels: Tensor | None = None,
    process_group: Any = None,
    sequence_group: Any = None,
    max_workspace_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum log-probs over the responses of pairs, without gradients or an objective: for references and evaluation.

    Takes the arguments and input forms of ``fused_inspo_loss``. 2NHV operations, in a workspace of one tile.

    Returns:
        Two tables of shape (kinds, B).

        - sums: float64, in nats.
        - lengths: int64, scored tokens. 0 for a response without a scored token.

        Row 0 of each holds the chosen, row 1 the rejected responses. With marginals, rows 2 and 3 hold the
        marginals of the chosen and rejected responses, log pi(y_w | x) and log pi(y_l | x).

    Raises:
        TypeError, ValueError: as ``fused_inspo_loss``.
    """
    split = Split.of(process_group, sequence_group)
    with errors_shared(split, hidden):
        weight, bias = local_shard("weight", weight, process_group), local_shard("bias", bias, process_group)
        tensors = PairTensors(hidden, weight, labels, bias, marginal_labels, cu_seqlens, segment_ids)
        tensors.check_kinds()
        options = PairOptions.checked(
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            max_workspace_bytes=max_workspace_bytes,
            backend=backend,
            shift=shift,
            num_pairs=num_pairs,
        )
        p = prepare(tensors, options, split, sums_only=True)
    if p.run is None:
        left_out = ("temperature", "max_workspace_bytes", "backend", "objective", "marginal_weight", "reduction")
        given = arguments_of(tensors.for_reference(), without=("pair_weights",))
        sums, lengths, _ = reference.pair_sums(**given, **arguments_of(options, without=left_out))
        return sums, lengths
    return pair_sums(p.run, p.plan, p.plan.take(hidden)).table, p.plan.lengths


class _LinearLogps(torch.autograd.Function):
    """Log-probs and statistics; saves what the backward pass needs as ``ScoredTokens.forward`` left it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scored: ScoredTokens, needs: GradMask
    ) -> tuple[Tensor, ...]:
        scores, state = scored.forward(needs)
        run = scored.run
        ctx.needs, ctx.dtypes, ctx.hooked = needs, dtypes_of(x, weight, bias), hooks_see_saved_tensors()
        logps = scores.logps  # saved first, for ``first_order_only``
        if isinstance(state, KeptTokens):
            ctx.recomputes = state.sums is not None
            sums = () if state.sums is None else (state.sums.offset, state.sums.rest, state.sums.label)
            # Only recomputation reads the weight: an engine may take it away where all rows are kept.
            head: tuple[Tensor | None, ...] = (None, None)
            if ctx.recomputes:
                # Copy the bias, which costs little: a frozen bias may change, or be an inference tensor.
                head = (run.head.weight, None if run.head.bias is None else run.head.bias.clone())
            ctx.save_for_backward(logps, scored.x, scored.targets, *head, state.dx, *sums, *state.kept)
            empty = scored.x.new_empty(0)
            ctx.scored = replace(scored, x=empty, targets=empty, run=run.without_weight())
        elif state is not None:
            ctx.save_for_backward(logps, state)
        outputs = (logps, *scores.statistics.values())
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @first_order_only
    def backward(ctx: Any, saved: tuple[Any, ...], upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs.head:
            _, dx = saved
            return (dx * upstream.unsqueeze(1)).to(ctx.dtypes[0]), None, None, None, None
        _, x, targets, weight, bias, dx, *others = saved
        run, sums = ctx.scored.run, None
        if ctx.recomputes:
            run = replace(run, head=replace(run.head, weight=weight, bias=bias))
            sums, others = RowSums(*others[:3]), others[3:]
        scored = replace(ctx.scored, x=x, targets=targets, run=run)
        reads_last = graph_is_freed() and not ctx.hooked
        gradients = scored.backward(upstream, KeptTokens(sums, dx, tuple(others)), ctx.needs, reads_last=reads_last)
        return (*gradients.scaled(None, *ctx.dtypes), None, None)
