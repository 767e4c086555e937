"""Turn pairs into losses: per-segment sums -> objective -> losses, coefficients and the report.

A segment is one response of one pair, scored in one context. Tables over segments have shape (kinds, pairs), their rows
in the order of ``KINDS``: two, or four where marginals are scored. All arithmetic is float64: the vectors are tiny, and
margins are small differences of long sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gradients import graph_leaves
from .objectives import Objective, PairSums
from .objectives.registry import evaluate, is_vector, kind_of

KINDS = ("chosen", "rejected", "marginal_chosen", "marginal_rejected")


@dataclass(frozen=True)
class PairTerms:
    """Everything that a loss needs besides the sums: the objective, its reference and the weights.

    ``ref_logps`` (2B,) and ``pair_weights`` (B,) are float64 or None; ``marginal_weight`` scales the same objective
    evaluated on the marginals; ``mean`` divides the total by B.
    """

    objective: Objective
    ref_logps: Tensor | None
    pair_weights: Tensor | None
    marginal_weight: float
    mean: bool

    @property
    def uses_marginals(self) -> bool:
        """Return whether the loss, not only the report, needs marginal log-probs."""
        return self.objective.needs_marginals or self.marginal_weight != 0.0

    def gradient_kinds(self, num_kinds: int) -> tuple[int, ...]:
        """Return which of the ``num_kinds`` scored kinds the loss is differentiated in; the others are forward-only."""
        return tuple(kind for kind in self._differentiated(num_kinds) if kind < num_kinds)

    def required_kinds(self, num_kinds: int) -> tuple[int, ...]:
        """Return the kinds of segments in which every pair must have scored tokens, scored in this call or not."""
        kinds = {0, 1, *self._differentiated(num_kinds)}
        if self.objective.needs_marginals and not kinds & {2, 3}:
            kinds |= {2, 3}  # the objective reads marginals without gradients, and does not say which
        return tuple(sorted(kinds))

    def _differentiated(self, num_kinds: int) -> list[int]:
        fields = set(self.objective.differentiated(marginals=num_kinds == len(KINDS)))
        if self.marginal_weight != 0.0:
            fields |= {f"marginal_{name}" for name in ("chosen", "rejected") if name in fields}
        return [kind for kind, name in enumerate(KINDS) if name in fields]

    def sums(self, logps: Tensor | Sequence[Tensor], lengths: Tensor, first: int = 0) -> PairSums:
        """Return the ``PairSums`` of consecutive pairs, beginning with pair ``first`` of the batch.

        ``logps`` belong to these pairs; ``lengths`` (kinds, B) cover the whole batch. Both are float64.
        """
        pairs = slice(first, first + len(logps[0]))
        own = columns(lengths, pairs)
        fields = dict(zip(KINDS, logps))
        fields |= {f"{name}_len": row for name, row in zip(KINDS, own)}
        if own is not lengths:
            means = lengths.mean(1, keepdim=True).expand_as(own)
            fields |= {f"{name}_len_mean": row for name, row in zip(KINDS, means)}
        if self.ref_logps is not None:
            fields["ref_chosen"], fields["ref_rejected"] = columns(self.ref_logps.view(2, -1), pairs)
        fields["index"] = torch.arange(pairs.start, pairs.stop, device=logps[0].device)
        return PairSums(**fields)

    def losses(self, s: PairSums) -> Tensor:
        """Return each pair's loss before the reduction, (pairs,) float64, with its weight and marginal term."""
        losses = evaluate(self.objective, s)
        if self.marginal_weight != 0.0:
            losses = losses + self.marginal_weight * evaluate(self.objective, s.on_marginals())
        if self.pair_weights is not None:
            losses = losses * self.pair_weights[s.index]
        return losses

    def reduce(self, losses: Tensor) -> Tensor:
        """Return the mean or the sum over all pairs of the batch."""
        return losses.mean() if self.mean else losses.sum()

    def coefficients(self, logps: Tensor, lengths: Tensor, first: int, num_pairs: int) -> tuple[Tensor, Tensor]:
        """Return losses (pairs,) and c = d loss / d logps, for a loss reduced over ``num_pairs`` pairs.

        ``logps`` are (kinds, pairs), ``lengths`` (kinds, B), c is (pairs, gradient kinds). Torch autograd runs on the
        sums alone, so any objective gets the fused path. There is no kernel for the built-in objectives: it would
        duplicate their mathematics to save about 20 tiny launches per group.
        """
        kinds = self.gradient_kinds(len(logps))
        with torch.enable_grad():
            leaves = [row.detach().requires_grad_() for row in logps]
            losses = self.losses(self.sums(leaves, lengths, first))
            if not losses.requires_grad:
                return losses, logps.new_zeros(logps.shape[1], len(kinds))
            others = [each for each in graph_leaves(losses).values() if not any(each is leaf for leaf in leaves)]
            if others:
                raise ValueError(
                    f"objective {type(self.objective).__name__} uses a tensor of shape {tuple(others[0].shape)} that "
                    "requires grad; it would get no gradient here: detach it, or train it outside the objective"
                )
            upstream = torch.full_like(losses, 1 / num_pairs if self.mean else 1.0)
            gradients = torch.autograd.grad(losses, leaves, upstream, allow_unused=True)
        for kind, gradient in enumerate(gradients):
            if gradient is not None and kind not in kinds:
                raise ValueError(
                    f"objective {type(self.objective).__name__} depends on {KINDS[kind]!r} without declaring it: "
                    "list it in gradient_fields" + (" and set needs_marginals = True" if kind >= 2 else "")
                )
        columns = (gradients[kind] for kind in kinds)
        return losses.detach(), torch.stack([torch.zeros_like(losses) if c is None else c for c in columns], 1)

    def rewards(self, s: PairSums) -> tuple[Tensor, Tensor]:
        """Return the objective's rewards of the chosen and the rejected responses, (pairs,) each."""
        rewards = self.objective.rewards(s)
        if not isinstance(rewards, tuple) or len(rewards) != 2 or not all(is_vector(r, s) for r in rewards):
            got = ", ".join(map(kind_of, rewards)) if isinstance(rewards, tuple) else kind_of(rewards)
            raise ValueError(
                f"{type(self.objective).__name__}.rewards must return two tensors of shape {tuple(s.chosen.shape)}, of "
                f"the chosen and the rejected responses; got {got}"
            )
        return rewards


