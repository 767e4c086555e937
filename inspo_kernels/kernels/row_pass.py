"""One pass over a tile of logits, rows x a range of words: E for the gradient matmuls, and sums carried per row.

With z = scale * (raw + bias) and z' = outer * tanh(z / softcap) (z' = z without a soft-cap), row offset o, label y:

    E_v = exp(z'_v - o), 0 at y        rest = sum of E_v        stored: D_v E_v, with D = 1 - tanh(z / softcap)^2

(D = 1 without a soft-cap). The tile is in the cache when this pass reads it, and the next tile takes its place, so
logits never reach memory. ``p_offset`` and ``p_rest`` carry each row's o and rest from one tile to the next. Sums are
float32 (float64 for float64), taken before E is rounded for storage. Each lane adds its columns of a block, then the
lanes are added as a tree. The label is left out: ``label_logits`` computes its logit, for the reason given there,
and it is added when the sums are combined. So nothing cancels if the label is almost certain.

The offset. In float32 and bfloat16 any o with max - 57 ln 2 <= o <= max will do. So a row's first offset is the maximum
of the label and of the first BLOCK columns, and tiles are read once. Afterwards, rest <= 2^57 tells whether o was near
enough. If it was not, or if rest is not finite because the first block was -inf, the row's program takes the tile's
maximum and raises o by a whole number k of powers of two. It multiplies what the row has summed and stored by 2^-k,
which is exact, and reads the tile again. ``p_raised`` counts these repeats. float16 has no such slack. And where E
replaces the logits (float32, float64), the tile cannot be read again. Both come as a tile of the whole vocabulary and
take its maximum first (EXACT_OFFSET). In float16 the label's later entry, -rest, must also stay below 65504, so o is
then raised by SHIFT >= log(V) - log(32768).

Statistics, where WANTED: moment adds sum of E_v (z'_v - o), squares sum of E_v^2, logits sum of z'_v (y included), tops
the largest z' before and after y.

Launch invariants:
- one program per row; columns of the tile start at word ``first``; ``stride_raw`` and ``stride_e`` are multiples of 64
  elements, and so is ``first`` (16-byte accesses for any V); E's columns beyond V are written as 0;
- ``bias`` has as many elements as E has columns, padding included;
- E may be the logits' own memory if EXACT_OFFSET: each element is read and then written by one thread, and a barrier
  stands between the reads for the maximum and the first write;
- a label outside 0..V-1 is a word of another rank: no column is left out for it; its logit must be -inf.
"""

# Arguments of kernels are typed by Triton at launch.
# mypy: allow-incomplete-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .softcap import Transform, Wanted, transformed

FAR = tl.constexpr(144115188075855872.0)  # 2^57
# Offset of a row without any finite logit so far: exp(-inf - offset) must be 0.
LOWEST = tl.constexpr(-1e30)
LN2 = tl.constexpr(0.6931471805599453)
# Order in which ``p_parts`` (5, n) holds the statistics' sums.
PARTS = ("moment", "squares", "logits", "before", "after")


@triton.jit
def _tile_max(p_raw, p_bias, label, num_cols, first, vocab, TRANSFORM: tl.constexpr, BLOCK: tl.constexpr):
    """Largest z' of the tile's columns before ``num_cols``, the label left out."""
    b_max = tl.full([BLOCK], float("-inf"), p_raw.dtype.element_ty)
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < num_cols
        words = first + cols
        b_raw = tl.load(p_raw + cols, mask=mask, other=0.0)
        b_z, _ = transformed(b_raw, p_bias, words, mask, TRANSFORM)
        b_max = tl.maximum(b_max, tl.where(mask & (words < vocab) & (words != label), b_z, float("-inf")))
    return tl.max(b_max, axis=0)


