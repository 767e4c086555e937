"""Run the head in plain torch on any device. Logits exist only as tiles of rows x words that fit the last-level cache.

Each tile of logits is computed, turned into E and used while it is still in the cache. z' is in units of log 2, because
exp2 is three times as fast as exp on a CPU. o is an offset within 2^40 of the row's maximum so far, y is the label:

    E_v = 2^(z'_v - o), 0 at the label        rest = sum of E_v        S = rest + 2^(z'_y - o)

o is 0 if that is near enough, because 0 costs nothing: 2^40 V and its inverse are far from float32's limits. When a
later tile raises o, the earlier sums are multiplied by 2^(old o - new o), which is exact. The label's part of every
gradient is computed separately, because it needs S' = rest over all tiles. With D = dz'/dz of the soft-cap (1 without a
soft-cap), slope s and coefficients c:

    dlogp/dx = -(s / S) (sum of D_v E_v W_v - rest D_y W_y)
    dW = -E^T (X * c s / S)        db = -E^T (c s / S)        with D E for E, and -rest D_y at the label

So 1 - p never cancels, and probabilities are never formed. dlogp/dx is accumulated tile by tile, as in attention whose
keys and values are the head. Only dW and db need E of all words at once, because c depends on whole sequences. For them
the tiles are kept, each as k words x n rows, contiguous. If a tile's offset was below the final offset, the tile is
multiplied by 2^(o_tile - o) once o is known. This is rare unless ranks share the words.

Reduced-precision operands are widened tile by tile, so matmuls, sums and accumulators are float32 (float64 for
float64) and dW is never rounded between groups.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import workspace
from ..head import LMHead
from ..row_sums import Parts, RowSums, above
from .base import Backend, HeadTile, chunks, cut

if TYPE_CHECKING:
    from ..gradients import Gradients

LOG2 = math.log(2.0)
# A tile: the slice of the head, the tile and dx share the cache. Where fewer rows are kept it has more words, up to so
# many times: each tile costs some 30 small operations, and matmuls want large operands.
TILE_WORDS = 1024
TILE_ROWS = 2048
MOST_LONGER = 2
# Other devices: tiles only bound the memory of scoring.
DEVICE_TILE_WORDS = 16384
DEVICE_TILE_ROWS = 4096
MIN_WORDS = 64
# Powers of 2 between a row's offset and its maximum: beyond, the first tile gets its own offset, a later one raises it.
SLACK = 40.0
# The same where differences from the maximum are summed up, which lose digits to a large offset.
SLACK_OF_MOMENT = 8.0
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
        logits = most * tile.words[0].stop * tile.dtype.itemsize
        # Beside the tiles: x times a factor. After the last tile: the labels' rows of the weight, perhaps widened.
        scaled = most * head.hidden_size * tile.dtype.itemsize
        itemsizes = tile.dtype.itemsize + (0 if tile.plain_weight else head.weight.itemsize)
        labels = rows * head.hidden_size * itemsizes
        return logits + max(labels, scaled + self.logits_bytes(head, device, workspace_bytes))

    def logits_bytes(self, head: LMHead, device: torch.device, workspace_bytes: int) -> int:
        # Kept rows are logits before they are E; but a slice of a reduced-precision weight is widened, and the next one
        # before the last is released.
        tile = TorchTile(head, 0, workspace_bytes)
        slices = 0 if tile.plain_weight else min(2, len(tile.words))
        return slices * tile.words[0].stop * head.hidden_size * tile.dtype.itemsize

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


def _label_places(targets: Tensor, words: list[slice], is_shard: bool) -> list[tuple[Tensor | None, Tensor]]:
    """Return for each tile whether each label is one of its words (None: all are), and the label's column; (n, 1) each.

    If a label is outside the tile, its column is an arbitrary column of the tile.
    """
    if len(words) == 1 and not is_shard:
        return [(None, targets.unsqueeze(1))]
    starts = torch.tensor([[part.start] for part in words], device="cpu").to(targets.device, non_blocking=True)
    last = words[0].stop - words[0].start - 1
    distance = targets - starts
    columns = distance.clamp(0, last)
    inside = columns == distance
    if (short := words[-1].stop - words[-1].start - 1) < last:
        inside[-1] &= columns[-1] <= short
        columns[-1].clamp_(max=short)
    return list(zip(inside.unsqueeze(2), columns.unsqueeze(2)))


def _write(z: Tensor, inside: Tensor | None, column: Tensor, value: Any, before: Tensor | None = None) -> None:
    """Write ``value``, a number or (n, 1), at each row's label where it is inside; ``before`` stands there now."""
    if inside is not None:
        value = torch.where(inside, value, z.gather(1, column) if before is None else before)
    z.scatter_(1, column, value)


