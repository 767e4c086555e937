"""The options of a run's model, adapter and data; ``config.py`` adds those of the objective and of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .errors import InputError
from .sources import parse_sources

LoraOptions = dict[str, Any]  # fields of peft.LoraConfig; ``alpha`` is ``lora_alpha``


@dataclass
class DataOptions:
    """Model, adapter and pairs. Relative paths start at the working directory."""

    model: Annotated[
        str | dict[str, Any], "hub id, local folder (of an adapter: trains it on), or LlamaConfig fields"
    ] = ""
    attn_implementation: Annotated[str | None, "of transformers: sdpa, eager, flash_attention_2, ..."] = None
    dtype: Annotated[Literal["float32", "bfloat16"], "float32|bfloat16: parameters, gradients, optimizer"] = "float32"
    quantization: Annotated[Literal["4bit", "8bit"] | None, "4bit|8bit: read the base quantised; needs lora"] = None
    save_dtype: Annotated[
        Literal["float32", "bfloat16"] | None, "float32|bfloat16: of the weights in final/; default dtype"
    ] = None
    lora: Annotated[
        LoraOptions | None, "section of peft.LoraConfig (r, lora_alpha, target_modules, ...); {}: r 16, alpha 32"
    ] = None
    train_data: Annotated[
        str | dict[str, Any] | list[str | dict[str, Any]] | None,
        "file, folder, hub NAME[:SPLIT], or sections path, subset, split, revision, weight",
    ] = None
    eval_data: Annotated[
        str | dict[str, Any] | list[str | dict[str, Any]] | None,
        "held-out pairs, same forms; keep its prompts out of train_data",
    ] = None
    columns: Annotated[dict[str, str] | None, "section prompt, chosen, rejected: their columns in the data"] = None
    max_length: Annotated[int, "most tokens of prompt + chosen + rejected together"] = 2048
    truncation: Annotated[
        Literal["error", "prompt_left", "drop"], "error|prompt_left|drop: what happens to a longer pair"
    ] = "error"
    invalid_pairs: Annotated[
        Literal["drop", "error"], "drop|error: what happens to a pair with empty or identical responses"
    ] = "drop"
    alternative: Annotated[
        Literal["plain", "chat"], "plain|chat: the other response stands right before, or with a turn between"
    ] = "plain"
    alternative_instruction: Annotated[str, "alternative=chat: what the user says in that turn"] = (
        "Please give a better answer."
    )
    chat_template_kwargs: Annotated[dict[str, Any] | None, "section of the chat template's switches"] = None
    seed: Annotated[int, "of the order of the pairs and of a model built here"] = 42

    def __post_init__(self) -> None:
        """Raise InputError for values that no run could use; types are checked where the options are read."""
        if self.lora is not None:
            from .adapters import lora_settings  # imports peft, which is slow

            lora_settings(self.lora)
        for given in (self.train_data, self.eval_data):
            if given is not None:
                parse_sources(given, self.columns)
        if self.max_length < 3:
            raise InputError(f"max_length={self.max_length}: must be at least 3")
        if self.seed < 0:
            raise InputError(f"seed={self.seed}: must be at least 0")
