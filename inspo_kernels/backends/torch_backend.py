"""The head in plain torch on any device: three large products, one cached pass over the logits between them.

With row offset o = max_v z'_v, E_v = exp(z'_v - o), y the label, S' = sum of E_v over v != y and S = S' + E_y:

    logp       = z'_y - o - log S
    dlogp/dz_v = D_v (1[v = y] - E_v / S) = -(D_v / S) * (E_v  if v != y  else  -S')

where D = 1 - (z'/cap)^2 is the soft-cap's derivative (1 without one). The workspace therefore keeps D * E with the
label's entry set to -D_y S' (exact where p_y is close to 1, where E_y - S would cancel), probabilities are never
formed, and every scale sits on the small side of a product:

    dX = -(c s / S) * (E W)        dW = -E^T (X * c s / S)        db = -E^T (c s / S)

for upstream coefficients c and logit scale s. Reduced-precision operands are widened tile by tile, so products,
statistics and accumulators are float32 (float64 for float64) and dW is never rounded between groups.

Tried and lost on a 2-core CPU, for the pass over 512 x 32000 logits (15 ms as it is, beside 370 ms of products):
blocks of 2 MB instead of 16 (18 ms, and many times that beside other busy processes, because every block waits for all
threads four times); ``torch.softmax`` in place, one fused loop (10 ms, but its exp biases log-probs by 5e-7 a token,
which adds up over a sequence); workspaces of 1024 rows (4% faster over all, at twice the memory).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ..head import LMHead
from .base import Backend, HeadTile

# Block of the pass between the products: small enough for the last-level cache, large enough to start few threads.
BLOCK_BYTES = 16 << 20
# On a GPU a block only bounds the soft-cap's temporaries.
GPU_BLOCK_BYTES = 256 << 20
# A widened slice of a reduced-precision weight.
WIDENED_BYTES = 32 << 20


class TorchBackend(Backend):
    """``backend="torch"``: the default on CPU."""

    name = "torch"

    def unsupported(self, head: LMHead, device: torch.device) -> str | None:
        return None

    def default_workspace_bytes(self, head: LMHead, device: torch.device) -> int:
        # Every tile but the first reads and writes dW, 8*V*H bytes beside 6*C*V*H operations. At C = 512 that is 2% of
        # the time of a CPU with 150 Gflop/s and 20 GB/s; a GPU has more operations to a byte and wants more rows.
        rows = 512 if device.type == "cpu" else 4096
        return max(64 << 20, rows * self.bytes_per_row(head))

    def bytes_per_row(self, head: LMHead) -> int:
        return head.vocab_size * head.accumulate_dtype.itemsize

    def staged_bytes(self, head: LMHead, rows: int) -> int:
        return rows * self.bytes_per_row(head)

    def open_tile(self, head: LMHead, capacity: int) -> HeadTile:
        return TorchTile(head, capacity)


def _product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b.

    CPU libraries sum a product of fewer than four rows one term after another. At K = 32000 that is ten times the error
    of their blocked kernels (3.1e-6 against 3.3e-7 in float32), so such products are summed in blocks of K here.
    """
    if a.shape[0] >= 4 or a.device.type != "cpu":
        torch.addmm(out, a, b, beta=int(accumulate), out=out)
        return
    if not accumulate:
        out.zero_()
    for k in range(0, a.shape[1], 256):
        out += a[:, k : k + 256] @ b[k : k + 256]


class TorchTile(HeadTile):
    """The workspace is one (capacity, V) tensor: logits, then D * E in place."""

    def __init__(self, head: LMHead, capacity: int) -> None:
        super().__init__(head, capacity)
        self.device = head.weight.device
        block_bytes = BLOCK_BYTES if self.device.type == "cpu" else GPU_BLOCK_BYTES
        self.block = max(1, block_bytes // (head.vocab_size * head.accumulate_dtype.itemsize))
        self.bias = None if head.bias is None else self._widen(head.bias)

    @cached_property
    def workspace(self) -> Tensor:
        return self._new(self.capacity, self.head.vocab_size)

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.head.accumulate_dtype, device=self.device)

    def _widen(self, t: Tensor) -> Tensor:
        return t.to(self.head.compute_dtype).to(self.head.accumulate_dtype)

    def _weight_slices(self) -> Iterator[tuple[slice, Tensor]]:
        head = self.head
        if head.weight.dtype == head.compute_dtype == head.accumulate_dtype:
            yield slice(0, head.vocab_size), head.weight
            return
        step = max(1, WIDENED_BYTES // (head.hidden_size * head.accumulate_dtype.itemsize))
        for v in range(0, head.vocab_size, step):
            part = slice(v, min(v + step, head.vocab_size))
            yield part, self._widen(head.weight[part])

    def stage(self, x: Tensor, targets: Tensor) -> Tensor:
        self.x = self._widen(x)
        self.e = self.workspace[: len(x)]
        for part, weight in self._weight_slices():
            _product(self.x, weight.t(), self.e[:, part])
        logps, self.sums = self._new(len(x)), self._new(len(x))
        for i in range(0, len(x), self.block):
            rows = slice(i, i + self.block)
            logps[rows], self.sums[rows] = self._logits_to_e(self.e[rows], targets[rows, None])
        return logps

    def staged(self) -> tuple[Tensor, ...]:
        return self.x, self.e, self.sums

    def restore(self, staged: tuple[Tensor, ...]) -> None:
        self.x, self.e, self.sums = staged

    def _logits_to_e(self, z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a block of raw products into D * E in place; returns its log-probs and S, (rows,) each."""
        head = self.head
        if self.bias is not None:
            z.add_(self.bias)
        if head.logit_scale != 1.0:
            z.mul_(head.logit_scale)
        derivative = None
        if head.softcap is not None:
            z.div_(head.softcap).tanh_()
            derivative = 1 - z.square()
            z.mul_(head.softcap)
        label_logit = z.gather(1, targets)
        offset = z.amax(1, keepdim=True)
        z.sub_(offset).exp_()
        label_e = z.gather(1, targets)
        rest = z.scatter_(1, targets, 0.0).sum(1, keepdim=True)
        z.scatter_(1, targets, -rest)
        if derivative is not None:
            z.mul_(derivative)
        total = rest + label_e
        # Where the label is the likeliest, total = 1 + rest would lose rest's digits.
        below = label_logit - offset
        logps = torch.where(below == 0, -rest.log1p(), below - total.log())
        return logps.squeeze(1), total.squeeze(1)

    def gradients(
        self,
        coefficients: Tensor,
        *,
        dx: Tensor | None = None,
        dweight: Tensor | None = None,
        dbias: Tensor | None = None,
        accumulate: bool = False,
    ) -> None:
        scale = (coefficients * (-self.head.logit_scale) / self.sums).unsqueeze(1)
        if dx is not None:
            product = dx if dx.dtype == self.e.dtype else self._new(*dx.shape)
            for part, weight in self._weight_slices():
                _product(self.e[:, part], weight, product, accumulate=part.start > 0)
            torch.mul(product, scale, out=dx)
        beta = int(accumulate)
        if dweight is not None:
            product = dweight if dweight.dtype == self.e.dtype else self._new(*dweight.shape)
            torch.addmm(product, self.e.t(), self.x * scale, beta=beta, out=product)
            if product is not dweight:
                dweight.copy_(product)
        if dbias is not None:
            torch.addmv(dbias, self.e.t(), scale.squeeze(1), beta=beta, out=dbias)
