"""One pass over rows of logits: log-probs, and E for the gradient products.

With z = SCALE * (raw + bias) and z' = cap * tanh(z / cap) (z' = z without a soft-cap; columns beyond V are -inf, set
after the cap), row offset o, label y:

    E_v = exp(z'_v - o)    S' = sum of E_v over v != y    S = S' + E_y    logp = z'_y - o - log S
    stored: D_v E_v for v != y, -D_y S' for y, with D = dz'/dz = 1 - tanh(z / cap)^2 (1 without a soft-cap)

so that dlogp/dz_v = -stored_v / S. Sums are float32 (float64 for float64), taken before E is rounded for storage, each
lane adding V / BLOCK terms before the lanes are added as a tree. Where the label is likelier than not, logp is
-log1p(S' / E_y): no digit is lost where p is close to 1.

The offset. float32's and bfloat16's exponents forgive any o with max - 57 ln 2 <= o <= max, so o is the maximum of the
label and of the row's first BLOCK columns, known before the pass starts, and logits are read from memory once. S >=
exp(max - o) says afterwards whether that was near enough: S > 2^57 (or not finite: a first block of -inf) sends the row
round again with its true maximum, the logits being still there. float16 forgives nothing, and E in place of the logits
(float32, float64) destroys what a second round would read: both take the maximum first and read twice (EXACT_OFFSET).
In float16 -S' must stay below 65504 too, so o is then raised by SHIFT >= log(V) - log(32768).

The label's logit comes from ``label_logits``, for the reason given there, and never from ``raw``.

Launch invariants:
- one program per row; row strides are equal for logits and E, and multiples of 64 elements (16-byte accesses for any
  V); columns V..stride are read as garbage, masked, and written as 0;
- ``bias`` has as many elements as a row has columns, padding included;
- E may be the logits' own memory if EXACT_OFFSET: each element is read and then written by one thread, and a barrier
  stands between the reads for the maximum and the first write;
- a label outside 0..V-1 is neither read nor written at, and its log-prob is NaN.
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
from .softcap import softcap


@triton.jit
def _logits(z, p_bias, cols, mask, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """z' and D of raw logits ``z`` at ``cols``."""
    if HAS_BIAS:
        z += tl.load(p_bias + cols, mask=mask, other=0.0).to(z.dtype)
    if SCALE != 1.0:
        z = z * SCALE
    if SOFTCAP is not None:
        z, derivative = softcap(z, SOFTCAP)
    else:
        derivative = tl.cast(1.0, z.dtype)
    return z, derivative


