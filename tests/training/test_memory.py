"""Compare the estimate of a run's memory with the measured peak, and test the loss of updates in bfloat16."""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_model, token_pairs

from benchmarks.harness import own_peak
from training.batching import Batcher
from training.config import TrainConfig
from training.memory import GIB, estimate_memory, in_use, report_disk, report_memory, report_precision
from training.train import train

CPU = torch.device("cpu")
# Activations, weights and head each take a large share of the memory.
FIELDS = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 16_000,
}
RUNS = {"kept": {}, "checkpointed": {"activation_checkpointing": True}}
TOKENS = 2 * 512


def config_of(name: str) -> TrainConfig:
    return TrainConfig(max_steps=2, per_device_train_batch_size=4, max_batch_tokens=TOKENS, layout="rows", **RUNS[name])


def measure() -> None:
    """Print the peak bytes of each run in RUNS, above what the process held before. It runs in a fresh process."""
    generator = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.randint(3, 9999, (n,), generator=generator).tolist() for n in (12, 250, 250)) for _ in "abcd"]
    train(TrainConfig(max_steps=1), token_pairs(), model=tiny_model(), quiet=True)  # what is imported late
    peaks = {}
    for name in ("checkpointed", "kept"):  # the larger run last, so that it does not fit into memory freed by the other
        gc.collect()  # Trainer is in a cycle
        model = tiny_model(**FIELDS)
        peaks[name] = own_peak(functools.partial(train, config_of(name), pairs, model=model, quiet=True))
    print(json.dumps(peaks))


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parents[1]), str(here)])
    # Freed memory is returned at once, so that the second run does not start with the first run's memory.
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", "import test_memory; test_memory.measure()"]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.sweep
@pytest.mark.parametrize("name", RUNS)
def test_the_estimate_is_right_within_a_third(peaks: dict[str, int], name: str) -> None:
    if peaks[name] is None:
        pytest.skip("no /proc to measure memory with: the estimate is NOT tested")
    model = tiny_model(**FIELDS)
    memory = estimate_memory(model, config_of(name), CPU, tokens=TOKENS, longest_pair=500)
    expected = sum(memory.values()) - memory["parameters"]  # the model was there before
    assert peaks[name] / 1.33 < expected < peaks[name] * 1.33, (memory, peaks[name] / GIB)


@pytest.mark.sweep
def test_checkpointing_saves_what_the_estimate_says(peaks: dict[str, int]) -> None:
    model = tiny_model(**FIELDS)
    estimates = {
        name: sum(estimate_memory(model, config_of(name), CPU, tokens=TOKENS, longest_pair=500).values())
        for name in RUNS
    }
    if peaks["kept"] is not None:
        saved = peaks["kept"] - peaks["checkpointed"]
        assert 0.5 < saved / (estimates["kept"] - estimates["checkpointed"]) < 2


def test_sharded_estimates_count_shards_and_gathered_parameters() -> None:
    config = TrainConfig()
    alone, shared = (
        estimate_memory(tiny_model(**FIELDS), config, CPU, tokens=100, longest_pair=50, share=share) for share in (1, 8)
    )
    whole = sum(p.nbytes for p in tiny_model(**FIELDS).parameters())
    assert [alone[kind] for kind in ("parameters", "gradients", "optimizer", "gathered")] == [
        whole,
        whole,
        2 * whole,
        0,
    ]
    assert (shared["parameters"], shared["optimizer"]) == (whole // 8, 2 * whole // 8)
    embeddings = 2 * 16_000 * 256 * 4
    assert 2 * embeddings < shared["gathered"] < 2 * whole


def test_frozen_parameters_have_neither_gradients_nor_optimizer_state() -> None:
    model = tiny_model(**FIELDS).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    memory = estimate_memory(model, TrainConfig(), CPU, tokens=100, longest_pair=50)
    trained = estimate_memory(tiny_model(**FIELDS), TrainConfig(), CPU, tokens=100, longest_pair=50)
    assert (memory["gradients"], memory["optimizer"]) == (4 * 256, 8 * 256)
    assert trained["head"] - memory["head"] > 4 * 16_000 * 256  # dW, at least


@pytest.mark.parametrize(("capacity", "warned"), [(GIB, True), (100 * GIB, False)])
def test_a_device_that_is_too_small_is_reported(monkeypatch: pytest.MonkeyPatch, capacity: int, warned: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=capacity))
    monkeypatch.setattr("inspo_kernels.workspace_bytes", lambda *sizes, **more: 0)  # it asks the device, too
    said: list[str] = []
    batcher = Batcher(0, torch.device("cuda"), 100_000)
    pairs = SimpleNamespace(lengths=np.array([[1000, 500, 500]]))
    report_memory(
        TrainConfig(), SimpleNamespace(model=tiny_model(**FIELDS), train_pairs=pairs), batcher, said.append, 1
    )
    warning = "WARNING: that is more than the device has (1.00 GiB). What helps: a smaller max_batch_tokens"
    assert any(warning in line for line in said) is warned


