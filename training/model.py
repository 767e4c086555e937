"""Load the model and tokenizer that a run starts from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging

import inspo_kernels as ik
from inspo_kernels.models import check_head

from .adapters import continue_adapter, has_adapter, read_adapter
from .causal import check_causal, check_kind
from .checkpoint import refuse_run_folder
from .errors import InputError, Log, as_input_error, check_names, first_of
from .reading import local_path, reading

_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def load_model(options: Any, *, training: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return ``options.model`` in ``options.dtype`` with its tokenizer.

    A section of config fields builds a small random model of a ``model_type`` (default llama) with a byte-level
    tokenizer. A folder with an adapter gives its base with the adapter active and, with ``training``, trainable. Raises
    InputError for a model that cannot be trained as ``options`` say, and for weights that lack a tensor.
    """
    settings = load_settings(options, training=training)
    if isinstance(options.model, dict):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            return build_model(options, settings), byte_tokenizer()
    name = local_path(options.model)
    generation = read_generation_config(name)
    tokenizer = load_tokenizer(name)
    model = _from_pretrained(options, name, **_quantization(options))
    if not has_adapter(model):
        for parameter in model.parameters():  # a quantised folder keeps some in its own dtype
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype_of(options))
        return model, tokenizer
    if generation:  # the adapter's own; transformers has read the base's
        model.generation_config = GenerationConfig(**generation)
    if training:
        continue_adapter(model)
    return model, tokenizer


