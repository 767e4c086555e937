"""Warnings during training: signs that answers from the prompt alone, which inference uses, get worse."""

from __future__ import annotations

from typing import Any

from .errors import Log
from .scoring import TIE

FALL = -0.1  # nats per token that both responses lose
PREFERENCE = 0.15  # share of pairs by which longer responses win more often than they are the chosen ones
TOGETHER = 0.5  # share of the rejected responses' fall by which the chosen ones fall, too
PATIENCE = {"opposite": 3, "falling": 3}
REMEDY = "Lower learning_rate, or set marginal_weight (0.1 to 1)."


class Watch:
    """Logs each warning once, and again only after it has cleared or at the end of the run.

    A kind in ``PATIENCE`` is judged from few pairs: it is logged after that many rows in a row.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._standing: dict[str, int] = {}  # rows in a row

    def __call__(self, warnings: dict[str, str | None], *, last: bool) -> None:
        """Log the texts of ``warnings``, by kind. With ``last``, log what still holds once more."""
        for kind, text in warnings.items():
            rows = self._standing[kind] = 0 if text is None else self._standing.get(kind, 0) + 1
            patience = PATIENCE.get(kind, 1)
            if rows == patience or (last and rows > patience):
                self._log(f"WARNING: {text}")


def training_warnings(row: dict[str, Any]) -> dict[str, str | None]:
    """Return the warnings of a training row, by kind."""
    return {"opposite": _opposite_margins(row), "falling": _falling(_fall_from_reference(row), "training pairs")}


def evaluation_warnings(row: dict[str, Any], first: dict[str, Any]) -> dict[str, str | None]:
    """Return the warnings of an evaluation, compared with the one before step 1."""
    return {
        "falling, held-out": _falling(_fall_from_start(row, first), "held-out pairs"),
        "longer preferred": _longer_preferred(row, first),
    }


def _opposite_margins(row: dict[str, Any]) -> str | None:
    """Warn if the conditioned margin is positive and the one from the prompt alone negative."""
    conditioned, alone = row["rewards/margins"], row.get("marginal/rewards/margins", 0.0)
    if not (alone < -TIE and conditioned > TIE):
        return None
    return (
        f"given the other response the margin is {conditioned:+.3f}, but from the prompt alone, which\n"
        f"inference uses, it is {alone:+.3f}: there the model prefers the rejected responses. {REMEDY}\n"
        "Or fit the base to prompt + draft + answer sequences first."
    )


def _fall_from_reference(row: dict[str, Any]) -> list[float]:
    """Return how log-probs given the prompt alone differ from the reference, nats per token; [] without a reference."""
    if "ref_logps/chosen" not in row:
        return []
    alone = "marginal/" if "marginal/logps/chosen" in row else ""
    return [
        (row[f"{alone}logps/{kind}"] - row[f"ref_logps/{kind}"]) / row[f"tokens/{kind}"]
        for kind in ("chosen", "rejected")
    ]


def _fall_from_start(row: dict[str, Any], first: dict[str, Any]) -> list[float]:
    """Return how held-out log-probs given the prompt alone changed, nats per token; [] if that may be noise."""
    name = "eval_marginal/logps_per_token/"
    now, then = row.get(f"{name}chosen_ci"), first.get(f"{name}chosen_ci")
    if now is None or then is None or not now[1] < then[0]:
        return []
    return [row[name + kind] - first[name + kind] for kind in ("chosen", "rejected")]


def _falling(change: list[float], where: str) -> str | None:
    if not change or not max(change) < FALL or change[0] > TOGETHER * change[1]:
        return None
    return (
        f"from the prompt alone, the log-probs of both responses fall together ({where}, nats per token\n"
        f"since the start: chosen {change[0]:+.3f}, rejected {change[1]:+.3f}): probability goes to answers that are\n"
        f"neither. {REMEDY}"
    )


def _longer_preferred(row: dict[str, Any], first: dict[str, Any]) -> str | None:
    """Warn if longer responses win clearly more often than they are chosen, and than before training."""
    name = "eval_marginal/longer_preferred"
    if name not in row or row["step"] == first["step"]:
        return None
    expected = max(row["eval_longer_chosen"], first[name])
    if row[name] < expected + PREFERENCE or row[f"{name}_ci"][0] < expected:
        return None
    return (
        f"from the prompt alone, the model prefers the longer response in {row[name]:.0%} of the held-out\n"
        f"pairs, but it is the chosen one in {row['eval_longer_chosen']:.0%} (before training preferred in "
        f"{first[name]:.0%}): it may be\nlearning length. Objectives that account for it are simpo and rdpo."
    )
