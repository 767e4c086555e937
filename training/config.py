"""Every option of ``python -m training.train``: one dataclass, read from YAML and the command line."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from inspo_kernels.objectives import OBJECTIVES, Objective, make_objective

OBJECTIVE_PARAMETERS = ("beta", "label_smoothing", "tau", "gamma", "alpha", "lam", "sft")


class InputError(ValueError):
    """Bad input from the user: the message names the file, line or option and says what to change."""


class NotAtHandError(InputError):
    """A tokenizer or data that could not be read from where they are said to be, as the hub without a network."""


class Section(str):
    """Heading in ``--help``, put above the option that carries it."""


@dataclass
class LoraOptions:
    """An adapter that is trained in place of the weights. It has no dropout: policy and reference must be alike."""

    r: int = 16
    alpha: float = 32.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1 or not self.alpha > 0 or not self.target_modules:
            raise InputError(f"lora: r={self.r} and alpha={self.alpha} must be above 0, and target_modules not empty")


@dataclass
class TrainConfig:
    """Options of a training run. Relative paths, also those in a YAML file, are relative to the working directory."""

    model: Annotated[
        str | dict[str, Any], "hub id, local folder, or a section of LlamaConfig fields", Section("Model and data")
    ] = ""
    attn_implementation: Annotated[str | None, "of transformers: sdpa, eager, flash_attention_2, ..."] = None
    lora: Annotated[
        LoraOptions | None, "section r [16], alpha [32], target_modules [all-linear]: train an adapter alone"
    ] = None
    train_data: Annotated[str | None, "local .jsonl, or hub dataset NAME[:SPLIT]: prompt, chosen, rejected"] = None
    eval_data: Annotated[str | None, "held-out pairs, same formats; keep its prompts out of train_data"] = None
    output_dir: Annotated[str | None, "folder for everything a run writes"] = None
    max_length: Annotated[int, "most tokens of prompt + chosen + rejected together"] = 2048
    truncation: Annotated[
        Literal["error", "prompt_left", "drop"], "error|prompt_left|drop: what happens to a longer pair"
    ] = "error"
    invalid_pairs: Annotated[
        Literal["drop", "error"], "drop|error: what happens to a pair with empty or identical responses"
    ] = "drop"

    alternative: Annotated[
        Literal["plain", "chat"], "plain|chat: the other response stands right before, or with a turn between"
    ] = "plain"
    alternative_instruction: Annotated[str, "alternative=chat: what the user says in that turn"] = (
        "Please give a better answer."
    )
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, "section of the chat template's switches, e.g. enable_thinking"
    ] = None

    objective: Annotated[
        str, ", ".join(OBJECTIVES), Section("Objective (a parameter left out has the objective's default)")
    ] = "dpo"
    conditioned: Annotated[bool, "score each response given the other one; false: the plain twin"] = True
    marginal_weight: Annotated[float, "adds this times the same objective given the prompt alone"] = 0.0
    reference_conditioned: Annotated[bool, "condition the reference, too (not the paper's method)"] = False
    beta: Annotated[float | None, "dpo, one_sided, simpo, rdpo, hinge: scale of the rewards"] = None
    label_smoothing: Annotated[float | None, "dpo: share of labels assumed to be flipped"] = None
    tau: Annotated[float | None, "ipo: regularisation; the margin aimed at is 1/(2 tau)"] = None
    gamma: Annotated[float | None, "simpo: margin aimed at"] = None
    alpha: Annotated[float | None, "rdpo: weight of the length difference"] = None
    lam: Annotated[float | None, "orpo: weight of the odds ratio"] = None
    sft: Annotated[
        Literal["marginal", "chosen"] | None, "orpo: log-prob of the chosen response that is fitted, marginal|chosen"
    ] = None

    num_epochs: Annotated[int, "passes over train_data", Section("Optimisation")] = 1
    max_steps: Annotated[int | None, "optimizer steps; overrides num_epochs"] = None
    batch_size: Annotated[int, "pairs in one optimizer step, over all processes"] = 32
    max_batch_tokens: Annotated[int, "most tokens, padding included, in one forward pass of one process"] = 16384
    layout: Annotated[
        Literal["auto", "tree", "rows"], "auto|tree|rows: tree reads a pair's prompt once; auto: where the model can"
    ] = "auto"
    learning_rate: Annotated[float, "peak learning rate of AdamW"] = 5e-7
    lr_scheduler: Annotated[
        Literal["cosine", "linear", "constant"], "cosine|linear|constant: shape after the warm-up"
    ] = "cosine"
    warmup: Annotated[float, "steps of linear warm-up, as a share of all steps"] = 0.1
    weight_decay: Annotated[float, "decoupled weight decay"] = 0.0
    max_grad_norm: Annotated[float, "gradients are clipped to this norm"] = 1.0
    param_dtype: Annotated[
        Literal["float32", "bfloat16"], "float32|bfloat16: parameters, gradients and AdamW's state"
    ] = "float32"
    mixed_precision: Annotated[Literal["no", "bf16"], "no|bf16: products in bfloat16, whatever param_dtype"] = "no"
    gradient_checkpointing: Annotated[bool, "keep one activation a layer, compute the others again"] = False
    seed: Annotated[int, "of the order of the pairs and of a model built here"] = 0

    log_every: Annotated[int, "steps between logged lines", Section("Run")] = 10
    eval_every: Annotated[int | None, "steps between evaluations; always before step 1 and at the end"] = None
    save_every: Annotated[int | None, "steps between checkpoints"] = None
    save_total: Annotated[int, "newest checkpoints that are kept; older ones are deleted"] = 3
    keep_best: Annotated[bool, "keep the model that does best on eval_data, from the prompt alone, in best/"] = True
    sample_prompts: Annotated[int, "prompts of eval_data answered at each evaluation, in samples.jsonl"] = 4
    sample_tokens: Annotated[int, "longest of these answers"] = 128
    resume: Annotated[str | None, "'auto' (newest checkpoint in output_dir, if any) or a checkpoint folder"] = None
    resume_changed: Annotated[bool, "resume also where settings, model or data are other than the run's"] = False
    report_to: Annotated[
        Literal["tensorboard", "wandb", "trackio"] | None, "tensorboard|wandb|trackio: shows metrics.jsonl, too"
    ] = None
    reference_cache: Annotated[str | None, "folder for reference log-probs that runs share; default output_dir"] = None
    dry_run: Annotated[bool, "say what the run would be, without loading weights or writing anything"] = False

    def __post_init__(self) -> None:
        """Raises InputError for values that no run could use; types are checked where the options are read."""
        if isinstance(self.lora, dict):
            self.lora = LoraOptions(**self.lora)
        least = {"max_length": 3, "num_epochs": 1, "max_steps": 1, "batch_size": 1,
                 "max_batch_tokens": 1, "log_every": 1, "eval_every": 1, "save_every": 1, "save_total": 1,
                 "sample_prompts": 0, "sample_tokens": 1, "seed": 0,
                 "learning_rate": 0, "weight_decay": 0, "marginal_weight": 0, "warmup": 0}  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise InputError(f"{name}={value}: must be at least {minimum}")
        if not self.max_grad_norm > 0:
            raise InputError(f"max_grad_norm={self.max_grad_norm}: must be above 0")
        if self.warmup >= 1:
            raise InputError(f"warmup={self.warmup}: is a share of all steps, below 1")
        if self.marginal_weight and not self.conditioned:
            raise InputError("marginal_weight needs conditioned=true: the plain twin already trains the marginals")
        if self.reference_conditioned and (self.marginal_weight or not self.conditioned):
            raise InputError("reference_conditioned needs conditioned=true and marginal_weight=0")
        if self.output_dir is None and (self.save_every or self.resume or self.report_to):
            raise InputError("save_every, resume and report_to need an output_dir")
        if not self.make_objective().needs_reference and self.reference_conditioned:
            raise InputError(f"reference_conditioned: objective {self.objective!r} has no reference")

    @property
    def folder(self) -> Path | None:
        """``output_dir``."""
        return Path(self.output_dir) if self.output_dir else None

    def make_objective(self) -> Objective:
        """The objective with its parameters. The plain twin of ORPO fits the chosen response: it has no marginals."""
        given = {name: getattr(self, name) for name in OBJECTIVE_PARAMETERS if getattr(self, name) is not None}
        if self.objective == "orpo" and not self.conditioned and given.setdefault("sft", "chosen") == "marginal":
            raise InputError('sft="marginal" needs conditioned=true; the plain twin has sft="chosen"')
        try:
            return make_objective(self.objective, **given)
        except ValueError as error:
            raise InputError(str(error)) from None

    @property
    def title(self) -> str:
        """The objective, and what each response is scored given."""
        return f"{self.make_objective()}, {'each response given the other one' if self.conditioned else 'plain'}"

    def steps_per_epoch(self, pairs: int) -> int:
        return math.ceil(pairs / self.batch_size)

    def total_steps(self, pairs: int) -> int:
        """Of a run on so many pairs."""
        return self.max_steps or self.num_epochs * self.steps_per_epoch(pairs)

    def to_yaml(self) -> str:
        """A file that ``--config`` reads back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def parse_config(arguments: Sequence[str]) -> TrainConfig:
    """Reads ``--config FILE`` and ``--option value`` (which wins). Raises InputError."""
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    words = [word for argument in arguments for word in argument.split("=", 1)]
    check_names((w[2:].split(".")[0] for w in words if w.startswith("--")), [*names, "config"], "--")
    for flag, value in itertools.pairwise(words):
        if flag == "--config":
            check_names(_read_yaml(value), names, f"in {value}: ")
    parser = ArgumentParser(prog="training.train", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainConfig)
    try:
        options = parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise InputError(" ".join(str(error).split()).replace("Parser key", "option")) from None
    options.pop("config")
    config = TrainConfig(**options.as_dict())
    for name in ("model", "train_data", "output_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is missing; give it on the command line or in the --config file")
    return config


def check_names(names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raises InputError for the first name that is not known, with the nearest one."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            raise InputError(f"unknown option {where}{name}{hint}")


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config {file}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {file}: must hold lines of the form 'option: value'")
    return content


def help_text() -> str:
    """One line per option, with its default, on one screen."""
    lines = ["python -m training.train --config FILE.yaml [--option value ...]"]
    lines.append("Relative paths, also those in FILE.yaml, start at the working directory.")
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    for name, hint in get_type_hints(TrainConfig, include_extras=True).items():
        described, *section = hint.__metadata__
        default = str(defaults[name]).lower() if isinstance(defaults[name], bool) else defaults[name]
        default = "" if default in (None, "") else f" [{default}]"
        lines += [*section, f"  --{name:<28}{described}{default}"]
    return "\n".join(lines)
