"""Turn preference pairs into token batches that score each response given the other (InSPO, arXiv 2512.23126).

The policy of InSPO scores the chosen response ``y_w`` in ``x + y_l + y_w`` and the rejected response ``y_l`` in
``x + y_w + y_l``, where ``x`` is the prompt. Attention is causal, so the alternative's own positions in the same two
sequences hold its log-probability given the prompt alone. ``labels`` score the last response of each sequence;
``marginal_labels`` score the response before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..arguments import choice, integer
from .alternative_dropout import keeps_alternatives
from .tree import concatenated, padded, tree_batch

IGNORE_INDEX = -100
_FIELDS = ("prompt", "chosen response", "rejected response")
_LAYOUTS = ("rows", "packed", "tree", "packed_tree")
_TRUNCATIONS = ("error", "prompt_left", "drop")
_Pair: TypeAlias = tuple[Tensor, Tensor, Tensor]  # prompt, chosen, rejected


def condition_pairs(
    pairs: Iterable[Sequence[Any]],
    *,
    pad_token_id: int,
    conditioned: bool | Sequence[bool] = True,
    alternative_dropout: float = 0.0,
    dropout_seed: int = 0,
    separator_ids: Sequence[int] | Tensor = (),
    max_length: int | None = None,
    truncation: str = "error",
    layout: str = "rows",
) -> dict[str, Any]:
    """Build the batch that scores B preference pairs, as 2B sequences or as B trees.

    Sequence ``b`` scores the chosen response of pair ``b`` and sequence ``B + b`` the rejected one:

        conditioned=True    x + y_l + separator + y_w    then    x + y_w + separator + y_l
        conditioned=False   x + y_w                      then    x + y_l

    Labels are aligned with ``input_ids`` (not shifted), as ``fused_inspo_loss`` expects with ``shift=True``. No ids
    are added: include a beginning-of-sequence token in the prompt, and an end-of-sequence token in each response.
    Padding is found by length, so a ``pad_token_id`` equal to the end-of-sequence id is safe.

    The two sequences of a pair share the prompt. A tree holds the prompt once, followed by two branches: the rest of
    sequence ``b`` and the rest of sequence ``B + b``. It has ``|x| + 2(|y_w| + |y_l| + |separator|)`` tokens and gives
    the same log-probs.

    Args:
        pairs: ``(prompt_ids, chosen_ids, rejected_ids)`` per pair; each a non-empty list, tuple or 1-D integer tensor.
            Identical responses are accepted.
        pad_token_id: fills the right end of the shorter rows; it is never scored and never attended to.
        conditioned: False leaves the alternative out, for the reference and for plain objectives. A list of bools
            decides for each pair.
        alternative_dropout: probability, 0..1, that both sequences of a pair are laid out as with
            ``conditioned=False``. 0 is InSPO and 1 the plain layout.
        dropout_seed: seed of the random choice. The choice depends on the seed and the pair's position in ``pairs``,
            so give each batch its own seed.
        separator_ids: ids put between the two responses, for example a turn boundary. They are never scored.
        max_length: upper bound on ``|x| + |y_w| + |y_l| + |separator|``, in tokens. The bound is the same with
            ``conditioned=False``, so that policy, reference and plain baseline keep the same pairs and prompts.
        truncation: how to treat a pair above ``max_length``. ``"error"`` raises. ``"prompt_left"`` removes ids from
            the left of the prompt, keeps at least one id, and raises if that is not enough. ``"drop"`` leaves the pair
            out. Responses are never cut.
        layout: ``"rows"`` (padded), ``"packed"`` (concatenated, no padding), ``"tree"`` (a padded row for each pair)
            or ``"packed_tree"`` (all trees in one row, for flex_attention, which skips masked blocks).

    Returns:
        A dict of CPU tensors, lists and counts. T is the longest sequence, N the number of tokens.

        | key                 | rows          | packed        | meaning |
        |---|---|---|---|
        | ``input_ids``       | (2B, T) int64 | (1, N) int64  | token ids |
        | ``attention_mask``  | (2B, T) int64 | None          | 1 on tokens, 0 on padding |
        | ``position_ids``    | (2B, T) int64 | (1, N) int64  | 0, 1, ... within each sequence; 0 on padding |
        | ``labels``          | (2B, T) int64 | (N,) int64    | id of each token of the scored response, else -100 |
        | ``marginal_labels`` | (2B, T) int64 | (N,) int64    | the same for the other response; None if all are plain |
        | ``cu_seqlens``      | absent        | (2B+1,) int32 | sequence s is ``[cu_seqlens[s], cu_seqlens[s + 1])`` |
        | ``dropped``         | list of int   | list of int   | positions in ``pairs`` left out by ``"drop"`` |
        | ``truncated``       | int           | int           | number of prompts cut by ``"prompt_left"`` |
        | ``plain``           | list of int   | list of int   | positions in ``pairs`` of the plain pairs |

        The ``marginal_labels`` of a plain pair are -100 everywhere.

        Pass ``input_ids``, ``attention_mask`` and ``position_ids`` to a transformers causal LM as they are. In a
        packed batch transformers separates sequences where ``position_ids`` restart. It does so only if
        ``attention_mask`` is None and there is no key-value cache, so also pass ``use_cache=False``.

        Trees come with only the scored rows, the compact form of ``fused_inspo_loss``. With T the longest tree, N the
        number of tokens, n the longest sequence and M the number of scored tokens, marginals included:

        | key              | tree          | packed_tree   | meaning |
        |---|---|---|---|
        | ``input_ids``    | (B, T) int64  | (1, N) int64  | token ids: prompt, branch of y_w, branch of y_l |
        | ``position_ids`` | (B, T) int64  | (1, N) int64  | 0, 1, ... along prompt and branch; 0 on padding |
        | ``tree_ends``    | (B, T) int64  | (1, N) int64  | token q sees token k if ``k <= q < tree_ends[k]`` |
        | ``paths``        | (2B, n) int64 | (2B, n) int64 | rows of ``hidden.flatten(0, 1)`` of a sequence |
        | ``path_of``      | (B, T) int64  | (1, N) int64  | a sequence that the token is in; 0 on padding |
        | ``rows``         | (M,) int64    | (M,) int64    | rows of ``hidden.flatten(0, 1)`` to score |
        | ``labels``       | (M,) int64    | (M,) int64    | the id that each row predicts |
        | ``segment_ids``  | (M,) int64    | (M,) int64    | its segment, as numbered by ``fused_inspo_loss`` |
        | ``num_pairs``    | int           | int           | B |

        ``dropped``, ``truncated`` and ``plain`` are as above.

        The mask depends on the model: ``tree_attention_mask(batch, model)``. The prompt's last row predicts the first
        token of both branches, so it appears twice in ``rows``.

    Raises:
        ValueError: the ids or options are unusable, a pair does not fit, or no pair is left; the message names the
            pair's position in ``pairs`` and what to change.
    """
    if not isinstance(pairs, Iterable):
        expected = "an iterable of (prompt_ids, chosen_ids, rejected_ids)"
        raise TypeError(f"pairs must be {expected}, got {type(pairs).__name__}")
    choice("truncation", truncation, _TRUNCATIONS)
    choice("layout", layout, _LAYOUTS)
    pad_token_id = integer("pad_token_id", pad_token_id, minimum=0, hint="without one, use eos_token_id")
    separator = _ids(separator_ids, "separator_ids")
    if max_length is not None:
        shortest = len(_FIELDS) + len(separator)
        hint = "one token each of prompt and both responses, and the separator, must fit"
        max_length = integer("max_length", max_length, minimum=shortest, hint=hint)

    pairs = list(pairs)
    keeps = keeps_alternatives(conditioned, alternative_dropout, dropout_seed, len(pairs))

    kept: dict[int, _Pair] = {}
    truncated = 0
    for index, raw in enumerate(pairs):
        pair = _read_pair(index, raw)
        length = sum(map(len, pair)) + len(separator)
        if max_length is None or length <= max_length:
            kept[index] = pair
        elif truncation != "drop":
            kept[index] = _cut_prompt(index, pair, length, max_length, truncation)
            truncated += 1
    dropped = [index for index in range(len(pairs)) if index not in kept]
    if not kept:
        cause = f"all {len(dropped)} are longer than max_length={max_length}" if dropped else "pairs is empty"
        raise ValueError(f"no pair left to score: {cause}")

    counts = {"dropped": dropped, "truncated": truncated, "plain": [index for index in kept if not keeps[index]]}
    keeps, fitting = [keeps[index] for index in kept], list(kept.values())
    if layout in ("tree", "packed_tree"):
        packed = layout == "packed_tree"
        return tree_batch(fitting, separator, conditioned=keeps, pad_token_id=pad_token_id, packed=packed) | counts
    sequences = [_sequence(x, y_w, y_l if given else None, separator) for (x, y_w, y_l), given in zip(fitting, keeps)]
    sequences += [_sequence(x, y_l, y_w if given else None, separator) for (x, y_w, y_l), given in zip(fitting, keeps)]
    if layout == "rows":
        batch = padded(sequences, {"input_ids": pad_token_id, "labels": IGNORE_INDEX, "marginal_labels": IGNORE_INDEX})
    else:
        batch = concatenated(sequences)
        batch |= {name: batch[name][None] for name in ("input_ids", "position_ids")} | {"attention_mask": None}
        ends = torch.tensor([0, *(len(sequence["labels"]) for sequence in sequences)], device="cpu").cumsum(0)
        batch["cu_seqlens"] = ends.to(torch.int32)
    if not any(keeps):
        batch["marginal_labels"] = None
    return batch | counts


def _sequence(prompt: Tensor, scored: Tensor, alternative: Tensor | None, separator: Tensor) -> dict[str, Tensor]:
    """Return the columns of one token sequence: int64 tensors of the same length."""
    between = [] if alternative is None else [alternative, separator]
    ids = torch.cat([prompt, *between, scored])
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[-len(scored) :] = scored
    marginal_labels = torch.full_like(ids, IGNORE_INDEX)
    if alternative is not None:
        marginal_labels[len(prompt) : len(prompt) + len(alternative)] = alternative
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(len(ids), device="cpu"),
        "labels": labels,
        "marginal_labels": marginal_labels,
    }


def _cut_prompt(index: int, pair: _Pair, length: int, max_length: int, truncation: str) -> _Pair:
    prompt, chosen, rejected = pair
    excess = length - max_length
    if truncation == "error":
        raise ValueError(
            f"pair {index}: prompt, both responses and separator take {length} tokens, above max_length={max_length}; "
            "raise max_length, or use truncation='prompt_left' or truncation='drop'"
        )
    if excess >= len(prompt):
        raise ValueError(
            f"pair {index}: both responses, separator and one prompt token take {length - len(prompt) + 1} tokens, "
            f"above max_length={max_length}, and responses are never cut; raise max_length or use truncation='drop'"
        )
    return prompt[excess:], chosen, rejected


def _read_pair(index: int, raw: Any) -> _Pair:
    expected = f"pair {index}: expected (prompt_ids, chosen_ids, rejected_ids)"
    if isinstance(raw, Mapping):
        raise ValueError(f"{expected}, got a mapping with keys {list(raw)}; pass its three id lists as a tuple")
    try:
        fields = tuple(raw)
    except TypeError:
        raise ValueError(f"{expected}, got {type(raw).__name__}") from None
    if len(fields) != len(_FIELDS):
        raise ValueError(f"{expected}, got {len(fields)} elements")
    ids = [_ids(field, f"pair {index}: {name}") for field, name in zip(fields, _FIELDS, strict=True)]
    for tensor, name in zip(ids, _FIELDS, strict=True):
        if len(tensor) == 0:
            raise ValueError(f"pair {index}: {name} is empty; give it at least one token or leave the pair out")
    prompt, chosen, rejected = ids
    return prompt, chosen, rejected


def _ids(values: Any, where: str) -> Tensor:
    """Return token ids as a 1-D int64 CPU tensor; error messages begin with ``where``."""
    if isinstance(values, (str, bytes)):
        raise ValueError(f"{where} is text; tokenize it first and pass the ids")
    if hasattr(values, "__len__") and not (isinstance(values, Tensor) and values.ndim == 0) and len(values) == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    try:
        ids = values if isinstance(values, Tensor) else torch.tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{where} must be a flat list or 1-D tensor of integer ids: {error}") from None
    if ids.ndim != 1:
        raise ValueError(f"{where} must be a flat list or 1-D tensor of integer ids, got shape {tuple(ids.shape)}")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{where} must hold integer ids, got {ids.dtype}")
    ids = ids.to(device="cpu", dtype=torch.int64)
    if len(ids) and (lowest := ids.min().item()) < 0:
        raise ValueError(f"{where} holds the negative id {lowest}; remove masking or padding marks before conditioning")
    return ids
