"""The head on CUDA and ROCm: three large library products, and Triton kernels for all that lies between them.

The algorithm is that of ``torch_backend`` in fewer passes over memory. Logits are products accumulated and kept in
float32 (``out_dtype``), ``STAGE_ROWS`` rows at a time; ``kernels.row_pass`` reads them once and leaves log-probs, S,
and E in the compute dtype, which is what the two gradient products multiply:

    dX = -(c s / S) * (E W)        dW = -E^T (X * c s / S)        db = -E^T (c s / S)

Per logit that is 4 + 4 + 2 bytes written and read between the products instead of the 16 of float32 in place, E needs
half the memory, and both products are single calls over all rows of the tile.

Accuracy. Log-probs never see a logit in the compute dtype: operands are multiplied exactly, and sums, logits, S and
log-probs are float32 throughout; labels get logits of their own (``kernels.label_logits``). The gradients see E rounded
to the compute dtype once, and X * c s / S likewise: two independent relative errors of half an ulp per factor, where
plain torch rounds the logits first (an error of |z| half-ulps in every probability) and then dlogits. The label's entry
is -S' itself, summed before any rounding, so nothing cancels where the label is almost certain. dX, dW and db are
accumulated in float32; dW is never rounded between tiles. float32 and float64 heads keep E in the logits' own memory,
at full precision.

float16 has no room for c s / S, which shrinks like 1 / (V N): the rows of X * c s / S are multiplied by a power of two
2^k that makes their largest entry about 2^14 (k is found on the device), and dW is carried in units of 2^-k during the
product: exact, at the price of two passes over dW.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import Tensor

from ..head import LMHead
from ..kernels import config
from .base import Backend, HeadTile

# Logits staged at a time: enough rows for a product at full speed and two waves of row programs on 132
# multiprocessors, in 0.5 GB at V = 128256.
STAGE_ROWS = 1024
# Rows of a tile by default. Each tile but the first reads and writes dW in float32, 245/C of a tile's product time at C
# rows (measured nowhere yet; from 790 TFLOP/s and 4.3 TB/s): 3% here. Most batches fit one tile and write dW once.
TILE_ROWS = 8192
# A product of n rows does n operations per byte of the head it reads; an H200 does 184 in that time (790 TFLOP/s and
# 4.3 TB/s). Below this many rows at a time a product is bound by reading the head.
FEW_ROWS = 128


class TritonBackend(Backend):
    """``backend="triton"``: the default on CUDA and ROCm."""

    name = "triton"

    def unsupported(self, head: LMHead, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return 'the triton package is not installed: install it (pip install triton), or use backend="torch"'
        if device.type == "cpu":
            if os.environ.get("TRITON_INTERPRET") == "1":
                return None
            return 'needs a CUDA or ROCm device, and the tensors are on the CPU: use backend="torch"'
        if device.type != "cuda":
            return f'runs on CUDA and ROCm, not on {device.type}: use backend="torch"'
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return f'needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less: use backend="torch"'
        return None

    def default_workspace_bytes(self, head: LMHead, device: torch.device) -> int:
        return max(64 << 20, self._bytes(head, TILE_ROWS))

    def bytes_per_row(self, head: LMHead) -> int:
        return self._bytes(head, 1)

    def staged_bytes(self, head: LMHead, rows: int) -> int:
        return rows * _e_bytes(head)

    def capacity(self, head: LMHead, device: torch.device, max_workspace_bytes: int | None) -> int:
        limit = self.default_workspace_bytes(head, device) if max_workspace_bytes is None else max_workspace_bytes
        rows = limit // self._bytes(head, 1)
        if rows >= STAGE_ROWS:
            rows = STAGE_ROWS + (limit - self._bytes(head, STAGE_ROWS)) // _e_bytes(head)
        return max(1, rows)

    def _bytes(self, head: LMHead, rows: int) -> int:
        staged = 0 if _in_place(head) else min(rows, STAGE_ROWS) * _stride(head) * head.accumulate_dtype.itemsize
        return rows * _e_bytes(head) + staged

    def open_tile(self, head: LMHead, capacity: int) -> HeadTile:
        return TritonTile(head, capacity)


def _in_place(head: LMHead) -> bool:
    """E has the logits' dtype and takes their place."""
    return head.compute_dtype == head.accumulate_dtype


