"""The public loss: check the arguments, plan, make one pass over the head, return a differentiable scalar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import compiled, passes, reference
from .agreement import Split, errors_shared
from .gradients import dtypes_of, first_order_only, graph_is_freed, hooks_see_saved_tensors, refuse_transforms
from .groups import local_shard
from .objectives import Objective, make_objective
from .options import PairOptions, PairTensors, arguments_of, check_options
from .pair_loss import InSPOOutput
from .prepare import Prepared, prepare


def fused_inspo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: str | Objective = "dpo",
    ref_logps: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_pairs: int | None = None,
    marginal_labels: Tensor | None = None,
    marginal_weight: float = 0.0,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
    statistics: Iterable[str] = (),
    process_group: Any = None,
    sequence_group: Any = None,
    max_workspace_bytes: int | None = None,
    backend: str = "auto",
) -> InSPOOutput:
    """Compute a pairwise preference loss of B pairs from hidden states and the LM head, without full logits.

    Conditioning is in the sequences: ``condition_pairs`` lays them out so that each response is scored after the other
    response (InSPO, arXiv 2512.23126). On plain sequences the same call is DPO, SimPO and so on. Only scored positions
    go through the head. One pass gives loss and gradients, in 6NHV operations for N scored tokens. Sums and objectives
    are float64.

    Three input forms, with H the hidden size:

    - rows: hidden (2B, T, H), labels (2B, T). Rows 0..B-1 score the chosen, rows B..2B-1 the rejected responses.
    - packed: hidden (N, H), labels (N,), cu_seqlens (2B+1,) int32: the same 2B sequences, concatenated. If a model was
      given one packed row and returns (1, N, H), pass hidden[0].
    - compact: hidden (N, H) holds the scored rows in any order, labels (N,) their targets (never shifted), segment_ids
      (N,): 0..B-1 chosen, B..2B-1 rejected, 2B..3B-1 marginal chosen, 3B..4B-1 marginal rejected. B is ``num_pairs`` or
      half the length of ref_logps.

    Args:
        hidden: hidden states after the model's final norm: float16, bfloat16, float32 or float64.
        weight: (V, H) LM head, on hidden's device and in its dtype. Under autocast, any dtype but float64 may be mixed.
        labels: int64 token ids, ``ignore_index`` where not scored. Labels on the CPU avoid a synchronisation.
        objective: a name ("dpo", "simpo", "orpo", ...: the keys of ``objectives.OBJECTIVES``) or an ``Objective``.
        ref_logps: (2B,) summed reference log-probs in nats: log pi_ref(y_w | x) of each pair, then log pi_ref(y_l | x).
        bias: (V,) of the head, or None.
        softcap: logits z become softcap * tanh(z / softcap). None: no soft-cap.
        logit_scale: z = logit_scale * (hidden @ weight.T + bias).
        ignore_index: label of positions that are not scored.
        shift: whether labels are aligned with input_ids, so that hidden[t] predicts labels[t+1] of the same sequence.
        cu_seqlens: boundaries of the packed form.
        segment_ids: segments of the compact form.
        num_pairs: B, needed by the compact form without ref_logps.
        marginal_labels: like labels, but they score the *other* response of each sequence. They give log pi(y | x), at
            the cost of more rows in the head.
        marginal_weight: weight of the same objective on the marginals, with the same ref_logps, in the loss.
        pair_weights: (B,) factors of the pairs' losses.
        reduction: "mean" or "sum" over pairs.
        statistics: names of statistics to sum over the scored tokens of each response, from the same pass: "entropy",
            "mean_logit", "is_top1", "logsumexp", "log_sum_sq_probs". See ``linear_logps``.
        process_group: vocabulary-parallel head. Each rank passes its own consecutive rows of weight and bias, in rank
            order and of any number, or a DTensor that the group shards over dimension 0. All else is the same on every
            rank, with labels as ids of the whole vocabulary. Results are bit-identical on all ranks. dX is summed over
            the group; dW and db are those of the rank's rows. Every rank must run the backward pass.
        sequence_group: context parallelism. Each rank passes its own tokens of the same pairs, perhaps none of some
            pairs. Shift the labels before you split them (shift=False), or use the compact form. Losses and sums cover
            all tokens. Gradients are local: dX of the rank's rows, and the rank's part of the sum dW. If the engine
            averages gradients over the group, multiply the loss by the group's size.
        max_workspace_bytes: limit of the logits workspace, which holds at least one row. It changes results only by
            rounding. The default depends on shapes and device, and grows up to fourfold for a longer pair. If the batch
            fits, the workspace lives until the backward pass, in place of the weight's gradient.
        backend: "triton" (CUDA and ROCm), "torch" (any device), "reference" (plain torch, everything materialised), or
            "auto": "triton" where it runs, else "torch".

    Returns:
        ``InSPOOutput``. Its ``loss`` is differentiable in hidden, weight and bias; a second derivative raises. Only the
        gradients that autograd will ask for are computed, and none under ``torch.no_grad()``.

    Raises:
        TypeError, ValueError: before any matmul. The message names the argument and what to change.
    """
    refuse_transforms("fused_inspo_loss")
    split = Split.of(process_group, sequence_group)
    with errors_shared(split, hidden):
        weight, bias = local_shard("weight", weight, process_group), local_shard("bias", bias, process_group)
        tensors = PairTensors(
            hidden, weight, labels, bias, marginal_labels, cu_seqlens, segment_ids, ref_logps, pair_weights
        )
        tensors.check_kinds()
        options = PairOptions.checked(
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            statistics=statistics,
            max_workspace_bytes=max_workspace_bytes,
            backend=backend,
            objective=objective,
            shift=shift,
            num_pairs=num_pairs,
            marginal_weight=marginal_weight,
            reduction=reduction,
        )
        if torch.compiler.is_compiling():
            return compiled.fused_inspo_loss(tensors, options)
        p = prepare(tensors, options, split)
    if p.run is None:
        return _reference(tensors, options, p)
    x = p.plan.take(hidden)
    loss, losses, sums, *found = _FusedPairLoss.apply(x, weight, bias, p)
    if torch.is_grad_enabled() and not p.needs.any:
        _differentiate_objective(p, sums)
    return InSPOOutput.build(loss, losses, sums, p.plan.lengths, p.terms, dict(zip(p.run.statistics, found)))


class InSPOLoss(nn.Module):
    """Hold the options of ``fused_inspo_loss``: ``InSPOLoss("simpo", backend="torch")(hidden, weight, labels)``.

    Pass what varies from batch to batch (ref_logps, bias, cu_seqlens, ...) to the call, whose options take precedence.
    """

    def __init__(self, objective: str | Objective = "dpo", **options: Any) -> None:
        super().__init__()
        known = set(fused_inspo_loss.__kwdefaults__ or ())
        for name in options:
            if name not in known:
                raise TypeError(
                    f"InSPOLoss takes no {name!r}; its options are {', '.join(sorted(known))}. An objective's own "
                    "parameters go to the objective: objective=ik.DPO(beta=...)"
                )
        self.objective = make_objective(objective)
        self.options = check_options(options)

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **inputs: Any) -> InSPOOutput:
        return fused_inspo_loss(hidden, weight, labels, **{"objective": self.objective, **self.options, **inputs})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.objective), *(f"{name}={value!r}" for name, value in self.options.items())])


class _FusedPairLoss(torch.autograd.Function):
    """Compute gradients, or what they need, in forward. Backward scales them by the upstream scalar, out of place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, p: Prepared) -> tuple[Tensor, ...]:
        assert p.run is not None
        losses, sums, gradients = passes.pair_losses(p.run, p.plan, p.terms, p.pair_capacity, x, p.needs)
        ctx.dtypes, ctx.hooked = dtypes_of(x, weight, bias), hooks_see_saved_tensors()
        # A backward pass that is differentiated reaches this node through ``losses``; see ``first_order_only``.
        ctx.save_for_backward(losses, *gradients.tensors)
        ctx.set_materialize_grads(False)
        # What ctx itself holds lives as long as the loss, not only until its backward.
        ctx.gradients = gradients.replace_tensors(*(None for _ in gradients.tensors))
        outputs = (sums.table, *sums.statistics.values())
        ctx.mark_non_differentiable(*outputs)
        return p.terms.reduce(losses).to(p.run.head.accumulate_dtype), losses, *outputs

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any, saved: tuple[Tensor | None, ...], upstream: Tensor | None, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 4
        gradients = ctx.gradients.replace_tensors(*saved[1:])
        reads_last = graph_is_freed() and not ctx.hooked
        return (*gradients.scaled(upstream, *ctx.dtypes, reads_last=reads_last), None)


def _reference(tensors: PairTensors, options: PairOptions, p: Prepared) -> InSPOOutput:
    left_out = ("backend", "max_workspace_bytes", "temperature")
    given = arguments_of(tensors.for_reference()) | arguments_of(options, without=left_out)
    out = reference.fused_inspo_loss(**given)
    if torch.is_grad_enabled():
        # Objectives that the fused path refuses are refused here, too.
        sums = out.logps if out.marginal_logps is None else torch.cat([out.logps, out.marginal_logps])
        _differentiate_objective(p, sums.view(-1, p.plan.num_pairs))
    return out


def _differentiate_objective(p: Prepared, sums: Tensor) -> None:
    """Raise the errors of differentiation, such as a parameter that waits for a gradient; return nothing."""
    p.terms.coefficients(sums, p.plan.lengths.double(), 0, p.plan.num_pairs)
