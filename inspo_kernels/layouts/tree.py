"""Lay a pair out as a tree: the prompt once, followed by a branch for each order of the two responses.

    x ── y_l ── y_w     scores y_w given y_l (and y_l given the prompt alone)
    └─── y_w ── y_l     scores y_l given y_w (and y_w given the prompt alone)

Two separate sequences read 2|x| + 2(|y_w| + |y_l|) tokens, the tree |x| + 2(|y_w| + |y_l|). It gives the same hidden
states wherever attention sees a token's own ancestors and nothing else, and positions count along each branch.

``path_attention`` computes the attention of such a tree with the kernels that rows use. Elsewhere it takes a mask:
one integer per token says who its descendants are. Within a row of tokens, written in the order prompt, first branch,
second branch, the descendants of token k are the tokens k + 1 .. tree_ends[k] - 1: up to the end of the pair for a
token of the prompt, up to the end of its branch for any other. So token q attends to token k if and only if
``k <= q < tree_ends[k]``. A padding token k has ``tree_ends[k] = k + 1``: it sees itself (so that no softmax is empty)
and no token sees it. The pairs of a packed row cannot see each other, because the prompt's descendants end with its
pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.utils.rnn import pad_sequence

# Longest row of eager attention's mask, whose bytes grow with the square of the row.
MAX_DENSE_TOKENS = 8192

_BLOCK = 128  # queries and keys per block of a BlockMask: flex_attention's default


def tree_batch(
    pairs: Iterable[tuple[Tensor, Tensor, Tensor]],
    separator: Tensor,
    *,
    conditioned: Sequence[bool],
    pad_token_id: int,
    packed: bool,
) -> dict[str, Any]:
    """Return the tree layouts of ``condition_pairs``, for pairs that are checked and fit: int64 ids on the CPU.

    ``conditioned`` says for each pair whether its branches hold the alternative.
    """
    trees = [_tree(*pair, separator, given) for pair, given in zip(pairs, conditioned, strict=True)]
    lengths = torch.tensor([len(tree["input_ids"]) for tree in trees], device="cpu")
    # The index of each pair's first token among the tokens of all pairs.
    offsets = lengths.cumsum(0) - lengths if packed else torch.arange(len(trees), device="cpu") * lengths.max()
    columns = [{name: tree[name] for name in ("input_ids", "position_ids", "tree_ends")} for tree in trees]
    for pair, (column, tree, offset) in enumerate(zip(columns, trees, offsets)):
        column["path_of"] = tree["branch"] * len(trees) + pair
        if packed:
            column["tree_ends"] = tree["tree_ends"] + offset
    if packed:
        batch = {name: values[None] for name, values in concatenated(columns).items()}
    else:
        batch = padded(columns, {"input_ids": pad_token_id})
        index = torch.arange(batch["input_ids"].shape[1], device="cpu")
        batch["tree_ends"] = torch.where(index < lengths[:, None], batch["tree_ends"], index + 1)
    scores = [
        {"rows": tree["rows"] + offset, "labels": tree["labels"], "segment_ids": tree["kinds"] * len(trees) + pair}
        for pair, (tree, offset) in enumerate(zip(trees, offsets))
    ]
    paths = [tree[name] + offset for name in ("first_path", "second_path") for tree, offset in zip(trees, offsets)]
    return {**batch, **concatenated(scores), "paths": pad_sequence(paths, batch_first=True), "num_pairs": len(trees)}


def concatenated(parts: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Return each column of ``parts``, concatenated: (N,)."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def padded(parts: list[dict[str, Tensor]], fill: Mapping[str, int]) -> dict[str, Any]:
    """Return each column of ``parts`` as rows (len(parts), T), padded on the right with ``fill``, by default 0."""
    return {
        name: pad_sequence([part[name] for part in parts], batch_first=True, padding_value=fill.get(name, 0))
        for name in parts[0]
    }


def _tree(prompt: Tensor, chosen: Tensor, rejected: Tensor, separator: Tensor, conditioned: bool) -> dict[str, Tensor]:
    """Return one pair's tokens, paths and scored rows; ``kinds`` as in ``pair_loss.KINDS``."""
    tokens, scores = [], []
    start = root = len(prompt)
    for kind, scored, alternative in ((0, chosen, rejected), (1, rejected, chosen)):
        branch = torch.cat([alternative, separator, scored]) if conditioned else scored
        end = start + len(branch)
        positions = torch.arange(root, root + len(branch), device="cpu")
        tokens.append({"input_ids": branch, "position_ids": positions, "tree_ends": torch.full_like(branch, end)})
        # What predicts each token of the branch: the one before it, which for the first is the prompt's last.
        before = torch.arange(start - 1, end - 1, device="cpu")
        before[0] = root - 1
        kinds = torch.full_like(scored, kind)
        scores.append({"rows": before[-len(scored) :], "labels": scored, "kinds": kinds})
        if conditioned:
            kinds = torch.full_like(alternative, 3 - kind)
            scores.append({"rows": before[: len(alternative)], "labels": alternative, "kinds": kinds})
        start = end
    index = torch.arange(start, device="cpu")
    second = start - len(branch)  # where the second branch starts
    ends = torch.full_like(prompt, start)
    tokens = [{"input_ids": prompt, "position_ids": index[:root], "tree_ends": ends}, *tokens]
    return {
        **concatenated(tokens),
        **concatenated(scores),
        "branch": (index >= second).long(),
        "first_path": index[:second],
        "second_path": torch.cat([index[:root], index[second:]]),
    }


