"""Run the head on CUDA and ROCm: matmuls, and Triton kernels for everything between them.

The algorithm is that of ``torch_backend``. A pass over the logits returns sums per row. If gradients follow, it also
returns E in the compute dtype, which the two gradient matmuls read:

    dX = -(c s / S) * (E W)        dW = -E^T (X * c s / S)        db = -E^T (c s / S)

The pass has two forms. Where ``config.fused_pass`` returns launch sizes, ``kernels.fused_pass`` computes the logits in
registers and E from them. Elsewhere a library matmul writes a tile of float32 logits (``out_dtype``) that fits the
chip's last-level cache, and ``kernels.row_pass`` reads it there. Both forms take 2 + 2 + 2 bytes of memory traffic per
logit (E is written once and read twice), and none for scoring. Float32 logits in place would take 16 bytes. Each
gradient matmul is a single library call over all kept rows.

Accuracy. Log-probs never depend on a logit in the compute dtype. Operands are multiplied exactly. Sums, logits, S and
log-probs are float32 throughout. Labels get logits of their own (``kernels.label_logits``). The gradients read E and
X * c s / S, each rounded once to the compute dtype: two independent relative errors of half an ulp. Plain torch rounds
the logits first, which is an error of |z| half-ulps in every probability, and then dlogits. The label's entry is -S',
summed before any rounding, so nothing cancels if the label is almost certain. dX, dW and db are accumulated in
float32, and dW is never rounded between tiles. float32 and float64 heads keep E in the logits' memory, at full
precision.

float16's range is too small for c s / S, which shrinks like 1 / (V N). So the rows of X * c s / S are multiplied by a
power of two, 2^k, that makes their largest entry about 2^14; k is found on the device. During the matmul, dW is in
units of 2^-k. This is exact, and costs two passes over dW.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..head import LMHead
from ..kernels import config
from ..row_sums import Parts, RowSums
from .base import Backend, HeadTile, chunks, cut

if TYPE_CHECKING:
    from ..gradients import Gradients

# Rows of E that are kept by default. Most batches then fit one group and write dW once. Each further group reads and
# writes dW in float32. On an H100 with Llama-3-8B's head, 8,192 rows in groups of 4,096 take 1.08 times as long as in
# one group, and in groups of 2,048 rows 1.16 times.
KEPT_ROWS = 8192


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

    def prepared(self, head: LMHead) -> LMHead:
        # Under autocast the rounded copy that autocast itself would make. A matmul copies an operand without any unit
        # stride: once for all of them, then.
        weight = head.weight.to(head.compute_dtype)
        weight = weight if 1 in weight.stride() else weight.contiguous()
        return replace(head, weight=weight, bias=None if head.bias is None else head.bias.to(head.compute_dtype))

    def scale_rows(self, x: Tensor, scale: Tensor, out: Tensor) -> None:
        from ..kernels.scale_rows import scale_rows

        with _on(x.device):
            scale_rows(x, scale, out, arch=config.architecture(x.device))

    def default_workspace_bytes(self, head: LMHead, device: torch.device) -> int:
        return max(64 << 20, _tile_bytes(head, device) + KEPT_ROWS * _e_bytes(head))

    def kept_bytes(self, head: LMHead, rows: int) -> int:
        return rows * _e_bytes(head)

    def capacity(self, head: LMHead, device: torch.device, workspace_bytes: int) -> int:
        logits = self.logits_bytes(head, device, workspace_bytes)
        return max(1, (workspace_bytes - logits) // _e_bytes(head))

    def passing_bytes(self, head: LMHead, device: torch.device, rows: int, workspace_bytes: int) -> int:
        kept = min(rows, self.capacity(head, device, workspace_bytes)) * _e_bytes(head)
        dx = rows * head.hidden_size * head.accumulate_dtype.itemsize
        return kept + self.logits_bytes(head, device, workspace_bytes) + dx

    def logits_bytes(self, head: LMHead, device: torch.device, workspace_bytes: int) -> int:
        return min(_tile_bytes(head, device), workspace_bytes // 2)

    def open_tile(self, head: LMHead, capacity: int, workspace_bytes: int) -> HeadTile:
        return TritonTile(head, capacity, workspace_bytes)


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _in_place(head: LMHead) -> bool:
    """E has the logits' dtype and takes their place."""
    return head.compute_dtype == head.accumulate_dtype


