"""The logits matmul and the row pass in one launch: E and each row's sum from x W^T, without logits in memory.

The names (z', row offset o, label y, E, D, rest), and what is summed and stored, are those of ``row_pass``.

A program accumulates a tile of raw logits in float32 registers and turns it into E there. A logit then costs 2 bytes of
memory traffic (E in the compute dtype), or none for scoring. The row pass over float32 logits in memory would cost 10
or 4 bytes. One program runs per multiprocessor. It processes several tiles, one after another, and loads the next
tile's operands while it computes E. Each tile writes one sum per row. ``_combine_kernel`` adds the sums in a fixed
order, so results do not depend on the order in which programs finish.

The offset must be known before the matmul. o = z'_y + HEADROOM suits every row whose largest z' exceeds the label's by
at most HEADROOM + 57 ln 2 = 69 nats. With this offset, words more than 57 nats below the label become 0.
``_combine_kernel`` detects all other rows by their total, the sum of E and exp(z'_y - o), which is outside NEAR..FAR or
NaN. For each block with such a row, ``_repair_kernel`` computes the logits twice: first for the maximum, then for E
with the maximum as the offset. It returns at once for other blocks. A repair is estimated, not measured, to take a few
times as long as the first pass, whether it repairs one block or all.

Launch invariants:
- x (n, H) and weight (V, H) have unit stride along H. The copy engine requires that row strides and addresses of x,
  weight and E are multiples of 16 bytes. Rows of E have a multiple of 64 elements.
- E's columns beyond V are written as 0. ``bias`` has as many elements as E has columns.
- x and weight are 16-bit, E is bfloat16 (float16 needs the exact maximum), sums are float32.
- If the label is outside 0..V-1 or its logit is not finite, the first offset is 0. The row is repaired unless 0 suits.
"""

# Arguments of kernels are typed by Triton at launch.
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import config
from .softcap import Transform, Wanted, transformed

HEADROOM = tl.constexpr(30.0)
# A suitable total is at least exp(-HEADROOM), except for rounding. Down to NEAR, squares of E keep their precision for
# any vocabulary size.
NEAR, FAR = tl.constexpr(2.0**-50), tl.constexpr(2.0**57)
# Offset of a row without any finite logit: exp(-inf - offset) must be 0.
LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _product(d_x, d_weight, first_row, first_word, hidden, WIDEN: tl.constexpr):
    """Return the raw logits (rows, words) of a tile, whose size is that of the blocks of x and of the weight."""
    ROWS: tl.constexpr = d_x.block_shape[0]
    WORDS: tl.constexpr = d_weight.block_shape[0]
    acc = tl.zeros([ROWS, WORDS], tl.float32)
    for start in range(0, hidden, d_x.block_shape[1]):
        b_x = d_x.load([first_row, start])
        b_weight = d_weight.load([first_word, start])
        if WIDEN:
            b_x, b_weight = b_x.to(tl.float32), b_weight.to(tl.float32)
        acc = tl.dot(b_x, b_weight.T, acc)
    return acc


@triton.jit
def _exponentials(
    z,
    d_e,
    p_bias,
    offset,
    label,
    first_row,
    first_word,
    vocab,
    TRANSFORM: tl.constexpr,
    WANTED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return a tile's sums of E and of the statistics, per row, and store D E, one of PARTS parts after another."""
    if PARTS == 1:
        words = first_word + tl.arange(0, z.shape[1])
        z, derivative = transformed(z, p_bias, words, words < vocab, TRANSFORM)
        in_vocab, word = (words < vocab)[None, :], words[None, :]
        kept = in_vocab & (word != label[:, None])
        e = tl.where(kept, tl.exp2((z - offset[:, None]) * LOG2_E), 0.0)
        rest = tl.sum(e, axis=1)
        moment, squares, logits, before, after = rest, rest, rest, rest, rest  # placeholders unless requested
        if WANTED.moment:
            moment = tl.sum(tl.where(e > 0, e * (z - offset[:, None]), 0.0), axis=1)
        if WANTED.squares:
            squares = tl.sum(e * e, axis=1)
        if WANTED.logits:
            logits = tl.sum(tl.where(in_vocab, z, 0.0), axis=1)
        if WANTED.tops:
            before = tl.max(tl.where(in_vocab & (word < label[:, None]), z, float("-inf")), axis=1)
            after = tl.max(tl.where(in_vocab & (word > label[:, None]), z, float("-inf")), axis=1)
        if WANTED.store:
            if TRANSFORM.softcap is not None:
                e = tl.where(kept, e * derivative, 0.0)
            d_e.store([first_row, first_word], e.to(d_e.dtype))
        return rest, moment, squares, logits, before, after
    else:
        HALF: tl.constexpr = z.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, HALF)), (0, 2, 1)))
        first = _exponentials(
            left, d_e, p_bias, offset, label, first_row, first_word, vocab, TRANSFORM, WANTED, PARTS // 2
        )
        second = _exponentials(
            right, d_e, p_bias, offset, label, first_row, first_word + HALF, vocab, TRANSFORM, WANTED, PARTS // 2
        )
        return _joined(first, second)