@triton.jit
def _sum_exp(
    p_raw,
    p_bias,
    p_e,
    label,
    offset,
    num_cols,
    first,
    vocab,
    TRANSFORM: tl.constexpr,
    WANTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rest and the statistics' sums of the tile; stores D E with 0 at the label."""
    b_sum = tl.zeros([BLOCK], p_raw.dtype.element_ty)
    b_moment, b_squares, b_logits = b_sum, b_sum, b_sum
    b_before = tl.full([BLOCK], float("-inf"), p_raw.dtype.element_ty)
    b_after = b_before
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < num_cols
        words = first + cols
        b_raw = tl.load(p_raw + cols, mask=mask, other=0.0)
        b_z, b_derivative = transformed(b_raw, p_bias, words, mask, TRANSFORM)
        m_words = mask & (words < vocab)
        m_kept = m_words & (words != label)
        b_e = tl.where(m_kept, tl.exp(b_z - offset), 0.0)
        b_sum += b_e
        if WANTED.moment:
            b_moment += tl.where(b_e > 0, b_e * (b_z - offset), 0.0)
        if WANTED.squares:
            b_squares += b_e * b_e
        if WANTED.logits:
            b_logits += tl.where(m_words, b_z, 0.0)
        if WANTED.tops:
            b_before = tl.maximum(b_before, tl.where(m_words & (words < label), b_z, float("-inf")))
            b_after = tl.maximum(b_after, tl.where(m_words & (words > label), b_z, float("-inf")))
        if WANTED.store:
            b_kept = tl.where(m_kept, b_e * b_derivative, 0.0)
            tl.store(p_e + words, b_kept.to(p_e.dtype.element_ty), mask=mask)
    return (
        tl.sum(b_sum, axis=0),
        tl.sum(b_moment, axis=0),
        tl.sum(b_squares, axis=0),
        tl.sum(b_logits, axis=0),
        tl.max(b_before, axis=0),
        tl.max(b_after, axis=0),
    )


@triton.jit(
    do_not_specialize=["num_rows", "vocab"],
    do_not_specialize_on_alignment=["p_targets", "p_label", "p_offset", "p_rest", "p_parts", "p_raised"],
)
def _row_pass_kernel(
    p_raw,
    p_bias,
    p_targets,
    p_label,
    p_e,
    p_offset,
    p_rest,
    p_parts,
    p_raised,
    num_rows,
    num_cols,
    first,
    vocab,
    stride_raw,
    stride_e,
    TRANSFORM: tl.constexpr,
    WANTED: tl.constexpr,
    IS_FIRST: tl.constexpr,
    EXACT_OFFSET: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_raw += i_row * stride_raw
    p_e += i_row * stride_e
    target = tl.load(p_targets + i_row)
    label = tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)
    element = p_raw.dtype.element_ty

    if IS_FIRST:
        label_z = tl.load(p_label + i_row)
        looked_at = num_cols if EXACT_OFFSET else tl.minimum(num_cols, BLOCK)
        offset = _tile_max(p_raw, p_bias, label, looked_at, first, vocab, TRANSFORM, BLOCK)
        offset = tl.maximum(tl.maximum(offset, label_z), LOWEST) + SHIFT
        before_tile = tl.cast(0.0, element)
        tl.debug_barrier()
    else:
        offset = tl.load(p_offset + i_row)
        before_tile = tl.load(p_rest + i_row)
    rest, moment, squares, logits, top_before, top_after = _sum_exp(
        p_raw, p_bias, p_e, label, offset, num_cols, first, vocab, TRANSFORM, WANTED, BLOCK
    )
    times = tl.cast(0, tl.int32)
    factor = tl.cast(1.0, element)
    shift = tl.cast(0.0, element)
    if not EXACT_OFFSET:
        near = before_tile + rest <= FAR  # false for NaN
        if not near:
            top = _tile_max(p_raw, p_bias, label, num_cols, first, vocab, TRANSFORM, BLOCK)
            raised = offset + tl.ceil((top - offset) / LN2) * LN2
            if IS_FIRST:  # the offset may be LOWEST
                raised = tl.maximum(tl.maximum(top, tl.load(p_label + i_row)), LOWEST)
            else:
                raised = tl.where(offset <= LOWEST, top, tl.maximum(raised, offset))
                powers = tl.where(offset <= LOWEST, 0.0, tl.ceil((raised - offset) / LN2 - 0.5))
                factor = tl.where(offset <= LOWEST, 0.0, tl.exp2(-powers))
                shift = tl.where(offset <= LOWEST, 0.0, -powers * LN2)
                raised = tl.where(offset <= LOWEST, raised, offset + powers * LN2)
                if WANTED.store:
                    for start in range(0, first, BLOCK):
                        cols = start + tl.arange(0, BLOCK)
                        mask = cols < first
                        b_e = tl.load(p_e + cols, mask=mask, other=0.0)
                        tl.store(p_e + cols, (b_e.to(element) * factor).to(p_e.dtype.element_ty), mask=mask)
            offset = raised
            times += 1
            tl.debug_barrier()
            rest, moment, squares, logits, top_before, top_after = _sum_exp(
                p_raw, p_bias, p_e, label, offset, num_cols, first, vocab, TRANSFORM, WANTED, BLOCK
            )
    p_parts += i_row
    if not IS_FIRST:
        times_before = tl.load(p_raised + i_row)
    # All threads have read what one of them now replaces.
    tl.debug_barrier()
    if IS_FIRST:
        tl.store(p_raised + i_row, times)
        tl.store(p_offset + i_row, offset)
        tl.store(p_rest + i_row, rest)
    else:
        if not EXACT_OFFSET:
            tl.store(p_raised + i_row, times_before + times)
            tl.store(p_offset + i_row, offset)
        tl.store(p_rest + i_row, before_tile * factor + rest)
        if WANTED.moment:
            moment += factor * (tl.load(p_parts) + shift * before_tile)
        if WANTED.squares:
            squares += factor * factor * tl.load(p_parts + num_rows)
        if WANTED.logits:
            logits += tl.load(p_parts + 2 * num_rows)
        if WANTED.tops:
            top_before = tl.maximum(top_before, tl.load(p_parts + 3 * num_rows))
            top_after = tl.maximum(top_after, tl.load(p_parts + 4 * num_rows))
    if WANTED.moment:
        tl.store(p_parts, moment)
    if WANTED.squares:
        tl.store(p_parts + num_rows, squares)
    if WANTED.logits:
        tl.store(p_parts + 2 * num_rows, logits)
    if WANTED.tops:
        tl.store(p_parts + 3 * num_rows, top_before)
        tl.store(p_parts + 4 * num_rows, top_after)


def row_pass(
    raw: Tensor,
    targets: Tensor,
    label: Tensor,
    offset: Tensor,
    rest: Tensor,
    parts: Tensor,
    raised: Tensor,
    *,
    first: int,
    vocab: int,
    e: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    outer: float,
    scale: float,
    wanted: frozenset[str],
    arch: str,
    all_words: int | None = None,
) -> None:
    """Add the words ``first``... of ``raw`` = x W^T (n, words, padded to 64) to ``offset``, ``rest`` and ``parts``.

    ``label`` (n,): z' of each row's target; ``offset`` and ``rest`` (n,), ``parts`` (5, n) in the order of ``PARTS``:
    written where ``first`` is 0, of the accumulate dtype like ``raw``. ``raised`` (n,) int32 counts raised offsets.
    ``e`` (n, all words, padded) receives D E of the tile's words, or is None; it may be ``raw`` itself. ``bias`` is
    (all words, padded) or None. ``wanted``: the parts that are summed. ``all_words``: V, if other ranks hold some.
    """
    if not len(raw):
        return
    in_place = e is not None and e.data_ptr() == raw.data_ptr()
    half = e is not None and e.dtype == torch.float16
    chosen = config.row_pass(arch, raw.shape[1], raw.dtype, softcap, bool(wanted))
    _row_pass_kernel[(len(raw),)](
        raw,
        raw if bias is None else bias,
        targets,
        label,
        raw if e is None else e,
        offset,
        rest,
        parts,
        raised,
        len(raw),
        raw.shape[1],
        first,
        vocab,
        raw.stride(0),
        raw.stride(0) if e is None else e.stride(0),
        TRANSFORM=Transform(scale, softcap, outer, bias is not None),
        WANTED=Wanted.of(e, wanted),
        IS_FIRST=first == 0,
        EXACT_OFFSET=in_place or half,
        SHIFT=max(0.0, math.log((all_words or vocab) / 32768)) if half else 0.0,
        BLOCK=chosen.block,
        num_warps=chosen.num_warps,
    )
