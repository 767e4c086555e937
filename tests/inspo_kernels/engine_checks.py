"""Define what each rank runs in the tests of heads under tensor parallelism or FSDP2."""

from __future__ import annotations

import contextlib
import os

import torch
import torch.distributed as dist
from cases import IGNORE, make_case, relative_error
from split_checks import STATISTICS, cuts, leaves, same_on_every_rank
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import inspo_kernels as ik
from inspo_kernels.models.head_parts import HeadError, HeadParts


def dtensor_head() -> None:
    """Check a weight and bias sharded by tensor parallelism, passed with their group. Gradients are also DTensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = make_case([(3, 5, 2), (1, 4, 7)])
    given = {"ref_logps": case.ref_logps, "statistics": STATISTICS}
    expected = leaves("xwb", case.hidden, case.weight, case.bias)
    true = ik.fused_inspo_loss(expected[0], expected[1], case.labels, bias=expected[2], **given)
    true.loss.backward()
    weight, bias = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (case.weight, case.bias))
    hidden = case.hidden.clone().requires_grad_()
    out = ik.fused_inspo_loss(hidden, weight, case.labels, bias=bias, process_group=mesh.get_group(), **given)
    out.loss.backward()
    torch.testing.assert_close(out.loss, true.loss)
    torch.testing.assert_close(hidden.grad, expected[0].grad)
    for got, t in ((weight, expected[1]), (bias, expected[2])):
        assert got.grad.placements == (Shard(0),)
        torch.testing.assert_close(got.grad.full_tensor(), t.grad)
    refused = {
        "sharded otherwise": (distribute_tensor(case.weight[:, :6], mesh, [Shard(1)]), mesh.get_group()),
        "replicated": (distribute_tensor(case.weight, mesh, [Replicate()]), mesh.get_group()),
        "no group": (weight, None),
    }
    for name, (wrong, group) in refused.items():
        try:
            ik.linear_logps(case.hidden, wrong, case.labels, process_group=group)
        except TypeError as error:
            words = (
                ("FSDP2", "process_group=weight.device_mesh.get_group()") if group is None else ("Shard(0)", "FSDP2")
            )
            assert all(word in str(error) for word in words), error
        else:
            raise AssertionError(f"{name}: no error")


def advice_for_tensor_parallelism() -> None:
    """Check that following the advice of the error without a group gives the gradients of one process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight, hidden, labels = torch.randn(33, 8), torch.randn(6, 8), torch.randint(0, 33, (6,))
    for tensor in (weight, hidden, labels):
        dist.broadcast(tensor, 0)
    expected = weight.clone().requires_grad_()
    ik.linear_logps(hidden, expected, labels).sum().backward()
    weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    ik.linear_logps(hidden, weight, labels, process_group=weight.device_mesh.get_group()).sum().backward()
    assert relative_error(weight.grad.full_tensor(), expected.grad) < 1e-6


def first_words() -> None:
    """Check that padding words can be cut off, wherever the ranks' blocks end."""
    mesh, ranks = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_world_size()
    weight, bias = torch.arange(29.0 * 3).view(29, 3), torch.arange(29.0)
    blocks = [slice(15 * rank, min(15 * rank + 15, 29)) for rank in range(ranks)]
    parts = HeadParts(*(distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, bias)))
    for count in (None, 29, 20, 15, 4):
        rows, entries, group = parts.words(count)
        own = slice(blocks[dist.get_rank()].start, min(blocks[dist.get_rank()].stop, count or 29))
        assert torch.equal(rows, weight[own]) and torch.equal(entries, bias[own])
        assert dist.get_process_group_ranks(group) == list(range(ranks))
    for wrong in (HeadParts(distribute_tensor(weight, mesh, [Shard(1)]), None), HeadParts(parts.weight, bias)):
        with contextlib.suppress(HeadError):
            wrong.words(None)
            raise AssertionError("no error")


