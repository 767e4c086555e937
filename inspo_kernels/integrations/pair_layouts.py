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
from ..scored_rows import from_sequences

LAYOUTS = ("auto", "rows", "packed", "tree", "packed_tree")

REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
# The keys of a text batch from TRL's collator. A batch with other keys (images, token types) is laid out in rows.
TEXT = {"input_ids", "attention_mask", "completion_mask", *REFERENCES}
CONDITIONED = "conditioned"


def plain(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch as the collator made it, in the form of ``conditioned``."""
    unread = {"completion_mask", "marginal_mask", CONDITIONED, *REFERENCES}
    ids, other = batch["input_ids"], batch.get("marginal_mask")
    labels = ids.masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
    marginal_labels = None if other is None else ids.masked_fill(other == 0, IGNORE_INDEX)
    return {
        "inputs": {name: value for name, value in batch.items() if name not in unread},
        "scored": _scored(labels, marginal_labels, None, width=ids.shape[1]),
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
    which = True if kept is None else kept
    options: dict[str, Any] = {"pad_token_id": pad_token_id, "separator_ids": separator_ids, "conditioned": which}
    if layout == "rows":
        return plain(condition_batch(batch, marginals=True, **options)) | given
    pairs = pair_ids(batch)
    laid_out = condition_pairs(pairs, layout=layout, **options)
    width = laid_out["input_ids"].shape[1]
    if layout == "packed":
        scored = _scored(*(laid_out[name] for name in ("labels", "marginal_labels", "cu_seqlens")), width=width)
        tree, num_tokens = None, width
    else:
        own = laid_out["segment_ids"] < 2 * len(pairs)
        order = torch.cat([own.nonzero()[:, 0], (~own).nonzero()[:, 0]])
        scored = {name: laid_out[name][order] for name in ("rows", "labels", "segment_ids")}
        scored |= {"num_own": int(own.sum()), "num_pairs": len(pairs), "width": width}
        tree = {name: laid_out[name] for name in ("tree_ends", "position_ids", "paths", "path_of")}
        # Position 0 is the root of a tree, or padding.
        num_tokens = len(pairs) + int((laid_out["position_ids"] > 0).sum())
    return {
        "inputs": {name: laid_out[name] for name in ("input_ids", "position_ids")},
        "scored": scored,
        "tree": tree,
        "num_tokens": torch.tensor(num_tokens),
        **given,
    }


def pair_ids(batch: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
    """Return the token ids of each pair's prompt, chosen and rejected response."""
    ids = batch["input_ids"].flatten()
    return [tuple(ids[part.to(ids.device)] for part in pair) for pair in pair_positions(batch)]


def _scored(labels: Tensor, marginal_labels: Tensor | None, cu_seqlens: Tensor | None, *, width: int) -> dict[str, Any]:
    """Return the scored rows of whole sequences in the compact form."""
    c = from_sequences(labels, marginal_labels, cu_seqlens, shift=True, ignore_index=IGNORE_INDEX)
    at = c.scored.nonzero()[:, 0]
    own = len(at) if not c.marginals else int((at < len(c.scored) // 2).sum())
    scored = {"rows": c.rows[at], "labels": c.targets[at], "segment_ids": c.segments[at]}
    return scored | {"num_own": own, "num_pairs": c.num_pairs, "width": width}
