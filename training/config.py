"""Every option of a run: transformers' ``TrainingArguments``, and what they lack for preference pairs."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from transformers import SchedulerType, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from inspo_kernels.objectives import OBJECTIVES, Objective, make_objective

from .data_options import DataOptions
from .dropout import check_dropout
from .errors import InputError

OBJECTIVE_PARAMETERS = ("beta", "label_smoothing", "tau", "gamma", "alpha", "lam", "sft", "divergence",
                        "divergence_alpha")  # fmt: skip
LEARNING_RATE, ADAPTER_LEARNING_RATE = 5e-7, 1e-5

# Options of TrainingArguments that it sets itself, by others.
_FOLLOWING = {"output_dir", "do_eval", "use_cpu", "gradient_checkpointing", "gradient_checkpointing_kwargs",
              "accelerator_config", "dataloader_pin_memory", "greater_is_better"}  # fmt: skip

# Options of TrainingArguments that would be ignored here, or do harm: why, or what to use instead.
UNSUPPORTED = {
    "label_smoothing_factor": "the objective's own option is label_smoothing",
    "auto_find_batch_size": "max_batch_tokens bounds the memory of a forward pass",
    "neftune_noise_alpha": "policy and reference must be the same function at step 1",
    "use_liger_kernel": "the loss is fused already",
    "fp16": "float16 needs loss scaling; use bf16",
    "fp16_full_eval": "use bf16",
    "bf16_full_eval": "use bf16",
    "torch_compile": "lengths differ from pass to pass",
    "load_best_model_at_end": "keep_best leaves the best model in best/",
    "save_only_model": "a checkpoint without optimizer state cannot be resumed; final/ and best/ hold models alone",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint in any case",
    "ignore_data_skip": "a resumed run goes on with the pairs that follow",
    "eval_on_start": "eval_data is always scored before step 1",
    "per_device_eval_batch_size": "max_batch_tokens bounds the memory of an evaluation, too",
    "dataloader_drop_last": "each epoch has all pairs",
    "train_sampling_strategy": "each epoch is a permutation that follows from seed",
    "parallelism_config": "data parallelism alone is supported: DDP, FSDP2, DeepSpeed",
    "hub_strategy": "push_to_hub uploads final/ at the end",
}


@dataclass
class TrainConfig(DataOptions, TrainingArguments):
    """The options of one run. Relative paths, also those in a YAML file, start at the working directory.

    Raises InputError for values that no run could use.
    """

    objective: Annotated[str, ", ".join(OBJECTIVES)] = "dpo"
    conditioned: Annotated[bool, "score each response given the other one; false: the plain baseline"] = True
    marginal_weight: Annotated[float, "adds this times the same objective given the prompt alone"] = 0.0
    reference_conditioned: Annotated[bool, "condition the reference, too (not the paper's method)"] = False
    alternative_dropout: Annotated[float, "share of pairs, by a coin each epoch, scored plain: 0 none, 1 all"] = 0.0
    beta: Annotated[float | None, "scale of the rewards"] = None
    label_smoothing: Annotated[float | None, "dpo, robust, exo_pair: share of labels assumed to be flipped"] = None
    tau: Annotated[float | None, "ipo: the margin aimed at is 1/(2 tau); discopop: temperature"] = None
    gamma: Annotated[float | None, "simpo: margin aimed at"] = None
    alpha: Annotated[float | None, "rdpo: weight of the length difference"] = None
    lam: Annotated[float | None, "orpo: weight of the odds ratio"] = None
    sft: Annotated[Literal["marginal", "chosen"] | None, "orpo: which log-prob of the chosen response is fitted"] = None
    divergence: Annotated[str | None, "dpo and its relatives: reverse_kl, forward_kl, js or alpha"] = None
    divergence_alpha: Annotated[float | None, "divergence=alpha: its exponent"] = None
    max_batch_tokens: Annotated[int, "most tokens, padding included, in one forward pass of one process"] = 16384
    layout: Annotated[Literal["auto", "tree", "rows"], "auto|tree|rows: tree reads a pair's prompt once"] = "auto"
    keep_best: Annotated[bool, "keep the model that does best on eval_data, from the prompt alone, in best/"] = True
    sample_prompts: Annotated[int, "prompts of eval_data answered at each evaluation, in samples.jsonl"] = 4
    sample_tokens: Annotated[int, "longest of these answers"] = 128
    resume_changed: Annotated[bool, "resume also where settings, model or data are other than the run's"] = False
    reference_cache: Annotated[str | None, "folder for reference log-probs that runs share [output_dir]"] = None
    dry_run: Annotated[bool, "say what the run would be, without loading weights or writing anything"] = False

    # transformers' options with other defaults.
    learning_rate: float | None = None  # type: ignore[assignment]
    per_device_train_batch_size: int = 32
    num_train_epochs: float = 1.0
    max_steps: int = -1
    lr_scheduler_type: SchedulerType | str = "cosine"
    warmup_steps: float = 0.1
    logging_steps: float = 10
    save_total_limit: int | None = 3
    logging_nan_inf_filter: bool = False
    disable_tqdm: bool | None = True
    ddp_find_unused_parameters: bool | None = False
    ddp_broadcast_buffers: bool | None = False  # buffers are constants; each forward would communicate
    ddp_timeout: int = 7200  # the first rank may take long to write a checkpoint to a slow disk

    def __post_init__(self) -> None:
        DataOptions.__post_init__(self)
        writes_nothing = not self.output_dir
        if self.learning_rate is None:
            adapter = self.lora is not None or Path(str(self.model), "adapter_config.json").is_file()
            self.learning_rate = ADAPTER_LEARNING_RATE if adapter else LEARNING_RATE
        if not torch.cuda.is_available():
            self.use_cpu = True  # Apple's GPUs lack float64, which sums and objectives need
        if self.resume_from_checkpoint is True or self.resume_from_checkpoint == "true":
            self.resume_from_checkpoint = "auto"
        if self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"  # type: ignore[assignment]
        if self.activation_checkpointing is None:
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        self._check()
        try:
            TrainingArguments.__post_init__(self)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            raise InputError(" ".join(str(error).split())) from None
        self._check_engine()
        if writes_nothing:
            self.output_dir = ""  # Trainer takes no None, and TrainingArguments has set a folder

    def _check(self) -> None:
        least = {"num_train_epochs": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
                 "max_batch_tokens": 1, "logging_steps": 0, "eval_steps": 0, "save_steps": 0, "save_total_limit": 1,
                 "sample_prompts": 0, "sample_tokens": 1, "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0,
                 "marginal_weight": 0, "warmup_steps": 0}  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise InputError(f"{name}={value}: must be at least {minimum}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise InputError(f"max_steps={self.max_steps}: must be at least 1, or -1 for num_train_epochs to decide")
        defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
        for name, remedy in UNSUPPORTED.items():
            if getattr(self, name) != defaults[name]:
                raise InputError(f"{name} is not supported: {remedy}")
        if self.marginal_weight and not self.conditioned:
            raise InputError("marginal_weight needs conditioned=true: the plain baseline already trains the marginals")
        if self.reference_conditioned and (self.marginal_weight or not self.conditioned):
            raise InputError("reference_conditioned needs conditioned=true and marginal_weight=0")
        objective = self.make_objective()
        if objective.batch_coupled or self.objective == "sft":
            raise InputError(
                f"objective {self.objective!r} compares the pairs of a batch with each other, but a step is split into "
                "passes here; use another one" + (", such as orpo with lam 0" if self.objective == "sft" else "")
            )
        check_dropout(self, objective)
        if not objective.needs_reference and self.reference_conditioned:
            raise InputError(f"reference_conditioned: objective {self.objective!r} has no reference")
        trackers = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        if not self.output_dir and (self.resume_from_checkpoint or self.push_to_hub or set(trackers) - {"none"}):
            raise InputError("resume_from_checkpoint, report_to and push_to_hub need an output_dir")
        for tracker in set(trackers) - {"none", "all"} - set(get_available_reporting_integrations()):
            raise InputError(f"report_to={tracker}: the package is not installed, or unknown; pip install {tracker}")
        if self.attn_implementation == "flex_attention" and not torch.cuda.is_available():
            raise InputError("attn_implementation=flex_attention needs a GPU; use sdpa or eager")

    def _check_engine(self) -> None:
        if self.mixed_precision not in ("no", "bf16") or (self.mixed_precision == "bf16") != self.bf16:
            raise InputError(
                f"the launcher's configuration has mixed_precision={self.mixed_precision}, but bf16={self.bf16}; set "
                "it to 'no' there, and choose bf16 and dtype in the training configuration"
            )
        if self.sharded and self.use_cpu:
            raise InputError("FSDP needs GPUs: accelerate ignores it on a CPU; launch with ddp_8gpu.yaml there")
        if self.sharded:
            for name, right in (("FSDP_VERSION", "2"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")):
                if (given := os.environ.get(name, right)).lower() != right:
                    raise InputError(f"accelerate's configuration has {name.lower()}={given}; set it to {right}")
        if self.deepspeed and self.hf_deepspeed_config.is_zero3():
            raise InputError(
                "deepspeed: stage 3 takes the output head apart, which the loss reads as a whole; use stage 2, or "
                "FSDP2 (training/configs/accelerate/fsdp2_8gpu.yaml)"
            )

    @property
    def sharded(self) -> bool:
        """Whether this run's engine is FSDP."""
        return self.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"

    @property
    def folder(self) -> Path | None:
        """``output_dir``, or None for a run that writes nothing."""
        return Path(self.output_dir) if self.output_dir else None

    @property
    def should_save(self) -> bool:
        """Whether this process writes."""
        return bool(self.output_dir) and super().should_save

    @property
    def n_gpu(self) -> int:
        """At most one GPU a process: several are for ``accelerate launch``."""
        return min(1, super().n_gpu)

    def make_objective(self) -> Objective:
        """Return the objective with its parameters. Plain ORPO fits the chosen response: it has no marginals."""
        given = {name: getattr(self, name) for name in OBJECTIVE_PARAMETERS if getattr(self, name) is not None}
        if self.objective == "orpo" and not self.conditioned and given.setdefault("sft", "chosen") == "marginal":
            raise InputError('sft="marginal" needs conditioned=true; the plain baseline has sft="chosen"')
        try:
            return make_objective(self.objective, **given)
        except ValueError as error:
            raise InputError(str(error)) from None

    @property
    def sees_alternative(self) -> bool:
        """Whether some response is scored given the other one: conditioned, and not always dropped."""
        return self.conditioned and self.alternative_dropout < 1

    @property
    def reference_sees_alternative(self) -> bool:
        """Whether the reference of conditioned pairs is conditioned, too."""
        return self.reference_conditioned and self.sees_alternative

    @property
    def title(self) -> str:
        """The objective, and what each response is scored given."""
        layout = "each response given the other one" if self.sees_alternative else "plain"
        if 0 < self.alternative_dropout < 1:
            layout += f", {self.alternative_dropout:.0%} of the pairs plain"
        return f"{self.make_objective()}, {layout}"

    @property
    def pairs_per_micro_step(self) -> int:
        """Pairs of all processes between two gradient accumulations."""
        return self.per_device_train_batch_size * self.world_size

    @property
    def pairs_per_step(self) -> int:
        return self.pairs_per_micro_step * self.gradient_accumulation_steps

    def steps_per_epoch(self, pairs: int) -> int:
        """Optimizer steps that an epoch of so many pairs takes; the last one may have fewer pairs."""
        return math.ceil(pairs / self.pairs_per_step)

    def total_steps(self, pairs: int) -> int:
        """Optimizer steps of a run on so many pairs."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * self.steps_per_epoch(pairs))

    def settings(self) -> dict[str, Any]:
        """Every option of this project, and those of transformers that differ from transformers' defaults."""
        theirs = {field.name: _plain(field.default) for field in dataclasses.fields(TrainingArguments)}
        own = {*TrainConfig.__annotations__, *DataOptions.__annotations__}
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = _plain(getattr(self, field.name))
            if field.name not in own and field.name in theirs:
                default = theirs[field.name]
                unset = value == default or (default in (None, "", "none", dataclasses.MISSING) and not value)
                if unset or field.name in _FOLLOWING:
                    continue
            found[field.name] = value
        return {"output_dir": self.output_dir or None} | found

    def to_yaml(self) -> str:
        """A file that ``--config`` reads back."""
        return yaml.safe_dump(self.settings(), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """``value`` as types that YAML and JSON have."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(part) for name, part in vars(value).items()}
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
