"""Test heads that tensor parallelism, FSDP2 or ZeRO-3 shard."""

from __future__ import annotations

import contextlib
import sys
import types

import engine_checks
import pytest
import tiny_models
import torch
import transformers
from cases import make_case
from packaging.version import Version
from rank_pool import ranks

import inspo_kernels as ik

ROW = 29 * 8


two = ranks(2)


def test_dtensor_head_with_its_group(two):
    two.run(engine_checks.dtensor_head)


def test_advice_for_tensor_parallelism_is_right(two):
    two.run(engine_checks.advice_for_tensor_parallelism)


def test_first_words_of_a_split_head(two):
    two.run(engine_checks.first_words)


@pytest.mark.parametrize("tied", [False, True])
def test_model_under_tensor_parallelism(two, tmp_path, tied):
    model = tiny_models.make_model("llama", torch.float64, tied=tied)
    if Version(transformers.__version__) < Version("5.23"):  # 5.17 splits a vocabulary only into equal shares
        model.resize_token_embeddings(2 * (tiny_models.VOCAB // 2))
    model.save_pretrained(tmp_path)
    two.run(engine_checks.tensor_parallel_model, str(tmp_path), tied)


def test_group_under_compile_is_a_clear_error(two):
    for error in two.run(engine_checks.compiled_call):
        assert "process_group is not supported under torch.compile" in error


@pytest.mark.parametrize("layout", ["all in one", "head alone", "head with norm"])
@pytest.mark.parametrize("function", ["pairs", "tokens"])
@pytest.mark.parametrize("limit", [None, 3 * ROW])
def test_fsdp2_with_deferred_synchronisation(two, layout, function, limit):
    two.run(engine_checks.fsdp2, layout, function, limit)


class TakenAway:
    """Imitate ZeRO-3: the weight is complete only inside ``gathered``, and has DeepSpeed's marks."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.parameter = torch.nn.Parameter(weight.clone())
        self.whole = self.parameter.data
        self.parameter.ds_id = 0
        self._empty()

    def _empty(self) -> None:
        self.parameter.data = self.whole.new_empty(0)

    @contextlib.contextmanager
    def gather(self, parameters):
        assert len(parameters) == 1 and parameters[0] is self.parameter
        self.parameter.data = self.whole.clone()
        yield
        self._empty()


@pytest.fixture
def deepspeed(monkeypatch):
    module = types.ModuleType("deepspeed")
    module.zero = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    return module


@pytest.mark.parametrize("limit", [None, 3 * ROW])
@pytest.mark.parametrize("function", ["pairs", "tokens"])
def test_weight_may_be_emptied_before_the_backward(deepspeed, function, limit):
    case = make_case([(2, 3, 2), (1, 2, 4)], bias=False)

    def gradients(weight):
        hidden = case.hidden.clone().requires_grad_()
        with ik.gathered(weight, None):
            if function == "pairs":
                loss = ik.fused_inspo_loss(
                    hidden, weight, case.labels, ref_logps=case.ref_logps, max_workspace_bytes=limit
                ).loss
            else:
                loss = ik.linear_logps(hidden, weight, case.labels, max_workspace_bytes=limit).sin().sum()
        # Without accumulation, because autograd would need the parameter's shape for it.
        gradients = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        with ik.gathered(weight):  # as in the backward of the module that has it
            loss.backward()
        assert torch.equal(weight.grad, gradients[1])
        return gradients

    head = TakenAway(case.weight)
    deepspeed.zero.GatheredParameters = head.gather
    expected = gradients(case.weight.clone().requires_grad_())
    got = gradients(head.parameter)
    assert head.parameter.numel() == 0
    torch.testing.assert_close(got, expected)
