"""Define what each rank runs in the tests of communication, and of ranks that disagree or are missing."""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from cases import IGNORE, make_case
from split_checks import STATISTICS, cuts, gradients, leaves
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import inspo_kernels as ik
from inspo_kernels.groups import GATHER


def error_of(kind: str, rank: int) -> str:
    """Return this rank's error if ``rank`` passes something else. The caller measures the time."""
    case = make_case([(2, 3, 2), (1, 2, 4)])
    own = cuts(29, dist.get_world_size())[dist.get_rank()]
    given: dict[str, Any] = {"hidden": case.hidden, "labels": case.labels, "ref_logps": case.ref_logps}
    other: dict[str, Any] = {
        "labels": {"labels": case.labels.where(case.labels == IGNORE, (case.labels + 1) % 29)},
        "hidden": {"hidden": case.hidden[:, :-1], "labels": case.labels[:, :-1]},
        "objective": {"objective": ik.DPO(beta=0.2)},
        "ref_logps": {"ref_logps": case.ref_logps + 1},
        "requires_grad": {"hidden": case.hidden.clone().requires_grad_()},
        "refused": {"softcap": -1.0},
        "pairs": {"hidden": case.hidden[:2], "labels": case.labels[:2], "ref_logps": case.ref_logps[:2]},
    }[kind]
    given |= other if dist.get_rank() == rank else {}
    try:
        ik.fused_inspo_loss(
            given.pop("hidden"),
            case.weight[own],
            given.pop("labels"),
            bias=case.bias[own],
            process_group=dist.group.WORLD,
            **given,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def error_in_mesh(rank: int) -> str:
    """Return this rank's error in a 2 x 2 mesh if ``rank`` has another objective."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "words"))
    case = make_case([(2, 3, 2)])
    given = case.compact()
    own = cuts(29, 2)[dist.get_rank() % 2]
    try:
        ik.fused_inspo_loss(
            given.pop("hidden"),
            case.weight[own],
            given.pop("labels"),
            **given,
            ref_logps=case.ref_logps,
            objective="ipo" if dist.get_rank() == rank else "dpo",
            process_group=mesh.get_group("words"),
            sequence_group=mesh.get_group("sequence"),
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def unscored() -> str:
    hidden = torch.randn(2, 6)
    labels, segments = torch.tensor([1, 2]), torch.tensor([[0, 1], [2, 0], [1, 2]])[dist.get_rank()]
    try:
        ik.fused_inspo_loss(
            hidden,
            torch.randn(9, 6),
            labels,
            segment_ids=segments,
            num_pairs=2,
            objective="simpo",
            sequence_group=dist.group.WORLD,
        )
    except ValueError as error:
        return str(error)
    return ""


def shifted() -> str:
    case = make_case([(2, 3, 2)])
    try:
        ik.fused_inspo_loss(
            case.hidden, case.weight, case.labels, ref_logps=case.ref_logps, sequence_group=dist.group.WORLD
        )
    except ValueError as error:
        return str(error)
    return ""


class Counted:
    """Record the bytes that this rank passes to collectives inside the block, call by call."""

    def __enter__(self) -> Counted:
        self.gathered: list[int] = []
        self.reduced: list[int] = []
        self._own = getattr(dist, GATHER), dist.all_reduce

        def gather(out: Tensor, tensor: Tensor, *args: Any, **options: Any) -> Any:
            self.gathered.append(tensor.numel() * tensor.element_size())
            return self._own[0](out, tensor, *args, **options)

        def reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
            self.reduced.append(tensor.numel() * tensor.element_size())
            return self._own[1](tensor, *args, **options)

        setattr(dist, GATHER, gather)
        dist.all_reduce = reduce
        return self

    def __exit__(self, *_: Any) -> None:
        setattr(dist, GATHER, self._own[0])
        dist.all_reduce = self._own[1]


def bytes_sent() -> None:
    case = make_case([(3, 5, 2), (1, 4, 7)], vocab=5000, bias=False).to(torch.bfloat16)
    own, group = cuts(5000, dist.get_world_size())[dist.get_rank()], dist.group.WORLD
    rows, width = 5 + 2 + 4 + 7, 6
    for count, names in enumerate([(), ("entropy",), ("entropy", "is_top1"), STATISTICS[:3]]):
        hidden, weight, _ = leaves("xw", case.hidden, case.weight[own], None)
        with Counted() as sent:
            out = ik.fused_inspo_loss(
                hidden, weight, case.labels, ref_logps=case.ref_logps, statistics=names, process_group=group
            )
            out.loss.backward()
        arguments, *sums = sent.gathered
        assert arguments < 256 and sum(sums) == rows * (12 + 4 * count)
        assert sent.reduced == [rows * width * 4]
    hidden, weight, _ = leaves("x", case.hidden, case.weight[own], None)
    with Counted() as sent:
        logps = ik.linear_logps(hidden, weight, case.labels, process_group=group)
        logps.sum().backward()
    scored = int((case.labels != IGNORE).sum())
    assert sum(sent.gathered[1:]) == scored * 12 and sent.reduced == [scored * width * 4]


class Operations(TorchDispatchMode):
    """Record torch's operations inside the block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def group_of_one() -> None:
    """Check that a group of one runs the operations of no group in the same order, and sends nothing."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    case = make_case([(3, 5, 2), (1, 4, 7)])
    own = groups[dist.get_rank()]
    for limit in (None, 5 * 29 * 8):
        results, operations = [], []
        for more in ({}, {"process_group": own, "sequence_group": own}):
            hidden, weight, bias = leaves("xwb", case.hidden, case.weight, case.bias)
            given = {"bias": bias, "max_workspace_bytes": limit, **more}
            tokens = {name: value for name, value in given.items() if name != "sequence_group"}
            with Counted() as sent, Operations() as run:
                out = ik.fused_inspo_loss(hidden, weight, case.labels, ref_logps=case.ref_logps, **given)
                logps = ik.linear_logps(hidden, weight, case.labels, **tokens)
                both = gradients(out.loss + logps.sin().sum(), hidden, weight, bias)
            assert not sent.gathered and not sent.reduced
            results.append([out.loss, logps, *both])
            operations.append(run.names)
        assert all(torch.equal(one, other) for one, other in zip(*results))
        assert operations[0] == operations[1] and len(operations[0]) > 100


def no_words() -> str:
    case = make_case([(1, 1, 1)])
    try:
        ik.pair_logps(case.hidden, case.weight[:0], case.labels, process_group=dist.group.WORLD)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def missing_rank(rank: int, seconds: int) -> dict[str, str]:
    """Return this rank's errors if ``rank`` skips a call or its backward pass."""
    case, own = make_case([(2, 3, 2), (1, 2, 4)]), cuts(29, dist.get_world_size())[dist.get_rank()]
    present = dist.get_rank() != rank

    def error_without(absent: str, group: Any) -> str:
        try:
            if absent == "sequence_group" and present:
                ik.pair_logps(case.hidden, case.weight, case.labels, sequence_group=group, shift=False)
            elif present or absent == "backward":
                hidden, weight, _ = leaves("xw", case.hidden, case.weight[own], None)
                logps = ik.linear_logps(hidden, weight, case.labels, process_group=group)
                if present:
                    logps.sum().backward()
        except RuntimeError as error:
            return str(error)
        return ""

    absences = ("process_group", "sequence_group", "backward")
    groups = [dist.new_group(timeout=datetime.timedelta(seconds=seconds)) for _ in absences]
    dist.barrier()
    with ThreadPoolExecutor() as waits:  # all at once, because each lasts for the timeout
        errors = dict(zip(absences, waits.map(error_without, absences, groups)))
    dist.barrier()
    return {absent: error for absent, error in errors.items() if error}