def _from_pretrained(options: Any, name: str, **more: Any) -> PreTrainedModel:
    """Call ``from_pretrained``. Raises InputError for tensors that it would initialise randomly."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the errors below replace its report of the tensors
    try:
        with reading(name, "weights (model.safetensors, or its parts)"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype_of(options),
                attn_implementation=options.attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **more,
            )
    finally:
        logging.set_verbosity(level)
    model, info = loaded
    sizes = sorted(
        f"{key} ({tuple(found)} in the weights, {tuple(asked)} by config.json)"
        for key, found, asked in info["mismatched_keys"]
    )
    if sizes:
        raise InputError(f"model {name!r}: weights and config.json do not fit together: {first_of(sizes)}")
    missing = set(info["missing_keys"])
    if missing and has_adapter(model) and Path(name, "adapter_model.safetensors").is_file():
        missing = read_adapter(model, Path(name), missing)
    if missing:
        found = sorted(info["unexpected_keys"])
        raise InputError(
            f"model {name!r}: its weights lack {len(missing)} tensors, which would be initialised at random: "
            + first_of(sorted(missing))
            + (f"; they hold {first_of(found)} instead. Rename these, or save the model again" if found else "")
        )
    shape = {re.sub(r"\d+", "#", key) for key in model.state_dict()}
    if extra := sorted(key for key in info["unexpected_keys"] if re.sub(r"\d+", "#", key) in shape):
        raise InputError(f"model {name!r}: by its config.json the model has no {first_of(extra)}, but its weights do")
    return model


def dtype_of(options: Any) -> torch.dtype:
    return getattr(torch, options.dtype)


def build_model(options: Any, settings: PretrainedConfig) -> PreTrainedModel:
    """Return a model with random weights."""
    with as_input_error(f"model: {options.model} does not make a causal language model: "):
        return AutoModelForCausalLM.from_config(
            settings, dtype=dtype_of(options), attn_implementation=options.attn_implementation
        )


def _quantization(options: Any) -> dict[str, Any]:
    if not (bits := options.quantization):
        return {}
    settings = BitsAndBytesConfig(
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype_of(options),
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": settings}


def load_settings(options: Any, *, training: bool = True) -> PretrainedConfig:
    """Return the configuration of the architecture, without weights. Raises InputError if it cannot run."""
    if options.attn_implementation == "flex_attention" and not torch.cuda.is_available():
        raise InputError("attn_implementation=flex_attention has no backward pass on a CPU; use sdpa or eager")
    if isinstance(options.model, dict):
        return _built_settings(dict(options.model))
    name = base = local_path(options.model)
    refuse_run_folder(Path(name))
    file = Path(name, "adapter_config.json")
    if file.is_file():
        with reading(name, file.name):
            base = json.loads(file.read_text()).get("base_model_name_or_path")
        if not base:
            raise InputError(f"model {name!r}: {file.name} names no base_model_name_or_path; write the base there")
    try:
        with reading(base, "config.json"):
            settings = AutoConfig.from_pretrained(base)
    except InputError as error:
        if base == name:
            raise
        raise InputError(f"model {name!r}: the base that {file.name} names cannot be read: {error}") from None
    check_kind(name, settings)
    read_generation_config(name)
    wanted = options.quantization
    quantized = getattr(settings, "quantization_config", None)
    if wanted and quantized:
        raise InputError(f"quantization: the weights of {name!r} are quantised already; leave it out")
    if training and (wanted or quantized) and options.lora is None and not file.is_file():
        raise InputError(
            f"model {name!r} is quantised, and quantised weights cannot be trained; train an adapter on them, with "
            "a section lora (lora: {})"
        )
    for how in filter(None, [quantized, *_quantization(options).values()]):
        with as_input_error(f"model {name!r}: quantised weights cannot be used here: "):
            AutoHfQuantizer.from_config(how, pre_quantized=how is quantized).validate_environment()
    return settings


def read_generation_config(name: str) -> dict[str, Any]:
    """Return what ``generation_config.json`` of a folder holds, {} if there is none. Raises InputError if damaged."""
    file = Path(name, "generation_config.json")
    if not file.is_file():
        return {}
    with reading(name, file.name):  # transformers ignores a damaged file
        return json.loads(file.read_text())


def _built_settings(fields: dict[str, Any]) -> PretrainedConfig:
    model_type = fields.pop("model_type", "llama")
    check_names([model_type], list(CONFIG_MAPPING), "model.model_type=")
    check_names(fields, list(CONFIG_MAPPING[model_type]().to_dict()), "model.")
    tokenizer = byte_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with as_input_error(f"model: {fields} does not make a {model_type} model: "):
        settings = CONFIG_MAPPING[model_type](**{"vocab_size": len(tokenizer), **ids, **fields})
    check_kind(fields, settings)
    return settings


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id. Raises InputError if it has no vocabulary."""
    name = local_path(name)
    with reading(name, "tokenizer (tokenizer.json, tokenizer_config.json)"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        # From a folder with only config.json, transformers makes a tokenizer without vocabulary.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError(f"{name} has no vocabulary for {type(tokenizer).__name__}")
        return tokenizer


def meta_model(options: Any) -> PreTrainedModel:
    """Return the model on the meta device: names and shapes without memory.

    If a local folder has weights, their names and shapes are compared with its configuration. Raises InputError as
    ``load_model`` does.
    """
    settings = load_settings(options)
    if not isinstance(options.model, dict) and Path(name := local_path(options.model)).is_dir():
        if has_weights(name) and getattr(settings, "quantization_config", None) is None:
            model = _from_pretrained(options, name, device_map="meta")
            if has_adapter(model):
                continue_adapter(model)
            return model
    with torch.device("meta"):
        return build_model(options, settings)


def has_weights(folder: str) -> bool:
    """Return whether the folder of a model or an adapter should have weights: an adapter's always should."""
    return any(any(Path(folder).glob(kind)) for kind in ("*.safetensors", "*.bin", "adapter_config.json"))


def check_architecture(model: PreTrainedModel) -> None:
    """Raise InputError if ``hidden_and_head`` cannot split the model or it is not causal; this tries a few tokens."""
    try:
        if model.device.type == "meta":  # nothing can be computed
            check_head(model)
        else:
            words = cast(Tensor, model.get_input_embeddings().weight).shape[0]
            # No padding, whose states may be 0 and fit any head.
            ids = torch.arange(4, device=model.device) + words // 2
            with torch.no_grad():
                ik.hidden_and_head(model, input_ids=ids[None] % words)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        if bad := [n for n, p in model.named_parameters() if p.device.type != "meta" and not p.isfinite().all()]:
            raise InputError(f"model: its weights hold values that are not finite: {first_of(bad)}") from None
        problem = str(error).split(". ")[0]  # advice to callers of the library follows
        raise InputError(
            f"model: {type(model).__name__} cannot be trained here: {problem}; choose a model of another architecture"
        ) from None
    check_causal(model, rounds_by_batch=rounds_by_batch(model))


def rounds_by_batch(model: PreTrainedModel) -> bool:
    """Return whether a row's log-probs depend on its batch: 8-bit layers treat a batch's outliers separately."""
    return any(getattr(getattr(module, "state", None), "threshold", 0) > 0 for module in model.modules())


def size_text(model: PreTrainedModel) -> str:
    """Return the number of parameters as text, and how many are trained if not all."""
    sizes = [(p.numel() / 1e6, p.requires_grad) for p in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    return f"{total:,.2f}M parameters" + ("" if trained == total else f", {trained:,.2f}M of them trained (LoRA)")


def padding_id(tokenizer: PreTrainedTokenizerBase, log: Log) -> int:
    """Return the padding id, or EOS if the tokenizer has none. Raises InputError for a tokenizer without EOS."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token, so responses would never end; set its eos_token and save it")
    if tokenizer.pad_token_id is None:
        log("the tokenizer has no padding token; EOS is used (padding is known by position: a real EOS stays scored)")
        return tokenizer.eos_token_id
    return tokenizer.pad_token_id


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes and ``<pad>``, ``<bos>``, ``<eos>``: it needs no download."""
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
