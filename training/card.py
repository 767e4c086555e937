"""The trained model's folder, whole or not there, with its card: what it is, how it was made, what was measured."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

import inspo_kernels as ik

from .adapters import has_adapter
from .checkpoint import on_first_process, whole_folder
from .config import TrainConfig
from .data import trained_ends
from .engine import process_count, whole_weights
from .inputs import Inputs
from .save_model import save_final

# Settings that say nothing about the model.
_LEFT_OUT = {"model", "train_data", "eval_data", "output_dir", "resume_from_checkpoint", "resume_changed", "report_to",
             "save_steps", "save_strategy", "save_total_limit", "reference_cache", "logging_steps", "disable_tqdm",
             "logging_nan_inf_filter", "ddp_timeout", "ddp_find_unused_parameters", "ddp_broadcast_buffers",
             "dry_run"}  # fmt: skip
_PACKAGES = ("torch", "transformers", "accelerate")


def write_model(
    folder: Path, module: nn.Module, inputs: Inputs, config: TrainConfig, *, title: str, step: int, steps: int,
    evaluations: list[dict[str, Any]], log: Callable[[str], None],
) -> None:  # fmt: skip
    """Write the model in ``module``, a PairModel in its engine, after ``step`` of ``steps``, to ``folder``.

    All processes call it, the first one writes. Raises SaveError, in all of them, and leaves what was there before.
    """
    model = inputs.model
    state_dict = {name.removeprefix("model."): tensor for name, tensor in whole_weights(module).items()}

    def write() -> None:
        with whole_folder(folder) as to:
            ends = trained_ends(inputs.train_pairs, inputs.tokenizer)
            save_final(to, model, inputs.tokenizer, state_dict, config, ends=ends, log=log)
            model_card(
                config, title=title, name=f"{folder.parent.name}/{folder.name}", step=step, steps=steps,
                pairs=len(inputs.train_pairs), parameters=sum(p.numel() for p in model.parameters()),
                trained=sum(p.numel() for p in model.parameters() if p.requires_grad), processes=process_count(),
                evaluations=evaluations, library="peft" if has_adapter(model) else "transformers",
            ).save(to / "README.md")  # fmt: skip

    on_first_process(write)


def model_card(
    config: TrainConfig, *, title: str, name: str, step: int, steps: int, pairs: int, parameters: int, trained: int,
    processes: int, evaluations: list[dict[str, Any]], library: str,
) -> ModelCard:  # fmt: skip
    """Describe the model after ``step`` of ``steps``.

    ``evaluations`` are rows of ``metrics.jsonl``, on the same held-out pairs.

    ``name`` is the folder's; ``library`` the one that loads the model ("transformers" or "peft").
    """
    base = config.model if isinstance(config.model, str) else None
    hub_id = base if base and not Path(base).exists() else None
    data = ModelCardData(base_model=hub_id, library_name=library, tags=["preference-optimization", "inspo"])
    built = "a model built on the spot with random weights: " + _inline(config.model)
    method = (
        "Each response of a pair was scored given the other one (InSPO, "
        "[arXiv 2512.23126](https://arxiv.org/abs/2512.23126)); at inference the model sees the prompt alone."
        if config.sees_alternative
        else "Each response was scored given the prompt alone."
    )
    share = "" if trained == parameters else f", {trained:,} of them trained"
    settings = {k: v for k, v in config.settings().items() if k not in _LEFT_OUT and v is not None}
    sections = [
        f"# {name}",
        f"A language model fine-tuned on preference pairs with `{title}`. {method}",
        f"- Base model: {f'`{base}`' if base else built if config.model else 'given in memory'}\n"
        f"- Parameters: {parameters:,}{share}\n"
        f"- Training data: {f'`{config.train_data}`' if config.train_data else 'given in memory'}, {pairs:,} pairs\n"
        f"- Training: {step:,} of {steps:,} steps, {config.pairs_per_step} pairs each, in {processes} "
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
