"""Test InSPOTrainer in two gloo processes, started as by ``accelerate launch``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trl_setup import assert_same, model, run

from inspo_kernels.integrations.trl import InSPOConfig, InSPOTrainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    children = []
    for rank in range(2):
        environment = (
            os.environ
            | address
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
            }
        )
        command = [sys.executable, str(Path(__file__).parent / "two_processes.py"), str(folder)]
        with (folder / f"output.{rank}").open("w") as file:
            children.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [child.wait(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
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
