"""Collect the metrics of TRL's DPOTrainer on the device until they are logged.

Each pass adds one vector of sums. Nothing waits for the device before ``flush``. It adds the vectors over ranks in one
collective, divides, and averages over passes, as TRL does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..pair_loss import preferences

STATISTICS = ("entropy", "mean_logit", "is_top1")
MARGINAL = "marginal/"
GAPS = ("conditioning_gap/chosen", "conditioning_gap/rejected")

# A metric's sum over a pass, and the count that divides it.
_Ratio: TypeAlias = tuple[Tensor, Tensor | float]


class PairMetrics:
    """Collect the sums of each pass, and turn them into means when they are logged.

    Args:
        beta: reward of a log-ratio of one nat, as in TRL.
        add_over_ranks: sums a tensor over all ranks.
        copies: number of ranks that read the same pairs because tensor parallelism splits each model over them.
    """

    def __init__(self, beta: float, add_over_ranks: Callable[[Tensor], Tensor], copies: int = 1) -> None:
        self.beta, self.add_over_ranks, self.copies = beta, add_over_ranks, copies
        self.tokens_trained = 0
        self._passes: dict[str, list[Tensor]] = {}  # each (metrics, 2): sums and counts
        self._names: dict[str, list[str]] = {}

    def add(self, mode: str, results: dict[str, Any], ref_logps: Tensor, num_tokens: Tensor) -> None:
        """Add the results of a ``PairPass`` of the policy; ``mode`` is "train" or "eval"."""
        logps, lengths, statistics = results["logps"], results["lengths"], results["statistics"]
        chosen_tokens, rejected_tokens = (part.sum() for part in lengths.chunk(2))
        chosen_logits, rejected_logits = statistics["mean_logit"].chunk(2)
        ratios: dict[str, _Ratio] = {
            "entropy": (statistics["entropy"].sum(), lengths.sum()),
            "logits/chosen": (chosen_logits.sum(), chosen_tokens),
            "logits/rejected": (rejected_logits.sum(), rejected_tokens),
            "mean_token_accuracy": (statistics["is_top1"].chunk(2)[0].sum(), chosen_tokens),
        }
        ratios |= self._preferences(logps, ref_logps) | {"num_tokens": (num_tokens, 1.0)}
        if "aux_loss" in results:
            ratios["aux_loss"] = results["aux_loss"].detach(), 1.0
        self._append(mode, ratios, logps.device)
        if "marginal_logps" in results:
            marginal = results["marginal_logps"]
            gaps = ((logps - marginal) / lengths).chunk(2)
            conditioned = results["kept"].sum() if "kept" in results else len(gaps[0])
            ratios = self._preferences(marginal, ref_logps)
            ratios |= {name: (gap.sum(), conditioned) for name, gap in zip(GAPS, gaps)}
            self._append(MARGINAL + mode, ratios, logps.device)

    def flush(self, mode: str) -> dict[str, float]:
        """Return the means over the passes since the last call. Every rank must call it."""
        metrics: dict[str, float] = {}
        for key, prefix in ((mode, ""), (MARGINAL + mode, MARGINAL)):
            totals = self._totals(key)
            tokens = self._tokens(totals)
            self.tokens_trained += tokens if key == "train" else 0
            self._passes.pop(key, None)
            for name, (sums, counts) in totals.items():
                if (counted := counts > 0).any():
                    metrics[prefix + name] = (sums / counts)[counted].mean().item()
        if metrics:
            metrics["num_tokens"] = self.tokens_trained + self._tokens(self._totals("train"))
        return metrics

    def _preferences(self, logps: Tensor, ref_logps: Tensor) -> dict[str, _Ratio]:
        chosen, rejected = (self.beta * (logps - ref_logps)).chunk(2)
        columns = preferences(chosen, rejected, logps)
        pairs = torch.full((), len(chosen), dtype=torch.float32, device=logps.device)  # filled there, without a copy
        return {name: (column.sum(), pairs) for name, column in columns.items()}

    def _append(self, key: str, ratios: dict[str, _Ratio], device: torch.device) -> None:
        values = [torch.as_tensor(v, dtype=torch.float32, device=device) for ratio in ratios.values() for v in ratio]
        self._names[key] = list(ratios)
        self._passes.setdefault(key, []).append(torch.stack(values).view(-1, 2))

    def _totals(self, key: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each metric's sums and counts over all ranks, (passes,) float64; empty if there was no pass."""
        if not self._passes.get(key):
            return {}
        sums, counts = self.add_over_ranks(torch.stack(self._passes[key])).cpu().double().unbind(2)
        return dict(zip(self._names[key], zip(sums.unbind(1), counts.unbind(1))))

    def _tokens(self, totals: dict[str, tuple[Tensor, Tensor]]) -> int:
        """Remove the number of tokens from ``totals`` and return it: it is summed over passes, not averaged."""
        sums, _ = totals.pop("num_tokens", (torch.zeros(1), None))
        return int(sums.sum()) // self.copies
