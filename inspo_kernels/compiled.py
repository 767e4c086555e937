"""Define the operators that stand for the public functions under ``torch.compile``, with the shapes they return.

The compiler cannot trace planning, which reads the labels, or the derivative of an objective. So each public function
becomes one opaque operator that runs the same checks, plan and passes. The shapes of its results follow from the shapes
of its inputs: a new length needs no new graph, except that torch compiles a second, dynamic graph once. Gradients leave
the operator in the accumulate dtype and are rounded once, as in eager mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import passes
from .arguments import finite
from .gradients import GradMask, dtypes_of, first_order_only
from .head import LMHead, checked_head
from .objectives.registry import find_objective
from .options import PairOptions, PairTensors, TokenOptions, arguments_of
from .pair_loss import InSPOOutput
from .passes import KeptTokens
from .prepare import ScoredTokens, prepare
from .scored_rows import spread_rows

_T = TypeVar("_T")
_Options = TypeVar("_Options", bound=TokenOptions)
# The operators read the labels on the host, which a CUDA graph cannot capture.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_NO_REFERENCE = 'backend="reference" is for reading and testing: call it outside torch.compile'
# The operator of the loss returns these fields of its output, after the gradients of hidden, weight and bias and before
# the statistics. An empty tensor stands for a missing result.
_RESULTS = [field.name for field in fields(InSPOOutput) if field.name != "statistics"]


def fused_inspo_loss(tensors: PairTensors, options: PairOptions) -> InSPOOutput:
    """Compute the traced loss. Compact input always reports marginals, 0 if it has none."""
    hidden, segment_ids = tensors.hidden, tensors.segment_ids
    head = checked_head(hidden, tensors.weight, tensors.bias, options.softcap, options.logit_scale)
    num_pairs, objective = options.num_pairs, options.objective
    if num_pairs is None:
        if segment_ids is None:
            num_pairs = (hidden.shape[0] if tensors.cu_seqlens is None else tensors.cu_seqlens.shape[0] - 1) // 2
        elif tensors.ref_logps is not None:
            num_pairs = tensors.ref_logps.shape[0] // 2
    needs = GradMask.of(hidden, head)
    given = _flatten(options) | {
        "num_pairs": num_pairs,
        "objective": objective if isinstance(objective, str) else f"{id(objective)}",
        # A tensor from a product: torch.compile computes the product on tensors, so a new value needs no new graph.
        "marginal_weight": options.marginal_weight * torch.ones((), dtype=torch.float64, device="cpu"),
    }
    autocast = torch.is_autocast_enabled(hidden.device.type)
    flat = (*arguments_of(tensors).values(), *given.values())
    _, _, _, loss, *found = _pair_loss([needs.x, needs.weight, needs.bias], autocast, head.compute_dtype, *flat)
    found = [value.detach() for value in found]
    results = dict(zip(_RESULTS, [loss, *found]))
    if not _has_marginals(tensors):
        results = {name: None if name.startswith("marginal") else value for name, value in results.items()}
    return InSPOOutput(**results, statistics=dict(zip(options.statistics, found[len(_RESULTS) - 1 :])))


def _has_marginals(tensors: PairTensors) -> bool:
    return tensors.marginal_labels is not None or tensors.segment_ids is not None


# By name or type of the field.
_SCHEMA_TYPES = {
    "marginal_weight": "Tensor",
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "bool": "bool",
    "float": "float",
    "float | None": "float?",
    "int": "SymInt",
    "int | None": "SymInt?",
    "str": "str",
    "str | Objective": "str",
    "tuple[str, ...]": "str",
}


def _schema(*classes: type) -> str:
    """Return the operator arguments that carry the fields of these dataclasses, in order."""
    all_fields = [field for cls in classes for field in fields(cls)]
    return ", ".join(f"{_SCHEMA_TYPES.get(f.name) or _SCHEMA_TYPES[str(f.type)]} {f.name}" for f in all_fields)


def _flatten(options: TokenOptions) -> dict[str, Any]:
    """Return options in a form that operators accept: names of statistics are joined, as operators take no lists."""
    return arguments_of(options) | {"statistics": ",".join(options.statistics)}


def _unflatten(kind: type[_Options], values: Sequence[Any]) -> _Options:
    """Undo ``_flatten``."""
    options = kind(*values)
    return replace(options, statistics=tuple(filter(None, str(options.statistics).split(","))))


def _pair_arguments(flat: Sequence[Any]) -> tuple[PairTensors, PairOptions]:
    """Undo the flattening in ``fused_inspo_loss``."""
    tensors = PairTensors(*flat[: len(fields(PairTensors))])
    return tensors, _unflatten(PairOptions, flat[len(fields(PairTensors)) :])


@torch.library.custom_op(
    "inspo_kernels::pair_loss",
    mutates_args=(),
    schema=f"(bool[] needs, bool autocast, ScalarType compute_dtype, {_schema(PairTensors, PairOptions)}) -> Tensor[]",
    tags=_TAGS,
)
def _pair_loss(needs: list[bool], autocast: bool, compute_dtype: torch.dtype, *flat: Any) -> list[Tensor]:
    """Return gradients, ``_RESULTS`` and statistics."""
    tensors, traced = _pair_arguments(flat)
    hidden = tensors.hidden

    def run() -> list[Tensor]:
        marginal_weight = finite("marginal_weight", traced.marginal_weight)
        options = replace(traced, objective=find_objective(str(traced.objective)), marginal_weight=marginal_weight)
        # The autocast context of the traced call has ended.
        with torch.autocast(hidden.device.type, dtype=compute_dtype if autocast else None, enabled=autocast):
            p = prepare(tensors, options)
        if p.run is None:
            raise ValueError(_NO_REFERENCE)
        with torch.no_grad():
            rows = p.plan.take(hidden)
            losses, sums, gradients = passes.pair_losses(
                p.run, p.plan, p.terms, p.pair_capacity, rows, GradMask(*needs)
            )
            x, dweight, dbias = gradients.scaled(None, *(p.run.head.accumulate_dtype,) * 3, reads_last=True)
            loss = p.terms.reduce(losses).to(p.run.head.accumulate_dtype)
            out = InSPOOutput.build(loss, losses, sums.table, p.plan.lengths, p.terms, sums.statistics)
            if out.marginal_logps is None and tensors.segment_ids is not None:
                nan, zeros = torch.full_like(out.chosen_rewards, torch.nan), torch.zeros_like(out.logps)
                out = replace(out, marginal_logps=zeros, marginal_chosen_rewards=nan, marginal_rejected_rewards=nan)
            dhidden = None
            if x is not None:
                dhidden = spread_rows(x, p.plan.rows, hidden.shape, distinct=p.plan.distinct)
        results = [*(getattr(out, name) for name in _RESULTS), *out.statistics.values()]
        # An operator's results must not share memory, and these may be views of one table.
        results = [None if value is None else value.clone() for value in results]
        return _no_none(hidden, dhidden, dweight, dbias, *results)

    return _in_worker(run, hidden.device)


@_pair_loss.register_fake
def _(needs: list[bool], autocast: bool, compute_dtype: torch.dtype, *flat: Any) -> list[Tensor]:
    t, options = _pair_arguments(flat)
    num_pairs = options.num_pairs or 0
    accumulate = LMHead(t.weight, t.bias, None, 1.0, compute_dtype).accumulate_dtype
    dtypes = {"loss": accumulate, "losses": accumulate, "lengths": torch.int64}

    def new(name: str) -> Tensor | None:
        if name.startswith("marginal") and not _has_marginals(t):
            return None
        per_response = name in ("logps", "lengths", "marginal_logps", *options.statistics)
        shape = () if name == "loss" else (2 * num_pairs if per_response else num_pairs,)
        return t.hidden.new_empty(shape, dtype=dtypes.get(name, torch.float64))

    gradients = _new_gradients(needs, (t.hidden, t.weight, t.bias), accumulate)
    return _no_none(t.hidden, *gradients, *map(new, (*_RESULTS, *options.statistics)))


def _no_none(hidden: Tensor, *results: Tensor | None) -> list[Tensor]:
    return [hidden.new_empty(0) if value is None else value for value in results]


def _new_gradients(
    needs: list[bool], tensors: Sequence[Tensor | None], dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """Return an uninitialised tensor for each gradient that is needed, in ``dtype`` or its tensor's dtype."""
    return [
        t.new_empty(t.shape, dtype=dtype or t.dtype) if needed and t is not None else None
        for needed, t in zip(needs, tensors)
    ]


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.needs, _, _, *flat = inputs
    tensors, _ = _pair_arguments(flat)
    ctx.save_for_backward(*output[:3])
    ctx.dtypes, ctx.num_inputs = dtypes_of(tensors.hidden, tensors.weight, tensors.bias), len(inputs)


