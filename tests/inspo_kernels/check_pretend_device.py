"""Test the public functions on a simulated device (see ``pretend_device``). ``test_pretend_device`` runs this file."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import triton_setup
from cases import OBJECTIVES, make_case
from pretend_device import DEVICE, OnDevice, Pretend, values
from torch import Tensor

import inspo_kernels as ik
from inspo_kernels import agreement, groups
from inspo_kernels.backends.triton_backend import TritonBackend
from inspo_kernels.kernels import bias_gradient, config, fused_pass, label_logits, row_pass, scale_rows

pytestmark = triton_setup.quiet

CPU = torch.device("cpu")
# bfloat16, because its matmuls into float32 take another path on devices than on the CPU.
CASE = make_case([(2, 3, 2), (1, 1, 3)], hidden_size=24).to(torch.bfloat16)


# This device's autocast changes no operation. It need not, because the package itself rounds operands.
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_autocast.fallback(torch.library.fallthrough_kernel)


@pytest.fixture(autouse=True)
def kernels_of_the_device(monkeypatch):
    """Let Triton's interpreter work on the CPU values, and count the launches of each launcher."""
    monkeypatch.setattr(TritonBackend, "unsupported", lambda *_: None)
    for module in (label_logits, row_pass, fused_pass, bias_gradient, scale_rows):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, name, partial(launch, name, getattr(module, name)))


def launch(name: str, kernel: Any, *args: Any, **kwargs: Any) -> Any:
    on_device = isinstance(args[0], OnDevice)
    if on_device:
        OnDevice.ledger.launches += [name] * (3 if name == "fused_pass" else 1)
    args, kwargs = values((args, kwargs))
    result = kernel(*args, **kwargs)
    return OnDevice(result) if on_device and isinstance(result, Tensor) else result


@pytest.fixture
def device():
    with Pretend() as pretend:
        yield pretend


def moved(tensors: dict[str, Tensor], to: torch.device) -> dict[str, Tensor]:
    return {name: t.detach().clone().to(to, non_blocking=True) for name, t in tensors.items()}


def pair_loss(place: torch.device, labels_on: torch.device, inputs: dict[str, Tensor], needed, **options):
    """Return everything that a training step uses: output, metrics, gradients."""
    head = moved({"weight": CASE.weight, "bias": CASE.bias}, place)
    hidden = inputs["hidden"].detach().clone().to(place, non_blocking=True)
    labels = moved({name: t for name, t in inputs.items() if name != "hidden"}, labels_on)
    leaves = {name: t for name, t in {"hidden": hidden, **head}.items() if name in needed}
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = ik.fused_inspo_loss(hidden, **head, **labels, ref_logps=CASE.ref_logps, **options)
    if leaves:
        out.loss.backward()
    return [out.loss.detach(), out.losses, out.logps, *out.metrics().values(), *(t.grad for t in leaves.values())]


FORMS = {
    "rows": {"hidden": CASE.hidden, "labels": CASE.labels, "marginal_labels": CASE.marginal_labels},
    "packed": CASE.packed(),
    "compact": CASE.compact(),
}
NEEDED = [("hidden", "weight", "bias"), ("hidden",), ("weight",), ()]


@pytest.mark.parametrize("labels_on", [CPU, DEVICE], ids=str)
@pytest.mark.parametrize(
    "backend, form, needed",
    [
        *(("torch", form, needed) for form in FORMS for needed in NEEDED),
        *(("triton", "rows", needed) for needed in NEEDED),
        *(("triton", form, NEEDED[0]) for form in ("packed", "compact")),
    ],
)
def test_pair_loss_reads_the_device_at_most_once(device, backend, form, labels_on, needed):
    """Labels on the device cost one read, labels on the CPU none. Values equal the CPU's bit by bit."""
    options = {"marginal_weight": 0.5, "backend": backend}
    expected = pair_loss(CPU, CPU, FORMS[form], needed, **options)
    assert not device.ledger.launches
    got = pair_loss(DEVICE, labels_on, FORMS[form], needed, **options)
    assert device.ledger.reads == (["tolist"] if labels_on == DEVICE else [])
    assert device.ledger.waits == []
    assert all(isinstance(t, OnDevice) for t in got)
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine.value, other)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rows", [1, 7])
def test_every_objective_and_workspace(device, objective, rows):
    options = {"objective": objective, "backend": "triton", "max_workspace_bytes": rows * 64 * 6}  # 6 bytes a logit
    expected = pair_loss(CPU, CPU, FORMS["rows"], NEEDED[0], **options)
    got = pair_loss(DEVICE, CPU, FORMS["rows"], NEEDED[0], **options)
    assert device.ledger.reads == device.ledger.waits == []
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine.value, other)


