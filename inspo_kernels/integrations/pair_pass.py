"""Run one forward pass over preference pairs inside the model's own ``forward``.

Engines (DDP, FSDP2, DeepSpeed) hook into a model's ``forward``: parameters are whole there, and the engine prepares
for gradients. So the loss is computed there. ``accept_pair_pass`` lets a model's forward take a ``PairPass``. It runs
the model without its head, selects the scored rows and passes them to a function of this file.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .. import fused_inspo_loss, hidden_and_head, linear_logps, pair_logps, tree_attention_mask
from ..objectives import SFT, Objective, PairSums
from ..pair_loss import PairTerms
from .trl_losses import fits_tokens

Finish = Callable[[Tensor, dict[str, Any], dict[str, Any]], dict[str, Any]]

_FLAG = "_accepts_pair_pass"


def accept_pair_pass(model: nn.Module) -> None:
    """Let ``model(..., pair_pass=PairPass(...))`` return that pass's results; other calls do not change."""
    if getattr(model, _FLAG, None) is not None:
        return
    original = model.forward

    @functools.wraps(original)  # generate() checks its arguments against this signature
    def forward(self: nn.Module, *args: Any, pair_pass: PairPass | None = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if pair_pass is None else pair_pass(self, **kwargs)

    model.forward = MethodType(forward, model)  # type: ignore[method-assign]
    setattr(model, _FLAG, weakref.ref(model))


def renew_copied_forward(model: Any) -> None:
    """Restore the class's ``forward`` on a deep copy of a model that accepts a ``PairPass``.

    The copied ``forward`` would run the original model.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    accepted = getattr(model, _FLAG, None)
    if accepted is not None and accepted() is not model:
        del model.forward
        delattr(model, _FLAG)


class PairPass:
    """Settings of one forward pass over pairs.

    It is neither a dataclass nor a container: engines cast and move the tensors inside such objects, and the
    reference's log-probs must not be rounded to 16 bits.

    Args:
        laid_out: a result of ``pair_layouts``, on the model's device.
        finish: takes the scored hidden states (M, H), the head and ``scored``; returns a dict of tensors.
        marginals: whether to score the marginals, too.
    """

    def __init__(self, laid_out: Mapping[str, Any], finish: Finish, *, marginals: bool = False) -> None:
        self.tree, self.finish = laid_out["tree"], finish
        self.kept = laid_out.get("kept") if marginals else None
        self.scored = dict(laid_out["scored"])
        if not marginals:
            for name in ("rows", "labels", "segment_ids"):
                self.scored[name] = self.scored[name][: self.scored["num_own"]]

    def __call__(self, model: Any, **inputs: Any) -> dict[str, Any]:
        inputs = {name: value for name, value in inputs.items() if value is not None}  # adapters add empty arguments
        if self.tree is not None:
            inputs["attention_mask"] = tree_attention_mask(self.tree, model)
        hidden, head, outputs = hidden_and_head(model, **inputs, return_outputs=True)
        # Prompt-learning adapters put virtual tokens before the rows.
        hidden = hidden[:, -self.scored["width"] :].flatten(0, 1)
        scored = {
            name: value.to(hidden.device) if isinstance(value, Tensor) else value for name, value in self.scored.items()
        }
        results = self.finish(hidden.index_select(0, scored["rows"]), head, scored)
        if self.kept is not None:
            kept: Tensor = self.kept.to(hidden.device)
            logps: Tensor = results["logps"]
            # A plain pair's log-probs are already given the prompt alone.
            marginal_logps = torch.where(kept.repeat(2), results.get("marginal_logps", logps), logps)
            results |= {"marginal_logps": marginal_logps, "kept": kept}
        if inputs.get("output_router_logits"):
            results["aux_loss"] = outputs.aux_loss
        return results


def reference_logps(
    x: Tensor, head: dict[str, Any], scored: dict[str, Any], *, ld_alpha: float | None
) -> dict[str, Any]:
    """Return ``logps`` (2B,) float64, the summed log-probs of chosen, then rejected responses."""
    if ld_alpha is None:
        sums, _ = pair_logps(x, **_segments(scored), **head)
    else:
        logps = linear_logps(x, targets=scored["labels"], **head)
        sums = _sums(logps * _tail_weights(scored, ld_alpha), scored)
    return {"logps": sums[:2].flatten()}


def _segments(scored: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the compact form, except hidden."""
    return {name: scored[name] for name in ("labels", "segment_ids", "num_pairs")}


def pair_loss(
    x: Tensor,
    head: dict[str, Any],
    scored: dict[str, Any],
    *,
    objective: Objective,
    ref_logps: Tensor,
    marginal_weight: float,
    statistics: tuple[str, ...],
) -> dict[str, Any]:
    """Return the results of the fused loss, which keeps no token's log-prob."""
    terms: dict[str, Any] = {"objective": objective, "ref_logps": ref_logps, "marginal_weight": marginal_weight}
    out = fused_inspo_loss(x, statistics=statistics, **terms, **_segments(scored), **head)
    found = {"loss": out.loss, "logps": out.logps, "lengths": out.lengths, "statistics": out.statistics}
    # Under torch.compile, compact input reports marginals of 0 where it has none.
    has_marginals = len(x) > scored["num_own"]
    return found | {"marginal_logps": out.marginal_logps} if has_marginals else found


def token_loss(
    x: Tensor,
    head: dict[str, Any],
    scored: dict[str, Any],
    *,
    parts: list[tuple[Objective, float]],
    ref_logps: Tensor,
    marginal_weight: float,
    statistics: tuple[str, ...],
    ld_alpha: float | None,
    use_weighting: bool,
) -> dict[str, Any]:
    """Return the results of a loss that weighs single tokens (LD-DPO), or pairs by the policy's log-probs (WPO)."""
    needed = marginal_weight != 0 or fits_tokens(parts)
    differentiated = len(x) if needed else scored["num_own"]
    asked = (*statistics, "log_sum_sq_probs") if use_weighting else statistics
    logps, values = linear_logps(
        x[:differentiated], targets=scored["labels"][:differentiated], statistics=asked, **head
    )
    if differentiated < len(x):  # marginals that are only reported
        with torch.no_grad():
            others = linear_logps(x[differentiated:], targets=scored["labels"][differentiated:], **head)
        logps = torch.cat([logps, others])
    whole = _sums(logps, scored)
    weighed = whole if ld_alpha is None else _sums(logps * _tail_weights(scored, ld_alpha), scored)
    lengths = _sums(torch.ones_like(logps), scored)
    confidence = None
    if use_weighting:  # arXiv 2406.11827, equation 2: how likely each response is, against the policy's own samples
        aligned = logps[:differentiated].detach() - values["log_sum_sq_probs"]
        confidence = (_sums(aligned, scored) / lengths[: 4 if needed else 2].clamp(min=1)).exp()

    terms = PairTerms(parts[0][0], ref_logps.double(), None, marginal_weight, mean=True)
    sums = terms.sums(weighed, lengths)
    of_all_tokens = terms.sums(whole, lengths)  # SFT weighs all tokens alike

    def mean_loss(kinds: slice, sums: PairSums, of_all_tokens: PairSums) -> Tensor:
        total = torch.zeros_like(sums.chosen)
        for objective, weight in parts:
            total = total + weight * objective(of_all_tokens if isinstance(objective, SFT) else sums)
        return total.mean() if confidence is None else (total * confidence[kinds].prod(0)).mean()

    loss = mean_loss(slice(0, 2), sums, of_all_tokens)
    if marginal_weight:
        loss = loss + marginal_weight * mean_loss(slice(2, 4), sums.on_marginals(), of_all_tokens.on_marginals())
    own = scored["segment_ids"][: scored["num_own"]]
    kept = {name: values[name][: scored["num_own"]].double() for name in statistics}
    found = {
        "loss": loss.to(logps.dtype),
        "logps": weighed[:2].flatten().detach(),
        "lengths": lengths[:2].flatten(),
        "statistics": {n: v.new_zeros(2 * scored["num_pairs"]).index_add_(0, own, v) for n, v in kept.items()},
    }
    return found if len(weighed) == 2 else found | {"marginal_logps": weighed[2:].flatten().detach()}


def _sums(values: Tensor, scored: dict[str, Any]) -> Tensor:
    """Sum over each segment: (2, B) float64, or (4, B) with marginals."""
    kinds = 2 if len(values) == scored["num_own"] else 4
    zeros = values.new_zeros(kinds * scored["num_pairs"], dtype=torch.float64)
    return zeros.index_add(0, scored["segment_ids"][: len(values)], values.double()).view(kinds, -1)


def _tail_weights(scored: dict[str, Any], ld_alpha: float) -> Tensor:
    """Return LD-DPO's token weights (arXiv 2409.06411): 1 up to the shorter response's length, then ``ld_alpha``."""
    segments, pairs = scored["segment_ids"], scored["num_pairs"]
    index = torch.arange(len(segments), device=segments.device)
    first = torch.full((4 * pairs,), len(segments), device=segments.device)
    first = first.scatter_reduce(0, segments, index, "amin")  # a segment's rows are consecutive and in order
    lengths = torch.bincount(segments, minlength=4 * pairs).view(4, pairs)
    shared = torch.minimum(lengths[[0, 0, 2, 2]], lengths[[1, 1, 3, 3]]).flatten()
    return torch.where(index - first[segments] < shared[segments], 1.0, ld_alpha)
