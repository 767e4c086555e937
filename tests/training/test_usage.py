from __future__ import annotations

import pytest
import torch
from helpers import tiny_model

from training import usage
from training.usage import GIB, usage_of


def test_model_flops_are_six_times_the_parameters_that_a_token_meets():
    model = tiny_model()
    config = model.config
    head = 259 * config.hidden_size
    trunk = sum(p.numel() for p in model.parameters()) - 2 * head
    whole = usage_of(model, torch.device("cpu"), bf16=True, processes=1)
    assert whole.flops_per_token == 6 * trunk and whole.flops_per_scored_token == 6 * head
    tied = usage_of(tiny_model(tie_word_embeddings=True), torch.device("cpu"), bf16=True, processes=1)
    assert (tied.flops_per_token, tied.flops_per_scored_token) == (6 * trunk, 6 * head)
    model.requires_grad_(False)
    frozen = usage_of(model, torch.device("cpu"), bf16=True, processes=1)
    assert (frozen.flops_per_token, frozen.flops_per_scored_token) == (4 * trunk, 4 * head)


def test_mfu_is_there_where_the_peak_is_known_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * GIB)
    model, device = tiny_model(), torch.device("cuda")
    name = "NVIDIA H200"
    known = usage_of(model, device, bf16=True, processes=8)
    values = known.metrics(tokens=1000, scored=400, seconds=2.0)
    flops = 1000 * known.flops_per_token + 400 * known.flops_per_scored_token
    assert values == {
        "tokens_per_second": 500.0, "mfu": pytest.approx(flops / 2.0 / (8 * 989e12)), "peak_memory_gib": 3.0
    }  # fmt: skip
    assert usage_of(model, device, bf16=False, processes=1).peak is None
    name = "NVIDIA H200 NVL"
    assert usage_of(model, device, bf16=True, processes=1).peak is None
    name = "NVIDIA H200"
    model.config.num_local_experts = 8
    assert usage_of(model, device, bf16=True, processes=1).peak is None
    assert set(usage.PEAK_FLOPS) >= {"NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"}


def test_on_a_cpu_memory_is_the_process_s_and_there_is_no_mfu():
    values = usage_of(tiny_model(), torch.device("cpu"), bf16=True, processes=1).metrics(10, 5, 1.0)
    assert set(values) == {"tokens_per_second", "rss_gib"}
    held = torch.ones(GIB // 4, dtype=torch.uint8)
    more = usage_of(tiny_model(), torch.device("cpu"), bf16=True, processes=1).metrics(10, 5, 1.0)["rss_gib"]
    assert more - values["rss_gib"] == pytest.approx(0.25, abs=0.02) and held[0] == 1
