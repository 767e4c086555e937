"""The trained model as transformers, or peft, loads it: a folder that is whole or not there, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .card import model_card
from .checkpoint import in_first_process, whole_folder
from .config import TrainConfig
from .engine import process_count, whole_weights
from .scoring import unwrap


def save_model(
    folder: Path, module: nn.Module, tokenizer: PreTrainedTokenizerBase | None, config: TrainConfig, *, title: str,
    step: int, steps: int, pairs: int, evaluations: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Writes the model in ``module``, after ``step`` of ``steps``, to ``folder``, with its card.

    All processes call it, the first one writes. Raises SaveError, in all of them, and leaves what was there before.
    """
    state_dict = {key.removeprefix("model."): tensor for key, tensor in whole_weights(module).items()}
    model = unwrap(module).model

    def write() -> None:
        with whole_folder(folder) as to:
            model.save_pretrained(to, state_dict=state_dict)
            if tokenizer is not None:
                tokenizer.save_pretrained(to)
            model_card(
                config, title=title, name=f"{folder.parent.name}/{folder.name}", step=step, steps=steps,
                pairs=pairs, parameters=sum(p.numel() for p in model.parameters()),
                trained=sum(p.numel() for p in model.parameters() if p.requires_grad), processes=process_count(),
                evaluations=evaluations, library="peft" if config.lora else "transformers",
            ).save(to / "README.md")  # fmt: skip

    in_first_process(write)
