"""What ``torch.compile`` sees of the package: three operators that it does not look into, and the shapes they return.

Planning reads the labels, and objectives are differentiated inside: neither can be traced. Under ``torch.compile`` the
public functions therefore become one operator each, with the same checks, plan and passes inside. Shapes of its results
follow from those of the inputs, so that a new length is no new graph (torch itself compiles a second, dynamic one).
Gradients leave the operator in the accumulate dtype and are rounded once, as in eager mode.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import passes
from .arguments import finite
from .first_order import first_order_only
from .gradients import Needs, dtypes_of
from .head import LMHead, checked_head
from .objectives import Objective, find_objective
from .pair_loss import InSPOOutput
from .passes import KeptTokens
from .prepare import prepare
from .scored_tokens import ScoredTokens

_T = TypeVar("_T")
# The operators read the labels on the host, which a CUDA graph cannot capture.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_NO_REFERENCE = 'backend="reference" is for reading and testing: call it outside torch.compile'


def fused_inspo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: str | Objective,
    ref_logps: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    segment_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    num_pairs: int | None,
    marginal_labels: Tensor | None,
    statistics: tuple[str, ...],
    **options: Any,
) -> InSPOOutput:
    """``inspo_kernels.fused_inspo_loss`` as traced. Compact input always reports marginals, 0 if it has none."""
    head = checked_head(hidden, weight, bias, softcap, logit_scale)
    if num_pairs is None:
        if segment_ids is None:
            num_pairs = (hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) // 2
        elif ref_logps is not None:
            num_pairs = ref_logps.shape[0] // 2
    needs = Needs.of(hidden, head)
    outputs = _pair_loss(
        hidden,
        weight,
        bias,
        [needs.x, needs.weight, needs.bias],
        labels,
        marginal_labels,
        cu_seqlens,
        segment_ids,
        ref_logps,
        options["pair_weights"],
        0 if num_pairs is None else num_pairs,
        objective if isinstance(objective, str) else f"{id(objective)}",
        softcap,
        logit_scale,
        options["ignore_index"],
        options["shift"],
        # As a tensor, and by a product, which torch.compile carries out on tensors: no new graph for a new value.
        options["marginal_weight"] * torch.ones((), dtype=torch.float64, device="cpu"),
        options["reduction"],
        ",".join(statistics),
        options["max_workspace_bytes"],
        options["backend"],
        torch.is_autocast_enabled(hidden.device.type),
        head.compute_dtype,
    )
    results = _PairResults(*outputs[: len(_PairResults._fields)])
    has_marginals = marginal_labels is not None or segment_ids is not None
    return InSPOOutput(
        loss=results.loss,
        losses=results.losses.detach(),
        logps=results.logps.detach(),
        lengths=results.lengths,
        marginal_logps=results.marginal_logps.detach() if has_marginals else None,
        chosen_rewards=results.chosen_rewards.detach(),
        rejected_rewards=results.rejected_rewards.detach(),
        marginal_chosen_rewards=results.marginal_chosen_rewards.detach() if has_marginals else None,
        marginal_rejected_rewards=results.marginal_rejected_rewards.detach() if has_marginals else None,
        statistics={name: value.detach() for name, value in zip(statistics, outputs[len(results) :])},
    )


def _names(statistics: str) -> tuple[str, ...]:
    """Names from the comma-separated string that an operator is given: operators take no lists of strings."""
    return tuple(filter(None, statistics.split(",")))


class _PairResults(NamedTuple):
    """What the operator returns before the statistics: the fields of ``InSPOOutput``, then gradients.

    An empty tensor stands for what there is not.
    """

    loss: Tensor
    losses: Tensor
    logps: Tensor
    lengths: Tensor
    marginal_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    marginal_chosen_rewards: Tensor
    marginal_rejected_rewards: Tensor
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor


@torch.library.custom_op("inspo_kernels::pair_loss", mutates_args=(), tags=_TAGS)
def _pair_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
    labels: Tensor,
    marginal_labels: Tensor | None,
    cu_seqlens: Tensor | None,
    segment_ids: Tensor | None,
    ref_logps: Tensor | None,
    pair_weights: Tensor | None,
    num_pairs: int,
    objective: str,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    shift: bool,
    marginal_weight: Tensor,
    reduction: str,
    statistics: str,
    max_workspace_bytes: int | None,
    backend: str,
    autocast: bool,
    compute_dtype: torch.dtype,
) -> list[Tensor]:
    """The fields of ``_PairResults``, then the statistics."""

    def run() -> list[Tensor]:
        # The autocast under which the call was traced is over by now.
        with torch.autocast(hidden.device.type, dtype=compute_dtype if autocast else None, enabled=autocast):
            p = prepare(
                hidden,
                weight,
                labels,
                objective=find_objective(objective),
                ref_logps=ref_logps,
                bias=bias,
                softcap=softcap,
                logit_scale=logit_scale,
                ignore_index=ignore_index,
                shift=shift,
                cu_seqlens=cu_seqlens,
                segment_ids=segment_ids,
                num_pairs=num_pairs or None,
                marginal_labels=marginal_labels,
                marginal_weight=finite("marginal_weight", marginal_weight.item()),
                pair_weights=pair_weights,
                reduction=reduction,
                statistics=_names(statistics),
                max_workspace_bytes=max_workspace_bytes,
                backend=backend,
            )
        if p.run is None:
            raise ValueError(_NO_REFERENCE)
        with torch.no_grad():
            x = hidden.reshape(-1, p.head.hidden_size).index_select(0, p.plan.rows)
            losses, sums, gradients = passes.pair_losses(p.run, p.plan, p.terms, p.pair_capacity, x, Needs(*needs))
            gradients = gradients.computed()
            loss = p.terms.reduce(losses).to(p.head.accumulate_dtype)
            out = InSPOOutput.build(loss, losses, sums.table, p.plan.lengths, p.terms, sums.statistics)
            if out.marginal_logps is None and segment_ids is not None:
                nan = torch.full_like(out.chosen_rewards, torch.nan)
                out = replace(out, marginal_logps=torch.zeros_like(out.logps))
                out = replace(out, marginal_chosen_rewards=nan, marginal_rejected_rewards=nan)
            dhidden = None
            if gradients.x is not None:
                flat = gradients.x.new_zeros(hidden.numel() // p.head.hidden_size, p.head.hidden_size)
                dhidden = flat.index_add_(0, p.plan.rows, gradients.x).view(hidden.shape)
        # An operator's results must not share memory, and the small ones may be views of one table.
        fields: dict[str, Tensor | None] = {k: v.clone() for k, v in vars(out).items() if isinstance(v, Tensor)}
        fields |= {"dhidden": dhidden, "dweight": gradients.weight, "dbias": gradients.bias}
        named = ((name, fields.get(name)) for name in _PairResults._fields)
        results = [hidden.new_empty(0) if value is None else value for _, value in named]
        return results + [value.clone() for value in out.statistics.values()]

    return _in_worker(run, hidden.device)


@_pair_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
    labels: Tensor,
    marginal_labels: Tensor | None,
    cu_seqlens: Tensor | None,
    segment_ids: Tensor | None,
    ref_logps: Tensor | None,
    pair_weights: Tensor | None,
    num_pairs: int,
    *others: Any,
) -> list[Tensor]:
    statistics = _names(others[7])
    accumulate = LMHead(weight, bias, None, 1.0, others[-1]).accumulate_dtype
    has_marginals = marginal_labels is not None or segment_ids is not None

    def new(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    dhidden, dweight, dbias = _fake_gradients(hidden, weight, bias, needs, accumulate)
    results = _PairResults(
        loss=new(dtype=accumulate),
        losses=new(num_pairs, dtype=accumulate),
        logps=new(2 * num_pairs),
        lengths=new(2 * num_pairs, dtype=torch.int64),
        marginal_logps=new(2 * num_pairs) if has_marginals else hidden.new_empty(0),
        chosen_rewards=new(num_pairs),
        rejected_rewards=new(num_pairs),
        marginal_chosen_rewards=new(num_pairs) if has_marginals else hidden.new_empty(0),
        marginal_rejected_rewards=new(num_pairs) if has_marginals else hidden.new_empty(0),
        dhidden=dhidden,
        dweight=dweight,
        dbias=dbias,
    )
    return [*results, *(new(2 * num_pairs) for _ in statistics)]


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], accumulate: torch.dtype
) -> list[Tensor]:
    return [
        t.new_empty(t.shape, dtype=accumulate) if needed and t is not None else hidden.new_empty(0)
        for needed, t in zip(needs, (hidden, weight, bias))
    ]


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, bias, ctx.needs, *others = inputs
    results = _PairResults(*output[: len(_PairResults._fields)])
    ctx.save_for_backward(results.dhidden, results.dweight, results.dbias)
    ctx.dtypes, ctx.num_others = dtypes_of(hidden, weight, bias), len(others)


@first_order_only
def _scale_gradients(ctx: Any, upstream: list[Tensor]) -> tuple[Tensor | None, ...]:
    scaled = [
        (gradient * upstream[0]).to(dtype) if needed else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs)
    ]
    return (*scaled, None, *(None,) * ctx.num_others)


_pair_loss.register_autograd(_scale_gradients, setup_context=_save_gradients)


def linear_logps(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    *,
    ignore_index: int,
    statistics: tuple[str, ...],
    max_workspace_bytes: int | None,
    backend: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``inspo_kernels.linear_logps`` as traced. A trainable head keeps nothing for its backward pass here: 8NHV."""
    needs = Needs.of(hidden, head)
    transform = (head.softcap, head.logit_scale, head.temperature, head.compute_dtype)
    logps, _, *found = _linear_logps(
        hidden, head.weight, head.bias, [needs.x, needs.weight, needs.bias], targets, *transform, ignore_index,
        max_workspace_bytes, backend, ",".join(statistics),
    )  # fmt: skip
    return logps, {name: value.detach() for name, value in zip(statistics, found)}


