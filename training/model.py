"""The model and tokenizer that a run starts from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import inspo_kernels as ik

from .config import InputError, LoraOptions, NotAtHandError, TrainConfig, check_names

_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def load_model(config: TrainConfig, *, adapter: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """``config.model`` in ``config.param_dtype`` with its tokenizer.

    A section of config fields builds a small random model. It may name a ``model_type`` (default llama); its tokenizer
    is byte-level. A folder that holds an adapter gives its base with the adapter active, if ``adapter`` allows it.
    """
    dtype = getattr(torch, config.param_dtype)
    settings = load_settings(config)
    if isinstance(config.model, dict):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model = AutoModelForCausalLM.from_config(
                    settings, dtype=dtype, attn_implementation=config.attn_implementation
                )
        except Exception as error:  # transformers checks the fields in many places, each with its own class of error
            raise InputError(f"model: {config.model} does not make a model ({error})") from None
        return model, byte_tokenizer()
    tokenizer = load_tokenizer(config.model)
    with _loading(config.model, "weights (model.safetensors, or its parts)"):
        model = AutoModelForCausalLM.from_pretrained(
            config.model, dtype=dtype, attn_implementation=config.attn_implementation
        )
    if has_adapter(model) and not adapter:
        raise InputError(
            f"model {config.model!r} holds an adapter. Training starts from a whole model: merge it first, with "
            "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OTHER)"
        )
    return model, tokenizer


def load_settings(config: TrainConfig) -> PretrainedConfig:
    """The configuration of the architecture, without any weights."""
    if not isinstance(config.model, dict):
        file = Path(config.model, "adapter_config.json")
        base = json.loads(file.read_text())["base_model_name_or_path"] if file.is_file() else config.model
        with _loading(base, "config.json"):
            return AutoConfig.from_pretrained(base)
    fields = dict(config.model)
    model_type = fields.pop("model_type", "llama")
    check_names([model_type], list(CONFIG_MAPPING), "model.model_type=")
    check_names(fields, list(CONFIG_MAPPING[model_type]().to_dict()), "model.")
    tokenizer = byte_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        return CONFIG_MAPPING[model_type](**{"vocab_size": len(tokenizer), **ids, **fields})
    except Exception as error:  # transformers checks the fields in many places, each with its own class of error
        raise InputError(f"model: {fields} does not make a {model_type} model ({error})") from None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    with _loading(name, "tokenizer (tokenizer.json, tokenizer_config.json)"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        # Of a folder that has a model's config.json alone, transformers makes a tokenizer that knows no text.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError(f"{name} has no vocabulary for {type(tokenizer).__name__}")
        return tokenizer


def meta_model(config: TrainConfig) -> PreTrainedModel:
    """The model without weights, on the meta device: shapes and names, and no memory."""
    settings = load_settings(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                settings, dtype=getattr(torch, config.param_dtype), attn_implementation=config.attn_implementation
            )
    except Exception as error:  # as in load_settings: some fields are looked at only when the model is built
        raise InputError(f"model: {config.model} does not make a causal language model ({error})") from None


@contextmanager
def _loading(name: str, what: str) -> Iterator[None]:
    """What goes wrong while ``what`` of the model ``name`` is read becomes an InputError that says how to mend it.

    A path that is not there is refused at once: the hub would be asked for it for half a minute, or call it ill-formed.
    """
    if not Path(name).is_dir():
        first, _, rest = name.partition("/")
        is_path = name.startswith((".", "/", "~")) or "/" in rest
        is_below = rest != "" and Path(first).is_dir()
        if is_path or is_below:
            hint = "" if is_path else f"; a model of the hub is not looked for where there is a folder {first!r}"
            raise InputError(f"model {name!r}: no such folder (working directory: {Path.cwd()}){hint}")
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        remedy = "" if Path(name).is_dir() else (
            f". Without the hub: give a local folder instead (elsewhere, `hf download {name} --local-dir DIR` fills "
            "one), or set HF_HUB_OFFLINE=1 where HF_HOME holds a cache that has it"
        )  # fmt: skip
        problem = " ".join(str(error).split())
        raise NotAtHandError(
            f"model {name!r}: its {what} could not be loaded as a local folder or from the hub ({problem}){remedy}"
        ) from None


def check_architecture(model: PreTrainedModel) -> None:
    """Raises InputError where ``hidden_and_head`` cannot take the model apart; found out on one token."""
    # On the meta device no mask can be looked into: one that is prepared already is taken as it is.
    mask = torch.zeros(1, 1, 1, 1, device="meta") if model.device.type == "meta" else None
    try:
        with torch.no_grad():
            ik.hidden_and_head(
                model, input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), attention_mask=mask
            )
    except (TypeError, ValueError) as error:
        raise InputError(f"model: {error}") from None


def add_lora(model: PreTrainedModel, options: LoraOptions, seed: int) -> None:
    """Puts a fresh LoRA adapter into ``model`` and freezes everything else; it changes nothing before it is trained.

    The adapter's own parameters are float32, whatever the model's dtype is. Raises InputError where it would sit on the
    output head, whose loss needs the head as one matrix, or where no layer has such a name.
    """
    from peft import LoraConfig as PeftLoraConfig  # slow to import

    if has_adapter(model):
        raise InputError("lora: the model has an adapter already; merge it first, or leave out lora")
    head = model.get_output_embeddings()
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module is head}
    targets = options.target_modules
    if names.intersection([targets] if isinstance(targets, str) else targets):
        raise InputError(
            f"lora.target_modules: {', '.join(names)} is the output head, which takes no adapter here; leave it out, "
            'or use "all-linear", which does'
        )
    settings = PeftLoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # divided by r alone
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_adapter(settings)
    except ValueError as error:
        raise InputError(f"lora: {error}") from None
    if model.get_output_embeddings() is not head:
        raise InputError(f"lora.target_modules={targets!r} matches the output head, which takes no adapter here")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def size_text(model: PreTrainedModel) -> str:
    """Parameters, and how many of them are trained if not all."""
    sizes = [(p.numel() / 1e6, p.requires_grad) for p in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    return f"{total:,.2f}M parameters" + ("" if trained == total else f", {trained:,.2f}M of them trained (LoRA)")


def has_adapter(model: PreTrainedModel) -> bool:
    return getattr(model, "_hf_peft_config_loaded", False)


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """The model without its adapter, if it has one, for the time being."""
    if not has_adapter(model):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


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
