"""Add a LoRA adapter, or train the adapter of a folder further."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .errors import InputError, as_input_error, check_names, first_of, nearest

if TYPE_CHECKING:
    from peft import LoraConfig

_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
_MERGE = "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OTHER)"
# Fields of LoraConfig whose adapters merge wrongly, or not at all.
_UNSUPPORTED = {
    "layer_replication": "copies of a layer share its weights, and merging would add every copy's adapter to them",
    "alora_invocation_tokens": "peft cannot merge an adapter that acts on only part of the text",
}


def lora_settings(options: dict[str, Any]) -> LoraConfig:
    """Return peft's configuration with the fields ``options``; ``alpha`` is ``lora_alpha``. Raises InputError."""
    from peft import LoraConfig, PeftConfig  # slow to import

    of_any_adapter = {field.name for field in dataclasses.fields(PeftConfig)}  # set by the loop
    known = sorted({field.name for field in dataclasses.fields(LoraConfig)} - of_any_adapter - {"runtime_config"})
    check_names(options, [*known, "alpha"], "lora.")
    given = {"lora_alpha" if name == "alpha" else name: value for name, value in options.items() if value is not None}
    if given.get("lora_dropout"):
        raise InputError("lora.lora_dropout: must be 0; policy and reference must be the same function at step 1")
    if given.get("init_lora_weights", True) not in (True, "gaussian"):
        raise InputError(
            f"lora.init_lora_weights={given['init_lora_weights']!r}: must be true or gaussian; others begin with "
            "another model than the base, which is the reference"
        )
    for name, reason in _UNSUPPORTED.items():
        if given.get(name):
            raise InputError(f"lora.{name} is not supported: {reason}")
    needs_targets = "target_parameters" not in given and "trainable_token_indices" not in given
    defaults = _DEFAULTS if needs_targets else {k: v for k, v in _DEFAULTS.items() if k != "target_modules"}
    settings = {**defaults, **given}
    for name, kinds, what in (("r", int, "a whole number"), ("lora_alpha", int | float, "a number")):
        if isinstance(settings[name], bool) or not isinstance(settings[name], kinds) or not settings[name] > 0:
            raise InputError(f"lora: {name}={settings[name]!r} must be {what} above 0")
    with as_input_error("lora: "):
        return LoraConfig(**settings, task_type="CAUSAL_LM")


def add_lora(model: PreTrainedModel, options: dict[str, Any], seed: int) -> None:
    """Add a new LoRA adapter to ``model`` and freeze the rest; the model's outputs stay the same until training.

    The adapter's parameters are float32, whatever the model's dtype. Raises InputError for names that match nothing in
    the model.
    """
    if has_adapter(model):
        raise InputError(
            "lora: the model holds an adapter already. Leave out lora to train it further, or merge it first, with "
            + _MERGE
        )
    settings = lora_settings(options)
    _check_targets(model, settings)
    with as_input_error("lora: "), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("error", r"The following \w+ keys did not match")
        torch.manual_seed(seed)
        model.add_adapter(settings)
    _check_tied(model, settings)
    _in_float32(model)


def continue_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Make the adapter that ``model`` was loaded with trainable. The reference is the model with this adapter.

    Raises InputError if ``folder`` also holds tensors of the base, which final/ would lack.
    """
    settings: Any
    (settings,) = model.peft_config.values()
    if settings.peft_type != "LORA":
        raise InputError(f"model: its adapter is of peft's type {settings.peft_type}; only LoRA can be trained here")
    _check_tied(model, settings)
    settings.inference_mode = False
    saved = [*(settings.modules_to_save or []), "lora_", "trainable_tokens"]
    for name, parameter in model.named_parameters():
        of_bias = name.endswith("bias") and (
            settings.bias == "all" or (settings.bias == "lora_only" and ".base_layer." in name)
        )
        parameter.requires_grad_((of_bias or any(part in name for part in saved)) and "original_module" not in name)
    file, frozen = folder / "adapter_model.safetensors", {n for n, p in model.named_parameters() if not p.requires_grad}
    if file.is_file():  # a hub id has none
        with safe_open(file, framework="pt") as held:
            names = [key.removeprefix("base_model.model.") for key in held.keys()]
        # Beside an adapter on the head, peft saves the head each time, as its base_layer.
        if whole := sorted(name for name in frozen.intersection(names) if ".base_layer." not in name):
            raise InputError(
                f"model: {file} also holds {first_of(whole)}, which modules_to_save does not name; the trained adapter "
                f"would lack it. Merge it first, with {_MERGE}"
            )
    _in_float32(model)
    model._continued_adapter = True  # type: ignore[assignment]


def read_adapter(model: PreTrainedModel, folder: Path, missing: set[str]) -> set[str]:
    """Load the ``missing`` tensors of the adapter of ``model`` with peft; return those that ``folder`` lacks.

    transformers does not find all of them, such as the magnitudes of DoRA.
    """
    from peft import set_peft_model_state_dict

    (name,) = model.peft_config
    weights = load_file(folder / "adapter_model.safetensors")
    result: Any = set_peft_model_state_dict(
        model, {key.removeprefix("base_model.model."): tensor for key, tensor in weights.items()}, adapter_name=name
    )
    return missing.intersection(result.missing_keys)


def has_adapter(model: PreTrainedModel) -> bool:
    return getattr(model, "_hf_peft_config_loaded", False)


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """Make an untrained model its reference: a new adapter is off, and an adapter that is trained further stays on."""
    if not has_adapter(model) or getattr(model, "_continued_adapter", False):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper  # modules_to_save, which transformers leaves off

    switched = [part for part in model.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for part in switched:
        part.enable_adapters(False)
    try:
        yield
    finally:
        for part in switched:
            part.enable_adapters(True)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)


def _check_targets(model: PreTrainedModel, settings: LoraConfig) -> None:
    """Raise InputError for a name that matches nothing; peft ignores it as long as another name matches."""
    for option in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        parts = model.named_parameters() if option == "target_parameters" else model.named_modules()
        known, given = [name for name, _ in parts], getattr(settings, option) or []
        for name in [] if isinstance(given, str) else given:
            if not any(one == name or one.endswith(f".{name}") for one in known):
                close = nearest(name, {one.rpartition(".")[2] for one in known})
                hint = f"; did you mean {close!r}?" if close else ""
                raise InputError(f"lora.{option}: nothing in the model is called {name!r}{hint}")
    layers = settings.layers_to_transform
    count = model.config.get_text_config().num_hidden_layers
    for layer in [layers] if isinstance(layers, int) else layers or []:
        if not 0 <= layer < count:
            raise InputError(f"lora.layers_to_transform: there is no layer {layer}; the model has {count}, from 0")


def _check_tied(model: PreTrainedModel, settings: LoraConfig) -> None:
    """Raise InputError for a LoRA adapter on a head that shares its matrix with the embeddings.

    Merging it would also change the other use of the matrix. peft cannot save adapters on both uses.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = [model.get_output_embeddings(), model.get_input_embeddings()]
    bases = [part.get_base_layer() if isinstance(part, BaseTunerLayer) else part for part in parts]
    if bases[0].weight is not bases[1].weight:
        return
    if any(isinstance(part, BaseTunerLayer) for part in parts):
        raise InputError(
            "lora: the model's head and its embeddings share one matrix, so an adapter on either would change both "
            "when merged. Take them out of lora.target_modules and lora.target_parameters, or name them in "
            "lora.modules_to_save instead"
        )
    if settings.ensure_weight_tying:
        raise InputError("lora.ensure_weight_tying: peft cannot save such an adapter of this model; leave it out")


def _in_float32(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data = parameter.data.float()
