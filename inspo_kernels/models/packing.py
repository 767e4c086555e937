"""Find out on a few tokens whether a model keeps packed sequences apart."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .model_head import run_model
from .small_runs import device_of, is_rounding, relative_difference, small_ids, undisturbed

_LENGTH = 8  # tokens in each of two sequences

_MIXES: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


def mixes_packed_sequences(model: Any) -> bool:
    """Tell whether sequences in one row, whose position ids restart, see each other; found once per attention kind.

    A model that ignores position ids does, and so does any that carries a state from token to token.
    """
    attention = str(getattr(model.config.get_text_config(), "_attn_implementation", None))
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
        apart = states(model, ids.view(2, -1), counted.expand(2, -1))[1]
        packed = states(model, ids[None], torch.cat([counted, counted])[None])[0, _LENGTH:]
        joined = states(model, ids[None], torch.arange(2 * _LENGTH, device=device_of(model))[None])[0, _LENGTH:]
    error, control = relative_difference(packed, apart), relative_difference(joined, apart)
    return not is_rounding(error, apart.dtype, control)


def states(model: Any, input_ids: Tensor, position_ids: Tensor, attention_mask: Any = None) -> Tensor:
    """Return the states (B, T, H) that the model gives its head."""
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
    inputs = {name: value for name, value in inputs.items() if value is not None} | {"use_cache": False}
    call, _ = run_model(model, model.get_output_embeddings(), inputs, (input_ids.shape[0], input_ids.shape[1]))
    assert call.hidden is not None
    return call.hidden
