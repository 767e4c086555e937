"""Describe the LM head: z = logit_scale * (hidden @ weight.T + bias), z' = cap * tanh(z / cap) / temperature.

Without a soft-cap z' = z / temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LMHead:
    """Hold the parameters and the transform of a checked LM head.

    The operands of matmuls are rounded to ``compute_dtype``, the dtype of the inputs or of autocast. Logits,
    statistics and accumulators have ``accumulate_dtype``: float64 for float64, else float32.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    compute_dtype: torch.dtype
    temperature: float = 1.0
    # Size of the whole vocabulary, if this head holds only a rank's part of it.
    whole_vocab: int | None = None

    @property
    def vocab_size(self) -> int:
        """Return the number of words that this rank holds."""
        return self.weight.shape[0]

    @property
    def is_shard(self) -> bool:
        return self.whole_vocab is not None

    @property
    def all_words(self) -> int:
        """Return the size of the whole vocabulary."""
        return self.vocab_size if self.whole_vocab is None else self.whole_vocab

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def slope(self) -> float:
        """Return dz'/d(hidden @ weight.T + bias), without the derivative of the soft-cap."""
        return self.logit_scale / self.temperature

    def holds(self, targets: Tensor) -> Tensor:
        """Return whether each target, counted from this rank's first word, is a word of this rank."""
        return (targets >= 0) & (targets < self.vocab_size)

    def detach(self) -> LMHead:
        """Return this head outside any graph."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def without_weight(self, words: int | None = None) -> LMHead:
        """Return a head of this shape, or with ``words`` words, that takes no memory: only its shape may be used."""
        words = self.vocab_size if words is None else words
        return replace(self, weight=self.weight.new_zeros(()).expand(words, self.hidden_size), bias=None)


def checked_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float = 1.0,
    *,
    is_shard: bool = False,
) -> LMHead:
    """Check hidden (..., H) against weight (V, H) and bias (V,); errors say what to change.

    With ``is_shard``, the head is one rank's part of the vocabulary and may have no words. Under autocast, dtypes may
    differ; matmuls then use autocast's dtype, unless the inputs are float64.
    """
    given = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"{name} is a DTensor: {_dtensor_advice(name)}")
        if tensor.is_nested:
            raise TypeError(f"{name} is a nested tensor: pad it, or concatenate its rows for the packed form")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}: pass {name}.to_dense()")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden on {hidden.device}: move one of them")
    if hidden.is_meta:
        raise ValueError("hidden and weight are on the meta device, which holds no data: load the model first")
    if weight.dim() != 2 or not weight.shape[1] or not (weight.shape[0] or is_shard):
        raise ValueError(f"weight must be (V, H), got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} must end in H = {weight.shape[1]}, weight's second dimension")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},) for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")
    dtypes = {tensor.dtype for tensor in given.values()}
    compute_dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        # Autocast leaves float64 alone.
        if torch.float64 not in dtypes:
            dtypes = {compute_dtype := torch.get_autocast_dtype(hidden.device.type)}
    if len(dtypes) > 1:
        got = ", ".join(f"{name} {tensor.dtype}" for name, tensor in given.items())
        raise TypeError(f"hidden, weight and bias must share a dtype (autocast mixes all but float64), got {got}")
    return LMHead(weight, bias, softcap, logit_scale, compute_dtype, temperature)


def _dtensor_advice(name: str) -> str:
    if name == "hidden":
        return "replicate it and pass its local tensor: hidden.redistribute(placements=[Replicate()]).to_local()"
    return (
        "with FSDP2, compute the loss inside the wrapped module's forward, where the parameter is whole (if the head "
        "is wrapped by itself, call its unshard() first). Or, on a data-parallel mesh, pass "
        f"{name}.full_tensor(grad_placements=[Partial('avg')]), with Partial from torch.distributed.tensor (without "
        "grad_placements the ranks' gradients would not be averaged). With tensor parallelism, where each rank "
        f"computes its own words for the same hidden states, pass {name} as it is and "
        f"process_group={name}.device_mesh.get_group()"
    )


def plain_arithmetic(device: torch.device) -> torch.autocast:
    """Return a context without autocast: the head chooses operand dtypes, and statistics must never be rounded."""
    return torch.autocast(device.type, enabled=False)
