"""The LM head as one value: z = logit_scale * (hidden @ weight.T + bias), soft-capped to cap * tanh(z / cap)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import finite

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LMHead:
    """Parameters and transform of a checked LM head.

    ``compute_dtype`` is what the products' operands are rounded to: the inputs' dtype, or autocast's.
    ``accumulate_dtype`` is what logits, statistics and accumulators are kept in: float64 for float64, else float32.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    compute_dtype: torch.dtype

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    def detach(self) -> LMHead:
        """The same head outside any graph."""
        bias = None if self.bias is None else self.bias.detach()
        return LMHead(self.weight.detach(), bias, self.softcap, self.logit_scale, self.compute_dtype)


def checked_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> LMHead:
    """Check hidden (..., H) against weight (V, H), bias (V,) and the transform; errors say what to change.

    Under autocast the dtypes may differ, and the products use autocast's dtype unless everything is float64.
    """
    given = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name} is a DTensor: pass {name}.full_tensor(), or compute the loss inside the wrapped module's "
                "forward, where the engine hands out the unsharded parameter"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}: pass {name}.to_dense()")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden on {hidden.device}: move one of them")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be (V, H), got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} must end in H = {weight.shape[1]}, weight's second dimension")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},) for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")
    logit_scale = finite("logit_scale", logit_scale)
    softcap = checked_softcap(softcap)

    dtypes = {tensor.dtype for tensor in given.values()}
    compute_dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        # Autocast leaves float64 alone.
        if torch.float64 not in dtypes:
            dtypes = {compute_dtype := torch.get_autocast_dtype(hidden.device.type)}
    if len(dtypes) > 1:
        got = ", ".join(f"{name} {tensor.dtype}" for name, tensor in given.items())
        raise TypeError(f"hidden, weight and bias must share a dtype (autocast mixes all but float64), got {got}")
    return LMHead(weight, bias, softcap, logit_scale, compute_dtype)


def checked_softcap(softcap: float | None) -> float | None:
    """A positive number or None."""
    softcap = None if softcap is None else finite("softcap", softcap)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap!r}")
    return softcap


def plain_arithmetic(device: torch.device) -> torch.autocast:
    """Autocast off: operand dtypes are the head's own decision, and statistics must never be rounded."""
    return torch.autocast(device.type, enabled=False)