def dense_mask(ends: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Return (rows, 1, T, T) bool: whether query q attends to key k."""
    index = torch.arange(ends.shape[1], device=ends.device)
    allowed = (index[:, None] >= index) & (index[:, None] < ends[:, None, :])
    if window is not None:
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    return allowed[:, None]


def block_mask(ends: Tensor, positions: Tensor, window: int | None) -> BlockMask:
    """Return the mask for flex_attention, from T * T / 128 numbers instead of T * T.

    A key's descendants and itself are one interval of queries, so its share of a block of queries is the overlap of
    two intervals; summed over a block of keys it says whether the pair of blocks is empty, full or neither.
    """
    length = ends.shape[1]
    blocks = -(-length // _BLOCK)
    index = torch.arange(length, device=ends.device)
    first = torch.arange(blocks, device=ends.device)[:, None] * _BLOCK  # of each block of queries
    overlap = torch.minimum(ends[:, None], first + _BLOCK) - torch.maximum(index, first)
    allowed = _by_block(overlap.clamp(min=0), 0).sum(-1)  # (rows, blocks of queries, blocks of keys)
    some, full = allowed > 0, allowed == _BLOCK * _BLOCK
    if window is not None:
        # Distances between two blocks lie within these bounds, so "some" may be too many and "full" too few blocks;
        # in a block that is not full the kernel asks for each token.
        low, high = _by_block(positions, 2**31 - 1).amin(-1), _by_block(positions, -1).amax(-1)
        some &= low[:, :, None] - high[:, None, :] < window
        full &= high[:, :, None] - low[:, None, :] < window
        full &= some

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (key <= query) & (query < ends[row, key])
        return allowed if window is None else allowed & (positions[row, query] - positions[row, key] < window)

    (part, part_indices), (whole, whole_indices) = _block_table(some & ~full), _block_table(full)
    return BlockMask.from_kv_blocks(
        part, part_indices, whole, whole_indices, BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _by_block(values: Tensor, fill: int) -> Tensor:
    """(..., T) to (..., blocks, 128), the last block filled up."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % _BLOCK), value=fill)
    return padded.unflatten(-1, (-1, _BLOCK))


def _block_table(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Per block of queries, how many blocks of keys are kept, and which: their numbers, ascending, come first."""
    kept = kept[:, None].int()  # the same for every head
    return kept.sum(-1, dtype=torch.int32), kept.argsort(dim=-1, descending=True, stable=True).int()