class TorchTile(HeadTile):
    """Kept rows lie in one tensor of capacity * V elements; rows that are not kept pass through a single tile."""

    def __init__(self, head: LMHead, capacity: int, workspace_bytes: int) -> None:
        super().__init__(head, capacity)
        self.device, self.dtype = head.weight.device, head.accumulate_dtype
        self.on_cpu = self.device.type == "cpu"
        self.plain_weight = head.weight.dtype == head.compute_dtype == self.dtype
        rows, words = (TILE_ROWS, TILE_WORDS) if self.on_cpu else (DEVICE_TILE_ROWS, DEVICE_TILE_WORDS)
        if self.plain_weight and 0 < capacity < rows:
            # As many elements in a tile of fewer rows; but a slice of a widened weight is no larger.
            longer = min(rows // capacity, MOST_LONGER)
            rows, words = rows // longer, words * longer
        elements = workspace_bytes // self.dtype.itemsize
        self.most_words = min(words, max(MIN_WORDS, elements))
        self.block = max(1, min(rows, elements // self.most_words))
        # x W^T + b enters with the factor inner: z' / log 2, or the argument of the soft-cap's tanh.
        self.inner = head.slope / LOG2 if head.softcap is None else head.logit_scale / head.softcap
        self.outer = 1.0 if head.softcap is None else head.softcap / (head.temperature * LOG2)
        self.is_graded = False
        self.words = self._equal_words()
        self.buffer: Tensor | None = None

    def _equal_words(self) -> list[slice]:
        """Return the vocabulary cut into equal tiles, of which the last may be smaller."""
        vocab = self.head.vocab_size
        count = -(-vocab // self.most_words)
        size = -(-vocab // count)
        if count > 1:
            size = min(self.most_words, -(-size // 8) * 8)
        return [slice(v, min(v + size, vocab)) for v in range(0, vocab, size)]

    @cached_property
    def bias(self) -> Tensor | None:
        if self.head.bias is None:
            return None
        # In float64, not by ``_multiply``, which could turn a bias of -inf into NaN.
        return (self._widen(self.head.bias).double() * self.inner).to(self.dtype)

    @cached_property
    def one(self) -> Tensor:
        return torch.ones((), dtype=self.dtype, device=self.device)

    def _reserve(self, start: int, n: int, width: int) -> Tensor:
        """Return the workspace, allocated when first needed, with room for a tile (n, width) from ``start`` on."""
        if self.buffer is None or self.buffer.numel() < start + n * width:
            # Rows that pass through take the place of rows that were kept before.
            size = max(self.capacity * self.head.vocab_size, min(self.block, n) * self.words[0].stop)
            self.buffer = None
            self.buffer = workspace.borrow(size, self.dtype, self.device)
        return self.buffer

    def _passing_tile(self, n: int, part: slice) -> Tensor:
        """Return a tile (n, words) for rows that are not kept."""
        width = part.stop - part.start
        return self._reserve(0, n, width).as_strided((n, width), (width, 1))

    def _kept_tile(self, part: slice) -> Tensor:
        """Return E (n, words) of all kept rows and the words ``part``, stored word by word.

        With fewer rows than words, this layout makes the matmuls of logits and dW faster. Otherwise it is no slower.
        """
        n, width = len(self.x), part.stop - part.start
        return self._reserve(n * part.start, n, width).as_strided((n, width), (1, n), n * part.start)

    def _widen(self, t: Tensor) -> Tensor:
        return t if self.plain_weight else t.to(self.head.compute_dtype).to(self.dtype)

    def _multiply(self, t: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
        """Return ``factor`` * t, in ``out`` if given, as if ``factor`` had not been rounded to t's dtype.

        A rounded constant would scale all logits by the same wrong factor, and that error grows with the length of a
        response. So t is multiplied by the first 12 bits of the constant, which are exact. A small correction is added.
        """
        if factor == 1.0:
            return t
        if self.dtype == torch.float64 or not abs(factor) < 1e30:
            return torch.mul(t, factor, out=out)
        fraction, exponent = math.frexp(factor)
        exact = math.ldexp(round(fraction * 4096), exponent - 12)
        product = torch.mul(t, exact, out=out)
        return product if exact == factor else product.add_(product, alpha=factor / exact - 1)

    def stage(
        self, x: Tensor, targets: Tensor, *, keep: bool = False, dx: Tensor | None = None, parts: Parts = frozenset()
    ) -> RowSums:
        self._open(x, targets, dx)
        self.is_graded = keep or dx is not None
        # Tiles whose offsets differ from those of the tile before, in any row.
        self.raised: set[int] = set()
        blocks, offsets = zip(*(self._stage_block(rows, keep, parts) for rows in chunks(0, len(x), self.block)))
        sums = RowSums.cat(list(blocks))
        self.local_offset, self.offsets = sums.offset, None
        if keep and self.raised:
            self.offsets = torch.cat([torch.stack(of_tiles) for of_tiles in offsets], 1)
        self.keeps = keep
        return sums

    def _open(self, x: Tensor, targets: Tensor, dx: Tensor | None) -> None:
        self.x, self.targets, self.dx = self._widen(x), targets, dx
        self.label_slope = None if self.head.softcap is None else x.new_zeros(len(x), dtype=self.dtype)
        self.labels: tuple[slice, list[tuple[Tensor | None, Tensor]]] | None = None

    def _labels_of(self, rows: slice) -> list[tuple[Tensor | None, Tensor]]:
        """Return the ``_label_places`` of these rows, cached for the rows of the last call."""
        if self.labels is None or self.labels[0] != rows:
            self.labels = rows, _label_places(cut(self.targets, rows), self.words, self.head.is_shard)
        return self.labels[1]

    def _stage_block(self, rows: slice, keep: bool, parts: Parts) -> tuple[RowSums, list[Tensor]]:
        """Return the sums of a block of rows, and the offset of each tile, (rows,) in units of log 2."""
        x, targets = self._multiply(cut(self.x, rows), self.inner), cut(self.targets, rows)
        labels = self._labels_of(rows)
        dx = cut(self.dx, rows)
        n, offsets = len(x), []
        more = _Statistics(parts, targets)
        # Offset and label in units of log 2, sums in float64.
        label, offset, rest, shifted = x, x, x, False  # of the first tile on
        for i, part in enumerate(self.words):
            z = cut(self._kept_tile(part), rows) if keep else self._passing_tile(n, part)
            weight = self._widen(cut(self.head.weight, part))
            derivative = self._logits(x, weight, part, z, *labels[i], rows)
            more.with_label(z)
            inside, column = labels[i]
            found = z.gather(1, column)
            _write(z, inside, column, LOWEST, found)
            label = found if inside is None else torch.where(inside, found, -torch.inf if i == 0 else label)
            top = z.amax(1) if i == 0 or shifted or more.has_tops else None
            if top is not None:
                more.without_label(z, top, part)
            if i == 0:
                assert top is not None
                offset, shifted = self._first_offset(top, more)
            elif (raised := self._raised_offset(z, top, offset, shifted, more.slack)) is not None:
                factor = torch.exp2(offset - raised)
                more.rescale(factor, offset - raised, rest)
                rest.mul_(factor)
                if dx is not None:
                    dx.mul_(factor.unsqueeze(1))
                offset, shifted = raised, True
                self.raised.add(i)
            offsets.append(offset)
            if shifted:
                z.sub_(offset.unsqueeze(1))
            e_sums = more.exp2(z)
            rest = e_sums.double() if i == 0 else rest.add_(e_sums)
            if derivative is not None:
                z.mul_(derivative)
            if dx is not None:
                _matmul(z, weight, dx, accumulate=i > 0)
        final = offset.double() * LOG2 if shifted else torch.zeros_like(rest)
        return RowSums(final, rest, label.squeeze(1).double() * LOG2, **more.parts), offsets

    def _first_offset(self, top: Tensor, more: _Statistics) -> tuple[Tensor, bool]:
        """Return offsets (n,) for rows with these maxima in their first tile, and whether any may differ from 0."""
        if more.has_moment:
            return top.clamp(min=LOWEST), True
        if self.on_cpu:
            lowest, highest = top.aminmax()
            if -SLACK <= lowest.item() and highest.item() <= SLACK:
                return torch.zeros_like(top), False
        return torch.where(top.abs() <= SLACK, 0.0, top).clamp(min=LOWEST), True

    def _raised_offset(
        self, z: Tensor, top: Tensor | None, offset: Tensor, shifted: bool, slack: float
    ) -> Tensor | None:
        """Return offsets (n,) after a tile z' with maxima ``top`` (computed if None), or None if they do not change.

        On a GPU they are always returned, because looking for a change would wait for the device.
        """
        if self.on_cpu and not shifted and (z if top is None else top).amax().item() <= slack:
            return None
        top = z.amax(1) if top is None else top
        above = top > offset + slack
        return None if self.on_cpu and not above.any() else torch.where(above, top, offset)

    def _logits(
        self, x: Tensor, weight: Tensor, part: slice, z: Tensor, inside: Tensor | None, column: Tensor, rows: slice
    ) -> Tensor | None:
        """Write z' / log 2 of one tile; return D if there is a soft-cap and a gradient will need it."""
        _matmul(x, weight.t(), z)
        if self.bias is not None:
            z.add_(cut(self.bias, part))
        if self.label_slope is None:
            return None
        z.tanh_()
        derivative = torch.addcmul(self.one, z, z, value=-1) if self.is_graded else None
        self._multiply(z, self.outer, out=z)
        if derivative is None:
            return None
        slope = derivative.gather(1, column)
        self.label_slope[rows] += (slope if inside is None else torch.where(inside, slope, 0.0)).squeeze(1)
        return derivative

    def finish(self, sums: RowSums) -> None:
        self._take(sums)
        local = sums.offset is self.local_offset
        if self.keeps:
            self._complete_kept(rescaled=not local or self.offsets is not None)
        if self.dx is None:
            return
        unit = self.unit if local else self.unit * above(self.local_offset, self.offset).exp()
        self.dx.mul_(unit.to(self.dtype).unsqueeze(1))
        share, column = self.unit * self.rest, self.targets
        if self.head.is_shard:
            share, column = share * self.head.holds(column), column.clamp(0, self.head.vocab_size - 1)
        share = share.to(self.dtype)
        if self.label_slope is not None:
            share *= self.label_slope
        of_labels = self._widen(self.head.weight.index_select(0, column))
        self.dx.addcmul_(of_labels, share.unsqueeze(1), value=-1)

    def _take(self, sums: RowSums) -> None:
        # -s / S, whatever the label: for a label that is all but certain it is 0 rather than infinite.
        self.offset, self.rest, self.unit = sums.offset, sums.rest, -self.head.slope / sums.total

    def _complete_kept(self, rescaled: bool) -> None:
        """Give E of the kept rows its final offset and its labels' entries."""
        entry = (-self.rest if self.label_slope is None else -self.rest * self.label_slope).to(self.dtype).unsqueeze(1)
        labels = self._labels_of(slice(0, len(self.x)))
        for i, part in enumerate(self.words):
            e = self._kept_tile(part)
            if rescaled:
                offset = self.local_offset / LOG2 if self.offsets is None else self.offsets[i].double()
                e.mul_(torch.exp2(above(offset, self.offset / LOG2)).to(self.dtype).unsqueeze(1))
            _write(e, *labels[i], entry)

    def staged(self) -> tuple[Tensor, ...]:
        assert self.buffer is not None
        return self.x, cut(self.buffer, slice(0, len(self.x) * self.head.vocab_size)), self.unit

    def restore(self, staged: tuple[Tensor, ...]) -> None:
        self.x, self.buffer, self.unit = staged

    def release(self) -> None:
        if self.buffer is not None:
            workspace.give_back(self.buffer)
            self.buffer = None

    def head_gradients(self, coefficients: Tensor, out: Gradients, accumulate: bool = False) -> None:
        scale = (coefficients * self.unit).to(self.dtype)
        scaled = None if out.weight is None else self.x * scale.unsqueeze(1)
        for part in self.words:
            self._add_head_gradients(self._kept_tile(part), scaled, part, scale, out, accumulate)

    def recompute_gradients(
        self, x: Tensor, targets: Tensor, sums: RowSums, coefficients: Tensor, out: Gradients, accumulate: bool = False
    ) -> None:
        self._open(x, targets, out.x)
        # E needs offsets in its dtype. The sums get the same: ranks combine offsets in nats, which this would round.
        offsets = (sums.offset / LOG2).to(self.dtype)
        self._take(sums.rebased(offsets.double() * LOG2))
        self.is_graded = True
        scales = (coefficients * self.unit).to(self.dtype)
        for rows in chunks(0, len(x), self.block):
            own_x, offset = cut(self.x, rows), cut(offsets, rows).unsqueeze(1)
            labels, scale = self._labels_of(rows), cut(scales, rows)
            inner_x = self._multiply(own_x, self.inner)
            scaled = None if out.weight is None else own_x * scale.unsqueeze(1)
            for i, part in enumerate(self.words):
                z = self._passing_tile(len(own_x), part)
                weight = self._widen(cut(self.head.weight, part))
                derivative = self._logits(inner_x, weight, part, z, *labels[i], rows)
                z.sub_(offset).exp2_()
                if derivative is not None:
                    z.mul_(derivative)
                entry = -cut(self.rest, rows).to(self.dtype)
                if self.label_slope is not None:  # known from the label's own tile on
                    entry *= self.label_slope[rows]
                _write(z, *labels[i], entry.unsqueeze(1))
                self._add_head_gradients(z, scaled, part, scale, out, accumulate)
                if out.x is not None:
                    _matmul(z, weight, out.x[rows], accumulate=i > 0)
            accumulate = True
        if out.x is not None:
            out.x.mul_(scales.unsqueeze(1))

    def _add_head_gradients(
        self, e: Tensor, scaled: Tensor | None, part: slice, scale: Tensor, out: Gradients, accumulate: bool
    ) -> None:
        """Add dW and db of one tile of E to theirs, or write them; ``scaled`` is X times ``scale``."""
        if out.weight is not None:
            assert scaled is not None
            product = own = cut(out.weight, part)
            if own.dtype != self.dtype:
                product = torch.empty_like(own, dtype=self.dtype)
            _matmul(e.t(), scaled, product, accumulate)
            if product is not own:
                own.copy_(product)
        if out.bias is not None:
            _matmul(scale.unsqueeze(0), e, cut(out.bias, part).unsqueeze(0), accumulate)


class _Statistics:
    """Sum up the optional fields of ``RowSums`` of a block of rows, tile by tile."""

    def __init__(self, parts: Parts, targets: Tensor) -> None:
        self._targets = targets
        self.has_moment, self.has_tops = "moment" in parts, "before" in parts
        self.slack = SLACK_OF_MOMENT if self.has_moment else SLACK
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
        if not self.has_tops:
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
