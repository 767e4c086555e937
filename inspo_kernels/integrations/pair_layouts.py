"""Turn a collated preference batch into model inputs and the rows that go through the head.

Rows, packed rows and trees all end in the compact form of ``fused_inspo_loss``: ``rows`` of the flattened hidden
states, the id that each row predicts, and its segment. The pair's own responses come first, then the marginals, so
that a pass without marginals takes a slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layouts.conditioning import IGNORE_INDEX, condition_pairs
from ..layouts.preference_batch import condition_batch, pair_positions

LAYOUTS = ("auto", "rows", "packed", "tree", "packed_tree")

REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
# The keys of a text batch from TRL's collator. A batch with other keys (images, token types) is laid out in rows.
_TEXT = {"input_ids", "attention_mask", "completion_mask", *REFERENCES}
CONDITIONED = "conditioned"


def is_text(batch: Mapping[str, Any]) -> bool:
    """Return whether a batch holds only text, which trees and packed rows can carry."""
    return set(batch) <= _TEXT


def plain(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch as the collator made it, in the form of ``conditioned``."""
    unread = {"completion_mask", "marginal_mask", CONDITIONED, *REFERENCES}
    return {
        "inputs": {name: value for name, value in batch.items() if name not in unread},
        "scored": _scored_in_rows(batch["input_ids"], batch["completion_mask"], batch.get("marginal_mask")),
        "tree": None,
        "num_tokens": batch["attention_mask"].sum(),
    }


def conditioned(
    batch: Mapping[str, Any],
    layout: str,
    *,
    pad_token_id: int,
    separator_ids: Sequence[int],
    kept: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """Return the conditioned version of ``batch``; with ``kept``, only the pairs marked there are conditioned.

    Returns:
        ``inputs`` of the model. ``scored`` with ``rows``, ``labels`` and ``segment_ids`` (M,) int64, ``num_own`` (the
        number of first rows, before the marginals), ``num_pairs`` and ``width`` (the length of the rows). ``tree``,
        the input of ``tree_attention_mask``, or None. ``num_tokens``, the number of tokens that the model reads. If
        ``kept`` is given, also ``kept`` (B,) bool.
    """
    given = {} if kept is None else {"kept": torch.tensor(kept)}
    options: dict[str, Any] = {"pad_token_id": pad_token_id, "separator_ids": separator_ids}
    options["conditioned"] = True if kept is None else kept
    if layout == "rows":
        return plain(condition_batch(batch, marginals=True, **options)) | given
    pairs = pair_ids(batch)
    laid_out = condition_pairs(pairs, layout=layout, **options)
    if layout == "packed":
        return {
            "inputs": {name: laid_out[name] for name in ("input_ids", "position_ids")},
            "scored": _scored_in_packed(laid_out),
            "tree": None,
            "num_tokens": torch.tensor(laid_out["input_ids"].numel()),
            **given,
        }
    between = len(separator_ids)
    branches = [
        2 * (len(w) + len(l) + between) if i not in laid_out["plain"] else len(w) + len(l)
        for i, (_, w, l) in enumerate(pairs)
    ]
    own = laid_out["segment_ids"] < 2 * len(pairs)
    order = torch.cat([own.nonzero()[:, 0], (~own).nonzero()[:, 0]])
    scored = {name: laid_out[name][order] for name in ("rows", "labels", "segment_ids")}
    return {
        "inputs": {name: laid_out[name] for name in ("input_ids", "position_ids")},
        "scored": scored
        | {"num_own": int(own.sum()), "num_pairs": len(pairs), "width": laid_out["input_ids"].shape[1]},
        "tree": {name: laid_out[name] for name in ("tree_ends", "position_ids", "paths", "path_of")},
        "num_tokens": torch.tensor(sum(branches) + sum(len(pair[0]) for pair in pairs)),
        **given,
    }


def pair_ids(batch: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
    """Return the token ids of each pair's prompt, chosen and rejected response."""
    ids = batch["input_ids"].flatten()
    return [tuple(ids[part.to(ids.device)] for part in pair) for pair in pair_positions(batch)]


def _scored_in_rows(ids: Tensor, own: Tensor, other: Tensor | None) -> dict[str, Any]:
    """Return the scored positions of padded rows; the hidden state before a token predicts it."""
    pairs, width = len(ids) // 2, ids.shape[1]
    found = []
    for mask, segment_of in ((own, _own_segment), (other, _marginal_segment)):
        if mask is not None:
            row, column = mask[:, 1:].nonzero(as_tuple=True)
            found.append((row * width + column, ids[row, column + 1], segment_of(row, pairs)))
    rows, labels, segments = (torch.cat(parts) for parts in zip(*found))
    scored = {"rows": rows, "labels": labels, "segment_ids": segments}
    return scored | {"num_own": len(found[0][0]), "num_pairs": pairs, "width": width}


def _scored_in_packed(laid_out: Mapping[str, Any]) -> dict[str, Any]:
    starts = laid_out["cu_seqlens"].long()
    pairs, total = (len(starts) - 1) // 2, int(starts[-1])
    sequence = torch.bucketize(torch.arange(total), starts[1:], right=True)
    found = []
    for name, segment_of in (("labels", _own_segment), ("marginal_labels", _marginal_segment)):
        if laid_out[name] is None:  # no pair is conditioned
            continue
        at = (laid_out[name] != IGNORE_INDEX).nonzero()[:, 0]  # never a sequence's first: that is the prompt's
        found.append((at - 1, laid_out[name][at], segment_of(sequence[at], pairs)))
    rows, labels, segments = (torch.cat(parts) for parts in zip(*found))
    scored = {"rows": rows, "labels": labels, "segment_ids": segments}
    return scored | {"num_own": len(found[0][0]), "num_pairs": pairs, "width": total}


def _own_segment(sequence: Tensor, pairs: int) -> Tensor:
    """Number the segments as ``fused_inspo_loss`` does: 0..B-1 chosen, B..2B-1 rejected."""
    return sequence


def _marginal_segment(sequence: Tensor, pairs: int) -> Tensor:
    """Number the other response: sequence b reads the rejected one (3B + b), B + b the chosen one (2B + b)."""
    return 2 * pairs + (sequence + pairs) % (2 * pairs)