def test_a_run_says_what_it_will_need(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    train(TrainConfig(max_steps=1), token_pairs(), model=tiny_model())
    assert "a process needs, estimated: parameters" in capsys.readouterr().out
    asked: list = []
    monkeypatch.setattr(
        "training.train.report_memory", lambda *given, **more: asked.append(given[1].train_pairs.lengths)
    )
    train(TrainConfig(max_steps=1), token_pairs(), model=tiny_model(), quiet=True)
    assert asked[0].tolist() == [[len(ids) for ids in pair] for pair in token_pairs()]


def trained(dtype: torch.dtype, learning_rate: float) -> float:
    """Return the share of the head's weights that four steps of a run change."""
    model = tiny_model(vocab_size=48).to(dtype)
    before = model.lm_head.weight.detach().clone()
    config = TrainConfig(
        max_steps=4,
        warmup_steps=0,
        lr_scheduler_type="constant",
        learning_rate=learning_rate,
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
    )
    train(config, token_pairs(), model=model, quiet=True)
    return (model.lm_head.weight != before).float().mean().item()


def test_bfloat16_loses_small_updates_and_warns() -> None:
    model = tiny_model(vocab_size=48).bfloat16()
    for learning_rate in (5e-7, 1e-5, 1e-2):
        weights = model.lm_head.weight.detach()
        lost = ((weights.float() + learning_rate).bfloat16() == weights).float().mean().item()
        # A step of AdamW is at most about the learning rate, so at least this many weights do not change.
        assert trained(torch.bfloat16, learning_rate) <= 1 - lost + 0.05
    assert trained(torch.bfloat16, 5e-7) < 0.05 < 0.9 < trained(torch.float32, 5e-7)
    said: list[str] = []
    report_precision(model, 5e-7, said.append)
    assert "rounded away on 9" in said[0]
    report_precision(model, 1e-2, said.append)
    report_precision(model.float(), 5e-7, said.append)
    assert len(said) == 1


def test_a_run_says_what_it_will_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, said = tmp_path / "out", []
    config = TrainConfig(output_dir=str(out), max_steps=6, save_steps=2, save_total_limit=2, keep_best=False)
    model = tiny_model(vocab_size=9_000, hidden_size=256)
    report_disk(model, config, 6, said.append)
    train(config, token_pairs(), model=model, quiet=True)
    size = sum(file.stat().st_size for file in (out / "checkpoint-6").iterdir())
    one = sum(12 * p.numel() for p in model.parameters())
    assert f"checkpoints 3 x {one / GIB:.2f} GiB" in said[0] and size == pytest.approx(one, rel=0.01)
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=one))
    report_disk(model, config, 6, said.append)
    assert said[-1].startswith("WARNING: that is more than") and "save_total_limit" in said[-1]


def test_memory_in_use_is_the_processs_own() -> None:
    before = in_use(CPU)["rss_gib"]
    held = torch.ones(GIB // 4, dtype=torch.uint8)
    assert in_use(CPU)["rss_gib"] - before == pytest.approx(0.25, abs=0.02) and held[0] == 1
