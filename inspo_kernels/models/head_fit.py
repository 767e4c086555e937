"""Fit and check, on a few rows, the scale, soft-cap and vocabulary that turn a head's output into the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .head_parts import HeadError

# Rounding of logits, relative to the largest one of a row.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 3e-2}


def numbers(owner: Any) -> dict[str, float]:
    """Return the finite numbers among the attributes of a model or config."""
    return {
        name: value for name, value in vars(owner).items() if type(value) in (int, float) and abs(value) < float("inf")
    }


def tolerance_of(*values: Tensor) -> float:
    """Return what rounding may change, relative to the largest entry of a row."""
    tolerance = max(_ROUNDING[tensor.dtype] for tensor in values)
    tf32 = values[0].is_cuda and torch.backends.cuda.matmul.allow_tf32
    return max(tolerance, 5e-3) if tf32 else tolerance


def rows_of(values: Tensor) -> Tensor:
    """Return at most twelve rows of (B, k, V), in float64 on the CPU."""
    return values.detach().flatten(0, -2)[:12].cpu().double()


def row_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest entry of its row; rows that overflow are ignored."""
    error = (one - other).abs().amax(-1) / torch.maximum(one.abs().amax(-1), other.abs().amax(-1)).clamp(min=1e-30)
    error = error[one.isfinite().all(-1)]
    return float("inf") if len(error) == 0 or error.isnan().any() else error.max().item()


def fit_tail(
    output: Tensor, logits: Tensor, named: Sequence[float], tolerance: float
) -> tuple[float | None, float, int]:
    """Return (softcap, logit_scale, words) that make ``logits`` of ``output``, or raise HeadError."""
    words = logits.shape[1]
    if words > output.shape[1]:
        raise HeadError(f"its head has {output.shape[1]} words, but its logits have {words}")
    hidden_words = (logits < -1e20).all(0)  # padding of the vocabulary, which no softmax sees
    if hidden_words.any():
        words = int((~hidden_words).sum())
        if hidden_words[:words].any():
            raise HeadError("its logits leave out words in the middle of the vocabulary")
    output, logits = output[:, :words], logits[:, :words]
    if not output.any():  # any scale would fit
        raise HeadError("its head returns only zeros, as with a weight of zeros; initialise the weight first")
    best: tuple[float, float | None, float] = (float("inf"), None, 1.0)
    for softcap in (None, *_softcaps(logits, named)):
        bent = logits
        informative = torch.ones_like(logits, dtype=torch.bool)
        if softcap is not None:
            informative = logits.abs() < 0.9 * softcap
            bent = softcap * torch.atanh((logits / softcap).clamp(-0.99, 0.99))
        y, z = output[informative], bent[informative]
        fitted = ((y * z).sum() / (y * y).sum().clamp(min=1e-300)).item()
        # Rounding averages out in the fit, but less so after a soft-cap was inverted.
        for scale in _scales(fitted, named, tolerance / 20 if softcap is None else tolerance):
            made = output * scale if softcap is None else softcap * torch.tanh(output * scale / softcap)
            best = min(best, (row_difference(made, logits), softcap, scale), key=lambda found: found[0])
            if best[0] <= tolerance:
                return best[1], best[2], words
    error, softcap, scale = best
    raise HeadError(
        f"its logits differ from its head's output by {error:.1e} of the largest logit; the best fit has "
        f"logit_scale={scale:.6g}, softcap={softcap and round(softcap, 6)}"
    )


def _softcaps(logits: Tensor, named: Sequence[float]) -> list[float]:
    """Return candidates for the soft-cap: numbers that the model holds, then the largest logit itself."""
    top = logits[logits.isfinite()].abs().max().item()
    near = [value for value in named if top <= value * (1 + 1e-2)]
    return [*sorted(near, key=lambda value: value - top), top]


def _scales(fitted: float, named: Sequence[float], tolerance: float) -> list[float]:
    """Return candidates for the scale: the model's numbers or their inverses, nearest first, then the fitted scale."""
    near = {value for number in (1.0, *named) for value in (number, 1 / number)}
    close = [value for value in near if abs(value - fitted) <= tolerance * abs(fitted)]
    # The same number may be stored rounded to float32: the simplest of equals is 1.
    return [*sorted(close, key=lambda value: (value != 1.0, abs(value - fitted))), fitted]


def named_numbers(model: Any) -> list[float]:
    """Return the positive numbers of a model and its configs; those whose names mention logits come first."""
    owners = (model, model.config, model.config.get_text_config())
    found = {value: name for owner in owners for name, value in numbers(owner).items() if value > 0}
    return sorted(found, key=lambda value: not any(word in found[value] for word in ("logit", "cap", "scal", "mult")))
