"""Build the input of a whole training step: Llama-shaped models and batches of random pairs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import inspo_kernels as ik

from .batches import Lengths, ModelShape, sample_lengths

Pair = tuple[list[int], list[int], list[int]]
LEARNING_RATE = 0.05


def random_pairs(lengths: Sequence[Lengths], vocab: int) -> list[Pair]:
    """Draw random ids; every response ends with the end-of-sequence id."""
    g = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(vocab - 2, (count,), generator=g).tolist()

    return [(ids(x), [*ids(w - 1), vocab - 1], [*ids(l - 1), vocab - 1]) for x, w, l in lengths]


@dataclass
class Trained:
    """A run's losses, the seconds from its first step's start to its last step's end, and positions in the trunk."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    positions: int = 0
    reference_seconds: float = 0.0
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """The input of every contender: ``batches`` holds the pairs of each update."""

    model: PreTrainedModel
    batches: list[list[Pair]]
    learning_rate: float

    @property
    def pairs(self) -> list[Pair]:
        return [pair for batch in self.batches for pair in batch]


def now(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def counting_positions(models: Sequence[PreTrainedModel], trained: Trained) -> Iterator[None]:
    """Count the positions that enter the trunks, including padding."""

    def count(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        trained.positions += ids.numel()

    hooks = [model.base_model.register_forward_pre_hook(count, with_kwargs=True) for model in models]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch of ``condition_pairs`` on the device, without marginals in any layout.

    Labels and segment ids stay on the CPU, so that planning needs no synchronisation.
    """
    if "rows" in batch:  # a tree also scores the marginals
        same = batch["segment_ids"] < 2 * batch["num_pairs"]
        batch = batch | {name: batch[name][same] for name in ("rows", "labels", "segment_ids")}
    names = ("input_ids", "attention_mask", "position_ids", "tree_ends", "paths", "path_of", "rows")
    return batch | {name: batch[name].to(device) for name in names if isinstance(batch.get(name), Tensor)}


def layout_loss(model: PreTrainedModel, batch: dict[str, Any], **options: Any) -> ik.InSPOOutput:
    """Return the loss of a ``moved`` batch."""
    is_tree = "rows" in batch
    mask = ik.tree_attention_mask(batch, model) if is_tree else batch["attention_mask"]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    hidden, head = ik.hidden_and_head(model, **inputs, attention_mask=mask)
    if is_tree:
        hidden = hidden.flatten(0, 1).index_select(0, batch["rows"])
    scored = {name: batch[name] for name in ("labels", "segment_ids", "num_pairs") if name in batch}
    return ik.fused_inspo_loss(hidden, **scored, **options, **head)


# "small": the head dominates the step. "trunk": the layers dominate, as in models with billions of parameters.
MODELS = {
    "small": ModelShape(256, 688, 2, 4, 32_000),
    "trunk": ModelShape(512, 1376, 12, 8, 32_000),
    "quick": ModelShape(32, 64, 2, 2, 500),
}


def lengths_of(share: str, pairs: int, tokens: int) -> tuple[Lengths, ...]:
    """Return lengths of ``pairs`` pairs: ``tokens`` tokens with this prompt share, or real lengths up to ``tokens``."""
    if share == "real":
        return sample_lengths(pairs, longest=tokens)
    response = max(1, round(tokens * (1 - float(share)) / 2))
    return ((tokens - 2 * response, response, response),) * pairs


def job_of(
    model: str, share: str, updates: int, pairs: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> Job:
    shape = MODELS[model]
    drawn = random_pairs(lengths_of(share, updates * pairs, tokens), shape.vocab)
    batches = [drawn[i : i + pairs] for i in range(0, len(drawn), pairs)]
    return Job(shape.build(dtype, device), batches, LEARNING_RATE)