def _scored_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    compute_dtype: torch.dtype,
    ignore_index: int,
    max_workspace_bytes: int | None,
    backend: str,
    statistics: str,
) -> ScoredTokens:
    head = LMHead(weight, bias, softcap, logit_scale, compute_dtype, temperature).detach()
    scored = ScoredTokens.find(
        hidden.detach(), targets, head, ignore_index=ignore_index, backend=backend,
        max_workspace_bytes=max_workspace_bytes, statistics=_names(statistics),
    )  # fmt: skip
    if scored.run is None:
        raise ValueError(_NO_REFERENCE)
    return scored


@torch.library.custom_op("inspo_kernels::linear_logps", mutates_args=(), tags=_TAGS)
def _linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    compute_dtype: torch.dtype,
    ignore_index: int,
    max_workspace_bytes: int | None,
    backend: str,
    statistics: str,
) -> list[Tensor]:
    """Log-probs; for a frozen head the gradient of each in its own row of hidden (otherwise empty); statistics."""
    scored = _scored_tokens(
        hidden, weight, bias, targets, softcap, logit_scale, temperature, compute_dtype, ignore_index,
        max_workspace_bytes, backend, statistics,
    )  # fmt: skip
    scores, dx = scored.forward(Needs(*needs), may_keep=False)
    return [
        scored.scatter(scores.logps, targets.shape),
        scored.scatter(dx, hidden.shape) if isinstance(dx, Tensor) else hidden.new_empty(0),
        *scored.scatter_statistics(scores, targets.shape).values(),
    ]


