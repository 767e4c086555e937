"""Compute db_v = sum over rows of scale_n * E[n, v], the only gradient that is a matrix-vector product.

A matmul would need the scales in E's narrow dtype. Here they stay float32, and E is read once. Each column is summed in
a fixed order: rows in steps of BLOCK_ROWS, then the BLOCK_ROWS partial sums as a tree.

Launch invariants: E's row stride is a multiple of 64 elements; columns V..stride may hold anything and are not stored.
"""

# Arguments of kernels are typed by Triton at launch.
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import config


@triton.jit(do_not_specialize=["num_rows", "vocab"], do_not_specialize_on_alignment=["p_scale"])
def _bias_gradient_kernel(
    p_e,
    p_scale,
    p_out,
    num_rows,
    stride,
    vocab,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    b_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], p_scale.dtype.element_ty)
    for start in range(0, num_rows, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        m_rows = rows < num_rows
        o_e = rows.to(tl.int64)[:, None] * stride + cols[None, :]
        b_e = tl.load(p_e + o_e, mask=m_rows[:, None] & (cols < stride)[None, :], other=0.0)
        b_scale = tl.load(p_scale + rows, mask=m_rows, other=0.0)
        b_sum += b_e.to(b_sum.dtype) * b_scale[:, None]
    b_out = tl.sum(b_sum, axis=0)
    m_cols = cols < vocab
    if ACCUMULATE:
        b_out += tl.load(p_out + cols, mask=m_cols, other=0.0)
    tl.store(p_out + cols, b_out, mask=m_cols)


def bias_gradient(e: Tensor, scale: Tensor, out: Tensor, *, accumulate: bool, arch: str) -> None:
    """out (V,) = or += scale (n,) @ e (n, stride); ``scale`` and ``out`` have the accumulate dtype."""
    chosen = config.bias_gradient(arch)
    _bias_gradient_kernel[(triton.cdiv(len(out), chosen.block_cols),)](
        e,
        scale,
        out,
        len(e),
        e.stride(0),
        len(out),
        ACCUMULATE=accumulate,
        BLOCK_ROWS=chosen.block_rows,
        BLOCK_COLS=chosen.block_cols,
        num_warps=chosen.num_warps,
    )