def _stride(head: LMHead) -> int:
    return config.padded_vocab(head.vocab_size)


def _e_bytes(head: LMHead) -> int:
    return _stride(head) * head.compute_dtype.itemsize


def _tile_bytes(head: LMHead, device: torch.device) -> int:
    """Logits beside E: none where E takes their place."""
    if _in_place(head):
        return 0
    tile = config.logits_tile(config.architecture(device), device, head.accumulate_dtype.itemsize)
    # E in float16 needs the maximum of the whole row before it is written.
    words = _stride(head) if head.compute_dtype == torch.float16 else min(tile.words, _stride(head))
    return tile.rows * words * head.accumulate_dtype.itemsize


class TritonTile(HeadTile):
    """Memory is allocated when first needed: log-probs alone need no E."""

    def __init__(self, head: LMHead, capacity: int, workspace_bytes: int) -> None:
        super().__init__(head, capacity)
        self.device, self.dtype = head.weight.device, head.accumulate_dtype
        self.arch = config.architecture(self.device)
        self.stride = _stride(head)
        self.workspace_bytes = workspace_bytes
        self.dx_rows = capacity or TritonBackend().capacity(head, self.device, workspace_bytes)
        self.e_rows: Tensor | None = None
        # How often a row's offset had to be raised, for tests and tuning.
        self.raised: Tensor

    @cached_property
    def bias(self) -> Tensor | None:
        bias, head = self.head.bias, self.head
        return None if bias is None else torch.nn.functional.pad(bias, (0, self.stride - head.vocab_size))

    def _rows_of_e(self, n: int) -> Tensor:
        if self.e_rows is None or len(self.e_rows) < n:
            self.e_rows = None
            self.e_rows = self._new(max(n, self.capacity), self.stride, dtype=self.head.compute_dtype)
        return self.e_rows[:n]

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def _tile_shape(self, n: int, keep: bool) -> config.LogitsTile:
        """Rows and words of a tile of logits: from the cache, and never more than the workspace."""
        tile = config.logits_tile(self.arch, self.device, self.dtype.itemsize)
        elements = self.workspace_bytes // self.dtype.itemsize // (2 if keep else 1)
        if keep and self.head.compute_dtype == torch.float16:
            return config.LogitsTile(max(1, min(tile.rows, n, elements // self.stride)), self.stride)
        words = min(tile.words, self.stride, max(64, elements // 64 * 64))
        return config.LogitsTile(max(1, min(tile.rows, n, elements // words)), words)

    def stage(
        self, x: Tensor, targets: Tensor, *, keep: bool = False, dx: Tensor | None = None, parts: Parts = frozenset()
    ) -> RowSums:
        n = len(x)
        self.x, self.targets, self.dx = x.to(self.head.compute_dtype), targets, dx
        self.e = self._rows_of_e(n) if keep or dx is not None else None
        self.raised = self._new(n, dtype=torch.int32)
        with _on(self.device):
            label = self._label_logits(self.x, targets)
            fused = self._fused_pass(parts)
            sums = self._sum_tiles(label, parts) if fused is None else self._fuse(fused, label, parts)
        self.local_offset = sums["offset"]
        return RowSums(label=label, **sums)

    def _fused_pass(self, parts: Parts) -> config.FusedPass | None:
        """Return launch sizes of ``kernels.fused_pass``, or None if it cannot be used: see its launch invariants."""
        from ..kernels.fused_pass import fits

        if self.dtype != torch.float32 or not fits(self.x, self.head.weight):
            return None
        if self.e is not None and self.e.dtype != torch.bfloat16:
            return None
        return config.fused_pass(self.arch, self.head.softcap, bool(parts))

    def _fuse(self, chosen: config.FusedPass, label: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Return ``RowSums`` by name, except labels. A launch's sums of tiles take no more than a tile of logits."""
        from ..kernels.fused_pass import fused_pass, sums_bytes
        from ..kernels.row_pass import PARTS

        n, head = len(self.x), self.head
        offset, sums = self._new(n), []
        room = TritonBackend().logits_bytes(head, self.device, self.workspace_bytes)
        most = max(1, room // sums_bytes(chosen, head.vocab_size, parts))
        most -= most % chosen.rows if most > chosen.rows else 0  # whole tiles
        for rows in _even(n, most):
            sums.append(self._new(1 + len(parts), rows.stop - rows.start))
            fused_pass(
                self.x[rows],
                head.weight,
                self.targets[rows],
                label[rows],
                offset[rows],
                sums[-1],
                self.raised[rows],
                **self._launch_options(rows, parts),
            )
        names = ("rest", *(name for name in PARTS if name in parts))
        return {"offset": offset} | dict(zip(names, sums[0] if len(sums) == 1 else torch.cat(sums, 1), strict=True))

    def _launch_options(self, rows: slice, parts: Parts) -> dict[str, Any]:
        """Return the keyword arguments that ``kernels.row_pass`` and ``kernels.fused_pass`` share."""
        head = self.head
        return {
            "e": cut(self.e, rows),
            "bias": self.bias,
            "softcap": head.softcap,
            "outer": head.softcap / head.temperature if head.softcap is not None else 1.0,
            "scale": head.slope if head.softcap is None else head.logit_scale,
            "wanted": parts,
            "arch": self.arch,
        }

    def _sum_tiles(self, label: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Return ``RowSums`` by name, except labels, from one tile of logits after another, or from E's own memory."""
        from ..kernels.row_pass import PARTS, row_pass

        head, n = self.head, len(self.x)
        offset, rest, sums = self._new(n), self._new(n), self._new(len(PARTS), n)
        in_place = self.e if _in_place(head) else None
        whole = config.LogitsTile(n, self.stride)
        tile = self._tile_shape(n, self.e is not None) if in_place is None else whole
        buffer = self._new(tile.rows * tile.words) if in_place is None else in_place
        for rows in _even(n, tile.rows):
            count = rows.stop - rows.start
            some = self._new(len(PARTS), count)
            for start in range(0, self.stride, tile.words):
                stop = min(start + tile.words, self.stride)
                raw = buffer[: count * (stop - start)].view(count, stop - start) if in_place is None else buffer
                last = min(stop, head.vocab_size)
                _matmul(self.x[rows], head.weight[start:last].t(), raw[:, : last - start])
                row_pass(
                    raw,
                    self.targets[rows],
                    label[rows],
                    offset[rows],
                    rest[rows],
                    some,
                    self.raised[rows],
                    first=start,
                    vocab=head.vocab_size,
                    all_words=head.all_words,
                    **self._launch_options(rows, parts),
                )
            if parts:
                sums[:, rows] = some
        return {"offset": offset, "rest": rest} | {name: sums[PARTS.index(name)] for name in parts}

    def _label_logits(self, x: Tensor, targets: Tensor) -> Tensor:
        """z' of the labels, -inf for those that are words of another rank; their D in ``label_slope``."""
        from ..kernels.label_logits import label_logits

        head = self.head
        label = label_logits(x, head.weight, targets, arch=self.arch)
        if head.bias is not None:
            label += head.bias[targets.clamp(0, head.vocab_size - 1) if head.is_shard else targets]
        self.label_slope = None
        if head.softcap is None:
            if head.slope != 1.0:
                label *= head.slope
        else:
            capped = torch.tanh(label * (head.logit_scale / head.softcap))
            self.label_slope = 1 - capped.square()
            label = capped * (head.softcap / head.temperature)
        return torch.where(head.holds(targets), label, -torch.inf) if head.is_shard else label

    def finish(self, sums: RowSums) -> None:
        if self.e is None:
            return
        head, e, sums = self.head, self.e[:, : self.head.vocab_size], sums.to(self.dtype)
        self.total, entry = sums.total, -sums.rest
        own = head.holds(self.targets) if head.is_shard else None
        if sums.offset is not self.local_offset:
            factor = self._factor(sums, own)
            if own is not None and e.dtype == torch.float16:
                # An entry that is scaled to another offset, or to an arbitrary total, can overflow float16.
                power = self._power(sums.total)
                self.total, entry, factor = sums.total * power, entry * power, factor * power
                e.mul_(factor.to(e.dtype).unsqueeze(1))
            else:
                self.total, entry = self.total / factor, entry / factor
        if self.label_slope is not None:
            entry *= self.label_slope
        entry, column = entry.to(e.dtype).unsqueeze(1), self.targets.unsqueeze(1)
        if own is not None:
            column = column.clamp(0, head.vocab_size - 1)
            entry = torch.where(own.unsqueeze(1), entry, e.gather(1, column))
        e.scatter_(1, column, entry)
        if self.dx is not None:
            _matmul(e, head.weight, self.dx)
            self.dx.mul_((-head.slope / self.total).unsqueeze(1))

    def _factor(self, sums: RowSums, own: Tensor | None) -> Tensor:
        """exp(offset of each row of E - the final one), bounded so that the label's entry stays finite.

        A row whose label another rank holds has no entry: it needs no bound. See ``torch_backend``.
        """
        factor, lowest = (self.local_offset - sums.offset).exp(), 2.0**-100
        return factor.clamp_(min=lowest) if own is None else torch.where(own, factor.clamp(min=lowest), factor)

    def _power(self, total: Tensor) -> Tensor:
        """Return powers of two that scale totals to 2^14..2^15, or lower if E would otherwise leave float16's range."""
        # The largest element of E is 32768 / V before it is multiplied, by at most 32768.
        unit = min(15, 30 - (self.head.all_words - 1).bit_length())
        _, exponent = torch.frexp(total)
        return torch.ldexp(torch.ones_like(total), unit - exponent)

    def staged(self) -> tuple[Tensor, ...]:
        assert self.e is not None
        return self.x, self.e, self.total

    def restore(self, staged: tuple[Tensor, ...]) -> None:
        self.x, self.e, self.total = staged

    def release(self) -> None:
        self.e = self.e_rows = None

    def head_gradients(self, coefficients: Tensor, out: Gradients, accumulate: bool = False) -> None:
        head = self.head
        assert self.e is not None
        scale = coefficients * (-head.slope) / self.total
        e = self.e[:, : head.vocab_size]
        if (dweight := out.weight) is not None:
            if head.compute_dtype == torch.float16:
                self._half_dweight(e, scale, dweight, accumulate)
            else:
                scaled = torch.empty_like(self.x)
                TritonBackend().scale_rows(self.x, scale, scaled)
                product = dweight if dweight.dtype in (e.dtype, self.dtype) else self._new(*dweight.shape)
                _matmul(e.t(), scaled, product, accumulate)
                if product is not dweight:
                    dweight.copy_(product)
        if out.bias is not None:
            from ..kernels.bias_gradient import bias_gradient

            with _on(self.device):
                bias_gradient(self.e, scale, out.bias, accumulate=accumulate, arch=self.arch)

    def recompute_gradients(
        self, x: Tensor, targets: Tensor, sums: RowSums, coefficients: Tensor, out: Gradients, accumulate: bool = False
    ) -> None:
        for rows in chunks(0, len(x), self.dx_rows):
            self.stage(x[rows], targets[rows], keep=True, dx=cut(out.x, rows))
            self.finish(sums[rows])
            self.head_gradients(coefficients[rows], out, accumulate)
            accumulate = True
        if out.x is not None:
            out.x.mul_(coefficients.unsqueeze(1))

    def _half_dweight(self, e: Tensor, scale: Tensor, dweight: Tensor, accumulate: bool) -> None:
        product = dweight if dweight.dtype == self.dtype else self._new(*dweight.shape)
        scaled = self.x * scale.unsqueeze(1)
        _, exponent = torch.frexp(scaled.abs().amax())
        # Not below 2^-100: what other tiles have left would overflow. Beside that, such a tile is nothing.
        unit = torch.ldexp(torch.ones_like(scale[0]), exponent.clamp(min=-86) - 14)
        if accumulate:
            product.div_(unit)
        _matmul(e.t(), scaled.div_(unit).to(e.dtype), product, accumulate)
        torch.mul(product, unit, out=dweight)


def _matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
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


def _even(n: int, most: int) -> list[slice]:
    """n rows in as few parts of at most ``most`` as possible, nearly equal, of whole matmul blocks (128) if many."""
    count = -(-n // most)
    if count > 1:
        # The rows over go to the first parts, a block each: no part of few rows reads the whole head.
        blocks = -(-n // 128)
        if most % 128 == 0 and blocks >= count:
            sizes = [128 * (blocks // count + (i < blocks % count)) for i in range(count)]
            bounds = [0]
            for size in sizes:
                bounds.append(min(n, bounds[-1] + size))
            return [slice(a, b) for a, b in zip(bounds, bounds[1:]) if a < b]
    return list(chunks(0, n, most))
