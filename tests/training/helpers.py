"""Share helpers between the tests of the training loop: a model that takes milliseconds, and a fixture of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PAIRS = Path(__file__).parent / "pairs.jsonl"
# A run with several passes per step, whose evaluations, checkpoints and logs fall on different steps.
EVENTFUL = [
    "--per_device_train_batch_size",
    "10",
    "--max_batch_tokens",
    "500",
    "--eval_data",
    str(PAIRS),
    "--save_steps",
    "2",
    "--eval_steps",
    "2",
    "--logging_steps",
    "3",
    "--weight_decay",
    "0.1",
]
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_model(seed: int = 0, vocab_size: int = 259, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, pad_token_id=0, **{**TINY, **fields})
    return LlamaForCausalLM(config)


def token_pairs(count: int = 6, seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    """Return ragged random pairs with BOS 1 and EOS 2."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = torch.randint(low, high, (1,), generator=generator)
        return torch.randint(3, 40, (int(length),), generator=generator).tolist()

    return [([1, *ids(2, 9)], [*ids(1, 12), 2], [*ids(1, 12), 2]) for _ in range(count)]


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def options(output_dir: Path, *more: str) -> list[str]:
    """Return a command line that trains the tiny model on the fixture for three steps."""
    model = [word for name, value in TINY.items() for word in (f"--model.{name}", str(value))]
    base = [
        "--train_data",
        str(PAIRS),
        "--output_dir",
        str(output_dir),
        "--max_steps",
        "3",
        "--learning_rate",
        "1e-3",
        "--sample_prompts",
        "1",
        "--sample_tokens",
        "4",
    ]
    return [*model, *base, *more]


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def without_timings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the metrics that are equal in two runs with the same settings."""
    measured = {"time", "tokens_per_second", "rss_gib", "peak_memory_gib"}
    return [{name: value for name, value in row.items() if name not in measured} for row in rows]
