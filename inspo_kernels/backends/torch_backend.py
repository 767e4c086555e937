"""The head in plain torch on any device. Logits exist only as tiles of rows x words that fit the last-level cache.

Each tile is multiplied, turned into E and used while it is still in the cache. With z' in units of log 2 (exp2 is three
times as fast as exp on a CPU), o the running maximum of a row over the tiles so far, y the label:

    E_v = 2^(z'_v - o), 0 at the label        rest = sum of E_v        S = rest + 2^(z'_y - o)

When a later tile raises o, what has been summed is multiplied by 2^(old o - new o): exactly what it would have been.
The label's share of every gradient is apart, because it needs S' = rest over all tiles, with D = dz'/dz of the soft-cap
(1 without one), slope s and coefficients c:

    dlogp/dx = -(s / S) (sum of D_v E_v W_v - rest D_y W_y)
    dW = -E^T (X * c s / S)        db = -E^T (c s / S)        with D E for E, and -rest D_y at the label

so 1 - p never cancels and probabilities are never formed. dlogp/dx is summed up tile by tile, like attention whose keys
and values are the head; only dW and db need E of all words at once, because c depends on whole sequences. For these the
tiles are kept, each n rows x k words contiguous and with the offset it was made with. A tile's offset may lie below the
final one o: then its scale is 2^(o_tile - o) on X's side. That factor is bounded below by 2^-100, which adds less than
2^-100 of a probability and keeps the label's entry, -rest D_y / factor, finite.

Reduced-precision operands are widened tile by tile, so matmuls, sums and accumulators are float32 (float64 for
float64) and dW is never rounded between groups.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from ..head import LMHead
from ..row_sums import RowSums
from .base import Backend, HeadTile, chunks

LOG2 = math.log(2.0)
# Words of a tile: few enough for the slice of the head, the tile and dx to share the cache, enough for the matmuls.
TILE_WORDS = 1024
TILE_ROWS = 2048
# Other devices: tiles only bound the memory of scoring.
DEVICE_TILE_WORDS = 16384
DEVICE_TILE_ROWS = 4096
MIN_WORDS = 64
# A row's offset is raised, and what was summed up rescaled, when a tile's maximum lies more powers of 2 above it.
SLACK = 8.0
# Stands for -inf where 0 * -inf must be 0.
LOWEST = -1e30


class TorchBackend(Backend):
    """``backend="torch"``: the default on CPU."""

    name = "torch"

    def unsupported(self, head: LMHead, device: torch.device) -> str | None:
        if device.type == "mps":
            return "Apple's GPUs have no float64, which sums and objectives need: move the inputs to the CPU"
        return None

    def default_workspace_bytes(self, head: LMHead, device: torch.device) -> int:
        # Every group of rows but the first reads and writes dW, 8*V*H bytes beside 6*C*V*H operations. At C = 512 that
        # is 2% of the time of a CPU with 150 Gflop/s and 20 GB/s; a GPU has more operations to a byte and wants more.
        rows = 512 if device.type == "cpu" else 4096
        return max(64 << 20, rows * _row_bytes(head))

    def capacity(self, head: LMHead, device: torch.device, workspace_bytes: int) -> int:
        return workspace_bytes // _row_bytes(head)

    def kept_bytes(self, head: LMHead, rows: int) -> int:
        return rows * _row_bytes(head)

    def passing_bytes(self, head: LMHead, device: torch.device, rows: int, workspace_bytes: int) -> int:
        tile = TorchTile(head, 0, workspace_bytes)
        most = -(-rows // -(-rows // tile.block))
        width = tile.words[0].stop
        return most * width * tile.dtype.itemsize + self.logits_bytes(head, device, workspace_bytes)

    def logits_bytes(self, head: LMHead, device: torch.device, workspace_bytes: int) -> int:
        # Kept rows are logits before they are E; but a slice of a reduced-precision weight is widened, and the next one
        # before the last is released.
        tile = TorchTile(head, 0, workspace_bytes)
        return 0 if tile.plain_weight else 2 * tile.words[0].stop * head.hidden_size * tile.dtype.itemsize

    def open_tile(self, head: LMHead, capacity: int, workspace_bytes: int) -> HeadTile:
        return TorchTile(head, capacity, workspace_bytes)


def _row_bytes(head: LMHead) -> int:
    return head.vocab_size * head.accumulate_dtype.itemsize


def _matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b.

    CPU libraries sum a product of fewer than four rows one term after another. At K = 32000 that is ten times the error
    of their blocked kernels (3.1e-6 against 3.3e-7 in float32), so such products are summed in blocks of K here.
    """
    if a.shape[0] >= 4 or a.shape[1] <= 256 or a.device.type != "cpu":
        if accumulate:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
        return
    if not accumulate:
        out.zero_()
    for k in range(0, a.shape[1], 256):
        out += a[:, k : k + 256] @ b[k : k + 256]


