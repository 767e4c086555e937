"""The options of a run's model, adapter and data; ``config.py`` adds the options of the objective and the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .errors import InputError
from .sources import parse_sources

DataSources = str | dict[str, Any] | list[str | dict[str, Any]]
LoraOptions = dict[str, Any]  # fields of peft.LoraConfig; ``alpha`` is ``lora_alpha``


@dataclass
class DataOptions:
    """Model, adapter and pairs. Relative paths are relative to the working directory."""

    model: Annotated[str | dict[str, Any], "hub id, folder (an adapter is trained further), or LlamaConfig fields"] = ""
    attn_implementation: Annotated[str | None, "transformers' option: sdpa, eager, flash_attention_2, ..."] = None
    dtype: Annotated[Literal["float32", "bfloat16"], "float32|bfloat16: parameters, gradients, optimizer"] = "float32"
    quantization: Annotated[Literal["4bit", "8bit"] | None, "4bit|8bit: load a quantised base; needs lora"] = None
    save_dtype: Annotated[Literal["float32", "bfloat16"] | None, "float32|bfloat16: weights in final/ [dtype]"] = None
    lora: Annotated[LoraOptions | None, "fields of peft.LoraConfig (r, lora_alpha, ...); {}: r 16, alpha 32"] = None
    train_data: Annotated[
        DataSources | None, "file, folder, hub NAME[:SPLIT], or fields path, subset, split, revision, weight"
    ] = None
    eval_data: Annotated[DataSources | None, "held-out pairs, likewise; keep their prompts out of train_data"] = None
    columns: Annotated[dict[str, str] | None, "fields prompt, chosen, rejected: their column names in the data"] = None
    max_length: Annotated[int, "maximum tokens of prompt + chosen + rejected"] = 2048
    truncation: Annotated[Literal["error", "prompt_left", "drop"], "longer pairs: error|prompt_left|drop"] = "error"
    invalid_pairs: Annotated[Literal["drop", "error"], "pairs with an empty or equal response: drop|error"] = "drop"
    alternative: Annotated[Literal["plain", "chat"], "plain|chat: nothing or a user turn between responses"] = "plain"
    alternative_instruction: Annotated[str, "alternative=chat: text of that user turn"] = "Please give a better answer."
    chat_template_kwargs: Annotated[dict[str, Any] | None, "arguments of the chat template"] = None
    seed: Annotated[int, "seed of the order of the pairs and of a model built from LlamaConfig fields"] = 42

    def __post_init__(self) -> None:
        """Raise InputError for values that no run could use; types are checked where the options are read."""
        for name in ("lora", "quantization"):
            if isinstance(self.model, dict) and getattr(self, name) is not None:
                raise InputError(
                    f"{name}: needs a base in a folder or on the hub, because final/ does not contain a built base. "
                    "Run once without lora into another output_dir, and set model to its final/"
                )
        if self.lora is not None:
            from .adapters import lora_settings  # imports peft, which is slow

            lora_settings(self.lora)
        for given in (self.train_data, self.eval_data):
            if given is not None:
                parse_sources(given, self.columns)
        if self.max_length < 3:
            raise InputError(f"max_length={self.max_length}: must be at least 3")
        if not 0 <= self.seed < 2**32:  # numpy takes no others
            raise InputError(f"seed={self.seed}: must be at least 0 and below 2**32")
