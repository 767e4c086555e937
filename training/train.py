"""Fine-tunes a causal language model on preference pairs: ``python -m training.train --config FILE.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import TrainConfig


@dataclass
class TrainResult:
    """``model`` is trained (in place, if it was passed in); ``metrics`` holds the rows of ``metrics.jsonl``."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    metrics: list[dict[str, Any]]
    final: Path | None


def train(
    config: TrainConfig,
    pairs: Sequence[tuple[list[int], list[int], list[int]]] | None = None,
    *,
    eval_pairs: Sequence[tuple[list[int], list[int], list[int]]] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pad_token_id: int = 0,
    quiet: bool = False,
) -> TrainResult:
    """Runs ``config``. Tokenised pairs (prompt ids, chosen ids, rejected ids; responses end in EOS) and a model in
    memory take the place of ``train_data``, ``eval_data`` and ``model``. Without ``output_dir`` nothing is written.
    """
    raise NotImplementedError
