"""Run small trial forward passes that leave no trace in the model, and show whether it keeps packed sequences apart."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .model_head import run_model

# Bounds on the difference of hidden states, relative to the largest: below the first it is certainly rounding, above
# the second it certainly is not.
_ROUNDING = {torch.float64: (1e-12, 1e-6), torch.float32: (1e-6, 1e-3)}
_ROUNDING_16_BIT = (5e-3, 0.1)

_LENGTH = 8  # tokens in each of two sequences

# Options that count tokens of a row, whatever sequence they are in, but act only beyond more tokens than a trial has.
_BY_ROW = ("index_topk", "keep_window_size", "floor_scale")

_MIXES: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Run the block in eval mode without gradients; afterwards modes, buffers and random numbers are as before.

    Compiled functions run uncompiled: compiling them for a few tokens would take longer than everything else.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None or buffer.is_meta else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    device = device_of(model)
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.compiler.set_stance("force_eager"),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer
            # A buffer that did not change may be part of a graph, which a write would break.
            if buffer is not None and before is not None and not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)


def device_of(model: Any) -> torch.device:
    """Return the device on which a model computes; accelerate keeps offloaded weights elsewhere."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return model.device if device is None else torch.device(device)


def small_ids(model: Any, count: int) -> Tensor:
    """Return ``count`` different-looking token ids on the CPU, none of them special to the model's config."""
    configs = (model.config, model.config.get_text_config())
    special: set[int] = set()
    for config in configs:
        for name, value in vars(config).items():
            if "token" in name:
                special.update(each for each in (value if isinstance(value, list) else [value]) if type(each) is int)
    vocab = getattr(configs[1], "vocab_size", None) or model.get_input_embeddings().weight.shape[0]
    usual = torch.tensor([token for token in range(min(vocab, 1024)) if token not in special])
    return usual[torch.randint(len(usual), (count,), generator=torch.Generator().manual_seed(0))]


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two tensors relative to the second one's largest entry."""
    error = (one.double() - other.double()).abs().max() / other.double().abs().max()
    return float("inf") if error.isnan() else error.item()


def is_rounding(error: float, dtype: torch.dtype, control: float) -> bool:
    """Tell whether hidden states that differ by ``error`` are the same but for rounding.

    ``control`` is the difference that the fault which is looked for would make.
    """
    surely, at_most = _ROUNDING.get(dtype, _ROUNDING_16_BIT)
    return error <= at_most and error <= max(surely, control * (0.3 if dtype.itemsize == 2 else 0.02))


def mixes_packed_sequences(model: Any) -> bool:
    """Tell whether sequences in one row, whose position ids restart, see each other; found once per attention kind.

    A model that ignores position ids does, and so does any that carries a state from token to token, or that picks or
    counts the tokens of long rows.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) is not None for name in _BY_ROW):
        return True
    attention = str(getattr(config, "_attn_implementation", None))
    known = _MIXES.setdefault(model, {})
    if attention not in known:
        if device_of(model).type == "meta":
            return False
        known[attention] = _mixes(model)
    return known[attention]


def _mixes(model: Any) -> bool:
    ids = small_ids(model, 2 * _LENGTH).to(device_of(model))
    counted = torch.arange(_LENGTH, device=device_of(model))
    with undisturbed(model):
        apart = states(model, ids.view(2, -1))[1]  # with the model's own position ids, which may not start at 0
        packed = states(model, ids[None], torch.cat([counted, counted])[None])[0, _LENGTH:]
        joined = states(model, ids[None], torch.arange(2 * _LENGTH, device=device_of(model))[None])[0, _LENGTH:]
    error, control = relative_difference(packed, apart), relative_difference(joined, apart)
    return not is_rounding(error, apart.dtype, control)


def states(model: Any, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Any = None) -> Tensor:
    """Return the states (B, T, H) that the model gives its head."""
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
    inputs = {name: value for name, value in inputs.items() if value is not None} | {"use_cache": False}
    call, _ = run_model(model, inputs)
    assert call.hidden is not None
    return call.hidden
