"""Define the sizes of the GPU benchmark, full and quick, and the targets of its results."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .batches import MODELS, HeadShape, ModelShape
from .gpu_accuracy import SEQUENCE_NAT, sequence_errors
from .measure import FORWARD, FROZEN, MODES, PRODUCTS, TRAIN

# What the bytes allow on an H200 if tiles of logits stay in the cache.
TARGETS = {TRAIN: 1.05, FROZEN: 1.08, FORWARD: 1.10}
MEMORY_TARGET = 1.05

ONE_BILLION = ModelShape(2048, 8192, 16, 32, 128_256, kv_heads=8, tied=True)
FOUR_LAYERS = replace(ONE_BILLION, layers=4)
TINY = ModelShape(32, 64, 2, 2, 300, tied=True)


@dataclass(frozen=True)
class Plan:
    """Hold the sizes of every step: ``response`` tokens a response, ``main`` model and tokens of most steps."""

    models: dict[str, HeadShape] = field(default_factory=lambda: MODELS)
    tokens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    main: tuple[str, int] = ("llama3-8b", 8192)
    response: int = 512
    tests: tuple[str, ...] = tuple(
        f"tests/inspo_kernels/test_{name}.py" for name in ("triton", "triton_kernels", "fused_pass", "cuda")
    )
    rounds: int = 15
    stage_rows: tuple[int, ...] = (512, 1024, 2048, 4096)
    tree_model: ModelShape = FOUR_LAYERS
    tree_pairs: int = 8
    tree_lengths: tuple[int, int] = (1024, 256)
    trained_model: ModelShape = ONE_BILLION
    trained_lengths: tuple[int, int] = (512, 256)
    training_steps: int = 100

    @property
    def main_head(self) -> HeadShape:
        return self.models[self.main[0]]

    def main_cells(self) -> list[tuple[str, int, str]]:
        """Return (model, tokens, mode) of the main shape."""
        return [(*self.main, mode) for mode in MODES]

    def other_cells(self) -> list[tuple[str, int, str]]:
        """Return all other shapes: the main model's lengths, then the models at the main length, then the rest."""
        model, tokens = self.main
        lengths = [(model, n) for n in self.tokens]
        at_main = [(m, tokens) for m in self.models]
        rest = [(m, n) for m in self.models for n in self.tokens]
        shapes = [shape for shape in dict.fromkeys([*lengths, *at_main, *rest]) if shape != self.main]
        return [(m, n, mode) for m, n in shapes for mode in MODES]


FULL = Plan()
QUICK = Plan(
    models={"tiny": HeadShape(64, 1000), "tiny-softcap": HeadShape(48, 777, softcap=30.0)},
    tokens=(64, 128),
    main=("tiny", 128),
    response=16,
    tests=("tests/inspo_kernels/test_logps.py::test_values_and_gradients",),
    rounds=3,
    stage_rows=(32, 64),
    tree_model=TINY,
    tree_pairs=2,
    tree_lengths=(24, 8),
    trained_model=TINY,
    trained_lengths=(24, 12),
    training_steps=3,
)


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of the Triton backend at Llama-3-8B's head and 8,192 tokens, stated for an H200."""
    cells = {c["mode"]: c for c in result["cells"] if (c["model"], c["tokens"]) == FULL.main}
    found: list[tuple[str, float, float | None]] = []
    for mode, limit in TARGETS.items():
        ratio = (triton_row(cells.get(mode)).get("times_floor") or {}).get("median")
        found.append((f"{mode}: time / bare matmuls ({PRODUCTS[mode]})", limit, ratio))
    expected = cells.get(TRAIN, {}).get("workspace_and_gradients_bytes")
    peak = triton_row(cells.get(TRAIN)).get("peak_bytes")
    share = peak / expected if peak and expected else None
    found.append((f"{TRAIN}: peak memory / (workspace + dX + dW)", MEMORY_TARGET, share))
    whole = [row for row in result["accuracy"] if row["response"] == FULL.response]
    errors = sequence_errors(whole, "triton", "bfloat16")
    what = f"bfloat16: log-probs of {FULL.response} tokens, nat from float64"
    found.append((what, SEQUENCE_NAT, max(errors, default=None)))
    return [
        {"target": what, "limit": limit, "measured": measured, "verdict": verdict(limit, measured)}
        for what, limit, measured in found
    ]


def verdict(limit: float, measured: float | None) -> str:
    return "not measured" if measured is None else "met" if measured <= limit else "missed"


def triton_row(cell: dict[str, Any] | None) -> dict[str, Any]:
    """Return the Triton backend's measured row, with labels on the CPU if possible: on the GPU they synchronise."""
    found = cell["contenders"] if cell else {}
    rows = (found.get(name, {}) for name in ("triton, labels on the CPU", "triton"))
    return next((row for row in rows if row.get("status") == "measured"), {})


def problems(result: dict[str, Any]) -> list[str]:
    """Return the reasons why the run fails: a step that broke, failing tests, or an accuracy check beyond its limit."""
    found = [
        f"step {name} {row['status']}" for name, row in result["steps"].items() if row["status"].startswith("failed")
    ]
    if result.get("tests") and result["tests"]["status"] != "passed":
        found.append(f"tests {result['tests']['status']}; see {result['tests']['log']}")
    for row in [*result.get("smoke", []), *result["accuracy"]]:
        if not row.get("ok", True):
            found.append(f"accuracy: {row['contender']}, {row['what']}, {row['dtype']}, soft-cap {row['softcap']}")
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Return name, memory, multiprocessors and capability of a device."""
    if device.type != "cuda":
        return {"type": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": device.type,
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
