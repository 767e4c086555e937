"""Compute gradients of sharded heads in two processes and in one process, and save both."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import make_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

import inspo_kernels as ik

# Rows of four tokens: one per rank and call, because gradients accumulate over two calls.
IDS = torch.randint(3, 60, (2, 2, 1, 4), generator=torch.Generator().manual_seed(0))


class Step(nn.Module):
    """Model and loss in one module, as engines need them."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.model = make_model("llama", torch.float64, tied=tied)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, head = ik.hidden_and_head(self.model, ids, torch.ones_like(ids))
        return -ik.linear_logps(hidden[:, :-1], targets=ids[:, 1:], **head).sum()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(tied: bool, wrap: Callable[[nn.Module], nn.Module] | None, rank: int) -> dict[str, Tensor]:
    """Return the gradients of the ranks' mean loss. Without ``wrap``, compute them in this process alone."""
    step = Step(tied)
    module = step if wrap is None else wrap(step)
    for ids in IDS:
        loss = module(ids[0]) + module(ids[1]) if wrap is None else module(ids[rank])
        (loss / 2 if wrap is None else loss).backward()
    return {name.removeprefix("module."): whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}


def engines(mesh: Any) -> dict[str, Callable[[nn.Module], nn.Module]]:
    def shard(step: Any, *parts: nn.Module) -> nn.Module:
        for part in (*step.model.model.layers, *parts):
            fully_shard(part, mesh=mesh)
        return fully_shard(step, mesh=mesh)

    return {
        "DDP": nn.parallel.DistributedDataParallel,
        "FSDP2": shard,
        "FSDP2 with the head by itself": lambda step: shard(step, step.model.lm_head),
    }


def advice(mesh: Any, rank: int) -> dict[str, float]:
    """Return the relative errors of a separately sharded head's gradient, gathered in two ways."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(33, 8, generator=generator), torch.randn(2, 6, 8, generator=generator)
    labels = torch.randint(0, 33, (2, 6), generator=generator)
    expected = weight.clone().requires_grad_()
    (-ik.linear_logps(hidden, expected, labels).sum() / 2).backward()

    def error(gather: Callable[[Any], Tensor]) -> float:
        head = nn.Linear(8, 33, bias=False)
        head.weight.data.copy_(weight)
        fully_shard(head, mesh=mesh)
        (-ik.linear_logps(hidden[rank], gather(head.weight), labels[rank]).sum()).backward()
        return ((whole(head.weight.grad) - expected.grad).norm() / expected.grad.norm()).item()

    return {
        "full_tensor()": error(lambda weight: weight.full_tensor()),
        "full_tensor(grad_placements=[Partial('avg')])": error(
            lambda weight: weight.full_tensor(grad_placements=[Partial("avg")])
        ),
    }


def refusal(mesh: Any) -> str:
    head = fully_shard(nn.Linear(8, 33, bias=False), mesh=mesh)
    try:
        ik.linear_logps(torch.randn(6, 8), head.weight, torch.zeros(6).long())
    except TypeError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {"advice": advice(mesh, rank), "refusal": refusal(mesh)}
    for tied in (False, True):
        found[f"one, tied={tied}"] = gradients(tied, None, rank)
        for name, wrap in engines(mesh).items():
            if not (tied and "by itself" in name):  # FSDP2 does not accept one parameter in two groups
                found[f"{name}, tied={tied}"] = gradients(tied, wrap, rank)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    os._exit(0)
