"""Options from YAML files and the command line to a ``TrainConfig``; each mistake names the option that is right."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import os
import textwrap
import types
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments

from .config import TrainConfig
from .errors import InputError

DOCS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
# Options whose value is a place: ~ and $VARIABLES mean the same in YAML as in a shell.
PLACES = {"model", "train_data", "eval_data", "output_dir", "reference_cache", "resume_from_checkpoint", "deepspeed"}
# Names that others use, and this project used before, with the option that they are here.
OTHER_NAMES = {
    "batch_size": "per_device_train_batch_size, pairs of one process", "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type", "warmup": "warmup_steps, below 1 a share of all steps",
    "param_dtype": "dtype", "mixed_precision": "bf16", "log_every": "logging_steps", "eval_every": "eval_steps",
    "save_every": "save_steps", "save_total": "save_total_limit", "resume": "resume_from_checkpoint",
    "model_name_or_path": "model", "dataset_name": "train_data", "dataset_train_split": "train_data, as NAME:SPLIT",
    "dataset_test_split": "eval_data, as NAME:SPLIT", "loss_type": "objective", "torch_dtype": "dtype",
    "max_prompt_length": "max_length, of prompt and both responses", "truncation_mode": "truncation",
    "max_completion_length": "max_length, of prompt and both responses", "simpo_gamma": "gamma",
    "use_peft": "lora", "lora_r": "lora.r", "lora_alpha": "lora.alpha", "lora_target_modules": "lora.target_modules",
    "precompute_ref_log_probs": "nothing: reference log-probs are always computed once",
    "ref_model": "model: the reference is the model before training", "rpo_alpha": "marginal_weight",
    "evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps, below 1 a share of all steps",
    "no_cuda": "use_cpu", "dataloader_batch_size": "per_device_train_batch_size", "lr": "learning_rate",
    "base_model": "model", "datasets": "train_data", "test_datasets": "eval_data", "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size", "optimizer": "optim", "rl": "objective", "rl_beta": "beta",
    "dpo_beta": "beta", "adapter": "lora", "val_set_size": "eval_data, a file of its own",
    "saves_per_epoch": "save_steps", "evals_per_epoch": "eval_steps", "wandb_project": "report_to: wandb",
    "output": "output_dir", "data": "train_data", "flash_attention": "attn_implementation: flash_attention_2",
    "save_only_last": "save_total_limit: 1", "early_stopping_patience": "nothing: best/ holds the best model",
}  # fmt: skip


def parse_config(arguments: Sequence[str]) -> TrainConfig:
    """Read ``--config FILE`` and ``--option value``, which wins. Raises InputError."""
    values: dict[str, Any] = {}
    given = _pairs_of(arguments)
    for name, value in given:
        if name == "config":
            values |= _read_yaml(value)
    for name, value in given:
        if name != "config":
            _put(values, name, value)
    hints = _hints()
    options = {name: _convert(name, value, hints[name]) for name, value in values.items()}
    for name in ("model", "train_data", "output_dir"):
        if not options.get(name):
            raise InputError(f"--{name} is missing; give it on the command line or in the --config file")
    return TrainConfig(**options)


def help_text() -> str:
    """Return this project's options on one screen, and where the others are."""
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = [field for field in dataclasses.fields(TrainConfig) if field.name not in theirs]
    hints = get_type_hints(TrainConfig, include_extras=True)
    lines = ["python -m training.train --config FILE.yaml [--option value ...]"]
    for field in fields:
        shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
        default = "" if shown in (None, "") else f" [{shown}]"
        text = f"  --{field.name:<24}{hints[field.name].__metadata__[0]}{default}"
        lines += textwrap.wrap(text, 118, subsequent_indent=" " * 28)
    lines.append("and each option of transformers.TrainingArguments, such as learning_rate [5e-7; adapter 1e-5],")
    lines.append(
        "per_device_train_batch_size [32], num_train_epochs [1], max_steps, eval_steps, save_steps, bf16, optim,"
    )
    lines.append("resume_from_checkpoint [auto: the newest in output_dir], report_to, deepspeed:")
    lines.append(DOCS)
    return "\n".join(lines)


