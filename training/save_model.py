"""Save the trained model as transformers or peft loads it, with its card."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import inspo_kernels as ik

from .adapters import has_adapter
from .checkpoint import may_change
from .config import TrainConfig
from .engine import process_count
from .errors import Log, SaveError, as_input_error, one_line
from .inputs import Inputs
from .model import size_text


def save_final(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    state_dict: dict[str, Tensor],
    options: Any,
    ends: Iterable[int] = (),
    log: Log = lambda note: None,
) -> None:
    """Write ``model`` with the whole weights ``state_dict``, CPU tensors under its names, into ``folder``.

    Weights are converted to ``options.save_dtype``; an adapter is saved alone and as it is. The token ids ``ends``
    ended responses in training. They are added to ``generation_config.json``, so that the served model stops there.
    Raises SaveError for any failure; its message is the cause alone.
    """
    dtype = None if has_adapter(model) else getattr(options, "save_dtype", None)
    if dtype is not None:
        low = getattr(torch, dtype)
        state_dict = {n: t.to(low) if t.is_floating_point() else t for n, t in state_dict.items()}
    own = model.generation_config
    try:
        # transformers refuses to save settings of which it would warn, such as a temperature without sampling. They are
        # the base model's own, and are written unchanged.
        model.generation_config = GenerationConfig()
        try:
            model.save_pretrained(folder, state_dict=state_dict)
        finally:
            model.generation_config = own
        if dtype is not None:
            _edit(folder / "config.json", {"dtype": dtype})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        file = folder / "generation_config.json"
        own.to_json_file(file)
        known = json.loads(file.read_text()).get("eos_token_id")
        known = [] if known is None else [known] if isinstance(known, int) else known
        if added := sorted(set(ends).difference(known)):
            _edit(file, {"eos_token_id": [*known, *added]})
            log(f"{file.name}: eos_token_id gets {added}, with which the responses of the data end")
    except Exception as error:  # the libraries raise errors of many classes
        raise SaveError(one_line(error)) from error


def _edit(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2) + "\n")


def check_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: Any) -> None:
    """Try ``save_final`` without weights. Raises InputError for anything that would fail after training."""
    state: dict[str, Tensor] = {}
    if has_adapter(model):  # peft looks up each tensor of the adapter
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if name in trained}
    with tempfile.TemporaryDirectory() as folder, as_input_error("model: it could not be saved after training: "):
        save_final(Path(folder), model, tokenizer, state, options)


def model_card(
    config: TrainConfig, inputs: Inputs, name: str, step: int, steps: int, evaluations: list[dict[str, Any]]
) -> ModelCard:
    """Describe the model ``name`` after ``step`` of ``steps``: settings, data and ``evaluations`` (metrics rows)."""
    base = config.model if isinstance(config.model, str) else None
    library = "peft" if has_adapter(inputs.model) else "transformers"
    data = ModelCardData(
        base_model=base if base and not Path(base).exists() else None,
        library_name=library,
        tags=["preference-optimization", "inspo"],
    )
    method = (
        "Each response of a pair was scored given the other response (InSPO, "
        "[arXiv 2512.23126](https://arxiv.org/abs/2512.23126)); at inference the model sees the prompt alone."
        if config.sees_alternative
        else "Each response was scored given the prompt alone."
    )
    built = f"a model built on the spot with random weights: {config.model}"
    kept = {k: v for k, v in config.settings().items() if not may_change(k) and k != "model" and v is not None}
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "accelerate"))
    auto = "peft.AutoPeftModelForCausalLM" if library == "peft" else "transformers.AutoModelForCausalLM"
    return ModelCard(f"""---
{data.to_yaml()}
---

# {name}

A language model fine-tuned on preference pairs with `{config.make_objective()}`. {method}

- Base model: {built if isinstance(config.model, dict) else _quoted(config.model)}
- Size: {size_text(inputs.model)}
- Training data: {_quoted(config.train_data)}, {len(inputs.train_pairs):,} pairs
- Training: {step:,} of {steps:,} steps, {config.pairs_per_step} pairs each; number of processes: {process_count()}

## Results

{_results(evaluations, step, config)}

## Use

```bash
python -m training.generate --model FOLDER --prompt "..."
```

The prompt is text in the form of the training data. `{auto}.from_pretrained` loads the folder, too.

## Settings

```yaml
{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).strip()}
```

Made with inspo_kernels {ik.__version__}, {versions}, Python {platform.python_version()}.
""")


def _quoted(given: Any) -> str:
    return f"`{given}`" if given else "given in memory"


def _results(evaluations: list[dict[str, Any]], step: int, config: TrainConfig) -> str:
    if not evaluations:
        return "The model was not evaluated: the run had no held-out pairs."
    first, last = evaluations[0], next(row for row in reversed(evaluations) if row["step"] <= step)
    then = f"after step {first['step']}" if first["step"] else "before training"
    lines = [f"| held-out pairs, 95% intervals | {then} | this model |", "|---|---|---|"]
    for layout, what in (("marginal", "from the prompt alone"), ("conditioned", "given the other response")):
        for metric, label in (("accuracies", "reward accuracy"), ("margins", "reward margin")):
            key = f"eval_{layout}/rewards/{metric}"
            lines.append(f"| {label}, {what} | {_measured(first, key)} | {_measured(last, key)} |")
    lines.append(f"| loss | {first['eval_loss']:.4f} | {last['eval_loss']:.4f} |")
    return (
        f"After step {last['step']}, on held-out pairs{f' of `{config.eval_data}`' if config.eval_data else ''}. The "
        "model is used from the prompt alone. These\nnumbers say how it ranks the two responses of a pair, not how "
        "good its own answers are.\n\n" + "\n".join(lines)
    )


def _measured(row: dict[str, Any], key: str) -> str:
    interval = row.get(f"{key}_ci")
    return f"{row[key]:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
