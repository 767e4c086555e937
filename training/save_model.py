"""The trained model as transformers, or peft, loads it; tried before the first step."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .adapters import has_adapter
from .errors import InputError, SaveError


def save_final(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, state_dict: dict[str, Tensor],
    options: Any, ends: Iterable[int] = (), log: Callable[[str], None] = lambda note: None,
) -> None:  # fmt: skip
    """Write ``model`` with the whole weights ``state_dict``, CPU tensors under its names, into ``folder``.

    Weights are in ``options.save_dtype``; an adapter's folder has the adapter alone, as it is. The token ids ``ends``
    that training ended responses with go into ``generation_config.json``, so that the served model stops there. Raises
    SaveError for whatever goes wrong.
    """
    dtype = None if has_adapter(model) else getattr(options, "save_dtype", None)
    if dtype is not None:
        low = getattr(torch, dtype)
        state_dict = {n: t.to(low) if t.is_floating_point() else t for n, t in state_dict.items()}
    own = model.generation_config
    try:
        # transformers saves no settings of which it would warn, such as a temperature without sampling, once a run has
        # touched them. They are the base's own, and are written as they are.
        model.generation_config = GenerationConfig()
        try:
            model.save_pretrained(folder, state_dict=state_dict)
        finally:
            model.generation_config = own
        if dtype is not None:
            _edit(folder / "config.json", {"dtype": dtype})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        own.to_json_file(folder / "generation_config.json")
        _add_ends(folder / "generation_config.json", set(ends), log)
    except Exception as error:  # the libraries that write fail in any way
        raise SaveError(f"{folder} could not be written: {' '.join(str(error).split()) or repr(error)}") from error


def _add_ends(file: Path, ends: set[int], log: Callable[[str], None]) -> None:
    known = json.loads(file.read_text()).get("eos_token_id")
    known = [] if known is None else [known] if isinstance(known, int) else known
    if added := sorted(ends.difference(known)):
        _edit(file, {"eos_token_id": [*known, *added]})
        log(f"{file.name}: eos_token_id gets {added}, with which the responses of the data end")


def _edit(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2) + "\n")


def check_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: Any) -> None:
    """Try what ``save_final`` will do, but for the weights. Raises InputError for what would fail after training."""
    state: dict[str, Tensor] = {}
    if has_adapter(model):  # whose writer looks each of its tensors up
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if name in trained}
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_final(Path(folder), model, tokenizer, state, options)
        except SaveError as error:
            problem = str(error).removeprefix(f"{folder} could not be written: ")
            raise InputError(f"model: it could not be saved after training: {problem}") from error