def tensor_parallel_model(folder: str, tied: bool) -> None:
    """Check that a model split by transformers has the loss, log-probs and gradients of the whole model."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    config = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    given = {"dtype": torch.float64, "tie_word_embeddings": tied}
    whole = AutoModelForCausalLM.from_pretrained(folder, **given)
    split = AutoModelForCausalLM.from_pretrained(folder, **given, distributed_config=config)
    ids = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(7) < 3, IGNORE)
    found = []
    for model in (whole, split):
        for _ in range(2):  # the first call verifies the head
            hidden, head = ik.hidden_and_head(model, ids)
        out = ik.fused_inspo_loss(hidden, labels=labels, objective="simpo", statistics=STATISTICS, **head)
        out.loss.backward()
        with torch.no_grad():
            hidden, head = ik.hidden_and_head(model, ids)
            sums, _ = ik.pair_logps(hidden, labels=labels, **head)
        found.append((out.loss.detach(), sums, *out.statistics.values()))
    assert ("process_group" in head) and len(head["weight"]) < len(whole.lm_head.weight)
    torch.testing.assert_close(found[1], found[0])
    same_on_every_rank(dist.group.WORLD, *found[1])
    for (name, got), true in zip(split.named_parameters(), whole.parameters()):
        gradient = got.grad.full_tensor() if isinstance(got.grad, DTensor) else got.grad
        torch.testing.assert_close(gradient, true.grad, rtol=1e-9, atol=1e-12, msg=name)


def compiled_call() -> str:
    case = make_case([(2, 3, 2)])
    own = cuts(29, dist.get_world_size())[dist.get_rank()]

    def loss(hidden: Tensor) -> Tensor:
        return ik.linear_logps(hidden, case.weight[own], case.labels, process_group=dist.group.WORLD)

    try:
        torch.compile(loss, backend="eager", fullgraph=True)(case.hidden)
    except Exception as error:
        return str(error)
    return ""


class _Head(torch.nn.Module):
    """Trunk, norm and head in one module that returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Linear(6, 6, dtype=torch.float64)
        self.norm = torch.nn.LayerNorm(6, dtype=torch.float64)
        self.head = torch.nn.Linear(6, 29, bias=False, dtype=torch.float64)

    def forward(self, function: str, hidden: Tensor, labels: Tensor, ref_logps: Tensor, limit: int | None) -> Tensor:
        states = self.norm(self.trunk(hidden))
        if isinstance(self.head, FSDPModule):  # an FSDP unit of its own, whose forward never runs
            self.head.unshard()
        if function == "tokens":
            return -ik.linear_logps(states, self.head.weight, labels, max_workspace_bytes=limit).sum()
        return ik.fused_inspo_loss(
            states, self.head.weight, labels, ref_logps=ref_logps, max_workspace_bytes=limit
        ).loss


def fsdp2(layout: str, function: str, limit: int | None) -> None:
    """Check gradients over two micro-batches, the first without synchronisation, against one process."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    batches = [[make_case([(2, 3, 2), (1, 2, 4)], seed=s * ranks + r) for r in range(ranks)] for s in range(2)]
    single = _Head()
    for cases in batches:
        losses = [single(function, c.hidden, c.labels, c.ref_logps, limit) for c in cases]
        (sum(losses) / ranks).backward()
    model, mesh = _Head(), init_device_mesh("cpu", (ranks,))
    if layout == "head alone":
        fully_shard(model.head, mesh=mesh)
    elif layout == "head with norm":
        fully_shard([model.norm, model.head], mesh=mesh)
    fully_shard(model, mesh=mesh)
    for step, cases in enumerate(batches):
        model.set_requires_gradient_sync(step == 1)
        own = cases[rank]
        model(function, own.hidden, own.labels, own.ref_logps, limit).backward()
    for (name, got), true in zip(model.named_parameters(), single.parameters()):
        torch.testing.assert_close(got.grad.full_tensor(), true.grad, msg=name)