class _Labels:
    """Where the labels of a block of rows lie in each of its tiles: row i of every field belongs to tile i."""

    def __init__(self, targets: Tensor, words: list[slice], is_shard: bool) -> None:
        self._inside: Tensor | None = None
        if len(words) == 1 and not is_shard:
            self._columns = targets.view(1, -1, 1)
            return
        starts = torch.tensor([[part.start] for part in words], device="cpu").to(targets.device, non_blocking=True)
        last = words[0].stop - words[0].start - 1
        columns = targets - starts
        self._columns = columns.clamp(0, last).unsqueeze(2)
        self._inside = (columns == self._columns.squeeze(2)).unsqueeze(2)
        if (short := words[-1].stop - words[-1].start - 1) < last:
            self._inside[-1] &= self._columns[-1] <= short
            self._columns[-1].clamp_(max=short)

    def __getitem__(self, i: int) -> tuple[Tensor | None, Tensor]:
        """Whether each label is a word of tile i (None: all are), and its column, any where it is not; (n, 1) each."""
        return None if self._inside is None else self._inside[i], self._columns[i]


def _replace(z: Tensor, inside: Tensor | None, column: Tensor, value: Tensor | float) -> Tensor:
    """Write ``value`` at each row's label where it is inside; returns what stood there, (n, 1)."""
    before = z.gather(1, column)
    z.scatter_(1, column, value if inside is None else torch.where(inside, value, before))  # type: ignore[arg-type]
    return before


