"""Load the model and tokenizer that a run starts from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
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

from .adapters import continue_adapter, has_adapter, read_adapter
from .checkpoint import MANIFEST, STATE, checkpoints
from .errors import InputError, Log, as_input_error, check_names, first_of, reading
from .sources import local_path

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def load_model(
    options: Any, *, training: bool = True, meta: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return ``options.model`` in ``options.dtype`` with its tokenizer.

    A section of config fields builds a small random model of a ``model_type`` (default llama) with a byte-level
    tokenizer. A folder with an adapter gives its base with the adapter active and, with ``training``, trainable. With
    ``meta``, the model is on the meta device: names and shapes without memory; a local folder's weights are compared
    with its configuration. Raises InputError for a model that cannot be trained as ``options`` say, and for weights
    that lack a tensor.
    """
    settings = load_settings(options, training=training)
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "an encoder-decoder" if settings.is_encoder_decoder else "not a causal language model"
        raise InputError(
            f"model {options.model!r}: {settings.model_type} is {kind}; choose a causal language model (decoder only)"
        )
    if isinstance(options.model, dict):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            return build_model(options, settings, meta), byte_tokenizer()
    name = local_path(options.model)
    generation = read_generation_config(name)
    tokenizer = load_tokenizer(name)
    if meta and (not has_weights(name) or getattr(settings, "quantization_config", None) is not None):
        return build_model(options, settings, meta), tokenizer
    model = _from_pretrained(options, name, **({"device_map": "meta"} if meta else _quantization(options)))
    if not has_adapter(model):
        for parameter in model.parameters():  # a quantised folder keeps some in its own dtype
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype_of(options))
        return model, tokenizer
    if generation:  # the adapter's own; transformers has read the base's
        model.generation_config = GenerationConfig(**generation)
    if training:
        continue_adapter(model, Path(name))
    return model, tokenizer


def _from_pretrained(options: Any, name: str, **more: Any) -> PreTrainedModel:
    """Call ``from_pretrained``. Raises InputError for tensors that it would initialise randomly."""
    with reading(name, f"model {name!r}: its weights (model.safetensors, or its parts)"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype_of(options),
            attn_implementation=options.attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **more,
        )
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
    if extra := _ignored(info["unexpected_keys"], model):
        raise InputError(
            f"model {name!r}: by its config.json the model has no {first_of(extra)}, but its weights do. Correct "
            "config.json, or save the model again (adapters merged)"
        )
    return model


def _ignored(unexpected: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Return the ``unexpected`` tensors of weights that belong to one more layer, or to a layer that has a weight.

    Such are biases, scales and unmerged adapters. Others, such as old buffers or a value head, change no log-prob.
    """
    kinds = {re.sub(r"\d+", "#", known) for known in model.state_dict()}
    modules = dict(model.named_modules())
    quantized, adapted, ignored = getattr(model, "is_quantized", False), has_adapter(model), []
    for key in sorted(unexpected):
        parent = key
        while parent and parent not in modules:
            parent = parent.rpartition(".")[0]
        read = quantized or (adapted and "lora_" in key)  # by the quantiser, or by peft
        state = key.endswith("._extra_state")  # TransformerEngine's, of training in float8
        if re.sub(r"\d+", "#", key) in kinds or (hasattr(modules[parent], "weight") and not read and not state):
            ignored.append(key)
    return ignored


def dtype_of(options: Any) -> torch.dtype:
    return getattr(torch, options.dtype)


def build_model(options: Any, settings: PretrainedConfig, meta: bool) -> PreTrainedModel:
    """Return a model with random weights, or on the meta device."""
    prefix = f"model: {options.model} does not make a causal language model: "
    with as_input_error(prefix), torch.device("meta") if meta else nullcontext():
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
    name = local_path(options.model)
    base, file = _base_of(name), Path(name, "adapter_config.json")
    _refuse_missing(base, f"model {name!r}: {file.name} names the base {base!r}" if base != name else f"model {name!r}")
    _refuse_run(Path(base))
    with reading(base, f"model {base!r}: its config.json"):
        settings = AutoConfig.from_pretrained(base)
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


def _refuse_missing(name: str, what: str) -> None:
    """Raise InputError for a path that is not there: the hub would search for it for half a minute."""
    first, _, rest = name.partition("/")
    if Path(name).is_dir():
        return
    if name.startswith((".", "/", "~")) or "/" in rest or (rest and Path(first).is_dir()):
        raise InputError(f"{what}: no such folder (working directory: {Path.cwd()})")


def _refuse_run(folder: Path) -> None:
    """Raise InputError for the folder of a run or of its checkpoint, from which no model can be loaded."""
    is_checkpoint = all((folder / name).is_file() for name in (MANIFEST, STATE))
    run = folder.parent if is_checkpoint else folder
    found = " or ".join(str(run / name) for name in ("final", "best") if (run / name).is_dir())
    if not (folder / "config.json").is_file() and (is_checkpoint or found or checkpoints(run)):
        remedy = f"give {found}" if found else "resume the run, which writes its model to final/ at the end"
        kind = "checkpoint" if is_checkpoint else "run"
        raise InputError(f"model {str(folder)!r} is the folder of a {kind}; {remedy}")


def _base_of(name: str) -> str:
    """Return the base of an adapter's folder, and ``name`` itself for any other model."""
    file = Path(name, "adapter_config.json")
    if not file.is_file():
        return name
    with reading(name, f"model {name!r}: its {file.name}"):
        base = json.loads(file.read_text()).get("base_model_name_or_path")
    if not base:
        raise InputError(f"model {name!r}: {file.name} names no base_model_name_or_path; write the base there")
    return str(base)


def read_generation_config(name: str) -> dict[str, Any]:
    """Return what ``generation_config.json`` of a folder holds, {} if there is none. Raises InputError if damaged."""
    file = Path(name, "generation_config.json")
    if not file.is_file():
        return {}
    with reading(name, f"model {name!r}: its {file.name}"):  # transformers ignores a damaged file
        held: dict[str, Any] = json.loads(file.read_text())
        ends = held.get("eos_token_id")
        if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends or 0])):
            raise ValueError(f"eos_token_id={ends!r} must be a whole number or a list of them")
        return held


def _built_settings(fields: dict[str, Any]) -> PretrainedConfig:
    model_type = fields.pop("model_type", "llama")
    check_names([model_type], list(CONFIG_MAPPING), "model.model_type=")
    check_names(fields, list(CONFIG_MAPPING[model_type]().to_dict()), "model.")
    tokenizer = byte_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with as_input_error(f"model: {fields} does not make a {model_type} model: "):
        return CONFIG_MAPPING[model_type](**{"vocab_size": len(tokenizer), **ids, **fields})


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id; that of the base for an adapter without one.

    Raises InputError if it has no vocabulary.
    """
    name = local_path(name)
    if not any(Path(name).glob("tokenizer*")):
        name = _base_of(name)
    with reading(name, f"model {name!r}: its tokenizer (tokenizer.json, tokenizer_config.json)"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        # From a folder with only config.json, transformers makes a tokenizer without vocabulary.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError(f"{name} has no vocabulary for {type(tokenizer).__name__}")
        return tokenizer


def has_weights(folder: str) -> bool:
    """Return whether a local folder of a model or an adapter should have weights: an adapter's always should."""
    return any(any(Path(folder).glob(kind)) for kind in ("*.safetensors", "*.bin", "adapter_config.json"))


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
