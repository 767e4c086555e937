"""Decide which models can read trees, and with which masks, by running two small pairs as trees and in rows."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ..layouts.conditioning import condition_pairs
from ..layouts.path_attention import PathMask
from ..layouts.tree import MAX_DENSE_TOKENS, block_mask, dense_mask
from .small_runs import device_of, is_rounding, relative_difference, small_ids, states, undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mask: TypeAlias = Tensor | BlockMask

_FULL, _SLIDING = "full_attention", "sliding_attention"

# Lengths of the two trial pairs: rows without padding, trees with padding, paths longer than the window below.
_PAIRS = ((6, 5, 8), (9, 7, 3))
_WINDOW = 5

# model -> state of its config -> the form of its masks ("full": one causal mask; "window": one sliding mask;
# "layer_types": a mask for each of config.layer_types), or the reason why there is none.
_FORMS: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[str | None, str | None]]] = weakref.WeakKeyDictionary()


def tree_unsupported(model: PreTrainedModel) -> str | None:
    """Return why a transformers causal LM cannot read the tree layouts of ``condition_pairs``, or None if it can.

    The model reads two small pairs as trees and in rows, once per model, config and attention implementation. The
    inputs of its output head must agree. Sliding windows are shortened meanwhile, so that a few tokens show them. The
    model's modes, buffers, gradients and the random number state stay unchanged. On the meta device nothing can be
    compared, and the config alone decides.
    """
    return _form(_inner(model))[1]


def tree_attention_mask(batch: Mapping[str, Any], model: PreTrainedModel) -> Mask | dict[str, Mask]:
    """Return the ``attention_mask`` with which ``model`` reads a tree batch; pass it on to ``hidden_and_head``.

    The form depends on the model and its attention implementation. The mask is on the device of
    ``batch["tree_ends"]``. Except in the first call for a model, nothing waits for the device. In a layer with a
    sliding window of w tokens, a token sees the last w tokens of its own branch and prompt, exactly as in a row.

    Args:
        batch: a result of ``condition_pairs`` with ``layout="tree"`` or ``"packed_tree"``. ``position_ids``,
            ``tree_ends``, ``paths`` and ``path_of`` are read.
        model: the transformers causal LM itself.

    Returns:
        The mask, or a dict of masks by layer type for a model whose layers differ.

        - ``"sdpa"``: a ``PathMask``. Attention runs over the paths as ordinary causal sequences.
        - ``"eager"``: a tensor (rows, 1, T, T) in the model's dtype that is added to the scores.
        - ``"flex_attention"``: a ``BlockMask`` that skips the empty blocks between branches and pairs.

    Raises:
        ValueError: ``model`` cannot read trees (``tree_unsupported`` says why), or a row is too long for a dense mask
            (``MAX_DENSE_TOKENS``).
        KeyError: ``batch`` has another layout.
    """
    model = _inner(model)
    form, reason = _form(model)
    if form is None:
        raise ValueError(reason)
    return _masks(batch, model, form)


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _masks(batch: Mapping[str, Any], model: Any, form: str) -> Mask | dict[str, Mask]:
    config = model.config.get_text_config()
    ends, positions = batch["tree_ends"], batch["position_ids"]
    attention = config._attn_implementation
    if attention == "eager" and ends.shape[1] > MAX_DENSE_TOKENS:
        raise ValueError(
            f"a row of {ends.shape[1]} tokens is too long for a mask of eager attention (at most {MAX_DENSE_TOKENS}): "
            "load the model with attn_implementation='sdpa' or 'flex_attention', lower max_length, or use layout='rows'"
        )

    def mask(window: int | None) -> Mask:
        if attention == "flex_attention":
            return block_mask(ends, positions, window)
        if attention == "sdpa":
            return PathMask.of(batch["paths"], batch["path_of"], positions, window)
        allowed = dense_mask(ends, positions, window)
        return torch.zeros((), dtype=model.dtype, device=ends.device).where(allowed, torch.finfo(model.dtype).min)

    if form == "layer_types":
        return {name: mask(config.sliding_window if name == _SLIDING else None) for name in set(config.layer_types)}
    return mask(config.sliding_window if form == "window" else None)


def _form(model: Any) -> tuple[str | None, str | None]:
    """Return (form of the masks, None) or (None, why there is none)."""
    config = model.config.get_text_config()
    names = ("_attn_implementation", "sliding_window", "layer_types", "rope_parameters")
    try:
        state = (type(model.base_model), *(str(getattr(config, name, None)) for name in names))
    except RuntimeError as error:  # transformers raises if the layers have different values
        return None, f"its layers differ in an option that decides the mask ({error}): use layout='rows'"
    known = _FORMS.setdefault(model, {})
    if state not in known:
        reason = _known_reason(model)
        has_types = bool(getattr(config, "layer_types", None))
        has_window = getattr(config, "sliding_window", None) is not None
        forms = ["layer_types"] * has_types + ["window"] * has_window + ["full"]  # the most specific first
        if reason is not None:
            known[state] = None, reason
        elif device_of(model).type == "meta":
            return forms[0], None
        else:
            known[state] = _tried(model, forms)
    return known[state]


def _known_reason(model: Any) -> str | None:
    """Return a reason that needs no trial or that a trial on a few tokens would miss."""
    config, model_type = model.config.get_text_config(), model.config.model_type
    if getattr(model, "_is_stateful", False):
        return f"{model_type!r} carries a state from token to token, which no mask can branch: use layout='rows'"
    if unknown := set(getattr(config, "layer_types", None) or ()) - {_FULL, _SLIDING}:
        return f"no mask is known for layers of type {', '.join(sorted(unknown))}: use layout='rows'"
    if window := getattr(config, "window_size", None):  # longer than a trial, and built into the layers
        return (
            f"{model_type!r} counts its window of {window} tokens along the row, not along branches: use layout='rows'"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{model_type!r} takes no position_ids, so it cannot count along branches: use layout='rows'"
    rope = getattr(config, "rope_parameters", None) or {}  # one dict, or a dict for each layer type
    ropes = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    if changing := {str(part.get("rope_type")) for part in ropes} & {"dynamic", "longrope"}:
        return (
            f"its rotary embedding ({', '.join(sorted(changing))}) depends on the longest sequence of the batch, "
            "so a pair's log-probs would depend on which pairs share its batch in either layout: use layout='rows'"
        )
    if (attention := config._attn_implementation) not in ("eager", "sdpa", "flex_attention"):
        return (
            f"attention implementation {attention!r} takes no mask from its caller: load the model with "
            "attn_implementation='sdpa', 'eager' or 'flex_attention', or use layout='rows'"
        )
    return None


def _tried(model: Any, forms: list[str]) -> tuple[str | None, str | None]:
    """Read two small pairs as trees and in rows, with each form of mask until the states agree."""
    tree, rows, places = _small_pairs(model)
    problems = []
    with undisturbed(model), _short_window(model.config.get_text_config()):
        try:
            expected = states(model, rows).flatten(0, 1)[places]  # the model's own position ids may not start at 0
            blind = {"attention_mask": torch.ones_like(tree["input_ids"])}
            unmasked = states(model, tree["input_ids"], tree["position_ids"], **blind)
        except Exception as error:  # a model may raise anything when it reads ids and positions
            return None, f"it cannot read two small pairs ({type(error).__name__}: {error}): use layout='rows'"
        control = relative_difference(unmasked.flatten(0, 1)[tree["rows"]], expected)
        for form in forms:
            try:
                mask = _masks(tree, model, form)
                found = states(model, tree["input_ids"], tree["position_ids"], mask).flatten(0, 1)[tree["rows"]]
            except Exception as error:  # a mask of this form does not suit the model
                problems.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
                continue
            difference = relative_difference(found, expected)
            if is_rounding(difference, expected.dtype, control):
                return form, None
            problems.append(f"its states differ by {difference:.1e} of the largest")
    return None, (
        f"{model.config.model_type!r} does not read a small pair as a tree with the same result as in rows "
        f"({'; '.join(dict.fromkeys(problems))}): use layout='rows'"
    )


def _small_pairs(model: Any) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return a tree batch, the ids of the same pairs in rows, and each scored row's place in the rows."""
    ids = small_ids(model, sum(map(sum, _PAIRS)))
    parts = iter(ids.split([length for lengths in _PAIRS for length in lengths]))
    pairs = [(next(parts), next(parts), next(parts)) for _ in _PAIRS]
    tree, rows = (condition_pairs(pairs, layout=layout, pad_token_id=int(ids[0])) for layout in ("tree", "rows"))
    # The marginal of the chosen response is in the rejected response's row, and vice versa.
    row_of_kind = torch.tensor([0, 1, 1, 0], device="cpu")
    kind, pair = tree["segment_ids"] // len(pairs), tree["segment_ids"] % len(pairs)
    depth = tree["position_ids"].flatten()[tree["rows"]]
    places = (pair + len(pairs) * row_of_kind[kind]) * rows["input_ids"].shape[1] + depth
    device = device_of(model)
    tree = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in tree.items()}
    return tree, rows["input_ids"].to(device), places.to(device)


@contextmanager
def _short_window(config: Any) -> Iterator[None]:
    """Shorten sliding windows, so that a few tokens show whether a mask has them."""
    window = getattr(config, "sliding_window", None)
    if window is None or window <= _WINDOW:
        yield
        return
    config.sliding_window = _WINDOW
    try:
        yield
    finally:
        config.sliding_window = window
