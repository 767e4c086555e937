"""A pair as a tree: the prompt once, and behind it one branch for each order of the two responses.

    x ── y_l ── y_w     scores y_w given y_l (and y_l given the prompt alone)
    └─── y_w ── y_l     scores y_l given y_w (and y_w given the prompt alone)

Two separate sequences read 2|x| + 2(|y_w| + |y_l|) tokens, the tree |x| + 2(|y_w| + |y_l|). It gives the same hidden
states wherever attention sees a token's own ancestors and nothing else, and positions count along each branch.

``path_attention`` computes the attention of such a tree with the kernels that rows use. Elsewhere it takes a mask:
one integer per token says who its descendants are. Within a row of tokens, written in the order prompt, first branch,
second branch, the descendants of token k are the tokens k + 1 .. tree_ends[k] - 1: up to the end of the pair for a
token of the prompt, up to the end of its branch for any other. So token q attends to token k if and only if
``k <= q < tree_ends[k]``. A padding token k has ``tree_ends[k] = k + 1``: it sees itself (so that no softmax is empty)
and nobody sees it. The pairs of a packed row cannot see each other, since each one's prompt ends with its pair.
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
    """The tree layouts of ``condition_pairs``, for pairs that are checked and fit: int64 ids on the CPU.

    ``conditioned`` says for each pair whether its branches hold the alternative.
    """
    trees = [_tree(*pair, separator, given) for pair, given in zip(pairs, conditioned, strict=True)]
    lengths = torch.tensor([len(tree["input_ids"]) for tree in trees], device="cpu")
    # Of each pair among all tokens.
    offsets = lengths.cumsum(0) - lengths if packed else torch.arange(len(trees), device="cpu") * lengths.max()
    columns = [{name: tree[name] for name in ("input_ids", "position_ids", "tree_ends")} for tree in trees]
    for pair, (column, tree, offset) in enumerate(zip(columns, trees, offsets)):
        column["path_of"] = tree["branch"] * len(trees) + pair
        if packed:
            column["tree_ends"] = tree["tree_ends"] + offset
    batch = join(columns, packed, {"input_ids": pad_token_id})
    if not packed:
        index = torch.arange(batch["input_ids"].shape[1], device="cpu")
        batch["tree_ends"] = torch.where(index < lengths[:, None], batch["tree_ends"], index + 1)
    paths = [tree[name] + offset for name in ("first_path", "second_path") for tree, offset in zip(trees, offsets)]
    return batch | {
        "paths": pad_sequence(paths, batch_first=True),
        "rows": torch.cat([tree["rows"] + offset for tree, offset in zip(trees, offsets)]),
        "labels": torch.cat([tree["labels"] for tree in trees]),
        "segment_ids": torch.cat([tree["kinds"] * len(trees) + pair for pair, tree in enumerate(trees)]),
        "num_pairs": len(trees),
    }


def join(sequences: list[dict[str, Tensor]], packed: bool, fill: Mapping[str, int]) -> dict[str, Any]:
    """Return each column of the sequences as one row (1, N), or as rows (len, T) padded with ``fill``, by default 0."""
    columns = {name: [sequence[name] for sequence in sequences] for name in sequences[0]}
    if packed:
        return {name: torch.cat(values)[None] for name, values in columns.items()}
    return {
        name: pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0))
        for name, values in columns.items()
    }


def _tree(prompt: Tensor, chosen: Tensor, rejected: Tensor, separator: Tensor, conditioned: bool) -> dict[str, Tensor]:
    """Tokens, paths and scored rows of one pair; ``kinds`` as in ``pair_loss.KINDS``: 0, 1 and the marginals 2, 3."""
    tokens, positions, ends = [prompt], [torch.arange(len(prompt), device="cpu")], []
    rows, labels, kinds = [], [], []
    start = len(prompt)
    for kind, scored, alternative in ((0, chosen, rejected), (1, rejected, chosen)):
        branch = torch.cat([alternative, separator, scored]) if conditioned else scored
        end = start + len(branch)
        tokens.append(branch)
        positions.append(torch.arange(len(prompt), len(prompt) + len(branch), device="cpu"))
        ends.append(torch.full((len(branch),), end, device="cpu"))
        # What predicts each token of the branch: the one before it, which for the first is the prompt's last.
        before = torch.arange(start - 1, end - 1, device="cpu")
        before[0] = len(prompt) - 1
        rows.append(before[-len(scored) :])
        labels.append(scored)
        kinds.append(torch.full((len(scored),), kind, device="cpu"))
        if conditioned:
            rows.append(before[: len(alternative)])
            labels.append(alternative)
            kinds.append(torch.full((len(alternative),), 3 - kind, device="cpu"))
        start = end
    index = torch.arange(start, device="cpu")
    second = start - len(tokens[2])  # where the second branch starts
    return {
        "first_path": index[:second],
        "second_path": torch.cat([index[: len(prompt)], index[second:]]),
        "branch": (index >= second).long(),
        "input_ids": torch.cat(tokens),
        "position_ids": torch.cat(positions),
        "tree_ends": torch.cat([torch.full((len(prompt),), start, device="cpu"), *ends]),
        "rows": torch.cat(rows),
        "labels": torch.cat(labels),
        "kinds": torch.cat(kinds),
    }


def dense_mask(ends: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """(rows, 1, T, T) bool: whether query q attends to key k."""
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
