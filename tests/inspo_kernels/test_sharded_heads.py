"""Test heads that an engine shards, gathers temporarily or offloads."""

from __future__ import annotations

import pytest
import sharded_heads
import torch
from forked_ranks import run_ranks
from test_models import compose
from tiny_models import make_model

from inspo_kernels import hidden_and_head


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the results of two gloo processes."""
    folder = tmp_path_factory.mktemp("sharded")
    codes = run_ranks(sharded_heads.__file__, folder)
    assert codes == [0, 0], (folder / "output.0").read_text()[-3000:]
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "FSDP2 with the head by itself"])
def test_gradients_equal_those_of_one_process(engine, tied, found):
    if tied and "by itself" in engine:
        pytest.skip("FSDP2 takes no parameter in two groups")
    one, two = found[f"one, tied={tied}"], found[f"{engine}, tied={tied}"]
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=0, atol=float(1e-12 * expected.abs().max()))


def test_the_advice_for_a_sharded_weight_is_right(found):
    call = "full_tensor(grad_placements=[Partial('avg')])"
    assert f"weight.{call}" in found["refusal"]
    assert found["advice"][call] < 1e-6
    assert found["advice"]["full_tensor()"] > 0.5


class GatherBefore(torch.autograd.Function):
    """Stands in for what ZeRO-3 puts behind a layer's output: it gathers before the layer's backward pass."""

    @staticmethod
    def forward(ctx, output, gather):
        ctx.gather = gather
        return output.detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.gather()
        return grad, None


@pytest.mark.parametrize("engine", ["ZeRO-3", "another"])
def test_a_weight_gathered_for_the_heads_forward_gets_its_gradient(engine):
    """DeepSpeed's ZeRO-3 empties a parameter outside the forward and the backward pass of the layer that has it."""
    model, ids = make_model("gemma2", torch.float64), torch.randint(3, 60, (2, 5))
    model(ids).logits.sin().sum().backward()
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    weight, full = model.lm_head.weight, model.lm_head.weight.data

    def gather(*_):
        weight.data = full

    def release(*_):
        weight.data = full.new_empty(0)

    release()
    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(release)
    if engine == "ZeRO-3":
        weight.ds_id = 0
        model.lm_head.register_forward_hook(lambda module, args, output: GatherBefore.apply(output, gather))
    for _ in range(2):
        hidden, head = hidden_and_head(model, ids)
        assert weight.numel() == 0
        if engine != "ZeRO-3":
            gather()
        model.zero_grad()
        compose(hidden, head).sin().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, own[name])
        release()


def test_an_offloaded_head_is_read_while_loaded():
    accelerate = pytest.importorskip("accelerate")
    model, ids = make_model("phi"), torch.randint(3, 60, (2, 5))
    own = model(ids).logits.detach()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compose(*hidden_and_head(model, ids)), own)
