"""The model card that goes with a trained model: what it is, how it was made, and what was measured. Nothing else."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import inspo_kernels as ik

from .config import TrainConfig

# Settings that say nothing about the model.
_LEFT_OUT = {"model", "train_data", "eval_data", "output_dir", "resume", "resume_changed", "report_to", "save_every",
             "save_total", "reference_cache", "log_every"}  # fmt: skip
_PACKAGES = ("torch", "transformers", "accelerate")


def model_card(
    config: TrainConfig, *, title: str, name: str, step: int, steps: int, pairs: int, parameters: int, trained: int,
    processes: int, evaluations: list[dict[str, Any]], library: str,
) -> ModelCard:  # fmt: skip
    """Of the model after ``step`` of ``steps``. ``evaluations``: rows of ``metrics.jsonl``, on the same held-out pairs.

    ``name`` is the folder's; ``library`` the one that loads the model ("transformers" or "peft").
    """
    base = config.model if isinstance(config.model, str) else None
    hub_id = base if base and not Path(base).exists() else None
    data = ModelCardData(base_model=hub_id, library_name=library, tags=["preference-optimization", "inspo"])
    built = "a model built on the spot with random weights: " + _inline(config.model)
    method = (
        "Each response of a pair was scored given the other one (InSPO, "
        "[arXiv 2512.23126](https://arxiv.org/abs/2512.23126)); at inference the model sees the prompt alone."
        if config.conditioned
        else "Each response was scored given the prompt alone."
    )
    share = "" if trained == parameters else f", {trained:,} of them trained"
    settings = {k: v for k, v in asdict(config).items() if k not in _LEFT_OUT and v is not None}
    sections = [
        f"# {name}",
        f"A language model fine-tuned on preference pairs with `{title}`. {method}",
        f"- Base model: {f'`{base}`' if base else built if config.model else 'given in memory'}\n"
        f"- Parameters: {parameters:,}{share}\n"
        f"- Training data: {f'`{config.train_data}`' if config.train_data else 'given in memory'}, {pairs:,} pairs\n"
        f"- Training: {step:,} of {steps:,} steps, {config.batch_size} pairs each, in {processes} "
        f"process{'es' if processes > 1 else ''}",
        _results(evaluations, step, config),
        "## Use\n\n```bash\n"
        f'python -m training.generate --model {name} --prompt "..."\n```\n\n'
        "The prompt is text in the form of the training data. "
        + (
            "The folder holds an adapter; `peft.AutoPeftModelForCausalLM.from_pretrained` loads it on its base model."
            if library == "peft"
            else "`transformers.AutoModelForCausalLM.from_pretrained` loads the folder, too."
        ),
        "## Settings\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {_cell(v)} |" for k, v in settings.items()),
        "Made with "
        + ", ".join([f"inspo_kernels {ik.__version__}", *(f"{package} {version(package)}" for package in _PACKAGES)])
        + f", Python {platform.python_version()}.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _results(evaluations: list[dict[str, Any]], step: int, config: TrainConfig) -> str:
    heading = "## Results\n\n"
    if not evaluations:
        return heading + "The model was not evaluated: the run had no held-out pairs."
    first, last = evaluations[0], next(row for row in reversed(evaluations) if row["step"] <= step)
    source = f" of `{config.eval_data}`" if config.eval_data else ""
    then = f"after step {first['step']}" if first["step"] else "before training"
    lines = [f"| held-out pairs, 95% intervals | {then} | this model |", "|---|---|---|"]
    for layout, what in (("marginal", "from the prompt alone"), ("conditioned", "given the other response")):
        for metric, label in (("accuracies", "reward accuracy"), ("margins", "reward margin")):
            key = f"eval_{layout}/rewards/{metric}"
            lines.append(f"| {label}, {what} | {_measured(first, key)} | {_measured(last, key)} |")
    lines.append(f"| loss | {first['eval_loss']:.4f} | {last['eval_loss']:.4f} |")
    return (
        heading
        + f"After step {last['step']}, on held-out pairs{source}. The model is used from the prompt alone. These\n"
        "numbers say how it ranks the two responses of a pair, not how good its own answers are.\n\n" + "\n".join(lines)
    )


def _measured(row: dict[str, Any], key: str) -> str:
    interval = row.get(f"{key}_ci")
    return f"{row[key]:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _inline(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _cell(value: Any) -> str:
    return _inline(value).replace("|", "\\|")
