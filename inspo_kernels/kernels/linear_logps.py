"""Log-probs from hidden states and head without any logits in memory.

Each program multiplies BLOCK_ROWS hidden states by the words of its share of the vocabulary, BLOCK_VOCAB at a time, and
folds every tile of z' into running statistics of its rows while it is still in registers:

    m' = max(m, max of z')    s' = s exp(m - m') + sum of exp(z' - m')    over all words but the label

The shares leave (m, s) each; a second step combines them with the label's z'_y, from ``label_logits``, for the reason
given there: M = max of m and z'_y, S' = sum of s exp(m - M), logp = z'_y - M - log(S' + exp(z'_y - M)). Shares exist so
that few rows still fill the device; which share a word belongs to depends on shapes and device alone, and the
combination is a fixed reduction: same input, same bits.

Products are accumulated in float32 and never leave registers, so log-probs are as exact as with float32 logits.

Launch invariants:
- x and weight have unit stride along H; rows, and words, beyond the last are clamped to it and masked afterwards;
- every share has at least one word (m is then -inf only if all its logits are);
- a label outside 0..V-1 is only ever compared, and its log-prob is NaN.
"""

# Arguments of kernels are typed by Triton at launch.
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .label_logits import label_logits
from .softcap import softcap


@triton.jit(
    do_not_specialize=["num_rows", "vocab", "tiles_per_share"],
    do_not_specialize_on_alignment=["p_targets", "p_max", "p_sum"],
)
def _linear_logps_kernel(
    p_x,
    p_weight,
    p_bias,
    p_targets,
    p_max,
    p_sum,
    num_rows,
    vocab,
    hidden,
    stride_x,
    stride_weight,
    tiles_per_share,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    i_share = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_rows = rows < num_rows
    features = tl.arange(0, BLOCK_HIDDEN)
    p_x_rows = p_x + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * stride_x + features[None, :]
    label = tl.load(p_targets + rows, mask=m_rows, other=-1).to(tl.int32)

    b_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    first = i_share * tiles_per_share
    for i_tile in range(first, tl.minimum(first + tiles_per_share, tl.cdiv(vocab, BLOCK_VOCAB))):
        words = i_tile * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
        o_words = tl.minimum(words, vocab - 1).to(tl.int64) * stride_weight
        p_tile = p_weight + o_words[None, :] + features[:, None]
        b_z = tl.zeros([BLOCK_ROWS, BLOCK_VOCAB], tl.float32)
        for start in range(0, hidden, BLOCK_HIDDEN):
            if WHOLE_BLOCKS:
                b_x = tl.load(p_x_rows + start)
                b_weight = tl.load(p_tile + start)
            else:
                m_features = start + features < hidden
                b_x = tl.load(p_x_rows + start, mask=m_features[None, :], other=0.0)
                b_weight = tl.load(p_tile + start, mask=m_features[:, None], other=0.0)
            b_z = tl.dot(b_x, b_weight, b_z, input_precision="ieee")
        if HAS_BIAS:
            b_z += tl.load(p_bias + words, mask=words < vocab, other=0.0).to(tl.float32)[None, :]
        if SCALE != 1.0:
            b_z = b_z * SCALE
        if SOFTCAP is not None:
            b_z, _ = softcap(b_z, SOFTCAP)
        b_z = tl.where((words < vocab)[None, :] & (words[None, :] != label[:, None]), b_z, float("-inf"))

        b_new = tl.maximum(b_max, tl.max(b_z, axis=1))
        b_offset = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_offset) + tl.sum(tl.exp(b_z - b_offset[:, None]), axis=1)
        b_max = b_new

    o_out = i_share.to(tl.int64) * num_rows + rows
    tl.store(p_max + o_out, b_max, mask=m_rows)
    tl.store(p_sum + o_out, b_sum, mask=m_rows)


def linear_logps(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    arch: str,
    multiprocessors: int,
) -> Tensor:
    """Log-probs (n,) float32 of ``targets`` given ``x`` (n, H) and ``weight`` (V, H), 16 or 32 bits, one dtype.

    Memory: 8 bytes per row and share. At most 2 * multiprocessors programs, unless rows alone make more.
    """
    chosen = config.linear_logps(arch, x.dtype)
    (num_rows, hidden), vocab = x.shape, len(weight)
    row_blocks, tiles = triton.cdiv(num_rows, chosen.block_rows), triton.cdiv(vocab, chosen.block_vocab)
    # Two programs per multiprocessor even out the last wave; more would only shorten each one's run of tiles.
    tiles_per_share = triton.cdiv(tiles, min(tiles, max(1, 2 * multiprocessors // row_blocks)))
    shares = triton.cdiv(tiles, tiles_per_share)
    largest, total = x.new_empty(2, shares, num_rows, dtype=torch.float32)
    _linear_logps_kernel[(row_blocks, shares)](
        x,
        weight,
        weight if bias is None else bias,
        targets,
        largest,
        total,
        num_rows,
        vocab,
        hidden,
        x.stride(0),
        weight.stride(0),
        tiles_per_share,
        SCALE=logit_scale,
        SOFTCAP=softcap,
        HAS_BIAS=bias is not None,
        WHOLE_BLOCKS=hidden % chosen.block_hidden == 0,
        BLOCK_ROWS=chosen.block_rows,
        BLOCK_VOCAB=chosen.block_vocab,
        BLOCK_HIDDEN=chosen.block_hidden,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    label = label_logits(x, weight, targets, arch=arch)
    if bias is not None:
        label += bias[targets.clamp(0, vocab - 1)]
    label *= logit_scale
    if softcap is not None:
        label = softcap * torch.tanh(label / softcap)
    offset = torch.maximum(largest.amax(0), label)
    rest = (total * (largest - offset).exp()).sum(0)
    # Where the label is the likeliest, 1 + rest would lose rest's digits.
    return torch.where(label == offset, -rest.log1p(), label - offset - (rest + (label - offset).exp()).log())