def _pairs_of(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(name, value) of ``--name value`` and ``--name=value``."""
    pairs: list[tuple[str, str]] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise InputError(f"{word!r} stands alone; options are --name value, lists --name '[a, b]'")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise InputError(f"--{name} has no value; give one, as in --{name} true")
            value = words.pop(0)
        if name != "config":
            _check_name(name.partition(".")[0], "--")
        pairs.append((name, value))
    return pairs


def _put(values: dict[str, Any], name: str, text: str) -> None:
    """Set the option, or the field of a section (``lora.r``), to what ``text`` is in YAML."""
    section, dot, field = name.partition(".")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    if _takes_text(_hints()[section]) and not dot and not isinstance(value, dict | list) and value is not None:
        value = text  # 007 and 1e5 may be names
    if dot:
        old = values.get(section)
        values[section] = {**(old if isinstance(old, dict) else {}), field: value}
    else:
        values[section] = value


class _Loader(yaml.SafeLoader):
    """YAML in which a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)  # type: ignore[no-untyped-call]
            if name in seen:
                raise InputError(f"line {key.start_mark.line + 1}: {name!r} stands there twice; keep one of them")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        content = yaml.load(Path(file).expanduser().read_text(encoding="utf-8"), _Loader) or {}
    except InputError as error:
        raise InputError(f"--config {file}: {error}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--config {file}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {file}: must hold lines of the form 'option: value'")
    for name in content:
        _check_name(str(name), f"in {file}: ")
    return content


def _check_name(name: str, where: str) -> None:
    known = _hints()
    if name in known:
        return
    if name in OTHER_NAMES:
        raise InputError(f"unknown option {where}{name}; here it is {OTHER_NAMES[name]}")
    close = difflib.get_close_matches(name, [*known, *OTHER_NAMES], n=1)
    right = OTHER_NAMES.get(close[0], close[0]) if close else None
    raise InputError(f"unknown option {where}{name}" + (f"; did you mean {right}?" if right else "; see --help"))


@cache
def _hints() -> dict[str, Any]:
    hints = get_type_hints(TrainConfig, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainConfig) if field.init}


def _alternatives(hint: Any) -> list[Any]:
    """The types that ``hint`` admits."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [one for part in get_args(hint) for one in _alternatives(part)]
    return [hint]


def _takes_text(hint: Any) -> bool:
    kinds = _alternatives(hint)
    return str in kinds and not any(isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in kinds)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """``value`` as a type that ``hint`` admits. Raises InputError."""
    if isinstance(value, str) and name in PLACES:
        value = os.path.expandvars(os.path.expanduser(value))
    kinds = _alternatives(hint)
    if not _takes_text(hint):  # a choice of words is not any text
        kinds = [kind for kind in kinds if kind is not str]
    for kind in kinds:
        try:
            return _as_kind(value, kind)
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
    names = ", ".join(_kind_text(kind) for kind in kinds if kind is not type(None))
    raise InputError(f"{name}={value!r}: must be {names}")


def _as_kind(value: Any, kind: Any) -> Any:
    """``value`` as a ``kind``, or TypeError or ValueError."""
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        choices = tuple(member.value for member in kind)
    if choices:  # YAML reads no and off as false
        value = "no" if value is False and "no" in choices else value
        return choices[choices.index(value)]
    if kind is type(None) and value is None:
        return None
    if kind is bool and (isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no")):
        return value if isinstance(value, bool) else str(value).lower() in ("true", "yes")
    if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = float(value)
        if kind is int and not number.is_integer():
            raise ValueError
        return int(number) if kind is int else number
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if (get_origin(kind) or kind) in (list, dict) and isinstance(value, get_origin(kind) or kind):
        return value
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        known = [field.name for field in dataclasses.fields(kind)]
        for field in value:
            if field not in known:
                raise InputError(f"unknown option {field} of a section; known: {', '.join(known)}")
        hints = get_type_hints(kind, include_extras=True)
        return kind(**{field: _convert(field, part, hints[field]) for field, part in value.items()})
    raise TypeError


def _kind_text(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(member.value for member in kind)
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
        kind, "a list" if (get_origin(kind) or kind) is list else "a section of fields"
    )
