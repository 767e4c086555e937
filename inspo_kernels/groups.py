"""Communicate between ranks that hold different words of the vocabulary, or different tokens of the same pairs.

Vocabulary. Rank r has the sums over its own words, with its own offset o_r (see ``row_sums``). One gather of three
floats per row, (o_r, rest_r, label), lets every rank compute

    M = max o_r        rest = sum of exp(o_r - M) rest_r        label = max label_r

in the same order from the same numbers, so all ranks get the same bits. One all-reduce would not do, because the sum
depends on the maximum. The backend then uses M instead of o_r. dX is a sum over words, so it is summed over the ranks;
dW and db belong to a rank's own words. No tensor of the vocabulary's size is sent.

Sequences. Sums over tokens are summed over the ranks, once for the whole batch, before the objective reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .head import LMHead
from .row_sums import RowSums

# torch 2.13 renamed this function.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
# A rest above this limit is moved into the offset, so that sums over ranks stay in float32's range. A total below the
# limit's inverse is moved, too. The final offset is then never far above all logits, so that backends may bound the
# distance between their own offset and the final offset.
LARGE_REST = 2.0**18


@contextmanager
def awaiting(what: str) -> Iterator[None]:
    """Add to a collective's error what it waited for; a missing rank becomes an error after the group's timeout."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"waiting for {what} failed: every rank must make the same calls. {error}") from error


def gather(tensor: Tensor, group: Any, what: str) -> Tensor:
    """Return (ranks, ...): every rank's ``tensor``; ``what`` describes it in errors."""
    ranks = dist.get_world_size(group)
    everyone = tensor.new_empty(ranks * tensor.numel())
    with awaiting(what):
        getattr(dist, GATHER)(everyone, tensor.flatten(), group=group)
    return everyone.view(ranks, *tensor.shape)


@dataclass(frozen=True)
class VocabGroup:
    """Ranks that hold consecutive words, in rank order; rank r holds ``starts[r]`` to ``starts[r + 1]`` - 1."""

    group: Any
    rank: int
    starts: tuple[int, ...]

    @property
    def first(self) -> int:
        """Return the first word of this rank."""
        return self.starts[self.rank]

    @property
    def vocab_size(self) -> int:
        """Return the number of words of all ranks."""
        return self.starts[-1]

    def largest(self, head: LMHead) -> LMHead:
        """Return a head with the largest rank's shape and no memory, so that all ranks decide alike by its size."""
        return head.without_weight(max(stop - start for start, stop in zip(self.starts, self.starts[1:])))

    def combine(self, sums: RowSums, targets: Tensor, dtype: torch.dtype) -> RowSums:
        """Return sums over the whole vocabulary, in float64, from every rank's sums, which are sent in ``dtype``.

        ``targets`` (n,): the labels, counted from this rank's first word.
        """
        total = sums.total
        is_large, is_small = sums.rest > LARGE_REST, (total > 0) & (total < 1 / LARGE_REST)
        moved = sums.offset + torch.where(is_large, sums.rest, total).log()
        offset = torch.where(is_large | is_small, moved, sums.offset).to(dtype)
        mine = sums.rebased(offset.double())
        optional = [name for name in ("moment", "squares", "logits") if getattr(mine, name) is not None]
        sent: dict[str, Tensor] = {name: getattr(mine, name) for name in ("offset", "rest", "label", *optional)}
        if sums.before is not None and sums.after is not None:
            # The label's rank compares its own words. From every other rank only the largest logit matters.
            own = (targets >= 0) & (targets < self.starts[self.rank + 1] - self.first)
            beaten = (sums.label <= sums.before) | (sums.label < sums.after)
            sent["top"] = torch.where(
                own, torch.where(beaten, torch.inf, -torch.inf), torch.maximum(sums.before, sums.after)
            )
        message = torch.stack([column.to(dtype) for column in sent.values()])
        everyone = gather(message, self.group, "the sums over the words of the other ranks of process_group")
        columns = dict(zip(sent, everyone.double().unbind(1)))
        top = columns.pop("top", None)
        whole_offset = columns["offset"].amax(0)
        ranks = RowSums(**columns).rebased(whole_offset)
        parts = {name: getattr(ranks, name).sum(0) for name in optional}
        if top is not None:
            starts = torch.tensor(self.starts[:-1], device="cpu").to(targets.device, non_blocking=True)
            later = starts.unsqueeze(1) > targets + self.first
            parts["before"] = top.masked_fill(later, -torch.inf).amax(0)
            parts["after"] = top.masked_fill(~later, -torch.inf).amax(0)
        return RowSums(whole_offset, ranks.rest.sum(0), ranks.label.amax(0), **parts)

    def start_sum(self, tensor: Tensor) -> Callable[[], Any]:
        """Start to sum ``tensor`` over the ranks, in place; return a function that waits for the sum."""
        if not tensor.numel():
            return lambda: None
        what = "the gradient of hidden from the other ranks of process_group"
        with awaiting(what):
            work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def wait() -> None:
            with awaiting(f"{what}, each of which must run the backward pass,"):
                work.wait()

        return wait


