"""Measure how far both backends and the peers are from float64 on a device, and check the limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from .batches import HeadShape, PairBatch, equal
from .contenders import BETA, CONTENDERS, OURS, PEERS, Contender, Outcome, chosen
from .harness import reason
from .measure import FROZEN, LOGPS, LOSS, TRAIN, Truth, step, too_large
from .result_files import dtype_name

# Allowed error of the sum of 512 log-probs: twice what tests/benchmarks/test_gpu.py simulates. Tensor cores round sums
# toward zero. With H = 4096, sums rounded after every 16 terms and unlikely labels, errors have one sign and add up to
# 2.4e-3 nat.
SEQUENCE_NAT = 2 * 2.4e-3
SMOKE_HEAD = HeadShape(256, 2000)
# The modes in which each function is checked, with titles.
TITLES = {
    LOSS: {mode: f"loss, {mode}" for mode in (TRAIN, FROZEN)},
    LOGPS: {TRAIN: "linear_logps", FROZEN: f"linear_logps, {FROZEN}"},
}


def accuracy(
    head: HeadShape, response: int, peers: Sequence[str], timed: torch.dtype, device: torch.device
) -> Iterator[list[dict[str, Any]]]:
    """Yield rows of errors against float64, one list per dtype and soft-cap; peers in the dtype they are timed in."""
    for dtype in (torch.bfloat16, torch.float32):
        for softcap in (None, 30.0):
            shape = equal(replace(head, softcap=softcap), 2, response, response)
            batch = PairBatch(shape, dtype=dtype, device=device)
            found = chosen([*OURS, *(p for p in peers if p == "log_softmax" or dtype == timed)], batch)
            context = {"dtype": dtype_name(dtype), "softcap": softcap, "response": response}
            rows = []
            for what in (LOSS, LOGPS):
                try:
                    rows += errors(batch, found, what)
                except Exception as error:  # too_large raises all but a lack of memory again
                    status = f"not checked: {too_large(error)}"
                    rows.append({"what": TITLES[what][TRAIN], "contender": "float64", "status": status})
            yield [{**context, **row} for row in rows]


def errors(batch: PairBatch, found: dict[str, Outcome], what: str) -> list[dict[str, Any]]:
    """Return errors of the loss or of ``linear_logps``: gradients relative, loss and log-probs in nats.

    Only plain torch and our backends compute log-probs of single tokens, under an arbitrary upstream gradient. Our
    gradients may have twice the error of plain torch. In the loss, log-probs have a limit of their own, but their error
    also reaches a pair's coefficient. So gradients may have a further relative error of 2 beta times that error.
    """
    if what == LOGPS:
        found = {name: found[name] for name in ("log_softmax", "triton", "torch") if name in found}
    knowing = {True, *(c.knows_reference for c in found.values() if isinstance(c, Contender))}
    truths = {knows: Truth(batch, what, knows_reference=knows) for knows in knowing}
    rows = []
    for mode, title in TITLES[what].items():
        plain = truths[True].errors(step(batch, mode, CONTENDERS["log_softmax"], what))
        for name, contender in found.items():
            row: dict[str, Any] = {"what": title, "contender": name}
            rows.append(row)
            if isinstance(contender, str):
                row["status"] = contender
                continue
            try:
                row["errors"] = truths[contender.knows_reference].errors(step(batch, mode, contender, what))
            except Exception as error:
                row |= {"status": reason(error), "ok": name in PEERS}
                continue
            row["status"] = "measured"
            if name not in PEERS:
                row |= judged(row["errors"], limits_of(batch, plain, row["errors"], what))
    return rows


def limits_of(batch: PairBatch, plain: dict[str, float], found: dict[str, float], what: str) -> dict[str, float]:
    if what == LOSS:
        limits, besides = {"sequence_nat": SEQUENCE_NAT, "loss_nat": 2 * BETA * SEQUENCE_NAT}, found["sequence_nat"]
    else:  # errors have either sign, so those of 512 tokens add up to a sequence's limit
        limits, besides = {"token_nat": SEQUENCE_NAT / 512**0.5}, 0.0
    rounding = torch.finfo(batch.hidden.dtype).eps / 2
    gradients = (name for name in ("dhidden", "dweight") if name in plain)
    return limits | {name: 2 * max(plain[name], rounding) + 2 * BETA * besides for name in gradients}


def judged(errors: dict[str, float], limits: dict[str, float]) -> dict[str, Any]:
    """NaN is beyond every limit."""
    return {"limits": limits, "ok": all(errors[name] <= limit for name, limit in limits.items())}


def sequence_errors(rows: list[dict[str, Any]], contender: str, dtype: str) -> list[float]:
    """Return the errors of a contender's summed log-probs, in nats."""
    mine = [row.get("errors", {}) for row in rows if (row["contender"], row["dtype"]) == (contender, dtype)]
    return [errors["sequence_nat"] for errors in mine if "sequence_nat" in errors]


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    dtype, softcap, response = (rows[0][key] for key in ("dtype", "softcap", "response"))
    lines = [f"errors against float64: {dtype}, soft-cap {softcap}, responses of {response} tokens"]
    for row in rows:
        errors = "  ".join(f"{name} {value:.1e}" for name, value in row.get("errors", {}).items())
        verdict = "" if row.get("ok", True) else "  TOO LARGE" if errors else "  FAILED"
        lines.append(f"  {row['what']:<26}{row['contender']:<27}{errors or row['status']}{verdict}")
    return "\n".join(lines)