class TorchTile(HeadTile):
    """Kept rows lie in one tensor of capacity * V elements; rows that are not kept pass through a single tile."""

    def __init__(self, head: LMHead, capacity: int, workspace_bytes: int) -> None:
        super().__init__(head, capacity)
        self.device, self.dtype = head.weight.device, head.accumulate_dtype
        on_cpu = self.device.type == "cpu"
        elements = workspace_bytes // self.dtype.itemsize
        self.most_words = min(TILE_WORDS if on_cpu else DEVICE_TILE_WORDS, max(MIN_WORDS, elements))
        self.block = max(1, min(TILE_ROWS if on_cpu else DEVICE_TILE_ROWS, elements // self.most_words))
        # x W^T + b enters with the factor inner: z' / log 2, or the argument of the soft-cap's tanh.
        self.inner = head.slope / LOG2 if head.softcap is None else head.logit_scale / head.softcap
        self.outer = 1.0 if head.softcap is None else head.softcap / (head.temperature * LOG2)
        self.plain_weight = head.weight.dtype == head.compute_dtype == self.dtype
        self.words = self._equal_words()
        self.buffer: Tensor | None = None

    def _equal_words(self) -> list[slice]:
        """The vocabulary in equal tiles."""
        vocab = self.head.vocab_size
        count = -(-vocab // self.most_words)
        size = -(-vocab // count)
        if count > 1:
            size = min(self.most_words, -(-size // 8) * 8)
        return [slice(v, min(v + size, vocab)) for v in range(0, vocab, size)]

    @cached_property
    def bias(self) -> Tensor | None:
        return None if self.head.bias is None else self._times_inner(self._widen(self.head.bias))

    def _tile(self, start: int, n: int, width: int) -> Tensor:
        """A contiguous (n, width) tile of the workspace, which is allocated when first needed."""
        if self.buffer is None or self.buffer.numel() < start + n * width:
            # Rows that pass through take the place of rows that were kept before.
            size = max(self.capacity * self.head.vocab_size, min(self.block, n) * self.words[0].stop)
            self.buffer = None
            self.buffer = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.buffer[start : start + n * width].view(n, width)

    def _widen(self, t: Tensor) -> Tensor:
        return t if self.plain_weight else t.to(self.head.compute_dtype).to(self.dtype)

    def _times_inner(self, t: Tensor) -> Tensor:
        # In float64: a constant rounded to float32 would scale all logits by the same wrong factor.
        return t if self.inner == 1.0 else t.to(torch.float64, copy=True).mul_(self.inner).to(self.dtype)

    def stage(
        self,
        x: Tensor,
        targets: Tensor,
        *,
        keep: bool = False,
        dx: Tensor | None = None,
        parts: frozenset[str] = frozenset(),
    ) -> RowSums:
        self._open(x, targets, dx)
        # Tiles whose offsets differ from those of the tile before, in any row.
        self.raised: set[int] = set()
        offsets: list[Tensor] = []
        blocks = []
        for rows in chunks(0, len(x), self.block):
            sums, tile_offsets = self._stage_block(rows, keep, parts)
            blocks.append(sums)
            if tile_offsets is not None:
                offsets.append(tile_offsets)
        self.offsets = (offsets[0] if len(offsets) == 1 else torch.cat(offsets, 1)) if keep else None
        sums = RowSums.cat(blocks)
        self.local_offset = sums.offset
        return sums

    def _open(self, x: Tensor, targets: Tensor, dx: Tensor | None) -> None:
        self.x, self.targets, self.dx = self._widen(x), targets, dx
        self.label_slope = None if self.head.softcap is None else x.new_zeros(len(x), dtype=self.dtype)

    def _stage_block(self, rows: slice, keep: bool, parts: frozenset[str]) -> tuple[RowSums, Tensor | None]:
        """Sums of a block of rows, and where it is kept the offset of each tile, (tiles, rows) in units of log 2."""
        x, targets = self._times_inner(self.x[rows]), self.targets[rows]
        labels = _Labels(targets, self.words, self.head.is_shard)
        dx = None if self.dx is None else self.dx[rows]
        n, offsets = len(x), []
        on_cpu = self.device.type == "cpu"  # elsewhere a look at the maxima would wait for the device
        # Offset and label in units of log 2, sums in float64.
        label = torch.full((n, 1), -torch.inf, dtype=self.dtype, device=self.device)
        rest = torch.zeros(n, dtype=torch.float64, device=self.device)
        more = _Statistics(parts, targets)
        for i, part in enumerate(self.words):
            z = self._kept_tile(part)[rows] if keep else self._tile(0, n, part.stop - part.start)
            weight = self._widen(self.head.weight[part])
            derivative = self._logits(x, weight, part, z, *labels[i], rows)
            more.with_label(z)
            inside, column = labels[i]
            found = _replace(z, inside, column, LOWEST)
            label = found if inside is None else torch.where(inside, found, label)
            top = z.amax(1)
            more.without_label(z, top, part)
            if i == 0:
                offset = top.clamp(min=LOWEST)
            elif not on_cpu or (top > offset + SLACK).any():
                raised = torch.where(top > offset + SLACK, top, offset)
                factor = torch.exp2(offset - raised)
                more.rescale(factor, offset - raised, rest)
                rest.mul_(factor)
                if dx is not None:
                    dx.mul_(factor.unsqueeze(1))
                offset = raised
                self.raised.add(i)
            offsets.append(offset)
            z.sub_(offset.unsqueeze(1))
            rest.add_(more.exp2(z))
            if derivative is not None and (keep or dx is not None):
                z.mul_(derivative)
            if dx is not None:
                _matmul(z, weight, dx, accumulate=i > 0)
        label = label.squeeze(1).double() * LOG2
        sums = RowSums(offset.double() * LOG2, rest, label, **more.parts)
        if not keep:
            return sums, None
        return sums, offset.unsqueeze(0) if len(offsets) == 1 else torch.stack(offsets)

    def _kept_tile(self, part: slice) -> Tensor:
        """E of all kept rows and the words ``part``."""
        n = len(self.x)
        return self._tile(n * part.start, n, part.stop - part.start)

    def _logits(
        self, x: Tensor, weight: Tensor, part: slice, z: Tensor, inside: Tensor | None, column: Tensor, rows: slice
    ) -> Tensor | None:
        """Write z' / log 2 of one tile; returns D where there is a soft-cap."""
        _matmul(x, weight.t(), z)
        if self.bias is not None:
            z.add_(self.bias[part])
        if self.label_slope is None:
            return None
        derivative = 1 - z.tanh_().square()
        z.mul_(self.outer)
        slope = derivative.gather(1, column)
        self.label_slope[rows] += (slope if inside is None else torch.where(inside, slope, 0.0)).squeeze(1)
        return derivative

    def finish(self, sums: RowSums) -> None:
        self._take(sums)
        if self.offsets is not None:
            # Only a row's own label has an entry that could overflow: a label that another rank holds has none.
            raised = torch.maximum(self.offsets, (self.offset / LOG2 - 100.0).to(self.dtype))
            self.offsets = torch.where(self._own(), raised, self.offsets) if self.head.is_shard else raised
            factor = self._factors()
            entry = -self.rest if self.label_slope is None else -self.rest * self.label_slope
            labels = _Labels(self.targets, self.words, self.head.is_shard)
            for i, part in enumerate(self.words):
                _replace(self._kept_tile(part), *labels[i], (entry / factor[i]).to(self.dtype).unsqueeze(1))
        if self.dx is None:
            return
        head = self.head
        per_row = head.slope / self.total
        scale = -per_row * (self.local_offset - self.offset).exp()
        self.dx.mul_(scale.to(self.dtype).unsqueeze(1))
        share, column = per_row * self.rest, self.targets
        if head.is_shard:
            share, column = share * self._own(), column.clamp(0, head.vocab_size - 1)
        share = share.to(self.dtype)
        if self.label_slope is not None:
            share *= self.label_slope
        self.dx.addcmul_(self._widen(head.weight.index_select(0, column)), share.unsqueeze(1))

    def _own(self) -> Tensor:
        """Whether each label is a word of this rank."""
        return (self.targets >= 0) & (self.targets < self.head.vocab_size)

    def _take(self, sums: RowSums) -> None:
        # An offset as high as the label: S then neither overflows nor leaves float32's range.
        raised = torch.maximum(sums.offset, sums.label)
        self.offset, self.rest = raised, sums.rest * (sums.offset - raised).exp()
        self.total = self.rest + (sums.label - raised).exp()

    def staged(self) -> tuple[Tensor, ...]:
        assert self.offsets is not None and self.buffer is not None
        kept = self.buffer[: len(self.x) * self.head.vocab_size]
        return self.x, kept, self.offsets, self.offset, self.total

    def restore(self, staged: tuple[Tensor, ...]) -> None:
        self.x, self.buffer, self.offsets, self.offset, self.total = staged
        self.raised = set(range(len(self.words)))

    def _factors(self) -> Tensor:
        """2^(offset of each kept tile - final offset), (tiles, n) in float64."""
        assert self.offsets is not None
        return (self.offsets.double() - self.offset / LOG2).exp2_()

    def head_gradients(
        self, coefficients: Tensor, *, dweight: Tensor | None, dbias: Tensor | None, accumulate: bool = False
    ) -> None:
        scales = (coefficients.double() * (-self.head.slope) / self.total * self._factors()).to(self.dtype)
        scaled = None
        for i, part in enumerate(self.words):
            if dweight is not None and (scaled is None or i in self.raised):
                scaled = self.x * scales[i].unsqueeze(1)
            self._add_head_gradients(self._kept_tile(part), scaled, part, scales[i], dweight, dbias, accumulate)

    def recompute_gradients(
        self,
        x: Tensor,
        targets: Tensor,
        sums: RowSums,
        coefficients: Tensor,
        *,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        accumulate: bool = False,
    ) -> None:
        self._open(x, targets, dx)
        self._take(sums)
        for rows in chunks(0, len(x), self.block):
            scaled, offset = self._times_inner(self.x[rows]), (self.offset[rows] / LOG2).to(self.dtype).unsqueeze(1)
            labels = _Labels(targets[rows], self.words, self.head.is_shard)
            scales = (coefficients[rows].double() * (-self.head.slope) / self.total[rows]).to(self.dtype)
            scaled_x = None if dweight is None else self.x[rows] * scales.unsqueeze(1)
            for i, part in enumerate(self.words):
                z = self._tile(0, len(scaled), part.stop - part.start)
                weight = self._widen(self.head.weight[part])
                derivative = self._logits(scaled, weight, part, z, *labels[i], rows)
                z.sub_(offset).exp2_()
                if derivative is not None:
                    z.mul_(derivative)
                entry = -self.rest[rows].to(self.dtype)
                if self.label_slope is not None:  # known from the label's own tile on
                    entry *= self.label_slope[rows]
                _replace(z, *labels[i], entry.unsqueeze(1))
                self._add_head_gradients(z, scaled_x, part, scales, dweight, dbias, accumulate)
                if dx is not None:
                    _matmul(z, weight, dx[rows], accumulate=i > 0)
            accumulate = True
        if dx is not None:
            dx.mul_((coefficients * (-self.head.slope) / self.total).to(self.dtype).unsqueeze(1))

    def _add_head_gradients(
        self,
        e: Tensor,
        scaled: Tensor | None,
        part: slice,
        scale: Tensor,
        dweight: Tensor | None,
        dbias: Tensor | None,
        accumulate: bool,
    ) -> None:
        """Add dW and db of one tile of E to theirs, or write them; ``scaled`` is X times ``scale``."""
        if dweight is not None:
            assert scaled is not None
            product = dweight[part]
            if product.dtype != self.dtype:
                product = torch.empty_like(product, dtype=self.dtype)
            _matmul(e.t(), scaled, product, accumulate)
            if dweight.dtype != self.dtype:
                dweight[part] = product
        if dbias is not None:
            torch.addmv(dbias[part], e.t(), scale, beta=int(accumulate), out=dbias[part])


class _Statistics:
    """The optional fields of ``RowSums`` of a block of rows, summed up tile by tile."""

    def __init__(self, parts: frozenset[str], targets: Tensor) -> None:
        self._targets = targets
        start = {"before": -torch.inf, "after": -torch.inf}
        self.parts = {
            name: torch.full(targets.shape, start.get(name, 0.0), dtype=torch.float64, device=targets.device)
            for name in sorted(parts)
        }

    def with_label(self, z: Tensor) -> None:
        """Look at a tile of z' / log 2, the label still in it."""
        if "logits" in self.parts:
            self.parts["logits"].add_(z.sum(1), alpha=LOG2)

    def rescale(self, factor: Tensor, exponent: Tensor, rest: Tensor) -> None:
        """Follow an offset that was raised: ``factor`` = 2^exponent; ``rest`` still has the old one."""
        if "moment" in self.parts:
            shift = torch.where(factor > 0, exponent.double(), 0.0) * LOG2
            self.parts["moment"] = factor * (self.parts["moment"] + shift * rest)
        if "squares" in self.parts:
            self.parts["squares"] *= factor.double().square()

    def without_label(self, z: Tensor, top: Tensor, part: slice) -> None:
        """Look at a tile of z' / log 2 with LOWEST at the label; ``top`` are its rows' maxima."""
        if "before" not in self.parts:
            return
        targets = self._targets
        before = torch.where(targets >= part.stop, top, -torch.inf)
        after = torch.where(targets < part.start, top, -torch.inf)
        mixed = ((targets >= part.start) & (targets < part.stop)).nonzero().squeeze(1)
        if len(mixed):
            lower = torch.arange(part.start, part.stop, device=z.device) < targets[mixed, None]
            some = z[mixed]
            before[mixed] = some.masked_fill(~lower, -torch.inf).amax(1)
            after[mixed] = some.masked_fill(lower, -torch.inf).amax(1)
        for name, largest in (("before", before), ("after", after)):
            self.parts[name] = torch.maximum(self.parts[name], largest.double() * LOG2)

    def exp2(self, z: Tensor) -> Tensor:
        """Turn z' / log 2 less its offset into E in place, with LOWEST at the label; returns the sums of E, (n,)."""
        if "moment" in self.parts:
            below = z.clamp(min=LOWEST)
            z.exp2_()
            self.parts["moment"].add_(torch.linalg.vecdot(z, below), alpha=LOG2)
        else:
            z.exp2_()
        if "squares" in self.parts:
            self.parts["squares"].add_(torch.linalg.vecdot(z, z))
        return z.sum(1)
