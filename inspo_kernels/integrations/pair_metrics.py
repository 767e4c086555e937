"""Collect the metrics of TRL's DPOTrainer on the device until they are logged.

Each pass adds one vector of sums. Nothing waits for the device before ``flush``. It adds the vectors over ranks in one
collective, divides, and averages over passes, as TRL does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STATISTICS = ("entropy", "mean_logit", "is_top1")
MARGINAL = "marginal/"
GAPS = ("conditioning_gap/chosen", "conditioning_gap/rejected")
# metric -> (name of its sum, name of the count that divides it)
_RATIOS = {
    "entropy": ("entropy", "tokens"),
    "logits/chosen": ("chosen_logits", "chosen_tokens"),
    "logits/rejected": ("rejected_logits", "rejected_tokens"),
    "mean_token_accuracy": ("top1", "chosen_tokens"),
    "rewards/chosen": ("chosen_reward", "pairs"),
    "rewards/rejected": ("rejected_reward", "pairs"),
    "rewards/accuracies": ("accuracy", "pairs"),
    "rewards/margins": ("margin", "pairs"),
    "logps/chosen": ("chosen_logps", "pairs"),
    "logps/rejected": ("rejected_logps", "pairs"),
    "aux_loss": ("aux_loss", "ranks"),
    GAPS[0]: (GAPS[0], "conditioned_pairs"),
    GAPS[1]: (GAPS[1], "conditioned_pairs"),
}


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
        self._passes: dict[str, list[Tensor]] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, mode: str, results: dict[str, Any], ref_logps: Tensor, num_tokens: Tensor) -> None:
        """Add the results of a ``PairPass`` of the policy; ``mode`` is "train" or "eval"."""
        logps, lengths, statistics = results["logps"], results["lengths"], results["statistics"]
        (chosen_tokens, rejected_tokens), logits = lengths.chunk(2), statistics["mean_logit"].chunk(2)
        sums = self._preferences(logps, ref_logps) | {
            "entropy": statistics["entropy"].sum(),
            "tokens": lengths.sum(),
            "chosen_logits": logits[0].sum(),
            "rejected_logits": logits[1].sum(),
            "chosen_tokens": chosen_tokens.sum(),
            "rejected_tokens": rejected_tokens.sum(),
            "top1": statistics["is_top1"].chunk(2)[0].sum(),
            "num_tokens": num_tokens,
        }
        if "aux_loss" in results:
            sums |= {"aux_loss": results["aux_loss"].detach(), "ranks": 1.0}
        self._append(mode, sums, logps.device)
        if "marginal_logps" in results:
            marginal = results["marginal_logps"]
            gaps = ((logps - marginal) / lengths).chunk(2)
            sums = self._preferences(marginal, ref_logps) | {name: gap.sum() for name, gap in zip(GAPS, gaps)}
            sums["conditioned_pairs"] = results["kept"].sum() if "kept" in results else sums["pairs"]
            self._append(MARGINAL + mode, sums, logps.device)

    def flush(self, mode: str) -> dict[str, float]:
        """Return the means over the passes since the last call. Every rank must call it."""
        metrics: dict[str, float] = {}
        for key, prefix in ((mode, ""), (MARGINAL + mode, MARGINAL)):
            totals = self._totals(key)
            if key == "train" and totals:
                self.tokens_trained += int(totals["num_tokens"].sum()) // self.copies
            self._passes.pop(key, None)
            for metric, (name, count) in _RATIOS.items():
                if name in totals and (counted := totals[count] > 0).any():
                    metrics[prefix + metric] = (totals[name] / totals[count])[counted].mean().item()
        if metrics:
            unlogged = self._totals("train").get("num_tokens")
            waiting = 0 if unlogged is None else int(unlogged.sum()) // self.copies
            metrics["num_tokens"] = self.tokens_trained + waiting
        return metrics

    def _preferences(self, logps: Tensor, ref_logps: Tensor) -> dict[str, Any]:
        chosen, rejected = (self.beta * (logps - ref_logps)).chunk(2)
        return {
            "chosen_reward": chosen.sum(),
            "rejected_reward": rejected.sum(),
            "accuracy": (chosen > rejected).sum(),
            "margin": (chosen - rejected).sum(),
            "chosen_logps": logps.chunk(2)[0].sum(),
            "rejected_logps": logps.chunk(2)[1].sum(),
            "pairs": len(chosen),
        }

    def _append(self, key: str, sums: dict[str, Any], device: torch.device) -> None:
        values = [torch.as_tensor(value, dtype=torch.float32, device=device) for value in sums.values()]
        self._names[key] = list(sums)
        self._passes.setdefault(key, []).append(torch.stack(values))

    def _totals(self, key: str) -> dict[str, Tensor]:
        """Return the sums over ranks by name, (passes,) float64; empty if there was no pass."""
        if not self._passes.get(key):
            return {}
        table = self.add_over_ranks(torch.stack(self._passes[key]))
        return dict(zip(self._names[key], table.cpu().double().unbind(1)))
