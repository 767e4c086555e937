"""Read the options of a ``TrainConfig`` from YAML files and the command line; each error names the right option."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Sequence
from enum import EnumType
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from .config import TrainConfig
from .errors import InputError, nearest, one_line
from .other_options import OTHER_NAMES, WITHOUT_OPTION
from .sources import local_path

DOCS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
# Options whose value is a path: ~ and $VARIABLES mean the same in YAML as in a shell.
PLACES = {"model", "train_data", "eval_data", "output_dir", "reference_cache", "resume_from_checkpoint", "deepspeed"}


def parse_config(arguments: Sequence[str]) -> TrainConfig:
    """Read ``--config FILE`` and ``--option value``; the command line wins. Raises InputError."""
    given = _pairs_of(arguments)
    values: dict[str, Any] = {}
    for name, value in given:
        if name == "config":
            values |= _read_yaml(value)
    for name, value in given:
        if name != "config":
            _put(values, name, value)
    options = {name: _convert(name, value) for name, value in values.items()}
    for name in ("model", "train_data", "output_dir"):
        if not options.get(name):
            raise InputError(f"--{name} is missing; give it on the command line or in the --config file")
    return TrainConfig(**options)


def help_text() -> str:
    """Return this project's options on one screen, and where to find the others."""
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    hints = get_type_hints(TrainConfig, include_extras=True)
    lines = ["python -m training.train --config FILE.yaml [--option value ...]"]
    for field in dataclasses.fields(TrainConfig):
        if field.name in theirs:
            continue
        shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
        default = "" if shown in (None, "") else f" [{shown}]"
        text = f"  --{field.name:<24}{hints[field.name].__metadata__[0]}{default}"
        lines += textwrap.wrap(text, 118, subsequent_indent=" " * 28)
    more = (
        "and each option of transformers.TrainingArguments, such as learning_rate [5e-7; adapter 1e-5], "
        "output_dir, per_device_train_batch_size [32], num_train_epochs [1], max_steps, eval_steps, save_steps, bf16, "
        "optim, resume_from_checkpoint (auto: the newest in output_dir), report_to, deepspeed:"
    )
    return "\n".join([*lines, *textwrap.wrap(more, 118), DOCS])


def _pairs_of(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return (name, value) of each ``--name value`` and ``--name=value``."""
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
    """Set the option, or the field of a section (``lora.r``), to ``text`` read as YAML."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    section, dot, field = name.partition(".")
    if dot:
        old = values.get(section)
        values[section] = {**(old if isinstance(old, dict) else {}), field: value}
    else:  # keep the text unless it is a section, a list or null: 007 and 1e5 may be names
        values[name] = value if isinstance(value, dict | list) or value is None else text


class _Loader(yaml.SafeLoader):
    """Load YAML without duplicate keys or dates. Only true and false are booleans: ``save_strategy: no`` is a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":  # "<<", which the base class handles
                continue
            name = self.construct_object(key, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(name, list | dict):
                raise InputError(f"line {key.start_mark.line + 1}: a key must be a word, not {name}")
            if name in seen:
                raise InputError(f"line {key.start_mark.line + 1}: {name!r} appears twice; keep one of them")
            seen.add(name)
        return super().construct_mapping(node, deep)


_BOOLEAN, _DATE, _INTEGER = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "timestamp", "int"))
_Loader.yaml_implicit_resolvers = {
    letter: [entry for entry in entries if entry[0] not in (_BOOLEAN, _DATE, _INTEGER)]
    for letter, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 reads 1e-7, without a dot, as text.
_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
# It reads 012 as 10 and 20:48 as 1248; here numbers are decimal, and the rest is text.
_Loader.add_implicit_resolver(_INTEGER, re.compile(r"^[-+]?\d+(?:_\d+)*$"), list("-+0123456789"))  # type: ignore[no-untyped-call]
_Loader.add_constructor(_INTEGER, lambda loader, node: int(node.value))  # type: ignore[no-untyped-call]
_Loader.add_implicit_resolver(_BOOLEAN, re.compile("^(?:true|false)$", re.I), list("tTfF"))  # type: ignore[no-untyped-call]


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        content = yaml.load(Path(file).expanduser().read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        raise InputError(f"--config {file}: no such file (working directory: {Path.cwd()})") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # InputError is a ValueError
        raise InputError(f"--config {file}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {file}: must hold lines of the form 'option: value'")
    for name in content:
        _check_name(str(name), f"in {file}: ")
    return content


def _check_name(name: str, where: str) -> None:
    known = _types()
    if name in known:
        return
    if name in WITHOUT_OPTION:
        raise InputError(f"unknown option {where}{name}; {WITHOUT_OPTION[name]}")
    if name in OTHER_NAMES or name.startswith("lora_"):
        field = name if name in ("lora_alpha", "lora_dropout", "lora_bias") else name.removeprefix("lora_")
        right = OTHER_NAMES.get(name, f"lora.{field}")
        raise InputError(f"unknown option {where}{name}; here it is {right}")
    close = nearest(name, [*known, *OTHER_NAMES])
    right = OTHER_NAMES.get(close, close)
    raise InputError(f"unknown option {where}{name}" + (f"; did you mean {right}?" if right else "; see --help"))


@cache
def _types() -> dict[str, TypeAdapter]:
    """Return the converter of each option's value: a number may be a name, and an enum takes only its own words."""
    hints, settings = get_type_hints(TrainConfig), ConfigDict(coerce_numbers_to_str=True)
    types = {}
    for field in dataclasses.fields(TrainConfig):
        if field.init:
            kinds = [kind for kind in get_args(hints[field.name]) if isinstance(kind, EnumType)]
            types[field.name] = TypeAdapter(kinds[0] if kinds else hints[field.name], config=settings)
    return types


def _convert(name: str, value: Any) -> Any:
    """Return ``value`` as the option's type. Raises InputError."""
    if name == "resume_from_checkpoint" and str(value).lower() in ("true", "false"):
        return "auto" if str(value).lower() == "true" else None
    if isinstance(value, str) and name in PLACES:
        value = local_path(value)
    try:
        return _types()[name].validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Input should be ").split(", unable")[0]
        raise InputError(f"{name}={value!r}: must be {problem}") from None