def _stride(head: LMHead) -> int:
    return config.padded_vocab(head.vocab_size)


def _e_bytes(head: LMHead) -> int:
    return _stride(head) * head.compute_dtype.itemsize


def needs_no_logits(head: LMHead, rows: int, capacity: int) -> tuple[bool, str]:
    """Whether to score ``rows`` rows by ``kernels.linear_logps`` instead of products and ``row_pass``, and why.

    Products win by default: published Triton forwards reach 26-60% of a Hopper's matrix peak where libraries reach 95%,
    and this one has not been measured.
    """
    if head.compute_dtype == torch.float64:
        return False, "float64 has no tile product in Triton"
    if head.weight.stride(1) != 1:
        return False, "the weight's features are not contiguous"
    if rows <= capacity:
        return False, "one product holds all rows, and reads the head once"
    if capacity >= FEW_ROWS:
        return False, f"products of {capacity} rows are bound by arithmetic"
    return True, f"each product of only {capacity} rows, all that the workspace holds, would read the whole head"


class TritonTile(HeadTile):
    """Memory is allocated when first needed: log-probs alone need no E."""

    def __init__(self, head: LMHead, capacity: int) -> None:
        super().__init__(head, capacity)
        self.device = head.weight.device
        self.arch = config.architecture(self.device)
        self.stride = _stride(head)

    @cached_property
    def weight(self) -> Tensor:
        # Under autocast, here and below, the rounded copy that autocast itself would make.
        weight = self.head.weight.to(self.head.compute_dtype)
        # A product copies an operand without any unit stride: once for all of them, then.
        return weight if 1 in weight.stride() else weight.contiguous()

    @cached_property
    def bias(self) -> Tensor | None:
        head = self.head
        if head.bias is None:
            return None
        return torch.nn.functional.pad(head.bias.to(head.compute_dtype), (0, self.stride - head.vocab_size))

    @cached_property
    def e_rows(self) -> Tensor:
        return self._new(self.capacity, self.stride, dtype=self.head.compute_dtype)

    @cached_property
    def logits_rows(self) -> Tensor:
        return self._new(min(self.capacity, STAGE_ROWS), self.stride)

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.head.accumulate_dtype, device=self.device)

    def _on_device(self) -> AbstractContextManager:
        """Triton launches on the current device, which need not be the tensors'."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def stage(self, x: Tensor, targets: Tensor) -> Tensor:
        n = len(x)
        self.x = x.to(self.head.compute_dtype)
        self.e = self.e_rows[:n]
        self.sums = self._new(n)
        logps = self._new(n)
        self._log_probs(self.x, targets, logps, self.sums, self.e)
        return logps

    def staged(self) -> tuple[Tensor, ...]:
        return self.x, self.e, self.sums

    def restore(self, staged: tuple[Tensor, ...]) -> None:
        self.x, self.e, self.sums = staged

    def _log_probs(self, x: Tensor, targets: Tensor, logps: Tensor, sums: Tensor, e: Tensor | None) -> None:
        """Fill ``logps`` (n,), ``sums`` (n,) and, if given, ``e`` (n, stride), one stage of logits after another."""
        from ..kernels.label_logits import label_logits
        from ..kernels.row_pass import row_pass

        head = self.head
        in_place = e if _in_place(head) else None
        with self._on_device():
            labels = label_logits(x, self.weight, targets, arch=self.arch)
            for rows in _stages(len(x), min(self.capacity, STAGE_ROWS)):
                raw = self.logits_rows[: rows.stop - rows.start] if in_place is None else in_place[rows]
                _product(x[rows], self.weight.t(), raw[:, : head.vocab_size])
                row_pass(
                    raw,
                    targets[rows],
                    labels[rows],
                    logps[rows],
                    sums[rows],
                    vocab=head.vocab_size,
                    e=None if e is None else e[rows],
                    bias=self.bias,
                    softcap=head.softcap,
                    logit_scale=head.logit_scale,
                    arch=self.arch,
                )

    def score(self, x: Tensor, targets: Tensor) -> Tensor:
        """Log-probs of any number of rows; the logits, if any, never exceed ``capacity`` rows."""
        head, x = self.head, x.to(self.head.compute_dtype)
        if needs_no_logits(head, len(x), self.capacity)[0]:
            from ..kernels.linear_logps import linear_logps

            with self._on_device():
                return linear_logps(
                    x,
                    self.weight,
                    targets,
                    bias=self.bias,
                    softcap=head.softcap,
                    logit_scale=head.logit_scale,
                    arch=self.arch,
                    multiprocessors=config.multiprocessors(self.device),
                )
        logps = self._new(len(x))
        self._log_probs(x, targets, logps, torch.empty_like(logps), e=None)
        return logps

    def gradients(
        self,
        coefficients: Tensor,
        *,
        dx: Tensor | None = None,
        dweight: Tensor | None = None,
        dbias: Tensor | None = None,
        accumulate: bool = False,
    ) -> None:
        head = self.head
        scale = coefficients * (-head.logit_scale) / self.sums
        e = self.e[:, : head.vocab_size]
        if dx is not None:
            product = self._accumulator(dx)
            _product(e, self.weight, product)
            torch.mul(product, scale.unsqueeze(1), out=dx)
        if dweight is not None:
            if head.compute_dtype == torch.float16:
                self._half_dweight(e, scale, dweight, accumulate)
            else:
                scaled = torch.mul(self.x, scale.unsqueeze(1), out=torch.empty_like(self.x))
                product = dweight if dweight.dtype == e.dtype else self._accumulator(dweight)
                _product(e.t(), scaled, product, accumulate)
                if product is not dweight:
                    dweight.copy_(product)
        if dbias is not None:
            from ..kernels.bias_gradient import bias_gradient

            with self._on_device():
                bias_gradient(self.e, scale, dbias, accumulate=accumulate, arch=self.arch)

    def _accumulator(self, out: Tensor) -> Tensor:
        """``out``, or a tensor to take its place until it can be rounded."""
        return out if out.dtype == self.head.accumulate_dtype else self._new(*out.shape)

    def _half_dweight(self, e: Tensor, scale: Tensor, dweight: Tensor, accumulate: bool) -> None:
        product = self._accumulator(dweight)
        scaled = self.x * scale.unsqueeze(1)
        _, exponent = torch.frexp(scaled.abs().amax())
        # Not below 2^-100: what other tiles have left would overflow. Beside that, such a tile is nothing.
        unit = torch.ldexp(torch.ones_like(scale[0]), exponent.clamp(min=-86) - 14)
        if accumulate:
            product.div_(unit)
        _product(e.t(), scaled.div_(unit).to(e.dtype), product, accumulate)
        torch.mul(product, unit, out=dweight)


def _product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b, accumulated in float32 at least and rounded to out's dtype at most once.

    ``out`` has the operands' dtype, or float32 for 16-bit ones: GPUs have no other mixed products. CPU tensors, which
    only the interpreter works on, are widened, as torch has none at all there.
    """
    assert a.dtype == b.dtype and out.dtype in (a.dtype, torch.promote_types(a.dtype, torch.float32))
    if a.device.type == "cpu":
        wide = torch.promote_types(out.dtype, torch.float32)
        out.copy_(torch.addmm(out.to(wide), a.to(wide), b.to(wide), beta=int(accumulate)))
    elif a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(accumulate), out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(accumulate), out=out)


def _stages(n: int, most: int) -> list[slice]:
    """n rows in as few stages of at most ``most`` as possible, nearly equal, of whole product tiles (128) if many."""
    count = -(-n // most)
    size = -(-n // max(1, count))
    if count > 1:
        size = min(most, -(-size // 128) * 128)
    return [slice(i, min(i + size, n)) for i in range(0, n, max(1, size))]