@pytest.mark.parametrize("needed", NEEDED, ids=str)
@pytest.mark.parametrize("targets_on", [CPU, DEVICE], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_linear_logps_reads_the_device_at_most_once(device, backend, targets_on, needed):
    def run(place: torch.device, targets_on: torch.device) -> list[Tensor]:
        leaves = moved({"hidden": CASE.hidden, "weight": CASE.weight, "bias": CASE.bias}, place)
        for name in needed:
            leaves[name].requires_grad_()
        targets = CASE.labels.clone().to(targets_on, non_blocking=True)
        logps = ik.linear_logps(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], backend=backend)
        if needed:
            (logps * logps.detach()).sum().backward()
        return [logps.detach(), *(leaves[name].grad for name in needed)]

    expected = run(CPU, CPU)
    got = run(DEVICE, targets_on)
    assert device.ledger.reads == (["tolist"] if targets_on == DEVICE else [])
    assert device.ledger.waits == []
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine.value, other)


@pytest.mark.parametrize("labels_on", [CPU, DEVICE], ids=str)
@pytest.mark.parametrize("names", [("process_group",), ("sequence_group",), ("process_group", "sequence_group")])
def test_ranks_of_a_group_read_the_device_once(device, monkeypatch, names, labels_on):
    """One read brings the arguments, labels and counts of all ranks. The other rank mirrors this rank."""
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 0)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: SimpleNamespace(wait=lambda: None))
    for module in (agreement, groups):
        monkeypatch.setattr(module, "gather", lambda tensor, *_: torch.stack([tensor, tensor]))
    given = {name: dist.ProcessGroup(0, 2) for name in names}
    out = pair_loss(DEVICE, labels_on, FORMS["compact"], NEEDED[0], backend="triton", num_pairs=2, **given)
    assert device.ledger.reads == ["tolist"] and device.ledger.waits == []
    assert all(isinstance(t, OnDevice) for t in out)


def test_autocast_on_the_device(device):
    def run(place: torch.device) -> list[Tensor]:
        hidden, weight = (t.float().to(place, non_blocking=True).requires_grad_() for t in (CASE.hidden, CASE.weight))
        with torch.autocast(place.type, dtype=torch.bfloat16):
            out = ik.fused_inspo_loss(hidden, weight, CASE.labels, ref_logps=CASE.ref_logps, backend="triton")
        out.loss.backward()
        return [out.logps, hidden.grad, weight.grad]

    expected, got = run(CPU), run(DEVICE)
    assert device.ledger.reads == device.ledger.waits == []
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine.value, other)


def launches(device: Pretend, num_pairs: int, length: int) -> int:
    """Count the launches of a training step with the pairwise loss, without metrics."""
    case = make_case([(2, length, length + 1)] * num_pairs, hidden_size=64).to(torch.bfloat16)
    hidden, weight = (t.to(DEVICE, non_blocking=True).requires_grad_() for t in (case.hidden, case.weight))
    before = len(device.ledger.launches)
    out = ik.fused_inspo_loss(hidden, weight, case.labels, ref_logps=case.ref_logps, backend="triton")
    out.loss.backward()
    return len(device.ledger.launches) - before


def test_launches_do_not_grow_with_the_batch(device, monkeypatch):
    """On a GPU each launch takes microseconds, regardless of its work."""
    monkeypatch.setattr(config, "logits_tile", lambda *_: config.LogitsTile(1024, 8448))
    few = launches(device, 1, 2)
    assert launches(device, 3, 5) == few
    assert few <= 75


def test_tensors_of_two_devices_are_refused(device):
    weight = CASE.weight.to(DEVICE, non_blocking=True)
    with pytest.raises(ValueError, match="weight is on pretend:0 but hidden on cpu"):
        ik.fused_inspo_loss(CASE.hidden, weight, CASE.labels, ref_logps=CASE.ref_logps)


class TestThePretendDevice:
    """Check that the simulated device detects what it should."""

    def test_reads(self, device):
        t = torch.arange(4.0).to(DEVICE)
        assert device.ledger.waits == ["_to_copy.default"]
        assert t.sum().item() == 6 and bool((t > 1).any()) and t.to("cpu").sum() == 6
        t[t > 2]
        t.repeat_interleave(torch.ones(4, dtype=torch.int64).to(DEVICE, non_blocking=True))
        assert len(device.ledger.reads) == 5

    def test_mixed_devices(self, device):
        t = torch.ones(4).to(DEVICE, non_blocking=True)
        with pytest.raises(RuntimeError, match="same device"):
            t + torch.ones(4)
        assert (t + torch.ones(())).value.tolist() == [2.0] * 4

    def test_views_share_memory(self, device):
        t = torch.zeros(4, device=DEVICE)
        t[1:3].add_(2)
        assert t.value.tolist() == [0, 2, 2, 0]
        assert device.ledger.launches == ["zeros.default", "add_.Tensor"] and not device.ledger.reads
