"""Test InSPOTrainer in two gloo processes, started as by ``accelerate launch``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import two_processes
from forked_ranks import run_ranks
from trl_setup import assert_same, model, run

from inspo_kernels.integrations.trl import InSPOConfig, InSPOTrainer


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    codes = run_ranks(two_processes.__file__, folder)
    assert codes == [0, 0], (folder / "output.0").read_text()[-3000:]
    outcomes = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return [{name: SimpleNamespace(**values) for name, values in outcome.items()} for outcome in outcomes]


def test_two_processes_equal_trl_in_two(two):
    for outcome in two:
        assert_same(outcome["theirs"], outcome["ours"])
    assert two[0]["ours"].logs == two[1]["ours"].logs


def test_two_processes_equal_one_with_twice_the_batch(two, tmp_path):
    alone = run(InSPOTrainer, InSPOConfig, tmp_path, policy=model(), reference=model(seed=5))
    for expected, found in zip(alone.gradients, two[0]["conditioned"].gradients):
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error <= 2e-5, (name, error)
    together, apart = (run.logs[0] for run in (alone, two[0]["conditioned"]))
    for name in ("num_tokens", "rewards/margins", "entropy", "marginal/logps/chosen", "marginal/rewards/accuracies"):
        assert apart[name] == pytest.approx(together[name], rel=1e-4), name


def test_tensor_parallel_model_trains_as_a_whole_one(two, tmp_path):
    alone = run(InSPOTrainer, InSPOConfig, tmp_path, policy=model(), reference=model(seed=5))
    for outcome in two:
        split = outcome["tensor parallel"]
        assert split.losses == pytest.approx(alone.losses, rel=1e-5)
        for expected, found in zip(alone.gradients, split.gradients, strict=True):
            for name, gradient in expected.items():
                error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
                assert error <= 2e-5, (name, error)
    for expected, found in zip(alone.logs, two[0]["tensor parallel"].logs, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_two_processes_drop_the_alternatives_that_one_drops(two, tmp_path):
    alone = run(InSPOTrainer, InSPOConfig, tmp_path, policy=model(), reference=model(seed=5), alternative_dropout=0.5)
    for expected, found in zip(alone.gradients, two[0]["dropout"].gradients, strict=True):
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error <= 2e-5, (name, error)
    for together, apart in zip(alone.logs[:2], two[0]["dropout"].logs[:2], strict=True):
        for name in ("num_tokens", "rewards/margins", "marginal/logps/chosen"):
            assert apart[name] == pytest.approx(together[name], rel=1e-4), name


def test_every_process_trains_on_the_pairs_that_fit(two):
    assert all(torch.isfinite(torch.tensor(outcome["dropping"].losses)).all() for outcome in two)
    assert two[0]["dropping"].logs == two[1]["dropping"].logs


@pytest.mark.parametrize("head_by_itself", [False, True])
@pytest.mark.parametrize("layout", ["rows", "packed_tree"])
def test_a_sharded_model_gives_the_same_gradient(two, layout, head_by_itself):
    for outcome in two:
        assert max(outcome[f"sharded {layout} {head_by_itself}"].difference.values()) <= 1e-6