@first_order_only
def _scale_gradients(ctx: Any, saved: tuple[Tensor, ...], upstream: list[Tensor]) -> tuple[Tensor | None, ...]:
    of_loss = upstream[3]
    hidden, weight, bias = (
        (gradient * of_loss).to(dtype) if needed else None
        for gradient, dtype, needed in zip(saved, ctx.dtypes, ctx.needs)
    )
    labels = None
    gradients = (None, None, None, hidden, weight, labels, bias)
    return gradients + (None,) * (ctx.num_inputs - len(gradients))


_pair_loss.register_autograd(_scale_gradients, setup_context=_save_gradients)


def linear_logps(
    hidden: Tensor, head: LMHead, targets: Tensor, options: TokenOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the traced log-probs. A trainable head keeps no rows here: 8NHV."""
    needs = GradMask.of(hidden, head)
    flat = (hidden, head.weight, head.bias, targets, *_flatten(options).values())
    logps, _, *found = _linear_logps([needs.x, needs.weight, needs.bias], head.compute_dtype, *flat)
    return logps, {name: value.detach() for name, value in zip(options.statistics, found)}


def _scored_tokens(
    compute_dtype: torch.dtype, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any
) -> ScoredTokens:
    o = _unflatten(TokenOptions, options)
    head = LMHead(weight, bias, o.softcap, o.logit_scale, compute_dtype, o.temperature)
    scored = ScoredTokens.find(hidden.detach(), targets, head, o)
    if scored is None:
        raise ValueError(_NO_REFERENCE)
    return scored


_TOKEN_ARGUMENTS = (
    "bool[] needs, ScalarType compute_dtype, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    + _schema(TokenOptions)
)


@torch.library.custom_op(
    "inspo_kernels::linear_logps", mutates_args=(), schema=f"({_TOKEN_ARGUMENTS}) -> Tensor[]", tags=_TAGS
)
def _linear_logps(needs: list[bool], compute_dtype: torch.dtype, *arguments: Any) -> list[Tensor]:
    """Return log-probs; for a frozen head the gradient of each in its own row of hidden, else empty; statistics."""
    hidden, _, _, targets, *_ = arguments
    scored = _scored_tokens(compute_dtype, *arguments)
    scores, dx = scored.forward(GradMask(*needs), may_keep=False)
    return [
        scored.scatter(scores.logps, targets.shape),
        scored.scatter(dx, hidden.shape) if isinstance(dx, Tensor) else hidden.new_empty(0),
        *(scored.scatter(value, targets.shape) for value in scores.statistics.values()),
    ]


@_linear_logps.register_fake
def _(needs: list[bool], compute_dtype: torch.dtype, *arguments: Any) -> list[Tensor]:
    hidden, weight, bias, targets, *options = arguments
    accumulate = LMHead(weight, bias, None, 1.0, compute_dtype).accumulate_dtype
    frozen = needs[0] and not (needs[1] or needs[2])
    dhidden = hidden.new_empty(hidden.shape, dtype=accumulate) if frozen else hidden.new_empty(0)
    names = _unflatten(TokenOptions, options).statistics
    dtypes = [torch.bool if name == "is_top1" else accumulate for name in names]
    statistics = [hidden.new_empty(targets.shape, dtype=dtype) for dtype in dtypes]
    return [hidden.new_empty(targets.shape, dtype=accumulate), dhidden, *statistics]


@torch.library.custom_op(
    "inspo_kernels::linear_logps_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {_TOKEN_ARGUMENTS}) -> Tensor[]",
    tags=_TAGS,
)
def _linear_logps_backward(
    upstream: Tensor, needs: list[bool], compute_dtype: torch.dtype, *arguments: Any
) -> list[Tensor]:
    """Return the gradients of hidden, weight and bias in the dtypes of these tensors; empty if not needed."""
    hidden, weight, bias, *_ = arguments
    scored = _scored_tokens(compute_dtype, *arguments)
    _, kept = scored.forward(GradMask(*needs))
    assert isinstance(kept, KeptTokens)
    gradients = scored.backward(upstream.flatten()[scored.index], kept, GradMask(*needs), reads_last=True)
    x, dweight, dbias = gradients.scaled(None, *dtypes_of(hidden, weight, bias))
    dhidden = None if x is None else scored.scatter(x, hidden.shape)
    return _no_none(hidden, dhidden, dweight, dbias)


@_linear_logps_backward.register_fake
def _(upstream: Tensor, needs: list[bool], compute_dtype: torch.dtype, *arguments: Any) -> list[Tensor]:
    return _no_none(arguments[0], *_new_gradients(needs, arguments[:3]))


def _save_tokens(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.needs, ctx.compute_dtype, hidden, weight, bias, targets, *options = inputs
    ctx.options = _flatten(replace(_unflatten(TokenOptions, options), statistics=())).values()
    ctx.frozen = ctx.needs[0] and not (ctx.needs[1] or ctx.needs[2])
    ctx.dtype = hidden.dtype
    # output[1], empty unless the head is frozen, is also saved for ``first_order_only``.
    ctx.save_for_backward(output[1], *(() if ctx.frozen else (hidden, weight, bias, targets)))


@first_order_only
def _token_gradients(ctx: Any, saved: tuple[Any, ...], upstream: list[Tensor]) -> tuple[Tensor | None, ...]:
    if ctx.frozen:
        (dhidden,) = saved
        gradients = [(dhidden * upstream[0].unsqueeze(-1)).to(ctx.dtype), None, None]
    else:
        results = _linear_logps_backward(upstream[0], ctx.needs, ctx.compute_dtype, *saved[1:], *ctx.options)
        gradients = [g if needed else None for g, needed in zip(results, ctx.needs)]
    targets = None
    return (None, None, *gradients, targets, *(None for _ in ctx.options))


_linear_logps.register_autograd(_token_gradients, setup_context=_save_tokens)


def _in_worker(run: Callable[[], _T], device: torch.device) -> _T:
    """Call ``run`` in another thread: objectives need autograd, and torch turns it off in the operator's thread."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def on_stream() -> _T:
        # On the CPU not torch.cuda.stream(None), which would ask for the current GPU.
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return run()

    with ThreadPoolExecutor(1, thread_name_prefix="inspo_kernels") as worker:
        return worker.submit(on_stream).result()