@_linear_logps.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], targets: Tensor, *o: Any) -> list[Tensor]:
    accumulate = LMHead(weight, bias, None, 1.0, o[3]).accumulate_dtype
    frozen = needs[0] and not (needs[1] or needs[2])
    dhidden = hidden.new_empty(hidden.shape, dtype=accumulate) if frozen else hidden.new_empty(0)
    dtypes = [torch.bool if name == "is_top1" else accumulate for name in _names(o[-1])]
    statistics = [hidden.new_empty(targets.shape, dtype=dtype) for dtype in dtypes]
    return [hidden.new_empty(targets.shape, dtype=accumulate), dhidden, *statistics]


@torch.library.custom_op("inspo_kernels::linear_logps_backward", mutates_args=(), tags=_TAGS)
def _linear_logps_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
    targets: Tensor,
    upstream: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    compute_dtype: torch.dtype,
    ignore_index: int,
    max_workspace_bytes: int | None,
    backend: str,
) -> list[Tensor]:
    """Gradients in hidden, weight and bias in their own dtypes (empty where not needed)."""
    scored = _scored_tokens(
        hidden, weight, bias, targets, softcap, logit_scale, temperature, compute_dtype, ignore_index,
        max_workspace_bytes, backend, "",
    )  # fmt: skip
    _, kept = scored.forward(Needs(*needs))
    assert isinstance(kept, KeptTokens)
    gradients = scored.backward(upstream.flatten()[scored.index], kept, Needs(*needs))
    x, dweight, dbias = gradients.scaled(None, *dtypes_of(hidden, weight, bias))
    dhidden = None if x is None else scored.scatter(x, hidden.shape)
    return [hidden.new_empty(0) if g is None else g for g in (dhidden, dweight, dbias)]


@_linear_logps_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], targets: Tensor, upstream: Tensor, *o: Any
) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed and t is not None else hidden.new_empty(0)
        for needed, t in zip(needs, (hidden, weight, bias))
    ]


def _save_tokens(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, bias, ctx.needs, targets, *ctx.options, _ = inputs
    ctx.frozen = ctx.needs[0] and not (ctx.needs[1] or ctx.needs[2])
    ctx.dtype = hidden.dtype
    if ctx.frozen:
        ctx.save_for_backward(output[1])
    else:
        ctx.save_for_backward(hidden, weight, bias, targets)


@first_order_only
def _token_gradients(ctx: Any, upstream: list[Tensor]) -> tuple[Tensor | None, ...]:
    if ctx.frozen:
        (dhidden,) = ctx.saved_tensors
        gradients = [(dhidden * upstream[0].unsqueeze(-1)).to(ctx.dtype), None, None]
    else:
        hidden, weight, bias, targets = ctx.saved_tensors
        results = _linear_logps_backward(hidden, weight, bias, ctx.needs, targets, upstream[0], *ctx.options)
        gradients = [g if needed else None for g, needed in zip(results, ctx.needs)]
    return (*gradients, None, None, *(None for _ in ctx.options), None)


_linear_logps.register_autograd(_token_gradients, setup_context=_save_tokens)


def _in_worker(run: Callable[[], _T], device: torch.device) -> _T:
    """``run`` in a thread of its own. Inside an operator autograd is off for the thread, and objectives need it."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def on_stream() -> _T:
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            return run()

    with ThreadPoolExecutor(1, thread_name_prefix="inspo_kernels") as worker:
        return worker.submit(on_stream).result()