def columns(table: Tensor, pairs: slice) -> Tensor:
    """Return ``table[:, pairs]``, or ``table`` itself if ``pairs`` covers all its columns."""
    return table if pairs.start == 0 and pairs.stop >= table.shape[1] else table[:, pairs]


@dataclass(frozen=True)
class InSPOOutput:
    """Result of ``fused_inspo_loss`` for B pairs. Everything but ``loss`` is detached.

    - ``loss``: scalar, float32 (float64 for float64 inputs), differentiable in hidden, weight and bias.
    - ``losses``: (B,), dtype of ``loss``: ``loss`` is their mean or sum. They include pair weights and marginal terms.
    - ``logps``: (2B,) float64, summed log-probs in nats: chosen responses, then rejected responses.
    - ``lengths``: (2B,) int64, scored tokens after the shift.
    - ``marginal_logps``: (2B,) float64 or None: log pi(y_w | x) of each pair, then log pi(y_l | x).
    - ``chosen_rewards``, ``rejected_rewards``, ``margins``: (B,) float64, see each objective's ``rewards``.
    - ``marginal_chosen_rewards``, ``marginal_rejected_rewards``: (B,) float64 or None, rewards of the marginals;
      NaN for a pair without both marginals.
    - ``statistics``: {name: (2B,) float64}, sums over the scored tokens of the chosen, then of the rejected responses.
    """

    loss: Tensor
    losses: Tensor
    logps: Tensor
    lengths: Tensor
    marginal_logps: Tensor | None
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    marginal_chosen_rewards: Tensor | None
    marginal_rejected_rewards: Tensor | None
    statistics: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def margins(self) -> Tensor:
        """Return chosen_rewards - rejected_rewards, (B,) float64."""
        return self.chosen_rewards - self.rejected_rewards

    @classmethod
    def build(
        cls,
        loss: Tensor,
        losses: Tensor,
        logps: Tensor,
        lengths: Tensor,
        terms: PairTerms,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> InSPOOutput:
        """Build the output from the differentiable ``loss``, ``losses`` and (kinds, B) sums and lengths."""
        marginal_chosen = marginal_rejected = None
        with torch.no_grad():
            own_losses = losses.to(loss.dtype, copy=True)
            s = terms.sums(logps.clone(), lengths.to(logps.dtype))  # the user's code may compute rewards, and write
            chosen, rejected = terms.rewards(s)
            if len(logps) == 4:
                unscored = (lengths[2:] == 0).any(0)
                marginal_rewards = terms.rewards(s.on_marginals())
                marginal_chosen, marginal_rejected = (r.masked_fill(unscored, torch.nan) for r in marginal_rewards)
        return cls(
            loss=loss,
            losses=own_losses,
            logps=(logps if len(logps) == 2 else logps[:2]).flatten(),
            lengths=(lengths if len(lengths) == 2 else lengths[:2]).flatten(),
            marginal_logps=logps[2:].flatten() if len(logps) == 4 else None,
            chosen_rewards=chosen,
            rejected_rewards=rejected,
            marginal_chosen_rewards=marginal_chosen,
            marginal_rejected_rewards=marginal_rejected,
            statistics={name: table[:2].flatten() for name, table in (statistics or {}).items()},
        )

    def metrics(self) -> dict[str, Tensor]:
        """Return batch means as 0-d float64 tensors on the device (no synchronisation), under TRL's names.

        The names are "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen" and
        "logps/rejected". If marginals were scored, the same names with the prefix "marginal/" are means over the pairs
        that have both marginals.
        """
        own = preferences(self.chosen_rewards, self.rejected_rewards, self.logps)
        metrics = {name: column.mean() for name, column in own.items()}
        if self.marginal_logps is not None:
            assert self.marginal_chosen_rewards is not None and self.marginal_rejected_rewards is not None
            unscored = self.marginal_chosen_rewards.isnan()
            marginal = preferences(self.marginal_chosen_rewards, self.marginal_rejected_rewards, self.marginal_logps)
            for name, column in marginal.items():
                metrics[f"marginal/{name}"] = column.masked_fill(unscored, torch.nan).nanmean()
        return metrics


def preferences(chosen: Tensor, rejected: Tensor, logps: Tensor) -> dict[str, Tensor]:
    """Return per-pair columns (B,) under TRL's names of their means, from rewards (B,) and summed log-probs (2B,)."""
    logps_chosen, logps_rejected = logps.chunk(2)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).double(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps_chosen,
        "logps/rejected": logps_rejected,
    }