@triton.jit
def _row_max(
    p_raw,
    p_bias,
    label,
    label_z,
    num_cols,
    vocab,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest z' of the columns before ``num_cols``, and of the label, by its own logit wherever it is."""
    b_max = tl.full([BLOCK], float("-inf"), p_raw.dtype.element_ty)
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < num_cols
        b_raw = tl.load(p_raw + cols, mask=mask, other=0.0)
        b_z, _ = _logits(b_raw, p_bias, cols, mask, SCALE, SOFTCAP, HAS_BIAS)
        b_max = tl.maximum(b_max, tl.where((cols < vocab) & (cols != label), b_z, float("-inf")))
    return tl.maximum(tl.max(b_max, axis=0), label_z)


@triton.jit
def _sum_exp(
    p_raw,
    p_bias,
    p_e,
    label,
    offset,
    stride,
    vocab,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S' of the row; stores D E with 0 at the label."""
    b_sum = tl.zeros([BLOCK], p_raw.dtype.element_ty)
    for start in range(0, stride, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < stride
        b_raw = tl.load(p_raw + cols, mask=mask, other=0.0)
        b_z, b_derivative = _logits(b_raw, p_bias, cols, mask, SCALE, SOFTCAP, HAS_BIAS)
        m_kept = (cols < vocab) & (cols != label)
        b_e = tl.exp(b_z - offset)
        b_sum += tl.where(m_kept, b_e, 0.0)
        if STORE:
            tl.store(p_e + cols, tl.where(m_kept, b_e * b_derivative, 0.0).to(p_e.dtype.element_ty), mask=mask)
    return tl.sum(b_sum, axis=0)


@triton.jit(
    do_not_specialize=["vocab"], do_not_specialize_on_alignment=["p_targets", "p_label_logits", "p_logps", "p_sums"]
)
def _row_pass_kernel(
    p_raw,
    p_bias,
    p_targets,
    p_label_logits,
    p_e,
    p_logps,
    p_sums,
    stride,
    vocab,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE: tl.constexpr,
    EXACT_OFFSET: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_raw += i_row * stride
    p_e += i_row * stride
    target = tl.load(p_targets + i_row)
    valid = (target >= 0) & (target < vocab)
    label = target.to(tl.int32)  # any number if not valid, and then used under a mask alone
    label_z, label_derivative = _logits(tl.load(p_label_logits + i_row), p_bias, label, valid, SCALE, SOFTCAP, HAS_BIAS)

    first = stride if EXACT_OFFSET else tl.minimum(stride, BLOCK)
    offset = _row_max(p_raw, p_bias, label, label_z, first, vocab, SCALE, SOFTCAP, HAS_BIAS, BLOCK) + SHIFT
    tl.debug_barrier()
    rest = _sum_exp(p_raw, p_bias, p_e, label, offset, stride, vocab, SCALE, SOFTCAP, HAS_BIAS, STORE, BLOCK)
    label_e = tl.exp(label_z - offset)
    if not EXACT_OFFSET:
        near = rest + label_e <= 144115188075855872.0  # 2^57; false for NaN
        if not near:
            offset = _row_max(p_raw, p_bias, label, label_z, stride, vocab, SCALE, SOFTCAP, HAS_BIAS, BLOCK)
            tl.debug_barrier()
            rest = _sum_exp(p_raw, p_bias, p_e, label, offset, stride, vocab, SCALE, SOFTCAP, HAS_BIAS, STORE, BLOCK)
            label_e = tl.exp(label_z - offset)
    total = rest + label_e

    ratio = rest / label_e
    one_plus = 1.0 + ratio
    log1p = tl.log(one_plus) + (ratio - (one_plus - 1.0)) / one_plus
    logp = tl.where(label_e > rest, -log1p, label_z - offset - tl.log(total))
    tl.store(p_logps + i_row, logp)
    tl.store(p_sums + i_row, total)
    if STORE:
        # Another thread has stored the 0 that this replaces.
        tl.debug_barrier()
        tl.store(p_e + label, (-rest * label_derivative).to(p_e.dtype.element_ty), mask=valid)


def row_pass(
    raw: Tensor,
    targets: Tensor,
    label_logits: Tensor,
    logps: Tensor,
    sums: Tensor,
    *,
    vocab: int,
    e: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    arch: str,
) -> None:
    """Write ``logps`` (n,), ``sums`` S (n,) and, if given, ``e`` (n, stride) from ``raw`` = x W^T (n, stride).

    ``raw``, ``label_logits`` (n,), ``logps`` and ``sums`` have the accumulate dtype; ``e`` may be ``raw``; ``bias`` is
    (stride,) or None.
    """
    in_place = e is not None and e.data_ptr() == raw.data_ptr()
    half = e is not None and e.dtype == torch.float16
    chosen = config.row_pass(arch, vocab, raw.dtype, softcap)
    _row_pass_kernel[(len(raw),)](
        raw,
        raw if bias is None else bias,
        targets,
        label_logits,
        raw if e is None else e,
        logps,
        sums,
        raw.stride(0),
        vocab,
        SCALE=logit_scale,
        SOFTCAP=softcap,
        HAS_BIAS=bias is not None,
        STORE=e is not None,
        EXACT_OFFSET=in_place or half,
        SHIFT=max(0.0, math.log(vocab / 32768)) if half else 0.0,
        BLOCK=chosen.block,
        num_warps=chosen.num_warps,
    )
