"""Define every option of a run: transformers' ``TrainingArguments``, plus the options for preference pairs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from transformers import SchedulerType, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.integration_utils import get_available_reporting_integrations

from inspo_kernels.layouts.alternative_dropout import checked_dropout
from inspo_kernels.objectives import OBJECTIVES, Objective, make_objective

from .data_options import DataOptions
from .errors import InputError, as_input_error
from .other_options import UNSUPPORTED, UNSUPPORTED_VALUES

OBJECTIVE_PARAMETERS = {field.name for kind in OBJECTIVES.values() for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
LEARNING_RATE, ADAPTER_LEARNING_RATE = 5e-7, 1e-5
AT_LEAST = {
    0: "num_train_epochs logging_steps eval_steps save_steps sample_prompts learning_rate weight_decay max_grad_norm "
    "marginal_weight warmup_steps",
    1: "per_device_train_batch_size gradient_accumulation_steps max_batch_tokens save_total_limit sample_tokens",
}

# Options of TrainingArguments that follow from other options.
_FOLLOWING = (
    "output_dir do_eval use_cpu gradient_checkpointing gradient_checkpointing_kwargs accelerator_config "
    "dataloader_pin_memory greater_is_better hub_token"
).split()


@dataclass
class TrainConfig(DataOptions, TrainingArguments):
    """The options of one run. Relative paths, in a YAML file too, are relative to the working directory.

    Raises InputError for values that no run could use.
    """

    objective: Annotated[str, ", ".join(OBJECTIVES)] = "dpo"
    conditioned: Annotated[bool, "score each response given the other; false: the plain baseline"] = True
    marginal_weight: Annotated[float, "weight of the same objective given the prompt alone, in the loss"] = 0.0
    reference_conditioned: Annotated[bool, "also condition the reference (not the paper's method)"] = False
    alternative_dropout: Annotated[float, "probability that a pair loses the other response, in each epoch"] = 0.0
    beta: Annotated[float | None, "scale of the rewards"] = None
    label_smoothing: Annotated[float | None, "dpo, robust, exo_pair: assumed share of flipped labels"] = None
    tau: Annotated[float | None, "ipo: the target margin is 1/(2 tau); discopop: temperature"] = None
    gamma: Annotated[float | None, "simpo: target margin"] = None
    alpha: Annotated[float | None, "rdpo: weight of the length difference"] = None
    lam: Annotated[float | None, "orpo: weight of the odds ratio"] = None
    sft: Annotated[Literal["marginal", "chosen"] | None, "marginal|chosen: the log-prob that orpo and sft fit"] = None
    divergence: Annotated[str | None, "dpo and its relatives: reverse_kl, forward_kl, js or alpha"] = None
    divergence_alpha: Annotated[float | None, "divergence=alpha: its exponent"] = None
    max_batch_tokens: Annotated[int, "maximum tokens, with padding, in a process's forward pass"] = 16384
    layout: Annotated[Literal["auto", "tree", "rows"], "auto|tree|rows: tree reads a pair's prompt once"] = "auto"
    keep_best: Annotated[bool, "save the model with the best prompt-only accuracy to best/"] = True
    sample_prompts: Annotated[int, "prompts of eval_data answered at each evaluation, in samples.jsonl"] = 4
    sample_tokens: Annotated[int, "maximum tokens of these answers"] = 128
    resume_changed: Annotated[bool, "resume even if settings, model or data have changed"] = False
    reference_cache: Annotated[str | None, "folder for reference log-probs that runs share [output_dir]"] = None
    dry_run: Annotated[bool, "print what the run would do, without loading weights or writing anything"] = False

    # Options of transformers with different defaults.
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
        if self.resume_from_checkpoint is True:
            self.resume_from_checkpoint = "auto"
        if self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"  # type: ignore[assignment]
        if self.activation_checkpointing is None:
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        self._check()
        with as_input_error(""):  # a missing package, for example
            TrainingArguments.__post_init__(self)
        self._check_engine()
        if writes_nothing:
            self.output_dir = ""  # TrainingArguments has set a folder, and Trainer does not accept None

    def _check(self) -> None:
        for minimum, names in AT_LEAST.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not value >= minimum:
                    raise InputError(f"{name}={value}: must be at least {minimum}")
                if value == math.inf and name != "max_grad_norm":
                    raise InputError(f"{name}={value}: must be finite")
        if self.max_steps == 0 or self.max_steps < -1:
            raise InputError(f"max_steps={self.max_steps}: must be at least 1, or -1 to use num_train_epochs")
        if self.max_steps < 1 and not self.num_train_epochs:
            raise InputError("num_train_epochs=0: must be above 0; --dry_run true checks a run without training")
        if not self.save_steps and self.save_strategy == "steps":
            raise InputError("save_steps=0: must be above 0; save_strategy=no writes no checkpoints")
        for name, part, reason in UNSUPPORTED_VALUES:
            given = getattr(self, name)
            if part in (value := str(getattr(given, "value", given))):
                raise InputError(f"{name}={value} is not supported: {reason}")
        defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
        for name, remedy in UNSUPPORTED.items():
            value, default = getattr(self, name), defaults[name]
            unset = not value and default in (None, False, 0, "", "no")  # "no" may be written as false, "" as []
            if value != default and not unset:
                raise InputError(f"{name} is not supported: {remedy}")
        if self.marginal_weight and not self.conditioned:
            raise InputError("marginal_weight needs conditioned=true: the plain baseline already trains the marginals")
        if self.reference_conditioned and (self.marginal_weight or not self.conditioned):
            raise InputError("reference_conditioned needs conditioned=true and marginal_weight=0")
        objective = self.make_objective()
        self._check_dropout(objective)
        if not objective.needs_reference and self.reference_conditioned:
            raise InputError(f"reference_conditioned: objective {self.objective!r} has no reference")
        self._check_deepspeed()
        trackers = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        if not self.output_dir and (self.resume_from_checkpoint or self.push_to_hub or set(trackers) - {"none"}):
            raise InputError("resume_from_checkpoint, report_to and push_to_hub need an output_dir")
        for tracker in set(trackers) - {"none", "all"} - set(get_available_reporting_integrations()):
            raise InputError(f"report_to={tracker}: unknown, or the package is missing; try pip install {tracker}")

    def _check_dropout(self, objective: Objective) -> None:
        with as_input_error(""):
            dropout = checked_dropout(self.alternative_dropout)
        if dropout and not self.conditioned:
            raise InputError("alternative_dropout needs conditioned=true: the plain baseline has nothing to drop")
        if dropout and (self.marginal_weight or objective.needs_marginals):
            raise InputError(
                "alternative_dropout needs marginal_weight=0, and sft=chosen for orpo and sft: the loss would need "
                "conditioned log-probs beside those given the prompt alone, and a dropped pair has none"
            )

    def _check_deepspeed(self) -> None:
        settings: Any = self.deepspeed or {}
        if isinstance(settings, str):
            with as_input_error(f"deepspeed={self.deepspeed}: "):
                settings = json.loads(Path(settings).read_text())
        for name, options in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type and warmup_steps")):
            if name in settings:
                raise InputError(f"deepspeed: remove {name!r} from the settings file, and set {options} instead")

    def _check_engine(self) -> None:
        if self.couples_pairs and (self.world_size > 1 or self.gradient_accumulation_steps > 1):
            raise InputError(
                f"objective {self.objective!r} couples a step's pairs: use one process, gradient_accumulation_steps=1"
            )
        if self.mixed_precision not in ("no", "bf16") or (self.mixed_precision == "bf16") != self.bf16:
            raise InputError(
                f"the launcher has mixed_precision={self.mixed_precision}, but bf16={self.bf16}; set 'no' there"
            )
        if self.sharded and self.use_cpu:
            raise InputError("FSDP needs GPUs: accelerate ignores it on a CPU; use ddp_8gpu.yaml on CPUs")
        if self.sharded:
            for name, right in (("FSDP_VERSION", "2"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")):
                if (given := os.environ.get(name, right)).lower() != right:
                    raise InputError(f"accelerate's configuration has {name.lower()}={given}; set it to {right}")
        if self.deepspeed:
            # Otherwise transformers would shard the weights on loading, before head and reference are checked.
            unset_hf_deepspeed_config()

    @property
    def sharded(self) -> bool:
        """Return whether this run's engine is FSDP."""
        return self.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"

    @property
    def folder(self) -> Path | None:
        """Return ``output_dir``, or None for a run that writes nothing."""
        return Path(self.output_dir) if self.output_dir else None

    @property
    def should_save(self) -> bool:
        """Return whether this process writes files."""
        return bool(self.output_dir) and super().should_save

    @property
    def n_gpu(self) -> int:
        """Return at most one GPU per process: use ``accelerate launch`` for several GPUs."""
        return min(1, super().n_gpu)

    @property
    def couples_pairs(self) -> bool:
        """Return whether a pair's loss depends on the step's other pairs, which then share one forward pass."""
        return self.make_objective().batch_coupled or self.objective == "sft"

    def make_objective(self) -> Objective:
        """Return the objective with its parameters. Plain pairs have no marginals, so ORPO and SFT fit ``chosen``."""
        given = {name: getattr(self, name) for name in OBJECTIVE_PARAMETERS if getattr(self, name) is not None}
        if self.objective in ("orpo", "sft"):
            given.setdefault("sft", "marginal" if self.conditioned else "chosen")
            if given["sft"] == "marginal" and not self.conditioned:
                raise InputError('sft="marginal" needs conditioned=true; use sft="chosen" for the plain baseline')
        with as_input_error(""):
            return make_objective(self.objective, **given)

    @property
    def sees_alternative(self) -> bool:
        """Return whether any response is scored given the other response: conditioned, not always dropped."""
        return self.conditioned and self.alternative_dropout < 1

    @property
    def reference_sees_alternative(self) -> bool:
        """Return whether the reference of conditioned pairs is also conditioned."""
        return self.reference_conditioned and self.sees_alternative

    @property
    def title(self) -> str:
        """Return the objective and the context in which each response is scored."""
        layout = "each response given the other" if self.sees_alternative else "plain"
        if 0 < self.alternative_dropout < 1:
            layout += f", {self.alternative_dropout:.0%} of the pairs plain"
        return f"{self.make_objective()}, {layout}"

    @property
    def pairs_per_micro_step(self) -> int:
        """Return the pairs of one micro-step, over all processes."""
        return self.per_device_train_batch_size * self.world_size

    @property
    def pairs_per_step(self) -> int:
        return self.pairs_per_micro_step * self.gradient_accumulation_steps

    def steps_per_epoch(self, pairs: int) -> int:
        """Return the optimizer steps of an epoch of ``pairs`` pairs; the last step may have fewer pairs."""
        return math.ceil(pairs / self.pairs_per_step)

    def total_steps(self, pairs: int) -> int:
        """Return the optimizer steps of a run on ``pairs`` pairs."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * self.steps_per_epoch(pairs))

    def settings(self) -> dict[str, Any]:
        """Return all options of this project, and the options of transformers that differ from its defaults."""
        theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
        own = {*TrainConfig.__annotations__, *DataOptions.__annotations__}
        found: dict[str, Any] = {"output_dir": self.output_dir or None}
        for name, value in self.to_dict().items():
            default = theirs.get(name)
            unset = value == default or (default in (None, "", "none", dataclasses.MISSING) and not value)
            if name in own or not (unset or name in _FOLLOWING):
                found[name] = value
        return found

    def to_yaml(self) -> str:
        """Return the settings as YAML that ``--config`` reads."""
        return yaml.safe_dump(self.settings(), sort_keys=False, allow_unicode=True)