def sequence_totals(group: Any, *tables: Tensor) -> list[Tensor]:
    """Return each table summed over the ranks in rank order: the same bits on every rank, in one collective."""
    what = "the sums over the tokens of the other ranks of sequence_group"
    return list(gather(torch.stack(tables), group, what).sum(0).unbind())


def gathered(*parameters: Tensor | None) -> AbstractContextManager:
    """Gather parameters that DeepSpeed's ZeRO-3 partitions, for the duration of the block.

        with ik.gathered(head.weight):
            loss = ik.fused_inspo_loss(hidden, head.weight, labels, ...).loss

    Parameters that DeepSpeed does not manage are left alone. The backward pass may run outside the block, because the
    call keeps what it needs from the weight, unless the batch exceeds the workspace.
    """
    managed = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    if not managed:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(managed)


def is_dtensor(tensor: Any) -> bool:
    """Return whether the tensor is a DTensor of torch.distributed.tensor."""
    return type(tensor).__name__ == "DTensor"


def sharing_group(tensor: Any) -> Any:
    """Return the group that shards a DTensor over dimension 0 only; None for any other placement."""
    from torch.distributed.tensor import Shard

    mesh = tensor.device_mesh
    split = [i for i, placement in enumerate(tensor.placements) if mesh.size(i) > 1 or type(placement) is Shard]
    return mesh.get_group(split[0]) if len(split) == 1 and tensor.placements[split[0]] == Shard(0) else None


def first_rows(tensor: Any, count: int) -> Tensor:
    """Return this rank's part of the first ``count`` rows of a DTensor that ``sharing_group`` shards.

    ``Shard`` makes blocks of equal size, of which the last may be smaller or empty.
    """
    group = sharing_group(tensor)
    block = -(-tensor.shape[0] // dist.get_world_size(group))
    return tensor.to_local()[: max(0, count - dist.get_rank(group) * block)]


def local_shard(name: str, tensor: Any, process_group: Any) -> Any:
    """Return this rank's rows of a DTensor that ``process_group`` shards over dimension 0; other tensors unchanged.

    The gradient becomes a DTensor of the same placement.
    """
    if not is_dtensor(tensor) or process_group is None:
        return tensor
    group = sharing_group(tensor)
    if group is not None and dist.get_process_group_ranks(group) == dist.get_process_group_ranks(process_group):
        return tensor.to_local()
    raise TypeError(
        f"{name} is a DTensor with placements {tensor.placements} on {tensor.device_mesh}: with process_group it must "
        "be sharded over dimension 0 by that group alone: Shard(0) on a mesh of one dimension whose get_group() is "
        "process_group. If other dimensions are FSDP2's, call inside the wrapped module's forward, where they are "
        f"gathered; or pass this rank's rows as a plain tensor, {name}.to_local()"
    )