@triton.jit
def _joined(a, b):
    """Combine the sums and largest logits of two sets of words."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], tl.maximum(a[4], b[4]), tl.maximum(a[5], b[5])


@triton.jit
def _store(p, step, sums, mask, WANTED: tl.constexpr):
    """Store rest and the requested statistics' sums, ``step`` elements apart."""
    tl.store(p, sums[0], mask=mask)
    if WANTED.moment:
        tl.store(p + step, sums[1], mask=mask)
    if WANTED.squares:
        tl.store(p + (1 + WANTED.moment) * step, sums[2], mask=mask)
    if WANTED.logits:
        tl.store(p + (1 + WANTED.moment + WANTED.squares) * step, sums[3], mask=mask)
    if WANTED.tops:
        tl.store(p + (1 + WANTED.moment + WANTED.squares + WANTED.logits) * step, sums[4], mask=mask)
        tl.store(p + (2 + WANTED.moment + WANTED.squares + WANTED.logits) * step, sums[5], mask=mask)


@triton.jit
def _offset_of(label_z):
    """Return the first offset of rows from the logits of their labels."""
    finite = tl.abs(label_z) < float("inf")  # false for NaN
    return tl.where(finite, label_z + HEADROOM, 0.0)


@triton.jit(do_not_specialize=["num_rows", "vocab"], do_not_specialize_on_alignment=["p_targets", "p_label", "p_sums"])
def _fused_pass_kernel(
    d_x,
    d_weight,
    d_e,
    p_bias,
    p_targets,
    p_label,
    p_sums,
    num_rows,
    vocab,
    hidden,
    TRANSFORM: tl.constexpr,
    WANTED: tl.constexpr,
    WIDEN: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    ROWS: tl.constexpr = d_x.block_shape[0]
    WORDS: tl.constexpr = d_weight.block_shape[0]
    high, wide = tl.cdiv(num_rows, ROWS), tl.cdiv(vocab, WORDS)
    for tile in tl.range(tl.program_id(0), high * wide, tl.num_programs(0), flatten=True):
        # Take GROUP rows of tiles at a time, column by column, so that concurrent tiles share operands in the cache.
        first_of_group = tile // (GROUP * wide) * GROUP
        height = tl.minimum(high - first_of_group, GROUP)
        in_group = tile % (GROUP * wide)
        first_row = (first_of_group + in_group % height) * ROWS
        i_word = in_group // height
        z = _product(d_x, d_weight, first_row, i_word * WORDS, hidden, WIDEN)
        rows = first_row + tl.arange(0, ROWS)
        m_rows = rows < num_rows
        offset = _offset_of(tl.load(p_label + rows, mask=m_rows, other=0.0))
        label = tl.load(p_targets + rows, mask=m_rows, other=-1).to(tl.int32)
        sums = _exponentials(z, d_e, p_bias, offset, label, first_row, i_word * WORDS, vocab, TRANSFORM, WANTED, PARTS)
        p_own = p_sums + i_word.to(tl.int64) * num_rows + rows
        _store(p_own, wide.to(tl.int64) * num_rows, sums, m_rows, WANTED)


@triton.jit
def _of_tiles(p, rows, m_rows, num_rows, num_tiles, IS_TOP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Return the sum or maximum over each row's tiles, whose values are ``num_rows`` elements apart."""
    b_sum = tl.full([BLOCK, ROWS], float("-inf") if IS_TOP else 0.0, tl.float32)
    for start in range(0, num_tiles, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        mask = (tiles < num_tiles)[:, None] & m_rows[None, :]
        p_own = p + tiles.to(tl.int64)[:, None] * num_rows + rows[None, :]
        own = tl.load(p_own, mask=mask, other=float("-inf") if IS_TOP else 0.0)
        b_sum = tl.maximum(b_sum, own) if IS_TOP else b_sum + own
    return tl.max(b_sum, axis=0) if IS_TOP else tl.sum(b_sum, axis=0)


@triton.jit(
    do_not_specialize=["num_rows", "num_tiles"],
    do_not_specialize_on_alignment=["p_sums", "p_label", "p_offset", "p_rows", "p_raised"],
)
def _combine_kernel(
    p_sums,
    p_label,
    p_offset,
    p_rows,
    p_raised,
    num_rows,
    num_tiles,
    NUM_SUMS: tl.constexpr,
    NUM_TOPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the tiles' sums, ROWS rows per program, and set ``p_raised`` to 1 where the offset does not suit the row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_rows = rows < num_rows
    label_z = tl.load(p_label + rows, mask=m_rows, other=0.0)
    offset = _offset_of(label_z)
    rest = _of_tiles(p_sums, rows, m_rows, num_rows, num_tiles, False, BLOCK, ROWS)
    tl.store(p_rows + rows, rest, mask=m_rows)
    for i in tl.static_range(1, NUM_SUMS + NUM_TOPS):
        step = tl.cast(i, tl.int64) * num_rows
        p_own = p_sums + step * num_tiles
        of_rows = _of_tiles(p_own, rows, m_rows, num_rows, num_tiles, i >= NUM_SUMS, BLOCK, ROWS)
        tl.store(p_rows + step + rows, of_rows, mask=m_rows)
    total = rest + tl.exp(label_z - offset)
    suits = (total >= NEAR) & (total <= FAR)  # false for NaN
    tl.store(p_raised + rows, (~suits).to(tl.int32), mask=m_rows)
    tl.store(p_offset + rows, offset, mask=m_rows)


@triton.jit(
    do_not_specialize=["num_rows", "vocab"],
    do_not_specialize_on_alignment=["p_targets", "p_label", "p_offset", "p_rows", "p_raised"],
)
def _repair_kernel(
    d_x,
    d_weight,
    d_e,
    p_bias,
    p_targets,
    p_label,
    p_offset,
    p_rows,
    p_raised,
    num_rows,
    vocab,
    hidden,
    TRANSFORM: tl.constexpr,
    WANTED: tl.constexpr,
    WIDEN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Repeat a block that has rows with ``p_raised`` 1, with the maximum as these rows' offset. Else do nothing."""
    ROWS: tl.constexpr = d_x.block_shape[0]
    WORDS: tl.constexpr = d_weight.block_shape[0]
    first_row = tl.program_id(0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    m_rows = rows < num_rows
    raised = tl.load(p_raised + rows, mask=m_rows, other=0)
    if tl.max(raised, axis=0) > 0:
        label = tl.load(p_targets + rows, mask=m_rows, other=-1).to(tl.int32)
        top = tl.load(p_label + rows, mask=m_rows, other=0.0)
        for first_word in range(0, vocab, WORDS):
            z = _product(d_x, d_weight, first_row, first_word, hidden, WIDEN)
            words = first_word + tl.arange(0, WORDS)
            z, _ = transformed(z, p_bias, words, words < vocab, TRANSFORM)
            kept = (words < vocab)[None, :] & (words[None, :] != label[:, None])
            top = tl.maximum(top, tl.max(tl.where(kept, z, float("-inf")), axis=1))
        offset = tl.load(p_offset + rows, mask=m_rows, other=0.0)
        offset = tl.where(raised > 0, tl.maximum(top, LOWEST), offset)
        none, lowest = tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
        sums = (none, none, none, none, lowest, lowest)
        for first_word in range(0, vocab, WORDS):
            z = _product(d_x, d_weight, first_row, first_word, hidden, WIDEN)
            of_tile = _exponentials(
                z, d_e, p_bias, offset, label, first_row, first_word, vocab, TRANSFORM, WANTED, PARTS
            )
            sums = _joined(sums, of_tile)
        # Other rows keep their sums bit for bit, because adding in this order rounds differently.
        m_raised = m_rows & (raised > 0)
        tl.store(p_offset + rows, offset, mask=m_raised)
        _store(p_rows + rows, num_rows, sums, m_raised, WANTED)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether the copy engine can read x (n, H) and weight (V, H), by dtype, strides and addresses.

    Rows must not share elements, as in an expanded weight, because descriptors do not define the result for them.
    """
    return x.dtype.itemsize == 2 and all(
        t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0
        for t in (x, weight)
    )


def sums_bytes(chosen: config.FusedPass, vocab: int, wanted: frozenset[str]) -> int:
    """Return the bytes per row that ``fused_pass`` allocates for the tiles' sums."""
    return 4 * (1 + len(wanted)) * -(-vocab // chosen.words)


def fused_pass(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    label: Tensor,
    offset: Tensor,
    sums: Tensor,
    raised: Tensor,
    *,
    e: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    outer: float,
    scale: float,
    wanted: frozenset[str],
    arch: str,
) -> None:
    """Compute offset (n,) and ``sums`` from x (n, H) and weight (V, H), and D E in ``e`` (n, V padded to 64).

    ``sums`` (1 + number of wanted parts, n) holds rest, then the parts in the order of ``row_pass.PARTS``. If ``e`` is
    None, only the sums are computed. ``label`` (n,) is z' of each row's target. ``raised`` (n,) int32 becomes 1 where
    the first offset did not suit. ``bias`` is (V padded to 64,) or None. Sums, offset and label are float32.
    """
    chosen = config.fused_pass(arch, softcap, bool(wanted))
    assert chosen is not None
    rows, vocab, words = len(x), len(weight), chosen.words
    if not rows:
        return
    wide = -(-vocab // words)
    of_tiles = torch.empty(len(sums), wide, rows, dtype=torch.float32, device=x.device)
    inputs = (x if bias is None else bias, targets, label)
    constants = {
        "TRANSFORM": Transform(scale, softcap, outer, bias is not None),
        "WANTED": Wanted.of(e, wanted),
        "WIDEN": arch == "interpreter",  # which multiplies bfloat16 numbers' bits
        "PARTS": chosen.parts,
    }

    def blocks(block_rows: int) -> tuple[TensorDescriptor, ...]:
        d_x = TensorDescriptor.from_tensor(x, [block_rows, chosen.features])
        d_weight = TensorDescriptor.from_tensor(weight, [words, chosen.features])
        return d_x, d_weight, d_x if e is None else TensorDescriptor.from_tensor(e, [block_rows, words // chosen.parts])

    programs = min(config.programs(x.device), -(-rows // chosen.rows) * wide)
    _fused_pass_kernel[(programs,)](
        *blocks(chosen.rows),
        *inputs,
        of_tiles,
        rows,
        vocab,
        x.shape[1],
        **constants,
        GROUP=chosen.group,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    num_tops = 2 * ("before" in wanted)
    _combine_kernel[(-(-rows // chosen.combined_rows),)](
        of_tiles,
        label,
        offset,
        sums,
        raised,
        rows,
        wide,
        NUM_SUMS=len(sums) - num_tops,
        NUM_TOPS=num_tops,
        BLOCK=16,
        ROWS=chosen.combined_rows,
        num_warps=4,
    )
    _repair_kernel[(-(-rows // chosen.repaired_rows),)](
        *blocks(chosen.repaired_rows),
        *inputs,
        offset,
        sums,
        raised,
        rows,
        vocab,
        x.shape[1],
        **constants,
        num_warps=chosen.num_warps // 2 or 1,
        num_stages=chosen.num_stages,
    )
