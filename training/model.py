"""The model and tokenizer that a run starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import inspo_kernels as ik

from .config import InputError, TrainConfig, check_names

_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def load_model(config: TrainConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """``config.model`` in ``config.param_dtype`` with its tokenizer.

    A section of config fields builds a small random model. It may name a ``model_type`` (default llama); its tokenizer
    is byte-level.
    """
    if isinstance(config.model, dict):
        return _build_model(config.model, config.seed, getattr(torch, config.param_dtype))
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=getattr(torch, config.param_dtype))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"model {config.model!r}: could not be loaded as a local folder or from the hub ({str(error).strip()})"
        ) from None
    return model, tokenizer


def _build_model(
    section: dict[str, Any], seed: int, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    fields = dict(section)
    model_type = fields.pop("model_type", "llama")
    check_names([model_type], list(CONFIG_MAPPING), "model.model_type=")
    check_names(fields, list(CONFIG_MAPPING[model_type]().to_dict()), "model.")
    tokenizer = byte_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        model_config = CONFIG_MAPPING[model_type](**{"vocab_size": len(tokenizer), **ids, **fields})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    except Exception as error:  # transformers checks the fields in many places, each with its own class of error
        raise InputError(f"model: {fields} does not make a {model_type} model ({error})") from None
    return model, tokenizer


def check_architecture(model: PreTrainedModel) -> None:
    """Raises InputError where ``hidden_and_head`` cannot take the model apart; found out on one token."""
    try:
        with torch.no_grad():
            ik.hidden_and_head(model, input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    except (TypeError, ValueError) as error:
        raise InputError(f"model: {error}") from None


def padding_id(tokenizer: PreTrainedTokenizerBase, log: Callable[[str], None]) -> int:
    """The id that pads; EOS where the tokenizer has none. Raises InputError for a tokenizer without EOS."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token, so responses would never end; set its eos_token and save it")
    if tokenizer.pad_token_id is None:
        log("the tokenizer has no padding token; EOS is used (padding is known by position: a real EOS stays scored)")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.pad_token_id


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes and ``<pad>``, ``<bos>``, ``<eos>``: reads any text, needs no download."""
    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
